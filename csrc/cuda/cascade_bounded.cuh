// All stages of a query over certified bounds: what is surely in stays, what is surely out goes, and only the band
// between is scored in float64. One block per query; results equal those over float64 scores.
#pragma once

#include "cuda/block.cuh"
#include "cuda/bound.cuh"
#include "cuda/cascade_exact.cuh"

namespace cascade::cuda {

constexpr int kBand = 2048;  // undecided keys whose float64 scores a block can hold; beyond, they are recomputed

struct BoundedShared {
  BlockShared block;
  double query_square[kMaxViews];              // |q|^2 by the contract
  float factor[kMaxViews], offset[kMaxViews];  // bound of a fused score from those of its views
  int slack;
  uint64_t band_key[kBand];
  uint32_t band_id[kBand];
};

static_assert(sizeof(BoundedShared) <= 28 * 1024, "three blocks fit an SM with 100 KiB");

// Memory of one launch's queries; null where the plan does not need it.
struct BoundedSpace {
  uint32_t* alive;     // [rows, K]
  uint32_t* eligible;  // [rows, K]: where a stage after the first is @bank
  uint32_t* chosen;    // [rows, K]: the same
  Pairs pairs;         // [rows, pair_stride]: where more than kBand are to be sorted
  int64_t pair_stride;
  int64_t* split_counts;  // [rows, splits]: where keys were preselected, how many of each split
  int64_t split_keys;     // keys of a split
};

// One query and one stage: a key's bound and its score.
struct StageScore {
  const StageArguments& stage;
  const Views& views;
  Metric metric;
  int64_t query;
  const uint16_t* bounds;  // [V, rows, stride], from the query's row on
  int64_t view_stride;     // from one view's bounds to the next's
  BoundedShared& shared;

  __device__ int bound(uint32_t key) const {
    if (stage.fusion == Fusion::none) {
      return ops::load(bounds + stage.views[0] * view_stride + key);
    }
    float value = 0;
    for (int v = 0; v < stage.view_count; ++v) {
      const auto step = static_cast<float>(ops::load(bounds + stage.views[v] * view_stride + key));
      const float part = step * shared.factor[v] + shared.offset[v];
      if (v == 0) {
        value = part;
      } else if (stage.fusion == Fusion::sum) {
        value += part;
      } else {
        value = (stage.fusion == Fusion::min) == (part < value) ? part : value;
      }
    }
    return value < kSteps ? static_cast<int>(value + 0.5f) : kSteps;
  }

