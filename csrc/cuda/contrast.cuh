// The contrastive loss and its gradients in one launch and one pass over the keys.
//
// As in attention, a running softmax over the keys also sums the keys themselves, weighted: that sum is the query's
// gradient. Members of P are kept out of the running sums, since there loss and gradient would be small differences of
// large numbers. Each block takes 16 queries and a run of keys; the last block of a query tile merges the runs, scores
// and adds the members, and writes. Sums are float32 in two levels (within 32 columns or 128 keys, then over those);
// what is there once per query is float64.
#pragma once

#include "cuda/contrast_members.cuh"

namespace cascade::cuda {

// Products of the block's queries with a tile of keys: of the warp's two queries with four keys a lane.
__device__ inline void nce_products(const NceProblem& p, int64_t query0, int64_t key0, NceShared& shared,
                                    float (&scores)[2][4]) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp = thread / 32;
  for (int64_t d0 = 0; d0 < p.keys.columns; d0 += kNceDepth) {
    __syncthreads();
    for (int at = thread; at < (kNceQueries + kNceKeys) * kNceDepth; at += kNceThreads) {
      const int line = at / kNceDepth, d = at % kNceDepth;
      const bool is_query = line < kNceQueries;
      const Matrix& side = is_query ? p.queries : p.keys;
      const int64_t row = is_query ? query0 + line : key0 + line - kNceQueries;
      const bool inside = row < side.rows && d0 + d < side.columns;
      const float value = inside ? element(side.data, row * side.stride + d0 + d, side.dtype) : 0;
      (is_query ? shared.query[line][d] : shared.key[line - kNceQueries][d]) = value;
    }
    __syncthreads();
    float part[2][4] = {};
#pragma unroll 8
    for (int d = 0; d < kNceDepth; ++d) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float key = shared.key[lane + 32 * j][d];
        part[0][j] += shared.query[2 * warp][d] * key;
        part[1][j] += shared.query[2 * warp + 1][d] * key;
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      scores[0][j] += part[0][j];
      scores[1][j] += part[1][j];
    }
  }
}

// Adds the tile's keys, by their weights, to the run's direction; `fresh` where nothing is there yet.
__device__ inline void add_directions(const NceProblem& p, float* direction, int64_t key0, bool fresh,
                                      const NceShared& shared) {
  constexpr int kMine = kNceQueries * kNceColumns / kNceThreads;
  const int first = static_cast<int>(threadIdx.x) / kNceColumns * kMine;
  const int64_t columns = p.keys.columns;
  const int64_t inside = p.keys.rows - key0;
  const int count = inside < kNceKeys ? static_cast<int>(inside) : kNceKeys;
  for (int64_t d = threadIdx.x % kNceColumns; d < columns; d += kNceColumns) {
    float sums[kMine] = {};
    for (int k = 0; k < count; ++k) {
      const float key = element(p.keys.data, (key0 + k) * p.keys.stride + d, p.keys.dtype);
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        sums[i] += shared.weight[k][first + i] * key;
      }
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      float* const at = direction + (first + i) * columns + d;
      ops::store(at, fresh ? sums[i] : ops::load(at) * shared.shrink[first + i] + sums[i]);
    }
  }
}

__device__ inline double log_add(double a, double b) {  // log(exp(a) + exp(b))
  const double high = a > b ? a : b, low = a > b ? b : a;
  return low == -INFINITY ? high : high + log1p(exp(low - high));
}
__device__ inline double sigmoid(double x) { return x < 0 ? exp(x) / (1 + exp(x)) : 1 / (1 + exp(-x)); }

