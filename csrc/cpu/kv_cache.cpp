// Writes into the paged KV cache: new tokens by slot, and the copy half of copy-on-write. See kernels/kv_cache.
// Any dtype, as bytes.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "common.h"

namespace {

// k, v: [T, Hk, D]; caches: [num_blocks, Hk, block_size, D], contiguous, of the same dtype; slot_mapping: [T] int64,
// -1 for a token that is left out.
void write_kv(const at::Tensor& k, const at::Tensor& v, at::Tensor& k_cache, at::Tensor& v_cache,
              const at::Tensor& slot_mapping) {
  TORCH_CHECK(k_cache.is_contiguous() && v_cache.is_contiguous(), "write_kv: k_cache and v_cache must be contiguous");
  const int64_t tokens = k.size(0), heads = k.size(1), dim = k.size(2), block_size = k_cache.size(2);
  const int64_t slots_total = k_cache.size(0) * block_size;
  if (tokens == 0) return;
  const at::Tensor kc = k.contiguous(), vc = v.contiguous(), slots = slot_mapping.contiguous();
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < tokens; ++t) {
    TORCH_CHECK_INDEX(slot[t] >= -1 && slot[t] < slots_total, "write_kv: slot_mapping[", t, "] = ", slot[t],
                      " is outside the cache of ", slots_total, " slots");
  }
  TORCH_CHECK_VALUE(k.scalar_type() == k_cache.scalar_type() && v.scalar_type() == v_cache.scalar_type(),
                    "write_kv: k and v must have the dtype of the cache");
  const char* src_k = static_cast<const char*>(kc.const_data_ptr());
  const char* src_v = static_cast<const char*>(vc.const_data_ptr());
  char* dst_k = static_cast<char*>(k_cache.mutable_data_ptr());
  char* dst_v = static_cast<char*>(v_cache.mutable_data_ptr());
  const int64_t bytes = dim * k.element_size();
  at::parallel_for(0, tokens, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (slot[t] < 0) continue;
      const int64_t block = slot[t] / block_size, offset = slot[t] % block_size;
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t to = ((block * heads + h) * block_size + offset) * bytes, from = (t * heads + h) * bytes;
        std::memcpy(dst_k + to, src_k + from, bytes);
        std::memcpy(dst_v + to, src_v + from, bytes);
      }
    }
  });
}

// kv: [L, 2, num_blocks, Hk, block_size, D], contiguous; src, dst, valid: [P] int64.
void copy_blocks(at::Tensor& kv, const at::Tensor& src, const at::Tensor& dst, const at::Tensor& valid) {
  TORCH_CHECK(kv.is_contiguous(), "copy_blocks: kv must be contiguous");
  const int64_t planes = kv.size(0) * kv.size(1), blocks = kv.size(2), heads = kv.size(3);
  const int64_t block_size = kv.size(4), token_bytes = kv.size(5) * kv.element_size(), pairs = src.numel();
  if (pairs == 0) return;
  const at::Tensor sc = src.contiguous(), dc = dst.contiguous(), vc = valid.contiguous();
  const int64_t *from = sc.const_data_ptr<int64_t>(), *to = dc.const_data_ptr<int64_t>();
  const int64_t* count = vc.const_data_ptr<int64_t>();
  for (int64_t p = 0; p < pairs; ++p) {
    TORCH_CHECK_INDEX(from[p] >= 0 && from[p] < blocks && to[p] >= 0 && to[p] < blocks, "copy_blocks: pair ", p,
                      " copies block ", from[p], " to ", to[p], ", but there are ", blocks, " blocks");
    TORCH_CHECK_INDEX(count[p] >= 0 && count[p] <= block_size, "copy_blocks: valid[", p, "] = ", count[p],
                      " is not within the block size ", block_size);
  }
  char* data = static_cast<char*>(kv.mutable_data_ptr());
  const int64_t head_bytes = block_size * token_bytes, block_bytes = heads * head_bytes;
  at::parallel_for(0, planes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      char* base = data + plane * blocks * block_bytes;
      for (int64_t p = 0; p < pairs; ++p) {
        for (int64_t h = 0; h < heads; ++h) {
          std::memmove(base + to[p] * block_bytes + h * head_bytes, base + from[p] * block_bytes + h * head_bytes,
                       count[p] * token_bytes);
        }
      }
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def("write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()");
  m.impl("write_kv", c10::DispatchKey::CPU, TORCH_FN(write_kv));
  m.def("copy_blocks(Tensor(a!) kv, Tensor src, Tensor dst, Tensor valid) -> ()");
  m.impl("copy_blocks", c10::DispatchKey::CPU, TORCH_FN(copy_blocks));
}