  // The score by the contract, as an ordered integer, from `dot_of(a, i, b, j)`.
  template <class Dot>
  __device__ uint64_t score(uint32_t key, Dot dot_of) const {
    double value = 0;
    for (int v = 0; v < stage.view_count; ++v) {
      const Matrix& queries = views.view[stage.views[v]].queries;
      const Matrix& keys = views.view[stage.views[v]].keys;
      const double square = metric == Metric::inner_product ? 0 : dot_of(keys, key, keys, key);
      const double part =
          similarity(metric, dot_of(queries, query, keys, key), shared.query_square[stage.views[v]], square);
      if (v == 0) {
        value = part;
      } else if (stage.fusion == Fusion::sum) {
        value = ops::add(value, part);
      } else {
        value = (stage.fusion == Fusion::min) == (part < value) ? part : value;
      }
    }
    return ordered(value);
  }
  // By one thread.
  __device__ uint64_t score_alone(uint32_t key) const {
    return score(key, [](const Matrix& a, int64_t i, const Matrix& b, int64_t j) { return dot(a, i, b, j); });
  }
  // By eight lanes; the whole warp calls it.
  __device__ uint64_t score_by_eight(uint32_t key) const {
    return score(key, [](const Matrix& a, int64_t i, const Matrix& b, int64_t j) { return dot_by_eight(a, i, b, j); });
  }
};

// Writes keys[i] = score of ids[i], eight lanes to an id.
__device__ inline void score_list(const StageScore& scores, const uint32_t* ids, int64_t count, uint64_t* keys) {
  const int lane = static_cast<int>(threadIdx.x & 31), warp = static_cast<int>(threadIdx.x >> 5);
  for (int64_t base = int64_t{warp} * 4; base < count; base += kWarps * 4) {
    const int64_t at = base + lane / 8;
    const uint64_t key = scores.score_by_eight(ids[at < count ? at : base]);
    if (at < count && lane % 8 == 0) {
      keys[at] = key;
    }
  }
  __syncthreads();
}

// How bounds of this stage are read, and how far one may be from its score. Thread 0 works: a barrier must come before
// the others read it, and the last stage's reads are behind the barrier that ends its compaction.
__device__ inline void describe_stage(const StageArguments& stage, const BoundMeaning* meaning, int64_t rows,
                                      BoundedShared& shared) {
  if (threadIdx.x == 0) {
    double slack = meaning[stage.views[0] * rows].slack;
    if (stage.fusion != Fusion::none) {
      const bool sums = stage.fusion == Fusion::sum;
      double low = INFINITY, high = -INFINITY, reach = 0, shift = 0;
      for (int v = 0; v < stage.view_count; ++v) {
        const BoundMeaning& m = meaning[stage.views[v] * rows];
        low = -m.scale - m.shift < low ? -m.scale - m.shift : low;
        high = m.scale - m.shift > high ? m.scale - m.shift : high;
        reach += m.scale;
        shift += m.shift;
      }
      const double half = sums ? reach : (high - low) / 2;
      slack = 0;
      for (int v = 0; v < stage.view_count; ++v) {
        const BoundMeaning& m = meaning[stage.views[v] * rows];
        const double factor = half > 0 ? m.scale / half : 0;
        shared.factor[v] = static_cast<float>(factor);
        shared.offset[v] = sums || half <= 0 ? 0 : static_cast<float>((-m.scale - m.shift - low) / half * kHalfSteps);
        slack = sums ? slack + factor * m.slack : factor * m.slack > slack ? factor * m.slack : slack;
      }
      slack += half > 0 ? kHalfSteps * stage.view_count * 0x1p-50 * (reach + shift) / half : 0;
      slack += 0.8;  // rounding to a whole step, and float32 arithmetic on numbers of up to 17 bits
    }
    constexpr double kAll = 2 * kSteps;  // everything is undecided
    shared.slack = static_cast<int>(slack < kAll ? slack : kAll) + 1;
  }
}

// Keeps the `n` best of `list` (in place, in index order); returns how many are left.
__device__ inline int64_t keep_best_bounded(uint32_t* list, int64_t count, int64_t n, const StageScore& scores) {
  BoundedShared& shared = scores.shared;
  if (count <= n) {
    return count;
  }
  const Threshold middle = nth_largest<16, true>(
      count, n,
      [&](int64_t i, uint64_t& key) {
        key = static_cast<uint64_t>(scores.bound(ops::load(list + i)));
        return true;
      },
      shared.block);
  // The n-th best score lies within `slack` of the n-th largest bound, and so does every bound of its own score.
  const int low = static_cast<int>(middle.prefix) - 2 * shared.slack;
  const int high = static_cast<int>(middle.prefix) + 2 * shared.slack;
  uint64_t mine = 0, total = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const int bound = scores.bound(ops::load(list + i));
    mine += bound > high ? 1 : bound >= low ? uint64_t{1} << 32 : 0;
  }
  exclusive_sum(mine, total, shared.block);
  const auto band = static_cast<int64_t>(total >> 32);
  const int64_t need = n - static_cast<int64_t>(total & 0xFFFFFFFFu);
  if (need >= band) {
    return compact(
        list, list, count, 0,
        [&](int64_t, uint32_t id) { return scores.bound(id) >= low ? Verdict::in : Verdict::out; }, shared.block);
  }
  const bool held = band <= kBand;
  if (held) {
    compact(
        list, shared.band_id, count, 0,
        [&](int64_t, uint32_t id) {
          const int bound = scores.bound(id);
          return bound >= low && bound <= high ? Verdict::in : Verdict::out;
        },
        shared.block);
    score_list(scores, shared.band_id, band, shared.band_key);
  }
  const auto band_score = [&](uint32_t id) {
    return held ? shared.band_key[position(shared.band_id, band, id)] : scores.score_alone(id);
  };
  const Threshold edge = nth_largest<64, false>(
      held ? band : count, need,
      [&](int64_t i, uint64_t& key) {
        if (held) {
          key = shared.band_key[i];
          return true;
        }
        const uint32_t id = ops::load(list + i);
        const int bound = scores.bound(id);
        const bool undecided = bound >= low && bound <= high;
        key = undecided ? scores.score_alone(id) : 0;
        return undecided;
      },
      shared.block);
  return compact(
      list, list, count, edge.need,
      [&](int64_t, uint32_t id) {
        const int bound = scores.bound(id);
        if (bound > high || bound < low) {
          return bound > high ? Verdict::in : Verdict::out;
        }
        const uint64_t key = band_score(id);
        return edge.above(key) ? Verdict::in : edge.tied(key) ? Verdict::tied : Verdict::out;
      },
      shared.block);
}

