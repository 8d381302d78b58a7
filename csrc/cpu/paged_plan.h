// What paged attention works on: tiles of queries, and the sequences they are cut from. See paged_attention.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <vector>

#include "attention.h"

namespace axpo {

constexpr int kSplit = 256;    // keys reduced together; results depend on it, so it is one constant
constexpr int kGroup = 32;     // keys handled between two calls of the prefetcher
constexpr int kScores = kSplit + 16;  // floats from one row of scores to the next: not a multiple of a page's sets
constexpr int kTileRows = 48;  // rows of a tile

// The queries of one sequence in a tile.
struct Member {
  int64_t q;              // where the first query begins in q and out, at the first head of the group
  const int32_t* blocks;  // block table of the sequence
  int64_t head;           // where the KV head begins in a block
  int64_t tokens;         // queries
  int64_t position;       // absolute position of the first of them
  int64_t shared;         // leading keys whose blocks are those of the member before it in the tile; 0 for the first

  int64_t keys() const { return position + tokens; }
};

struct Tile {
  const Member* members;
  int64_t count;
};

template <class T>  // float or c10::BFloat16; all arithmetic is fp32
struct Cache {
  const T *q, *k, *v;
  T* out;
  int64_t block_stride, block_size, dim, group;
  int64_t token_stride;  // elements from one query token to the next
  float scale;
};

// One sequence with queries.
struct Span {
  int64_t row, tokens, keys;  // first query row, queries, keys
  const int32_t* blocks;
  int64_t shared;  // leading keys in the same blocks as those of the span before it
};

inline int64_t max_rows(int64_t group) { return std::max<int64_t>(1, kTileRows / group) * group; }

inline int64_t scratch_size(int64_t group, int64_t dim) {
  const int64_t rows = (max_rows(group) + 7) / 8 * 8;
  return rows * (strips(dim) * kStrip + kScores + 2 * dim + 6) + strips(dim) * kStrip * kGroup;
}

// The sequences of a batch that have queries, in their order; `share` looks for blocks that neighbours have in common.
// This and the functions below are defined in paged_attention.cpp.
std::vector<Span> list_spans(const at::Tensor& tables, const at::Tensor& cu_seqlens_q, const at::Tensor& context_lens,
                             int64_t rows, int64_t blocks, int64_t block_size, bool share);

// The tiles of some sequences, for every KV head; up to `together` tokens of neighbours that share blocks in one.
struct Tiles {
  std::vector<Member> members;  // the tiles point into it
  std::vector<Tile> tiles;
};
Tiles cut_tiles(const Span* spans, int64_t count, int64_t kv_heads, int64_t group, int64_t dim, int64_t block_size,
                int64_t token_stride, int64_t together);

// Computes tiles begin .. end on the calling thread. scratch: scratch_size(group, dim) floats.
void attend_tiles(const Tile* begin, const Tile* end, const Cache<float>& cache, float* scratch);
void attend_tiles(const Tile* begin, const Tile* end, const Cache<c10::BFloat16>& cache, float* scratch);

}  // namespace axpo
