// The products of panels.h, compiled once. See kernels/packed.
#include "panels.h"

namespace axpo {
namespace {

// Eight rows fill the registers of AVX-512; two those of older processors.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && __GNUC__ >= 12
__attribute__((target("arch=x86-64-v4"))) void product_wide(const Product& p) { product_of<8>(p); }
bool has_wide() { return __builtin_cpu_supports("x86-64-v4"); }
#else
void product_wide(const Product&) {}
bool has_wide() { return false; }
#endif
AXPO_CLONES void product_narrow(const Product& p) { product_of<2>(p); }

}  // namespace

void product(const Product& p) {
  static const bool wide = has_wide();
  wide ? product_wide(p) : product_narrow(p);
}

}  // namespace axpo