// The candidates of one split of the keys that may be among the first stage's best of all keys: a superset of the
// split's own best. grid: (rows, splits)
__global__ void __launch_bounds__(kThreads, 3) preselect(const PlanArguments plan,   //
                                                         const Views views,          // V views, as stored
                                                         const Metric metric,        //
                                                         const int64_t keys,         // K
                                                         const Exclusion exclude,    // of all B queries
                                                         const int64_t first_query,  //
                                                         const BoundSpace bounds,    // V times [rows, stride]
                                                         const BoundedSpace space    //
) {
  auto& shared = *reinterpret_cast<BoundedShared*>(ops::shared_memory());
  const int64_t row = blockIdx.x, rows = gridDim.x, query = first_query + row;
  const int64_t first = blockIdx.y * space.split_keys;
  const int64_t in_split = keys - first < space.split_keys ? keys - first : space.split_keys;
  uint32_t* const list = space.alive + row * keys + first;
  int64_t count = compact(
      nullptr, list, in_split, 0,
      [&](int64_t, uint32_t key) { return excluded(exclude, query, key, keys) ? Verdict::out : Verdict::in; },
      shared.block, static_cast<uint32_t>(first));
  const StageArguments& stage = plan.stages[0];
  if (count > stage.keep) {
    describe_stage(stage, bounds.meaning + row, rows, shared);
    const StageScore scores{stage, views, metric, query, bounds.bounds + row * bounds.stride, rows * bounds.stride,
                            shared};
    const Threshold least = nth_largest<16, true>(
        count, stage.keep,
        [&](int64_t i, uint64_t& key) {
          key = static_cast<uint64_t>(scores.bound(ops::load(list + i)));
          return true;
        },
        shared.block);
    const int low = static_cast<int>(least.prefix) - 2 * shared.slack;
    count = compact(
        list, list, count, 0,
        [&](int64_t, uint32_t id) { return scores.bound(id) >= low ? Verdict::in : Verdict::out; }, shared.block);
  }
  if (threadIdx.x == 0) {
    ops::store(space.split_counts + row * gridDim.y + blockIdx.y, count);
  }
}

// Moves what every split has left to the front of the list; returns how many.
__device__ inline int64_t gather_splits(uint32_t* list, const int64_t* counts, int64_t splits, int64_t split_keys,
                                        BlockShared& shared) {
  int64_t gathered = 0;
  for (int64_t split = 0; split < splits; ++split) {
    gathered += compact(
        list + split * split_keys, list + gathered, ops::load(counts + split), 0,
        [](int64_t, uint32_t) { return Verdict::in; }, shared);
  }
  return gathered;
}

// All stages of queries first_query to first_query + gridDim.x - 1. grid: (rows)
__global__ void __launch_bounds__(kThreads, 3) cascade_over_bounds(const PlanArguments plan,   //
                                                                   const Views views,          // V views, as stored
                                                                   const Metric metric,        //
                                                                   const int64_t keys,         // K
                                                                   const Exclusion exclude,    // of all B queries
                                                                   const int64_t first_query,  //
                                                                   const BoundSpace bounds,    // V times [rows, stride]
                                                                   const BoundedSpace space,   //
                                                                   const Answer answer         // of all B queries
) {
  auto& shared = *reinterpret_cast<BoundedShared*>(ops::shared_memory());
  const int64_t row = blockIdx.x, rows = gridDim.x, query = first_query + row;
  uint32_t* const list = space.alive + row * keys;
  uint32_t* const eligible_list = space.eligible + row * keys;
  uint32_t* const chosen_list = space.chosen + row * keys;
  if (metric != Metric::inner_product && static_cast<int>(threadIdx.x) < plan.view_count) {
    const Matrix& queries = views.view[threadIdx.x].queries;
    shared.query_square[threadIdx.x] = dot(queries, query, queries, query);
  }
  const int64_t splits = space.split_counts == nullptr ? 0 : (keys + space.split_keys - 1) / space.split_keys;
  int64_t alive =
      splits > 0
          ? gather_splits(list, space.split_counts + row * splits, splits, space.split_keys, shared.block)
          : compact(
                nullptr, list, keys, 0,
                [&](int64_t, uint32_t key) { return excluded(exclude, query, key, keys) ? Verdict::out : Verdict::in; },
                shared.block);
  const int64_t eligible = alive;
  if (space.eligible != nullptr) {
    for (int64_t i = threadIdx.x; i < eligible; i += kThreads) {
      eligible_list[i] = list[i];
    }
  }
  for (int s = 0; s < plan.stage_count; ++s) {
    const StageArguments& stage = plan.stages[s];
    describe_stage(stage, bounds.meaning + row, rows, shared);
    const StageScore scores{stage, views, metric, query, bounds.bounds + row * bounds.stride, rows * bounds.stride,
                            shared};
    const bool over_bank = stage.over_bank && s > 0;
    for (int64_t i = threadIdx.x; over_bank && i < eligible; i += kThreads) {
      chosen_list[i] = eligible_list[i];
    }
    __syncthreads();
    const int64_t left =
        keep_best_bounded(over_bank ? chosen_list : list, over_bank ? eligible : alive, stage.keep, scores);
    alive = over_bank ? intersect(list, alive, chosen_list, left, shared.block) : left;
    if (s == plan.stage_count - 1) {
      const Pairs pairs = space.pair_stride == 0 ? Pairs{shared.band_key, shared.band_id}
                                                 : Pairs{space.pairs.key + row * space.pair_stride,
                                                         space.pairs.id + row * space.pair_stride};
      fill_pairs(pairs, list, alive, [](uint32_t) { return uint64_t{0}; });
      score_list(scores, pairs.id, alive, pairs.key);
      sort_pairs(pairs, alive);
      write_row(pairs, alive, stage.keep, answer.index + query * stage.keep, answer.similarity + query * stage.keep);
    }
  }
}

}  // namespace cascade::cuda
