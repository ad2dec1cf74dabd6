// AVX2 with FMA and F16C (Haswell, Zen and later): vpmaddwd for the tiles; selection is compiled from the plain loops.
#include <immintrin.h>

#include "cpu/isa_generic.hpp"

namespace cascade::cpu {
namespace {

inline __m256d load4(const float* key) { return _mm256_cvtps_pd(_mm_loadu_ps(key)); }
inline __m256d load4(const Float16* key) {
  return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(key))));
}
inline __m256d load4(const BFloat16* key) {
  const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(key)));
  return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
}

// The contract's sums s0..s3 and s4..s7 in two accumulators per key; two keys at a time hide latency.
template <int rows, class T>
inline void dot_rows(const double* query, const T* const (&key)[rows], int64_t dim, double* out) {
  __m256d low[rows], high[rows];
  for (int row = 0; row < rows; ++row) low[row] = high[row] = _mm256_setzero_pd();
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8) {
    const __m256d q0 = _mm256_loadu_pd(query + d), q1 = _mm256_loadu_pd(query + d + 4);
    for (int row = 0; row < rows; ++row) {
      low[row] = _mm256_fmadd_pd(q0, load4(key[row] + d), low[row]);
      high[row] = _mm256_fmadd_pd(q1, load4(key[row] + d + 4), high[row]);
    }
  }
  if (d < dim) {
    const __m256d q0 = _mm256_loadu_pd(query + d), q1 = _mm256_loadu_pd(query + d + 4);
    for (int row = 0; row < rows; ++row) {
      T rest[8] = {};
      for (int64_t lane = 0; d + lane < dim; ++lane) rest[lane] = key[row][d + lane];
      low[row] = _mm256_fmadd_pd(q0, load4(rest), low[row]);
      high[row] = _mm256_fmadd_pd(q1, load4(rest + 4), high[row]);
    }
  }
  for (int row = 0; row < rows; ++row) {
    const __m256d t = _mm256_add_pd(low[row], high[row]);
    const __m128d u = _mm_add_pd(_mm256_castpd256_pd128(t), _mm256_extractf128_pd(t, 1));
    out[row] = _mm_cvtsd_f64(_mm_add_sd(u, _mm_unpackhi_pd(u, u)));
  }
}

template <class T>
void dots_of(const double* query, const Matrix& keys, const int64_t* rows, int64_t first, int64_t count, double* out) {
  const auto* data = static_cast<const T*>(keys.data);
  const auto row = [&](int64_t i) { return data + (rows != nullptr ? rows[i] : first + i) * keys.stride; };
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    const T* const key[2] = {row(i), row(i + 1)};
    dot_rows(query, key, keys.columns, out + i);
  }
  for (; i < count; ++i) {
    const T* const key[1] = {row(i)};
    dot_rows(query, key, keys.columns, out + i);
  }
}

void dots(const double* query, const Matrix& keys, const int64_t* rows, int64_t first, int64_t count, double* out) {
  if (keys.dtype == DType::float32) dots_of<float>(query, keys, rows, first, count, out);
  if (keys.dtype == DType::float16) dots_of<Float16>(query, keys, rows, first, count, out);
  if (keys.dtype == DType::bfloat16) dots_of<BFloat16>(query, keys, rows, first, count, out);
}

// 4 queries x 16 keys in 8 accumulators, over both halves of the block.
void tile16(const int32_t* queries, int count, const int32_t* keys, int64_t steps, int16_t* out, int64_t stride) {
  constexpr int together = 4;
  for (int q = 0; q < count; q += together)
    for (int half = 0; half < lanes16; half += 16) {
      __m256i sum[together][2];
      for (auto& each : sum) each[0] = each[1] = _mm256_setzero_si256();
      for (int64_t step = 0; step < steps; ++step) {
        const auto* block = reinterpret_cast<const __m256i*>(keys + step * lanes16 + half);
        const __m256i low = _mm256_load_si256(block), high = _mm256_load_si256(block + 1);
#pragma GCC unroll 4
        for (int row = 0; row < together; ++row) {
          const __m256i word = _mm256_set1_epi32(queries[step * count + q + row]);
          sum[row][0] = _mm256_add_epi32(sum[row][0], _mm256_madd_epi16(low, word));
          sum[row][1] = _mm256_add_epi32(sum[row][1], _mm256_madd_epi16(high, word));
        }
      }
      for (int row = 0; row < together; ++row) {
        const __m256i packed =
            _mm256_packs_epi32(_mm256_srai_epi32(sum[row][0], 16), _mm256_srai_epi32(sum[row][1], 16));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (q + row) * stride + half),
                            _mm256_permute4x64_epi64(packed, 0xd8));  // undoes the interleaving of packs
      }
    }
}

}  // namespace

const Kernels& avx2_kernels() {
  static constexpr Kernels table{
      .name = "avx2",
      .dots = dots,
      .tile16 = tile16,
      .count16 = generic::count16,
      .range16 = generic::range16,
      .collect16 = generic::collect16,
      .split16 = generic::split16,
      .count_float = generic::count_float,
      .range_float = generic::range_float,
      .tile8 = nullptr,
  };
  return table;
}

}  // namespace cascade::cpu
