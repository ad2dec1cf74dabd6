// Who is a member of a query's P, found without the host knowing how many there are: mined positives come as slots, and
// siblings (keys of the query's own video) are found by their ids while the keys go by. The first 32 of a query are
// listed as blocks come upon them, and taken by slot; where there are more, the ids are gone through again.
#pragma once

#include "cuda/block.cuh"
#include "cuda/pack.cuh"

namespace cascade::cuda {

constexpr int kNceThreads = 256;
constexpr int kNceQueries = 16;  // of a block, two per warp
constexpr int kNceKeys = 128;    // of a tile, four per lane
constexpr int kNceDepth = 32;    // columns held at a time
constexpr int kNceSplits = 64;   // runs of keys at most
constexpr int kNceColumns = 128;
constexpr int kNceSiblings = 32;  // of a query that are listed, one per lane

struct NceShared {
  float query[kNceQueries][kNceDepth];
  float key[kNceKeys][kNceDepth + 1];   // one more column: lanes read down a column without bank conflicts
  float weight[kNceKeys][kNceQueries];  // exp(score - top)
  uint32_t skip[kNceKeys];              // bit q: the key does not count for query q
  int64_t video[kNceQueries];
  float shrink[kNceQueries];
  double run_scale[kNceThreads / 32][kNceSplits];
  uint32_t last;
};

static_assert(sizeof(NceShared) <= 34 * 1024, "two blocks fit an SM with 100 KiB");

struct NceSpace {
  uint32_t* counts;    // [query tiles + rows], zeros: blocks that are done, then siblings found of each query
  uint32_t* siblings;  // [rows, kNceSiblings] slots of the first ones
  float* top;          // [runs, rows] what a run's weights are relative to
  double* sum;         // [runs, rows] of a run's weights
  float* direction;    // [runs, rows, D] a run's keys summed by their weights; null without gradients
  int64_t rows;        // B rounded up to whole tiles
};

__device__ inline float largest_over_warp(float value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, value, lanes);
    value = other > value ? other : value;
  }
  return value;
}
__device__ inline float float_sum_over_warp(float value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  }
  return value;
}

// Whether siblings are anything but keys like others.
__device__ inline bool knows_siblings(const NceProblem& p) {
  return p.query_video != nullptr && p.siblings != Siblings::negative;
}

// Marks what of a tile is not the rest of a query's keys, and lists the siblings that are members of P.
__device__ inline void mark_tile(const NceProblem& p, const NceSpace& space, int64_t query0, int64_t key0,
                                 NceShared& shared) {
  const int64_t left = p.queries.rows - query0, queries = left < kNceQueries ? left : kNceQueries;
  for (int64_t at = threadIdx.x; at < queries * p.width; at += kNceThreads) {
    const int64_t key = ops::load(p.members + query0 * p.width + at) - key0;
    if (key >= 0 && key < kNceKeys) {
      atomicOr(shared.skip + key, 1u << (at / p.width));
    }
  }
  constexpr int kThreadsPerKey = kNceThreads / kNceKeys;
  const int key = static_cast<int>(threadIdx.x) / kThreadsPerKey;
  if (!knows_siblings(p) || key0 + key >= p.keys.rows) {
    return;
  }
  const int64_t video = ops::load(p.key_video + key0 + key);
  uint32_t* const counts = space.counts + gridDim.x + query0;
  for (int query = static_cast<int>(threadIdx.x) % kThreadsPerKey; query < queries; query += kThreadsPerKey) {
    if (video != shared.video[query]) {
      continue;
    }
    atomicOr(shared.skip + key, 1u << query);
    if (p.siblings == Siblings::positive) {
      const uint32_t place = atomicAdd(counts + query, 1u);
      if (place < kNceSiblings) {
        ops::store(space.siblings + (query0 + query) * kNceSiblings + place, static_cast<uint32_t>(key0 + key));
      }
    }
  }
}

// Calls `visit(slot)` for the members of a query's P but its own key, in an order that only the members decide, by a
// warp.
template <class Visit>
__device__ void each_member(const NceProblem& p, const NceSpace& space, int64_t query, Visit visit) {
  const int lane = static_cast<int>(threadIdx.x & 31);
  for (int64_t first = 0; first < p.width; first += 32) {
    const int64_t mine = first + lane < p.width ? ops::load(p.members + query * p.width + first + lane) : -1;
    unsigned found = __ballot_sync(kAllLanes, mine >= 0);
    for (int from = 0; found != 0; found >>= 1, ++from) {
      if (found & 1) {
        visit(__shfl_sync(kAllLanes, mine, from));
      }
    }
  }
  if (!knows_siblings(p)) {
    return;
  }
  // None were counted where they are no members.
  const auto count = static_cast<int64_t>(ops::load_shared_by_blocks(space.counts + gridDim.x + query));
  if (count <= kNceSiblings) {
    const int64_t mine =
        lane < count ? int64_t{ops::load_shared_by_blocks(space.siblings + query * kNceSiblings + lane)} : p.keys.rows;
    int64_t last = -1;
    for (int64_t n = 0; n < count; ++n) {
      int64_t next = mine > last ? mine : p.keys.rows;
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        const int64_t other = __shfl_xor_sync(kAllLanes, next, lanes);
        next = other < next ? other : next;
      }
      visit(next);
      last = next;
    }
    return;
  }
  const int64_t video = ops::load(p.query_video + query);
  for (int64_t first = 0; first < p.keys.rows; first += 32) {
    const bool mine = first + lane < p.keys.rows && ops::load(p.key_video + first + lane) == video;
    unsigned found = __ballot_sync(kAllLanes, mine);
    for (int64_t slot = first; found != 0; found >>= 1, ++slot) {
      if (found & 1) {
        visit(slot);
      }
    }
  }
}

// The score of a query with a key, by a warp.
__device__ inline double nce_score(const NceProblem& p, int64_t query, int64_t slot) {
  const Matrix &queries = p.queries, &keys = p.keys;
  float sum = 0;
  for (int64_t d = threadIdx.x & 31; d < keys.columns; d += 32) {
    sum += element(queries.data, query * queries.stride + d, queries.dtype) *
           element(keys.data, slot * keys.stride + d, keys.dtype);
  }
  return float_sum_over_warp(sum) / static_cast<float>(p.temperature);
}

// What the scores of P's members come to, by a warp.
struct Inside {
  int64_t count;
  double total, lse;  // of the members, own keys left out
};

__device__ inline Inside nce_members(const NceProblem& p, const NceSpace& space, int64_t query) {
  int64_t count = 0;
  double top = -INFINITY, total = 0, sum = 0;
  each_member(p, space, query, [&](int64_t slot) {
    const double score = nce_score(p, query, slot);
    const double best = score > top ? score : top;
    sum = sum * exp(top - best) + exp(score - best);
    top = best;
    total += score;
    ++count;
  });
  return {count, total, count > 0 ? top + log(sum) : -INFINITY};
}

// Adds the keys of P's members, by `weight(score)`, to a query's gradient, by a warp.
template <class Weight>
__device__ void add_members(const NceProblem& p, const NceSpace& space, int64_t query, Weight weight) {
  float* const to = p.to_query + query * p.keys.columns;
  each_member(p, space, query, [&](int64_t slot) {
    const auto factor = static_cast<float>(weight(nce_score(p, query, slot)));
    for (int64_t d = threadIdx.x & 31; d < p.keys.columns; d += 32) {
      ops::store(to + d, ops::load(to + d) + factor * element(p.keys.data, slot * p.keys.stride + d, p.keys.dtype));
    }
  });
}

}  // namespace cascade::cuda
