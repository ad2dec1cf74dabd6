// Rows of a view as halves for the tensor cores, with the exact size of what rounding took away.
#pragma once

#include "cuda/backend.hpp"
#include "cuda/exact.cuh"

namespace cascade::cuda {

constexpr int kPackedChunk = 32;  // halves: packed rows are padded with zeros to whole chunks of 64 bytes
constexpr int kPackThreads = 256;

// Largest values over a bank's rows, as bits of non-negative doubles, whose order is the numbers' own.
struct PackedRange {
  unsigned long long stored;    // |x| as stored: fixes the scale 2^-e that brings every row under length 2
  unsigned long long norm;      // |x'| of the scaled rows
  unsigned long long residual;  // |x' - half(x')|
};

static_assert(sizeof(PackedRange) == kPackedRangeBytes);

struct PackArguments {
  Matrix keys[kMaxViews];  // [K, D]
  PackedKeys packed[kMaxViews];
};

__device__ inline double number(unsigned long long bits) { return ops::bits_to_double(bits); }
__device__ inline unsigned long long bits_of(double value) {  // of a number that is not negative
  return ordered(value) & ~(uint64_t{1} << 63);
}

// The exponent e with 2^e <= value < 2^(e+1); 0 for 0.
__device__ inline int exponent_of(double value) {
  return value > 0 ? static_cast<int>(bits_of(value) >> 52) - 1023 : 0;
}
__device__ inline double two_to(int exponent) {
  return ops::bits_to_double(static_cast<uint64_t>(exponent + 1023) << 52);
}

__device__ inline double sum_over_warp(double value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
  }
  return value;
}

// |row|, by a warp.
__device__ inline double row_norm(const Matrix& matrix, int64_t row) {
  double sum = 0;
  for (int64_t d = threadIdx.x & 31; d < matrix.columns; d += 32) {
    const double x = element(matrix.data, row * matrix.stride + d, matrix.dtype);
    sum += x * x;
  }
  return ops::root(sum_over_warp(sum));
}

struct PackedRow {
  double norm, residual;  // |x'| and |x' - half(x')|
};

// Rounds factor * row to halves, zeros up to `pitch`, by a warp; `put(d, two)` takes halves d and d + 1.
template <class Put>
__device__ PackedRow pack_row(const Matrix& matrix, int64_t row, double factor, int64_t pitch, Put put) {
  double norm = 0, residual = 0;
  for (int64_t d = 2 * (threadIdx.x & 31); d < pitch; d += 64) {
    uint32_t two = 0;
    for (int i = 0; i < 2; ++i) {
      if (d + i < matrix.columns) {
        const double scaled = factor * element(matrix.data, row * matrix.stride + d + i, matrix.dtype);
        const double bounded = scaled > 65504 ? 65504 : scaled < -65504 ? -65504 : scaled;
        const uint16_t half = ops::float_to_half(static_cast<float>(bounded));
        const double off = scaled - ops::half_to_float(half);
        norm += scaled * scaled;
        residual += off * off;
        two |= uint32_t{half} << 16 * i;
      }
    }
    put(d, two);
  }
  return {ops::root(sum_over_warp(norm)), ops::root(sum_over_warp(residual))};
}

// Finds the longest row of each view. grid: (ceil(rows / 8), views)
__global__ void __launch_bounds__(kPackThreads, 2) measure_rows(const PackArguments arguments,  // V views
                                                                const int64_t first,  // rows first to first + rows - 1
                                                                const int64_t rows    //
) {
  const Matrix& keys = arguments.keys[blockIdx.y];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kPackThreads / 32) + threadIdx.x / 32;
  if (row >= rows) {
    return;
  }
  const double norm = row_norm(keys, first + row);
  if ((threadIdx.x & 31) == 0) {
    atomicMax(&arguments.packed[blockIdx.y].range->stored, bits_of(norm));
  }
}

// Packs one row of a view's keys, by a warp. The scale stays, and a row that is longer than all before it, or that
// rounding takes more from, only widens the bounds.
__device__ inline void pack_stored_row(const Matrix& keys, const PackedKeys& packed, Metric metric, int64_t row) {
  double factor = two_to(-exponent_of(number(packed.range->stored)));
  if (metric == Metric::cosine) {
    const double norm = row_norm(keys, row);
    factor = norm > 0 ? 1 / norm : 0;
  }
  const PackedRow found = pack_row(keys, row, factor, packed.pitch, [&](int64_t d, uint32_t two) {
    ops::store(reinterpret_cast<uint32_t*>(packed.rows + row * packed.pitch + d), two);
  });
  if ((threadIdx.x & 31) == 0) {
    ops::store(packed.squares + row, static_cast<float>(found.norm * found.norm));
    atomicMax(&packed.range->norm, bits_of(found.norm));
    atomicMax(&packed.range->residual, bits_of(found.residual));
  }
}

// Packs rows of each view. grid: (ceil(rows / 8), views)
__global__ void __launch_bounds__(kPackThreads, 2) pack_rows(const PackArguments arguments,  // V views
                                                             const Metric metric,            //
                                                             const int64_t first,  // rows first to first + rows - 1
                                                             const int64_t rows    //
) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kPackThreads / 32) + threadIdx.x / 32;
  if (row < rows) {
    pack_stored_row(arguments.keys[blockIdx.y], arguments.packed[blockIdx.y], metric, first + row);
  }
}

}  // namespace cascade::cuda