// Merges the runs of one query and writes its loss and gradients, by a warp; `scale` has room for a number per run.
__device__ inline void finish_query(const NceProblem& p, const NceSpace& space, int64_t query, int runs,
                                    double* scale) {
  const int lane = static_cast<int>(threadIdx.x & 31);
  const double own = ops::load(p.own + query);
  float top = static_cast<float>(own);
  for (int run = lane; run < runs; run += 32) {
    const float other = ops::load_shared_by_blocks(space.top + run * space.rows + query);
    top = other > top ? other : top;
  }
  top = largest_over_warp(top);
  double sum = 0;
  for (int run = lane; run < runs; run += 32) {
    const double other = ops::load_shared_by_blocks(space.top + run * space.rows + query);
    sum += ops::load_shared_by_blocks(space.sum + run * space.rows + query) * exp(other - top);
  }
  sum = sum_over_warp(sum);
  const Inside inside = nce_members(p, space, query);
  const bool kept = p.own_positive && !(inside.count > 0 && ops::load(p.drop + query));
  const auto size = static_cast<double>(inside.count + (kept ? 1 : 0));
  const double rest = log_add(top + log(sum), kept ? -INFINITY : own);
  const double in = log_add(inside.lse, kept ? own : -INFINITY);
  const double all = log_add(rest, in);
  const bool counted = size > 0;
  if (lane == 0) {
    const double apart = rest - in;
    const double by_mean = all - (inside.total + (kept ? own : 0)) / size;
    const double by_sum = apart > 0 ? apart + log1p(exp(-apart)) : log1p(exp(apart));
    ops::store(p.loss + query, !counted ? 0 : p.mean_log ? by_mean : by_sum);
    ops::store(p.counted + query, counted);
  }
  if (p.to_query == nullptr) {
    return;
  }
  const double share = sigmoid(rest - in);  // the mass outside P
  const auto of_member = [&](double score) {
    return p.mean_log ? exp(score - all) - 1 / size : -exp(score - in) * share;
  };
  if (lane == 0) {
    ops::store(p.to_own + query, !counted ? 0.0F : static_cast<float>(kept ? of_member(own) : exp(own - all)));
  }
  for (int run = lane; run < runs; run += 32) {
    const double other = ops::load_shared_by_blocks(space.top + run * space.rows + query);
    scale[run] = counted ? exp(other - all) / p.temperature : 0;
  }
  __syncwarp();
  for (int64_t d = lane; d < p.keys.columns; d += 32) {
    float total = 0;
    for (int run = 0; run < runs && p.keys.rows > 0; ++run) {
      const float* const from = space.direction + (run * space.rows + query) * p.keys.columns + d;
      total += static_cast<float>(scale[run]) * ops::load_shared_by_blocks(from);
    }
    ops::store(p.to_query + query * p.keys.columns + d, total);
  }
  __syncwarp();
  if (counted) {
    add_members(p, space, query, [&](double score) { return of_member(score) / p.temperature; });
  }
  __syncwarp();
}

// Losses and gradients of all queries. grid: (ceil(B / 16), runs of keys)
__global__ void __launch_bounds__(kNceThreads, 2) contrast_keys(const NceProblem p, const NceSpace space) {
  auto& shared = *reinterpret_cast<NceShared*>(ops::shared_memory());
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp = thread / 32;
  const int64_t query0 = static_cast<int64_t>(blockIdx.x) * kNceQueries;
  const int64_t tiles = (p.keys.rows + kNceKeys - 1) / kNceKeys;
  const int64_t first_tile = tiles * blockIdx.y / gridDim.y, last_tile = tiles * (blockIdx.y + 1) / gridDim.y;
  float* const direction =
      space.direction == nullptr ? nullptr : space.direction + (blockIdx.y * space.rows + query0) * p.keys.columns;
  float top[2];
  double sum[2] = {};
  for (int i = 0; i < 2; ++i) {
    const int64_t query = query0 + 2 * warp + i;
    top[i] = query < p.queries.rows ? ops::load(p.own + query) : 0;
  }
  if (thread < kNceQueries && knows_siblings(p)) {  // read after the first tile's barrier
    shared.video[thread] = query0 + thread < p.queries.rows ? ops::load(p.query_video + query0 + thread) : 0;
  }
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const int64_t key0 = tile * kNceKeys;
    for (int key = thread; key < kNceKeys; key += kNceThreads) {
      shared.skip[key] = key0 + key < p.keys.rows ? 0 : kAllLanes;
    }
    __syncthreads();
    mark_tile(p, space, query0, key0, shared);
    float scores[2][4] = {};
    nce_products(p, query0, key0, shared, scores);  // its barriers come before the marks are read
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < 2; ++i) {
        scores[i][j] /= static_cast<float>(p.temperature);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = 2 * warp + i;
      float best = top[i], total = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool counts = !(shared.skip[lane + 32 * j] >> query & 1);
        best = counts && scores[i][j] > best ? scores[i][j] : best;
      }
      best = largest_over_warp(best);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool counts = !(shared.skip[lane + 32 * j] >> query & 1);
        const float weight = counts ? expf(scores[i][j] - best) : 0;
        shared.weight[lane + 32 * j][query] = weight;
        total += weight;
      }
      const float shrink = expf(top[i] - best);
      sum[i] = sum[i] * shrink + float_sum_over_warp(total);
      top[i] = best;
      if (lane == 0) {
        shared.shrink[query] = shrink;
      }
    }
    __syncthreads();
    if (direction != nullptr) {
      add_directions(p, direction, key0, tile == first_tile, shared);
    }
  }
  for (int i = 0; i < 2 && lane == 0; ++i) {
    const int64_t at = blockIdx.y * space.rows + query0 + 2 * warp + i;
    ops::store(space.top + at, top[i]);
    ops::store(space.sum + at, sum[i]);
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    shared.last = atomicAdd(space.counts + blockIdx.x, 1u) == gridDim.y - 1;
  }
  __syncthreads();
  if (!shared.last) {
    return;
  }
  __threadfence();
  for (int i = 0; i < 2; ++i) {
    const int64_t query = query0 + 2 * warp + i;
    if (query < p.queries.rows) {
      finish_query(p, space, query, static_cast<int>(gridDim.y), shared.run_scale[warp]);
    }
  }
}

}  // namespace cascade::cuda
