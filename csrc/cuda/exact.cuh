// Float64 similarities by the contract: eight running sums, one for each index modulo 8, then a fixed tree.
#pragma once

#include "core/order.hpp"
#include "cuda/arguments.hpp"
#include "cuda/ops.cuh"

namespace cascade::cuda {

// Element `at` of stored data, exactly.
__device__ inline float element(const void* data, int64_t at, DType dtype) {
  if (dtype == DType::float32) {
    return ops::load(static_cast<const float*>(data) + at);
  }
  const uint16_t bits = ops::load(static_cast<const uint16_t*>(data) + at);
  return dtype == DType::float16 ? ops::half_to_float(bits) : ops::bits_to_float(uint32_t{bits} << 16);
}

__device__ inline double tree(const double (&s)[8]) {
  return ops::add(ops::add(ops::add(s[0], s[4]), ops::add(s[2], s[6])),
                  ops::add(ops::add(s[1], s[5]), ops::add(s[3], s[7])));
}

// Inner product of row i of a and row j of b, by one thread: running sums one after the other, in the order in which
// the tree wants them (bits of the index reversed), which keeps code and registers few.
__device__ inline double dot(const Matrix& a, int64_t i, const Matrix& b, int64_t j) {
  double pair = 0, four = 0, half = 0;
#pragma unroll 1
  for (int step = 0;; ++step) {
    double sum = 0;
#pragma unroll 1
    for (int64_t d = (step & 1) * 4 + (step & 2) + (step >> 2); d < a.columns; d += 8) {
      sum = ops::fused(element(a.data, i * a.stride + d, a.dtype), element(b.data, j * b.stride + d, b.dtype), sum);
    }
    if (!(step & 1)) {
      pair = sum;
      continue;
    }
    sum = ops::add(pair, sum);
    if (!(step & 2)) {
      four = sum;
      continue;
    }
    sum = ops::add(four, sum);
    if (step == 7) {
      return ops::add(half, sum);
    }
    half = sum;
  }
}

// The same by eight neighbouring lanes, one running sum each; all eight get the result. The whole warp calls it.
__device__ inline double dot_by_eight(const Matrix& a, int64_t i, const Matrix& b, int64_t j) {
  double sum = 0;
  for (int64_t d = threadIdx.x & 7; d < a.columns; d += 8) {
    sum = ops::fused(element(a.data, i * a.stride + d, a.dtype), element(b.data, j * b.stride + d, b.dtype), sum);
  }
  for (int lanes = 4; lanes > 0; lanes /= 2) {  // s + s4, then + s2, then + s1: the contract's tree
    sum = ops::add(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, lanes));
  }
  return sum;
}

// The metric's similarity from inner products; larger is more similar.
__device__ inline double similarity(Metric metric, double product, double query_norm, double key_norm) {
  if (metric == Metric::l2) {
    return -ops::add(ops::add(query_norm, -2 * product), key_norm);
  }
  if (metric == Metric::cosine) {
    const double norms = ops::multiply(ops::root(query_norm), ops::root(key_norm));
    return norms != 0 ? ops::divide(product, norms) : 0;
  }
  return product;
}

constexpr int kExactQueries = 16;  // rows of a block's tile of scores
constexpr int kExactKeys = 32;
constexpr int kExactDepth = 32;  // columns held at a time
constexpr int kExactThreads = 256;
constexpr int kKeysPerThread = kExactQueries * kExactKeys / kExactThreads;

struct ExactShared {
  float query[kExactQueries][kExactDepth];
  float key[kExactKeys][kExactDepth + 1];  // one more column: threads read down a column without bank conflicts
  double query_norm[kExactQueries];
  double key_norm[kExactKeys];
};

// Float64 scores of queries first_query to first_query + rows - 1 with all keys.
// grid: (ceil(K / 32), ceil(rows / 16), views)
__global__ void __launch_bounds__(kExactThreads) exact_scores(const Views views,           // V views
                                                              const Metric metric,         //
                                                              const int64_t first_query,   //
                                                              const int64_t rows,          //
                                                              double* __restrict__ scores  // [V, rows, K]
) {
  auto& shared = *reinterpret_cast<ExactShared*>(ops::shared_memory());
  const Matrix& queries = views.view[blockIdx.z].queries;
  const Matrix& keys = views.view[blockIdx.z].keys;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t query0 = static_cast<int64_t>(blockIdx.y) * kExactQueries;
  const int64_t key0 = static_cast<int64_t>(blockIdx.x) * kExactKeys;
  const int row = thread / (kExactThreads / kExactQueries), column = thread % (kExactThreads / kExactQueries);

  if (metric != Metric::inner_product && thread < kExactQueries + kExactKeys) {
    const bool is_query = thread < kExactQueries;
    const Matrix& side = is_query ? queries : keys;
    const int64_t at = is_query ? query0 + thread : key0 + thread - kExactQueries;
    const int64_t line = is_query ? first_query + at : at;
    const double norm = at < (is_query ? rows : keys.rows) ? dot(side, line, side, line) : 0;
    (is_query ? shared.query_norm[thread] : shared.key_norm[thread - kExactQueries]) = norm;
  }
  double sums[kKeysPerThread][8] = {};
  for (int64_t d0 = 0; d0 < queries.columns; d0 += kExactDepth) {
    __syncthreads();
    for (int at = thread; at < (kExactQueries + kExactKeys) * kExactDepth; at += kExactThreads) {
      const int line = at / kExactDepth, d = at % kExactDepth;
      const bool is_query = line < kExactQueries;
      const int64_t local = is_query ? query0 + line : key0 + line - kExactQueries;
      const bool inside = local < (is_query ? rows : keys.rows) && d0 + d < queries.columns;
      const Matrix& side = is_query ? queries : keys;
      const int64_t from = (is_query ? first_query + local : local) * side.stride + d0 + d;
      const float value = inside ? element(side.data, from, side.dtype) : 0;
      (is_query ? shared.query[line][d] : shared.key[line - kExactQueries][d]) = value;
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kExactDepth; ++d) {  // past the last column products are zero, which changes no sum
      const double q = shared.query[row][d];
#pragma unroll
      for (int j = 0; j < kKeysPerThread; ++j) {
        const double k = shared.key[column + j * (kExactThreads / kExactQueries)][d];
        sums[j][d % 8] = ops::fused(q, k, sums[j][d % 8]);
      }
    }
  }
  if (query0 + row >= rows) {
    return;
  }
#pragma unroll
  for (int j = 0; j < kKeysPerThread; ++j) {
    const int local = column + j * (kExactThreads / kExactQueries);
    if (key0 + local < keys.rows) {
      const bool norms = metric != Metric::inner_product;
      const double score =
          similarity(metric, tree(sums[j]), norms ? shared.query_norm[row] : 0, norms ? shared.key_norm[local] : 0);
      ops::store(scores + (blockIdx.z * rows + query0 + row) * keys.rows + key0 + local, score);
    }
  }
}

}  // namespace cascade::cuda
