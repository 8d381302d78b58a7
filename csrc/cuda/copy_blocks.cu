// Copy-on-write of blocks of the paged KV cache, all layers in one launch. See kernels/kv_cache.
//
// kv is [planes = layers * 2][blocks][heads][block_size][D]. For every pair of blocks, in every plane and head, the
// valid tokens are contiguous: one thread block moves them, 16 bytes a thread at a time.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256;  // 4 KB at a time: 16 tokens of 128 bf16 in one step
constexpr int kUnroll = 4;     // loads on their way before the first store, for larger blocks

template <class Vector>
__global__ void __launch_bounds__(kThreads)
    copy_blocks(char* kv, const int64_t* src, const int64_t* dst, const int64_t* valid, int64_t blocks, int heads,
                int64_t head_bytes, int64_t token_bytes) {
  const int64_t pair = blockIdx.y, plane = blockIdx.x / heads, head = blockIdx.x % heads;
  const int64_t block_bytes = heads * head_bytes, base = plane * blocks * block_bytes + head * head_bytes;
  const Vector* from = reinterpret_cast<const Vector*>(kv + base + src[pair] * block_bytes);
  Vector* to = reinterpret_cast<Vector*>(kv + base + dst[pair] * block_bytes);
  const int64_t count = valid[pair] * token_bytes / static_cast<int64_t>(sizeof(Vector));
  for (int64_t start = threadIdx.x; start < count; start += kThreads * kUnroll) {
    Vector moved[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (start + u * kThreads < count) moved[u] = from[start + u * kThreads];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (start + u * kThreads < count) to[start + u * kThreads] = moved[u];
    }
  }
}

template <class Vector>
cudaError_t launch(char* kv, const int64_t* src, const int64_t* dst, const int64_t* valid, int64_t pairs,
                   int64_t planes, int64_t blocks, int64_t heads, int64_t head_bytes, int64_t token_bytes,
                   cudaStream_t stream) {
  constexpr int64_t kMostPairs = 65535;  // of a grid's y
  for (int64_t first = 0; first < pairs; first += kMostPairs) {
    const int64_t some = pairs - first < kMostPairs ? pairs - first : kMostPairs;
    const dim3 grid(static_cast<unsigned>(planes * heads), static_cast<unsigned>(some));
    copy_blocks<Vector><<<grid, kThreads, 0, stream>>>(kv, src + first, dst + first, valid + first, blocks,
                                                       static_cast<int>(heads), head_bytes, token_bytes);
  }
  return cudaGetLastError();
}

}  // namespace

extern "C" cudaError_t axpo_copy_blocks(void* kv, const int64_t* src, const int64_t* dst, const int64_t* valid,
                                        int64_t pairs, int64_t planes, int64_t blocks, int64_t heads,
                                        int64_t block_size, int64_t token_bytes, cudaStream_t stream) {
  char* data = static_cast<char*>(kv);
  const int64_t head_bytes = block_size * token_bytes;
  const int64_t alignment = token_bytes | static_cast<int64_t>(reinterpret_cast<uintptr_t>(kv) & 15);
  if (alignment % 16 == 0) {
    return launch<uint4>(data, src, dst, valid, pairs, planes, blocks, heads, head_bytes, token_bytes, stream);
  }
  if (alignment % 4 == 0) {
    return launch<uint32_t>(data, src, dst, valid, pairs, planes, blocks, heads, head_bytes, token_bytes, stream);
  }
  return launch<uint8_t>(data, src, dst, valid, pairs, planes, blocks, heads, head_bytes, token_bytes, stream);
}
