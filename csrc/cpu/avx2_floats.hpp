// What AVX2 does with float32, for its translation unit alone: inner products with chosen keys, and counting.
#pragma once

#include <immintrin.h>

#include "cpu/isa_generic.hpp"

namespace cascade::cpu {
namespace {
namespace avx2 {

inline __m256 load8(const float* key) { return _mm256_loadu_ps(key); }
inline __m256 load8(const Float16* key) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(key)));
}
inline __m256 load8(const BFloat16* key) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(key)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

// Chosen rows are scattered: asks for those that come soon.
template <class T>
inline void prefetch(const Matrix& keys, const int64_t* rows, int64_t first, int64_t end, int64_t count) {
  for (int64_t i = first; i < end && i < count; ++i) {
    const T* key = static_cast<const T*>(keys.data) + rows[i] * keys.stride;
    for (int64_t d = 0; d < keys.columns; d += 64 / static_cast<int64_t>(sizeof(T)))
      _mm_prefetch(reinterpret_cast<const char*>(key + d), _MM_HINT_T0);
  }
}

template <int rows, class T>
inline void dot_rows_float(const float* query, const T* const (&key)[rows], int64_t dim, float* out) {
  __m256 low[rows], high[rows];
  for (int row = 0; row < rows; ++row) low[row] = high[row] = _mm256_setzero_ps();
  const auto add = [&](int row, int64_t d, const T* values) {
    low[row] = _mm256_fmadd_ps(_mm256_loadu_ps(query + d), load8(values), low[row]);
    high[row] = _mm256_fmadd_ps(_mm256_loadu_ps(query + d + 8), load8(values + 8), high[row]);
  };
  int64_t d = 0;
  for (; d + 16 <= dim; d += 16)
    for (int row = 0; row < rows; ++row) add(row, d, key[row] + d);
  if (d < dim)
    for (int row = 0; row < rows; ++row) {
      T rest[16] = {};
      for (int64_t lane = 0; d + lane < dim; ++lane) rest[lane] = key[row][d + lane];
      add(row, d, rest);
    }
  for (int row = 0; row < rows; ++row) {
    const __m256 t = _mm256_add_ps(low[row], high[row]);
    __m128 u = _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
    u = _mm_add_ps(u, _mm_movehl_ps(u, u));
    out[row] = _mm_cvtss_f32(_mm_add_ss(u, _mm_movehdup_ps(u)));
  }
}

template <class T>
void dots_float_of(const float* query, const Matrix& keys, const int64_t* rows, int64_t count, float* out) {
  constexpr int64_t ahead = 8;
  const auto row = [&](int64_t i) { return static_cast<const T*>(keys.data) + rows[i] * keys.stride; };
  prefetch<T>(keys, rows, 4, ahead, count);
  generic::by_fours<T>(count, row, [&](const auto& key, int64_t i) {
    prefetch<T>(keys, rows, i + ahead, i + ahead + 4, count);
    dot_rows_float(query, key, keys.columns, out + i);
  });
}

inline void dots_float(const float* query, const Matrix& keys, const int64_t* rows, int64_t count, float* out) {
  if (keys.dtype == DType::float32) dots_float_of<float>(query, keys, rows, count, out);
  if (keys.dtype == DType::float16) dots_float_of<Float16>(query, keys, rows, count, out);
  if (keys.dtype == DType::bfloat16) dots_float_of<BFloat16>(query, keys, rows, count, out);
}

inline int64_t count_float(const float* value, int64_t n, float least) {
  const __m256 bound = _mm256_set1_ps(least);
  __m256i even = _mm256_setzero_si256(), odd = even;
  const auto reached = [&](int64_t at) {
    return _mm256_castps_si256(_mm256_cmp_ps(_mm256_loadu_ps(value + at), bound, _CMP_GE_OQ));
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    even = _mm256_sub_epi32(even, reached(i));
    odd = _mm256_sub_epi32(odd, reached(i + 8));
  }
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi32(even, odd));
  int64_t total = generic::count_float(value + i, n - i, least);
  for (const int32_t lane : lanes) total += lane;
  return total;
}

inline void range_float(const float* value, int64_t n, float over, float* low, float* high) {
  const __m256 bound = _mm256_set1_ps(over);
  const __m256 most = _mm256_set1_ps(__builtin_inff()), least = _mm256_set1_ps(-__builtin_inff());
  __m256 smallest = most, largest = least;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 x = _mm256_loadu_ps(value + i), counted = _mm256_cmp_ps(x, bound, _CMP_GT_OQ);
    smallest = _mm256_min_ps(smallest, _mm256_blendv_ps(most, x, counted));
    largest = _mm256_max_ps(largest, _mm256_blendv_ps(least, x, counted));
  }
  alignas(32) float s[8], l[8];
  _mm256_store_ps(s, smallest);
  _mm256_store_ps(l, largest);
  generic::range_float(value + i, n - i, over, low, high);
  for (int lane = 0; lane < 8; ++lane) {
    *low = s[lane] < *low ? s[lane] : *low;
    *high = l[lane] > *high ? l[lane] : *high;
  }
}

}  // namespace avx2
}  // namespace
}  // namespace cascade::cpu
