// The bound pass: similarities of a tile of queries with all keys on tensor cores, each stored as 16 bits together with
// a certified limit to its error.
//
// With q' = q^ + e_q and x' = x^ + e_x, q^ and x^ rounded to half: q'.x' - q^.x^ = e_q.x' + q^.e_x, so the error is at
// most |e_q| |x'| + |q^| |e_x|, whose four lengths were measured in float64. To that comes what the tensor cores do to
// the sum: see kMatrixError.
#pragma once

#include "cuda/pack.cuh"

namespace cascade::cuda {

// Error of one 16 x 8 x 16 product, in units of 2^-23 of the largest addend or partial sum. Products are exact; addends
// are aligned to the largest and truncated, in groups of 4, 8 or 16 products by generation, at no fewer than 24 bits
// (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7:e330, 2021).
// At worst every product is a group: 32 truncated addends and 16 truncated results.
constexpr double kMatrixError = 48;
constexpr int kSteps = 65535;  // a bound is a whole number from 0 to 65535
constexpr double kHalfSteps = 32767.5;
constexpr int kBoundThreads = 256;
constexpr int kBoundKeys = 128;  // keys of a tile
constexpr int kPipeline = 4;     // chunks of keys under way or in use

// How a tile of queries is spread over a block's 8 warps.
template <int kWarpRows, int kRowTiles, int kColumnTiles>
struct Shape {
  static constexpr int warp_rows = kWarpRows;
  static constexpr int warp_columns = kBoundThreads / 32 / kWarpRows;
  static constexpr int row_tiles = kRowTiles;        // of 16 queries, per warp
  static constexpr int column_tiles = kColumnTiles;  // of 8 keys, per warp
  static constexpr int queries = kWarpRows * kRowTiles * 16;
  static_assert(warp_columns * kColumnTiles * 8 == kBoundKeys && kColumnTiles % 2 == 0);
};
using WideShape = Shape<2, 2, 4>;    // 64 queries: rows of up to 512 halves
using NarrowShape = Shape<1, 1, 2>;  // 16 queries: rows of up to 2,048 halves

// What a query's bounds in one view mean: similarity = scale * (bound / 32767.5 - 1) - shift, within
// scale * slack / 32767.5.
struct BoundMeaning {
  double scale, shift, slack;
};

struct BoundViews {
  Matrix queries[kMaxViews];  // [B, D]
  PackedKeys keys[kMaxViews];
};

struct BoundSpace {
  uint16_t* bounds;       // [V, rows, stride]
  BoundMeaning* meaning;  // [V, rows]
  int64_t stride;         // K rounded up to 8
};

template <class S>
constexpr size_t bound_shared_bytes(int64_t pitch) {
  return static_cast<size_t>(S::queries * pitch + kPipeline * kBoundKeys * kPackedChunk) * sizeof(uint16_t) +
         2 * S::queries * sizeof(float);
}

// Where half d of a row lies in a tile of `rows` rows: chunks of 32 halves apart, and the four 16-byte pieces of a
// chunk permuted by row, so that the eight rows of a load_matrices fall into different banks.
__device__ inline int64_t swizzled(int64_t rows, int64_t row, int64_t d) {
  const int64_t piece = (d % kPackedChunk / 8) ^ (row / 2 % 4);
  return (d / kPackedChunk * rows + row) * kPackedChunk + piece * 8 + d % 8;
}

// The factors that turn a product into a bound, and the bound's meaning.
struct QueryBound {
  float product, square;
  BoundMeaning meaning;
};

__device__ inline QueryBound describe(Metric metric, const PackedRange& range, double query_norm, PackedRow query,
                                      int query_exponent, int64_t pitch) {
  const double longest = number(range.norm), residual = number(range.residual);
  const double rounded = (query.norm + query.residual) * (longest + residual);
  const double depth = static_cast<double>(pitch);
  const double error = query.residual * longest + (query.norm + query.residual) * residual +
                       kMatrixError * depth / 16 * 0x1p-23 * 1.01 * rounded + (depth + 32) * 0x1p-51 * rounded;
  const int key_exponent = metric == Metric::cosine ? 0 : exponent_of(number(range.stored));
  double reach = query.norm * longest, product = 1, square = 0, contract = 0, shift = 0;
  double unit = metric == Metric::cosine ? 1 : two_to(query_exponent) * two_to(key_exponent);
  if (metric == Metric::l2) {  // in units of 2^(2 key_exponent)
    unit = two_to(key_exponent) * two_to(key_exponent);
    product = query_norm > 0 ? 2 * two_to(query_exponent) / two_to(key_exponent) : 0;
    square = 1;
    reach = product * reach + longest * longest;
    shift = query_norm * query_norm;
    // squares' float32, then the contract's own rounding: a dot product of D columns is off by less than (D / 8 + 3)
    // 2^-53 times the product of its lengths, -((q.q - 2 q.x) + x.x) rounds twice more, and `shift` is q.q by another
    // order of summation, off by less than (D / 32 + 9) 2^-53 of itself. With |x| <= longest it is all within (D + 32)
    // 2^-51 (shift + reach). Of that what q.q adds is the same for every key of the view, but not for the other views
    // that min and max compare with it.
    contract = longest * longest * 0x1p-23 + (depth + 32) * 0x1p-51 * (shift / unit + reach);
  }
  reach *= 1 + 1e-9;
  const double per_step = reach > 0 ? kHalfSteps / reach : 0;
  return {static_cast<float>(product * per_step),
          static_cast<float>(square * per_step),
          {reach * unit, shift, (product * error + contract) * per_step * (1 + 1e-9) + 0.6}};
}

// Bounds of queries first_query to first_query + rows - 1 with all keys.
// grid: (blocks that share the tiles of 128 keys, ceil(rows / S::queries), views)
template <class S>
__global__ void __launch_bounds__(kBoundThreads) bound_scores(const BoundViews views,     // V views
                                                              const Metric metric,        //
                                                              const int64_t keys,         // K
                                                              const int64_t first_query,  //
                                                              const int64_t rows,         //
                                                              const BoundSpace space      //
) {
  const Matrix& queries = views.queries[blockIdx.z];
  const PackedKeys& packed = views.keys[blockIdx.z];
  const int64_t pitch = packed.pitch;
  auto* const query_tile = reinterpret_cast<uint16_t*>(ops::shared_memory());  // [pitch / 32][queries][32]
  uint16_t* const pipeline = query_tile + S::queries * pitch;                  // [kPipeline][128][32]
  auto* const product = reinterpret_cast<float*>(pipeline + kPipeline * kBoundKeys * kPackedChunk);  // [queries]
  float* const square = product + S::queries;                                                        // [queries]
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp = thread / 32;
  const int64_t query0 = static_cast<int64_t>(blockIdx.y) * S::queries;
  const int64_t key_tiles = (keys + kBoundKeys - 1) / kBoundKeys;
  const int64_t my_tiles = (key_tiles - blockIdx.x + gridDim.x - 1) / gridDim.x;
  const int64_t chunks = pitch / kPackedChunk, steps = my_tiles * chunks;

  const auto fetch = [&](int64_t step) {
    if (step < steps) {
      const int64_t tile = blockIdx.x + step / chunks * gridDim.x, chunk = step % chunks;
      uint16_t* const to = pipeline + step % kPipeline * kBoundKeys * kPackedChunk;
      for (int piece = thread; piece < kBoundKeys * 4; piece += kBoundThreads) {
        const int row = piece / 4, d = piece % 4 * 8;
        const int64_t wanted = tile * kBoundKeys + row, key = wanted < keys ? wanted : keys - 1;
        ops::copy_async_16(to + swizzled(kBoundKeys, row, d), packed.rows + key * pitch + chunk * kPackedChunk + d);
      }
    }
    ops::commit_copies();
  };
  for (int step = 0; step < kPipeline - 1; ++step) {
    fetch(step);
  }

  for (int row = warp; row < S::queries; row += kBoundThreads / 32) {
    const bool inside = query0 + row < rows;
    const int64_t query = first_query + (inside ? query0 + row : 0);
    const double norm = row_norm(queries, query);
    const int exponent = metric == Metric::cosine ? 0 : exponent_of(norm);
    const double factor = metric != Metric::cosine ? two_to(-exponent) : norm > 0 ? 1 / norm : 0;
    const PackedRow found = pack_row(queries, query, inside ? factor : 0, pitch, [&](int64_t d, uint32_t two) {
      *reinterpret_cast<uint32_t*>(query_tile + swizzled(S::queries, row, d)) = two;
    });
    if (lane == 0) {
      const QueryBound bound = describe(metric, *packed.range, norm, found, exponent, pitch);
      product[row] = bound.product;
      square[row] = bound.square;
      if (inside && blockIdx.x == 0) {
        space.meaning[blockIdx.z * rows + query0 + row] = bound.meaning;
      }
    }
  }

  const int warp_row = warp / S::warp_columns * S::row_tiles * 16;
  const int warp_column = warp % S::warp_columns * S::column_tiles * 8;
  float sums[S::row_tiles][S::column_tiles][4] = {};
  for (int64_t step = 0; step < steps; ++step) {
    ops::wait_copies<kPipeline - 2>();
    __syncthreads();
    fetch(step + kPipeline - 1);
    const uint16_t* const key_tile = pipeline + step % kPipeline * kBoundKeys * kPackedChunk;
    const int64_t chunk = step % chunks;
#pragma unroll
    for (int k = 0; k < kPackedChunk; k += 16) {
      uint32_t a[S::row_tiles][4], b[S::column_tiles / 2][4];
#pragma unroll
      for (int m = 0; m < S::row_tiles; ++m) {
        const int row = warp_row + m * 16 + lane % 16;
        ops::load_matrices(a[m], query_tile + swizzled(S::queries, row, chunk * kPackedChunk + k + lane / 16 * 8));
      }
#pragma unroll
      for (int n = 0; n < S::column_tiles / 2; ++n) {
        const int row = warp_column + n * 16 + lane % 8 + lane / 16 * 8;
        ops::load_matrices(b[n], key_tile + swizzled(kBoundKeys, row, k + lane / 8 % 2 * 8));
      }
#pragma unroll
      for (int m = 0; m < S::row_tiles; ++m) {
#pragma unroll
        for (int n = 0; n < S::column_tiles; ++n) {
          const uint32_t pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
          ops::multiply_add(sums[m][n], a[m], pair);
        }
      }
    }
    if (chunk != chunks - 1) {
      continue;
    }
    const int64_t key0 = (blockIdx.x + step / chunks * gridDim.x) * kBoundKeys;
#pragma unroll
    for (int m = 0; m < S::row_tiles; ++m) {
#pragma unroll
      for (int n = 0; n < S::column_tiles; ++n) {
        const int64_t key = key0 + warp_column + n * 8 + lane % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row + m * 16 + lane / 4 + half * 8;
          uint32_t two = 0;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float value = sums[m][n][half * 2 + i] * product[row] + static_cast<float>(kHalfSteps);
            if (metric == Metric::l2 && key + i < keys) {
              value -= ops::load(packed.squares + key + i) * square[row];
            }
            value = value < 0 ? 0 : value > kSteps ? kSteps : value;
            two |= static_cast<uint32_t>(value + 0.5f) << 16 * i;
            sums[m][n][half * 2 + i] = 0;
          }
          if (key < keys && query0 + row < rows) {
            ops::store(
                reinterpret_cast<uint32_t*>(space.bounds + (blockIdx.z * rows + query0 + row) * space.stride + key),
                two);
          }
        }
      }
    }
  }
  ops::wait_copies<0>();
}

}  // namespace cascade::cuda
