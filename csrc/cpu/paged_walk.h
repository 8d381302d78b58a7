// What paged attention works on: tiles of queries, the keys that they see, and the walk over them. See
// paged_attention.cpp.
#pragma once

#include "attention.h"
#include "lanes.h"

namespace {

using namespace axpo;

constexpr int kSplit = 256;    // keys reduced together; results depend on it, so it is one constant
constexpr int kGroup = 32;     // keys handled between two calls of the prefetcher
constexpr int kScores = kSplit + 16;  // floats from one row of scores to the next: not a multiple of a page's sets
constexpr int kTileRows = 48;  // rows of a tile
constexpr int64_t kAheadBytes = 64 << 10;  // how far memory is fetched ahead of its use

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

// Up to kGroup keys, and the rows of the neighbouring members that take them from the same blocks.
struct Run {
  int64_t key, count;      // within the split
  int64_t row, rows;       // within the tile
  int64_t at[kGroup / 8];  // where its octets begin in the caches; the last one again where there are fewer
};

int64_t max_rows(int64_t group) { return std::max<int64_t>(1, kTileRows / group) * group; }

// Walks over the keys and values that a thread will need, some way ahead of the arithmetic and across the ends of its
// tiles: the blocks are scattered in memory, so no hardware prefetcher can follow them.
template <class T>
struct Prefetcher {
  const Cache<T>& cache;
  const Member* member;  // under the cursor
  const Member* end;
  int64_t credit;   // keys that may still be fetched ahead
  int64_t key = 0;  // of the member; those it shares were fetched with the member before it

  AXPO_INLINE void run(int64_t allowance) {
    for (credit += allowance; credit > 0 && member != end;) {
      const int64_t offset = key % cache.block_size;
      const int64_t count = std::min({credit, member->keys() - key, cache.block_size - offset});
      const int64_t at =
          member->blocks[key / cache.block_size] * cache.block_stride + member->head + offset * cache.dim;
      for (int64_t i = 0; i < count * cache.dim; i += 64 / sizeof(T)) {
        __builtin_prefetch(cache.k + at + i);
        __builtin_prefetch(cache.v + at + i);
      }
      credit -= count;
      key += count;
      while (member != end && key >= member->keys()) {
        ++member;
        key = member == end ? 0 : member->shared / kGroup * kGroup;
      }
    }
  }
};

// Fetches `keys` ahead in `steps` equal parts.
template <class T>
struct Spread {
  Prefetcher<T>& ahead;
  int64_t keys, steps, done = 0;

  AXPO_INLINE void operator()() {
    ahead.run(keys * (done + 1) / steps - keys * done / steps);
    ++done;
  }
};

// Whether a member takes all of its keys before `end` from the same blocks as the member before it.
AXPO_INLINE bool follows(const Member& m, int64_t end) {
  return m.shared >= std::min(end, std::max(m.keys(), (&m - 1)->keys()));
}

// The runs of a split, depth first: each member leads the runs of the keys that it does not share with the one before.
template <class T>
AXPO_INLINE int64_t list_runs(const Tile& tile, const Cache<T>& c, int64_t start, Run* runs) {
  int64_t n = 0, row = 0;
  for (int64_t m = 0; m < tile.count; row += tile.members[m++].tokens * c.group) {
    const Member& leader = tile.members[m];
    for (int64_t j = 0; j < kSplit; j += kGroup) {
      const int64_t first = start + j;
      if (m > 0 && follows(leader, first + kGroup)) continue;
      int64_t tokens = leader.tokens, end = leader.keys();
      for (int64_t f = m + 1; f < tile.count && follows(tile.members[f], first + kGroup); ++f) {
        tokens += tile.members[f].tokens;
        end = std::max(end, tile.members[f].keys());
      }
      if (first >= end) break;
      Run& run = runs[n++];
      run.key = j;
      run.count = std::min<int64_t>(kGroup, end - first);
      run.row = row;
      run.rows = tokens * c.group;
      const int64_t octets = (run.count + 7) / 8;
      for (int64_t o = 0; o < octets;) {
        const int64_t offset = (first + 8 * o) % c.block_size, block = leader.blocks[(first + 8 * o) / c.block_size];
        const int64_t stop = std::min(octets, o + (c.block_size - offset) / 8);
        for (int64_t at = block * c.block_stride + leader.head + offset * c.dim; o < stop; at += 8 * c.dim) {
          run.at[o++] = at;
        }
      }
      // Fills a panel up; those scores are not looked at.
      std::fill(run.at + octets, std::end(run.at), run.at[octets - 1]);
    }
  }
  return n;
}

}  // namespace
