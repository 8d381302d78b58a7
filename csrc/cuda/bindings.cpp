// Registers the CUDA kernels of this directory for the operators that csrc/cpu defines.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

extern "C" cudaError_t axpo_copy_blocks(void* kv, const int64_t* src, const int64_t* dst, const int64_t* valid,
                                        int64_t pairs, int64_t planes, int64_t blocks, int64_t heads,
                                        int64_t block_size, int64_t token_bytes, cudaStream_t stream);

namespace {

// kv: [L, 2, num_blocks, Hk, block_size, D], contiguous; src, dst, valid: [P] int64 on the same device, whose values
// are not looked at here, as that would wait for the device.
void copy_blocks(at::Tensor& kv, const at::Tensor& src, const at::Tensor& dst, const at::Tensor& valid) {
  TORCH_CHECK_VALUE(kv.is_contiguous(), "copy_blocks: kv must be contiguous");
  for (const at::Tensor& index : {src, dst, valid}) {
    TORCH_CHECK_VALUE(index.device() == kv.device() && index.scalar_type() == at::kLong,
                      "copy_blocks: src, dst and valid must be int64 on ", kv.device());
  }
  if (kv.numel() == 0 || src.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(kv.device());
  const at::Tensor sc = src.contiguous(), dc = dst.contiguous(), vc = valid.contiguous();
  C10_CUDA_CHECK(axpo_copy_blocks(kv.mutable_data_ptr(), sc.const_data_ptr<int64_t>(), dc.const_data_ptr<int64_t>(),
                                  vc.const_data_ptr<int64_t>(), sc.numel(), kv.size(0) * kv.size(1), kv.size(2),
                                  kv.size(3), kv.size(4), kv.size(5) * kv.element_size(),
                                  c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(axpo, CUDA, m) { m.impl("copy_blocks", TORCH_FN(copy_blocks)); }
