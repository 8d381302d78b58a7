// Which unit multiplies matrices of bf16. See matrix_unit.h.
#include "matrix_unit.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>

#ifdef AXPO_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace axpo {
namespace {

#ifdef AXPO_AMX
constexpr const char* kWishes = "auto, off, emulate, assume";

bool granted() {
  // Linux keeps the tiles' 8 KB out of a process until it asks: ARCH_REQ_XCOMP_PERM of feature 18, the tile data.
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

std::string why_not_here() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_wide_vectors() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 1) == 0 || (d >> 24 & 1) == 0) {
    return "the processor has no AMX for bf16";
  }
  return granted() ? "" : "the operating system does not let this process use AMX (arch_prctl)";
}
#else
constexpr const char* kWishes = "auto, off, emulate";

std::string why_not_here() { return "this build has no AMX: it takes x86-64 Linux and gcc 12 or later"; }
#endif

struct Choice {
  MatrixUnit unit = MatrixUnit::kNone;
  std::string why_not;  // AMX; empty where it serves
};

// AXPO_AMX: auto; off; emulate, the same arithmetic in C++, slow, for tests; assume, AMX without asking the processor,
// where instructions that it lacks are emulated under the process.
Choice choose() {
  const char* set = std::getenv("AXPO_AMX");
  const std::string wish = set == nullptr ? "auto" : set;
  if (wish == "off") return {MatrixUnit::kNone, "AXPO_AMX=off"};
  if (wish == "emulate") return {MatrixUnit::kEmulated, "AXPO_AMX=emulate"};
#ifdef AXPO_AMX
  if (wish == "assume") return {MatrixUnit::kAmx, ""};
#endif
  TORCH_CHECK_VALUE(wish == "auto", "AXPO_AMX='", wish, "' is not one of ", kWishes, ": set one of these or unset it");
  const std::string reason = why_not_here();
  return {reason.empty() ? MatrixUnit::kAmx : MatrixUnit::kNone, reason};
}

const Choice& choice() {
  static const Choice made = choose();
  return made;
}

std::string why_not_amx() { return choice().why_not; }

}  // namespace

MatrixUnit matrix_unit() { return choice().unit; }

}  // namespace axpo

TORCH_LIBRARY_FRAGMENT(axpo, m) { m.def("why_not_amx() -> str", TORCH_FN(axpo::why_not_amx)); }
