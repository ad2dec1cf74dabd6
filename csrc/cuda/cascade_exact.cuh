// The whole plan algebra over scores that exist in memory: one block per query runs all stages.
#pragma once

#include "cuda/block.cuh"
#include "cuda/exact.cuh"

namespace cascade::cuda {

constexpr double kRankOffset = 60;  // reciprocal rank fusion's constant: Cormack, Clarke, Buettcher, SIGIR 2009

// Scores of one view for some queries: float32 as given, or float64.
struct ScoreMatrix {
  const void* data;  // [rows, K]
  int64_t stride;    // elements from one query to the next
  bool is_double;
};

struct ScoreViews {
  ScoreMatrix view[kMaxViews];
};

// Memory of one launch's queries; null where the plan does not need it.
struct ExactSpace {
  uint32_t* alive;     // [rows, K]
  uint32_t* eligible;  // [rows, K]: where a stage after the first is @bank
  uint32_t* chosen;    // [rows, K]: the same
  double* fused;       // [rows, K]: where a stage fuses views
  Pairs pairs;         // [rows, pair_stride]
  int64_t pair_stride;
};

struct CascadeShared {
  BlockShared block;
  double reduced[kThreads];
};

// One query's view of it all.
struct ExactQuery {
  const ScoreViews& scores;
  int64_t row, keys;
  uint32_t *alive, *eligible, *chosen;
  double* fused;
  Pairs pairs;

  __device__ double score(int view, int64_t key) const {
    const ScoreMatrix& m = scores.view[view];
    const int64_t at = row * m.stride + key;
    return m.is_double ? ops::load(static_cast<const double*>(m.data) + at)
                       : ops::load(static_cast<const float*>(m.data) + at);
  }
};

__device__ inline double unordered(uint64_t key) {
  return ops::bits_to_double(key >> 63 ? key & ~(uint64_t{1} << 63) : ~key);
}

// Whether the key is no candidate of the query.
__device__ inline bool excluded(const Exclusion& exclude, int64_t query, int64_t key, int64_t keys) {
  if (exclude.mask != nullptr) {
    return ops::load(exclude.mask + query * keys + key) != 0;
  }
  return exclude.query_video != nullptr && ops::load(exclude.key_video + key) == ops::load(exclude.query_video + query);
}

template <class Combine>
__device__ double reduce(double value, Combine combine, CascadeShared& shared) {
  shared.reduced[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
      shared.reduced[threadIdx.x] = combine(shared.reduced[threadIdx.x], shared.reduced[threadIdx.x + half]);
    }
    __syncthreads();
  }
  const double result = shared.reduced[0];
  __syncthreads();
  return result;
}

// To bfloat16, ties to even; never infinity.
__device__ inline double round_to_bfloat16(double value) {
  if (value == 0) {
    return 0;
  }
  const double largest = ops::bits_to_double(0x47EFE00000000000);  // 0x7F7F as bfloat16
  value = value < largest ? value : largest;
  const double smallest = ops::bits_to_double(0x3810000000000000);  // 2^-126: below, bfloat16 has fixed steps
  double step = ops::bits_to_double(0x37A0000000000000);            // 2^-133
  if (value >= smallest) {
    step = ops::bits_to_double((ordered(value) & 0x7FF0000000000000) - (uint64_t{7} << 52));
  }
  const double units = value / step;  // a power of two: exact
  const auto whole = static_cast<int64_t>(units);
  const double rest = units - static_cast<double>(whole);
  return static_cast<double>(whole + (rest > 0.5 || (rest == 0.5 && (whole & 1)))) * step;
}

// bfloat16(1 / standard deviation over all keys); 0 where all scores are equal.
__device__ inline double spread_weight(const ExactQuery& q, int view, CascadeShared& shared) {
  const auto larger = [](double a, double b) { return a > b ? a : b; };
  const auto sum = [](double a, double b) { return ops::add(a, b); };
  double high = -INFINITY, low = -INFINITY, total = 0, squares = 0;
  for (int64_t key = threadIdx.x; key < q.keys; key += kThreads) {
    const double s = q.score(view, key);
    high = larger(high, s);
    low = larger(low, -s);
    total += s;
  }
  high = reduce(high, larger, shared);
  low = -reduce(low, larger, shared);
  if (high == low) {
    return 0;
  }
  const double mean = reduce(total, sum, shared) / static_cast<double>(q.keys);
  double rounded = 0;  // what the mean's rounding adds, far more than scores that lie close together differ
  for (int64_t key = threadIdx.x; key < q.keys; key += kThreads) {
    const double off = q.score(view, key) - mean;
    squares += off * off;
    rounded += off;
  }
  squares = reduce(squares, sum, shared);
  rounded = reduce(rounded, sum, shared) / static_cast<double>(q.keys);
  const double deviation = ops::root(larger(squares / static_cast<double>(q.keys) - rounded * rounded, 0));
  return deviation == 0 ? 0 : round_to_bfloat16(1 / deviation);
}

