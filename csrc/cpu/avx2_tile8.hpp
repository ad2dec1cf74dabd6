// The 8-bit tile of AVX2, for its translation unit alone: 6 queries x 16 keys at a time in 12 accumulators of 16-bit
// pairs, over the quarters of a block.
//
// vpmaddubsw multiplies unsigned bytes of keys by signed bytes of queries and adds neighbours, saturating. It never
// saturates here: keys' bytes lie in [1, 255] and queries' in [-64, 64], so 2 * 255 * 64 = 32,640 < 2^15.
// Widening an accumulator costs as much as a product does, so it is done once for a run of steps. Within a run the sums
// are kept modulo 2^16, from a start that takes back the 128 which keys' bytes carry. They may wrap on the way, but
// what they come to, the inner product of half a run of queries' and keys' signed bytes, is at most |q| |k| of the two
// halves by Cauchy-Schwarz; Packed8::pack_query keeps that below 2^15, so it is right in the end.
#pragma once

#include <immintrin.h>

#include "cpu/isa.hpp"

namespace cascade::cpu {
namespace {
namespace avx2 {

constexpr int queries8 = 6;

// As assembly: with the intrinsics GCC 12 copies every accumulator in every step.
inline __m256i broadcast8(const int8_t* bytes) {
  __m256i out;
  asm("vpbroadcastd %1, %0" : "=x"(out) : "m"(*reinterpret_cast<const int32_t (*)[1]>(bytes)), "m"(*bytes));
  return out;
}
inline void add_products8(__m256i& sum, __m256i keys, __m256i query) {
  __m256i product;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(keys), "x"(query));
}

inline void step_of(__m256i (&sum)[queries8][2], const int8_t* queries, const uint8_t* keys) {
  const auto* key = reinterpret_cast<const __m256i*>(keys);
  const __m256i low = _mm256_load_si256(key), high = _mm256_load_si256(key + 1);
#pragma GCC unroll 6
  for (int q = 0; q < queries8; ++q) {
    const __m256i word = broadcast8(queries + q * 4);
    add_products8(sum[q][0], low, word);
    add_products8(sum[q][1], high, word);
  }
}

// One run of `steps`, or a whole one, for 16 keys; adds to `total`, or begins it, whose rows are 64 apart. Not inlined:
// what its surroundings keep in registers would leave too few for the sums.
template <bool begins, bool whole>
[[gnu::noinline]] void run_of(const int8_t* queries, const uint8_t* keys, int64_t steps, const int32_t* start,
                              int64_t runs, int32_t* total) {
  __m256i sum[queries8][2];
#pragma GCC unroll 6
  for (int q = 0; q < queries8; ++q) sum[q][0] = sum[q][1] = _mm256_set1_epi32(start[q * runs]);
  if constexpr (whole) {
#pragma GCC unroll 8
    for (int64_t step = 0; step < run8; ++step) step_of(sum, queries + step * queries8 * 4, keys + step * lanes8 * 4);
  } else {
    for (int64_t step = 0; step < steps; ++step) step_of(sum, queries + step * queries8 * 4, keys + step * lanes8 * 4);
  }
  const __m256i ones = _mm256_set1_epi16(1);
  const auto add = [](int32_t* to, __m256i value) {
    auto* at = reinterpret_cast<__m256i*>(to);
    _mm256_store_si256(at, begins ? value : _mm256_add_epi32(_mm256_load_si256(at), value));
  };
#pragma GCC unroll 6
  for (int q = 0; q < queries8; ++q) {
    add(total + q * lanes8, _mm256_madd_epi16(sum[q][0], ones));
    add(total + q * lanes8 + 8, _mm256_madd_epi16(sum[q][1], ones));
  }
}

inline __m256 bounds_of(const int32_t* total, __m256 scale, __m256 residual, __m256 beta) {
  const __m256 value = _mm256_cvtepi32_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(total)));
  return _mm256_fmadd_ps(value, scale, _mm256_mul_ps(beta, residual));
}

// Which queries have a bound that reaches `least`. NaN never does.
inline uint32_t reached(const int32_t* total, const float* scale, const float* residual, const float* least,
                        const float* beta) {
  __m256 most[queries8], b[queries8];
#pragma GCC unroll 6
  for (int q = 0; q < queries8; ++q) {
    most[q] = _mm256_set1_ps(-__builtin_inff());
    b[q] = _mm256_set1_ps(beta[q]);
  }
  for (int lane = 0; lane < lanes8; lane += 8) {
    const __m256 s = _mm256_load_ps(scale + lane), r = _mm256_load_ps(residual + lane);
#pragma GCC unroll 6
    for (int q = 0; q < queries8; ++q)
      most[q] = _mm256_max_ps(bounds_of(total + q * lanes8 + lane, s, r, b[q]), most[q]);  // the latter for NaN
  }
  uint32_t any = 0;
#pragma GCC unroll 6
  for (int q = 0; q < queries8; ++q) {
    const int lanes = _mm256_movemask_ps(_mm256_cmp_ps(most[q], _mm256_set1_ps(least[q]), _CMP_GE_OQ));
    any |= static_cast<uint32_t>(lanes != 0) << q;
  }
  return any;
}

// Writes the bounds of one query and returns the lanes that reach `least`.
inline uint64_t write_bounds(const int32_t* total, const float* scale, const float* residual, float least, float beta,
                             float* upper) {
  uint64_t lanes = 0;
  for (int lane = 0; lane < lanes8; lane += 8) {
    const __m256 u =
        bounds_of(total + lane, _mm256_load_ps(scale + lane), _mm256_load_ps(residual + lane), _mm256_set1_ps(beta));
    _mm256_storeu_ps(upper + lane, u);
    const auto bits = _mm256_movemask_ps(_mm256_cmp_ps(u, _mm256_set1_ps(least), _CMP_GE_OQ));
    lanes |= static_cast<uint64_t>(bits) << lane;
  }
  return lanes;
}

inline uint32_t tile8(const int8_t* queries, const uint8_t* keys, int64_t steps, const int32_t* start,
                      const float* scale, const float* residual, const float* least, const float* beta, float* upper,
                      uint64_t* lanes) {
  alignas(32) int32_t total[queries8 * lanes8];
  const int64_t runs = (steps + run8 - 1) / run8;
  for (int lane = 0; lane < lanes8; lane += 16)
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t first = run * run8, rest = steps - first;
      const auto of = rest >= run8 ? (run == 0 ? run_of<true, true> : run_of<false, true>)
                                   : (run == 0 ? run_of<true, false> : run_of<false, false>);
      of(queries + first * queries8 * 4, keys + (first * lanes8 + lane) * 4, rest, start + run, runs, total + lane);
    }
  const uint32_t any = reached(total, scale, residual, least, beta);
  for (uint32_t left = any; left != 0; left &= left - 1) {
    const int q = __builtin_ctz(left);
    lanes[q] = write_bounds(total + q * lanes8, scale, residual, least[q], beta[q], upper + q * lanes8);
  }
  return any;
}

}  // namespace avx2
}  // namespace
}  // namespace cascade::cpu