// Writes the fused score of the listed keys to q.fused.
__device__ inline void fuse(const StageArguments& stage, const ExactQuery& q, const uint32_t* list, int64_t count,
                            CascadeShared& shared) {
  for (int v = 0; v < stage.view_count; ++v) {
    const int view = stage.views[v];
    const double weight = stage.fusion == Fusion::zsum ? spread_weight(q, view, shared) : 1;
    if (stage.fusion == Fusion::rrf) {
      fill_pairs(q.pairs, list, count, [&](uint32_t key) { return ordered(q.score(view, key)); });
      sort_pairs(q.pairs, count);
    }
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      const bool ranks = stage.fusion == Fusion::rrf;
      const uint32_t key = ranks ? q.pairs.id[i] : ops::load(list + i);
      const double part =
          ranks ? ops::divide(1, kRankOffset + static_cast<double>(i + 1)) : ops::multiply(weight, q.score(view, key));
      const double sofar = v ? ops::load(q.fused + key) : part;
      double now = ops::add(sofar, part);
      if (stage.fusion == Fusion::min) {
        now = part < sofar ? part : sofar;
      } else if (stage.fusion == Fusion::max) {
        now = part > sofar ? part : sofar;
      }
      ops::store(q.fused + key, v ? now : part);
    }
    __syncthreads();
  }
}

// Keeps the `n` best of `list` (in place, in index order); returns how many are left.
template <class Key>
__device__ int64_t keep_best(uint32_t* list, int64_t count, int64_t n, Key key, BlockShared& shared) {
  if (count <= n) {
    return count;
  }
  const Threshold t = nth_largest<64, false>(
      count, n,
      [&](int64_t i, uint64_t& value) {
        value = key(ops::load(list + i));
        return true;
      },
      shared);
  return compact(
      list, list, count, t.need,
      [&](int64_t, uint32_t id) {
        const uint64_t value = key(id);
        return t.above(value) ? Verdict::in : t.tied(value) ? Verdict::tied : Verdict::out;
      },
      shared);
}

// Keeps those of `alive` that the ascending list `chosen` holds.
__device__ inline int64_t intersect(uint32_t* alive, int64_t count, const uint32_t* chosen, int64_t chosen_count,
                                    BlockShared& shared) {
  return compact(
      alive, alive, count, 0,
      [&](int64_t, uint32_t id) { return holds(chosen, chosen_count, id) ? Verdict::in : Verdict::out; }, shared);
}

// Writes sorted pairs 0 to count - 1 and the padding up to k; `similarity` may be null.
__device__ inline void write_row(Pairs pairs, int64_t count, int64_t k, int64_t* index, float* similarity) {
  for (int64_t i = threadIdx.x; i < k; i += kThreads) {
    ops::store(index + i, i < count ? static_cast<int64_t>(pairs.id[i]) : int64_t{-1});
    if (similarity != nullptr) {
      ops::store(similarity + i, i < count ? static_cast<float>(unordered(pairs.key[i])) : -INFINITY);
    }
  }
  __syncthreads();
}

// All stages of queries first_query to first_query + gridDim.x - 1. grid: (rows)
__global__ void __launch_bounds__(kThreads, 1)
    cascade_over_scores(const PlanArguments plan,    //
                        const ScoreViews scores,     // V times [rows, K]
                        const int64_t keys,          //
                        const Exclusion exclude,     // of all B queries
                        const int64_t first_query,   //
                        const int64_t scores_first,  // the query of the scores' first row
                        const ExactSpace space,      //
                        const Answer answer          // of all B queries
    ) {
  auto& shared = *reinterpret_cast<CascadeShared*>(ops::shared_memory());
  const int64_t row = blockIdx.x, query = first_query + row;
  const ExactQuery q{.scores = scores,
                     .row = query - scores_first,
                     .keys = keys,
                     .alive = space.alive + row * keys,
                     .eligible = space.eligible + row * keys,
                     .chosen = space.chosen + row * keys,
                     .fused = space.fused + row * keys,
                     .pairs = {space.pairs.key + row * space.pair_stride, space.pairs.id + row * space.pair_stride}};
  int64_t alive = compact(
      nullptr, q.alive, keys, 0,
      [&](int64_t, uint32_t key) { return excluded(exclude, query, key, keys) ? Verdict::out : Verdict::in; },
      shared.block);
  const int64_t eligible = alive;
  if (space.eligible != nullptr) {
    for (int64_t i = threadIdx.x; i < eligible; i += kThreads) {
      q.eligible[i] = q.alive[i];
    }
  }
  __syncthreads();
  for (int s = 0; s < plan.stage_count; ++s) {
    const StageArguments& stage = plan.stages[s];
    const bool over_bank = stage.over_bank && s > 0;
    const bool fuses = stage.fusion != Fusion::none;
    if (fuses) {
      fuse(stage, q, over_bank ? q.eligible : q.alive, over_bank ? eligible : alive, shared);
    }
    const auto key = [&](uint32_t id) {
      return ordered(fuses ? ops::load(q.fused + id) : q.score(stage.views[0], id));
    };
    for (int64_t i = threadIdx.x; over_bank && i < eligible; i += kThreads) {
      q.chosen[i] = q.eligible[i];
    }
    __syncthreads();
    const int64_t left =
        keep_best(over_bank ? q.chosen : q.alive, over_bank ? eligible : alive, stage.keep, key, shared.block);
    alive = over_bank ? intersect(q.alive, alive, q.chosen, left, shared.block) : left;
    const bool last = s == plan.stage_count - 1;
    if (last || answer.kept[s] != nullptr) {
      fill_pairs(q.pairs, q.alive, alive, key);
      sort_pairs(q.pairs, alive);
      if (answer.kept[s] != nullptr) {
        write_row(q.pairs, alive, stage.keep, answer.kept[s] + query * stage.keep, nullptr);
      }
      if (last) {
        write_row(q.pairs, alive, stage.keep, answer.index + query * stage.keep,
                  answer.similarity + query * stage.keep);
      }
    }
  }
}

}  // namespace cascade::cuda
