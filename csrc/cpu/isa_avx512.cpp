// AVX-512 with VNNI and VBMI2 (Ice Lake, Zen 4 and later): vpdpwssd and vpdpbusd for the tiles, compress for selection.
// BF16 products are not used: vdpbf16ps runs no faster than vpdpwssd and its rounding error is ten times larger.
#include <immintrin.h>

#include <algorithm>

#include "cpu/contrast_tile.hpp"
#include "cpu/isa_generic.hpp"

namespace cascade::cpu {
namespace {

// ---- the contract's float64 sums: lane l of the accumulator is the contract's running sum s_l

inline __m512d load8(const float* key) { return _mm512_cvtps_pd(_mm256_loadu_ps(key)); }
inline __m512d load8(const Float16* key) {
  return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(key))));
}
inline __m512d load8(const BFloat16* key) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(key)));
  return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
}
inline __m512d load_some(const float* key, __mmask8 some) { return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(some, key)); }
inline __m512d load_some(const Float16* key, __mmask8 some) {
  return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_maskz_loadu_epi16(some, key)));
}
inline __m512d load_some(const BFloat16* key, __mmask8 some) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(some, key));
  return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
}

inline double tree(__m512d s) {
  const __m256d t = _mm256_add_pd(_mm512_castpd512_pd256(s), _mm512_extractf64x4_pd(s, 1));
  const __m128d u = _mm_add_pd(_mm256_castpd256_pd128(t), _mm256_extractf128_pd(t, 1));
  return _mm_cvtsd_f64(_mm_add_sd(u, _mm_unpackhi_pd(u, u)));
}

template <int rows, class T>
inline void dot_rows(const double* query, const T* const (&key)[rows], int64_t dim, double* out) {
  __m512d sum[rows];
  for (auto& each : sum) each = _mm512_setzero_pd();
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8) {
    const __m512d q = _mm512_loadu_pd(query + d);
    for (int row = 0; row < rows; ++row) sum[row] = _mm512_fmadd_pd(q, load8(key[row] + d), sum[row]);
  }
  if (d < dim) {
    const auto some = static_cast<__mmask8>((1u << (dim - d)) - 1);
    const __m512d q = _mm512_loadu_pd(query + d);
    for (int row = 0; row < rows; ++row) sum[row] = _mm512_fmadd_pd(q, load_some(key[row] + d, some), sum[row]);
  }
  for (int row = 0; row < rows; ++row) out[row] = tree(sum[row]);
}

constexpr int64_t rows_ahead = 8;  // chosen rows are scattered: they are asked for early

template <class T>
inline void fetch_rows(const Matrix& keys, const int64_t* rows, int64_t first, int64_t end) {
  for (int64_t i = first; i < end; ++i)
    for (int64_t d = 0; d < keys.columns; d += 64 / static_cast<int64_t>(sizeof(T)))
      _mm_prefetch(reinterpret_cast<const char*>(static_cast<const T*>(keys.data) + rows[i] * keys.stride + d),
                   _MM_HINT_T0);
}

// Calls `dot` as `by_fours` does, for chosen rows or those from `first` on.
template <class T, class Dot>
inline void each_row(const Matrix& keys, const int64_t* rows, int64_t first, int64_t count, const Dot& dot) {
  const auto* data = static_cast<const T*>(keys.data);
  if (rows == nullptr)
    return generic::by_fours<T>(count, [&](int64_t i) { return data + (first + i) * keys.stride; }, dot);
  fetch_rows<T>(keys, rows, 0, std::min(rows_ahead, count));
  generic::by_fours<T>(
      count, [&](int64_t i) { return data + rows[i] * keys.stride; },
      [&](const auto& key, int64_t i) {
        fetch_rows<T>(keys, rows, std::min(count, i + rows_ahead), std::min(count, i + rows_ahead + 4));
        dot(key, i);
      });
}

template <class T>
void dots_of(const double* query, const Matrix& keys, const int64_t* rows, int64_t first, int64_t count, double* out) {
  each_row<T>(keys, rows, first, count,
              [&](const auto& key, int64_t i) { dot_rows(query, key, keys.columns, out + i); });
}

void dots(const double* query, const Matrix& keys, const int64_t* rows, int64_t first, int64_t count, double* out) {
  if (keys.dtype == DType::float32) dots_of<float>(query, keys, rows, first, count, out);
  if (keys.dtype == DType::float16) dots_of<Float16>(query, keys, rows, first, count, out);
  if (keys.dtype == DType::bfloat16) dots_of<BFloat16>(query, keys, rows, first, count, out);
}

// ---- the same in float32

inline __m512 load16(const float* key, __mmask16 some) { return _mm512_maskz_loadu_ps(some, key); }
inline __m512 load16(const Float16* key, __mmask16 some) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, key));
}
inline __m512 load16(const BFloat16* key, __mmask16 some) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, key)), 16));
}

template <int rows, class T>
inline void dot_rows_float(const float* query, const T* const (&key)[rows], int64_t dim, float* out) {
  __m512 sum[rows];
  for (auto& each : sum) each = _mm512_setzero_ps();
  for (int64_t d = 0; d < dim; d += 16) {
    const auto some = static_cast<__mmask16>(dim - d >= 16 ? 0xffff : (1u << (dim - d)) - 1);
    const __m512 q = _mm512_loadu_ps(query + d);
    for (int row = 0; row < rows; ++row) sum[row] = _mm512_fmadd_ps(q, load16(key[row] + d, some), sum[row]);
  }
  for (int row = 0; row < rows; ++row) out[row] = _mm512_reduce_add_ps(sum[row]);
}

template <class T>
void dots_float_of(const float* query, const Matrix& keys, const int64_t* rows, int64_t count, float* out) {
  each_row<T>(keys, rows, 0, count,
              [&](const auto& key, int64_t i) { dot_rows_float(query, key, keys.columns, out + i); });
}

void dots_float(const float* query, const Matrix& keys, const int64_t* rows, int64_t count, float* out) {
  if (keys.dtype == DType::float32) dots_float_of<float>(query, keys, rows, count, out);
  if (keys.dtype == DType::float16) dots_float_of<Float16>(query, keys, rows, count, out);
  if (keys.dtype == DType::bfloat16) dots_float_of<BFloat16>(query, keys, rows, count, out);
}

// One instruction each, as assembly: with the intrinsics GCC 12 copies the accumulators and spills half of them.
inline __m512i broadcast(const void* word) {
  __m512i out;
  asm("vpbroadcastd %1, %0" : "=v"(out) : "m"(*static_cast<const int32_t*>(word)));
  return out;
}
inline void add_products16(__m512i& sum, __m512i a, __m512i b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
inline void add_products8(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// ---- 16-bit tiles: count x 32 keys in 2 * count accumulators, one broadcast and two products per query and step

template <int count>
void tile16_of(const int32_t* queries, const int32_t* keys, int64_t steps, int16_t* out, int64_t stride) {
  __m512i sum[count][2];
#pragma GCC unroll 12
  for (int q = 0; q < count; ++q) sum[q][0] = sum[q][1] = _mm512_setzero_si512();
  for (int64_t step = 0; step < steps; ++step) {
    const __m512i low = _mm512_load_si512(keys), high = _mm512_load_si512(keys + 16);
    keys += lanes16;
#pragma GCC unroll 12
    for (int q = 0; q < count; ++q) {
      const __m512i word = broadcast(queries + q);
      add_products16(sum[q][0], low, word);
      add_products16(sum[q][1], high, word);
    }
    queries += count;
  }
  const __m512i natural = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);  // undoes the interleaving of packs
#pragma GCC unroll 12
  for (int q = 0; q < count; ++q) {
    const __m512i packed = _mm512_packs_epi32(_mm512_srai_epi32(sum[q][0], 16), _mm512_srai_epi32(sum[q][1], 16));
    _mm512_storeu_si512(out + q * stride, _mm512_permutexvar_epi64(natural, packed));
  }
}

void tile16(const int32_t* queries, int count, const int32_t* keys, int64_t steps, int16_t* out, int64_t stride) {
  if (count == 12) return tile16_of<12>(queries, keys, steps, out, stride);
  if (count == 8) return tile16_of<8>(queries, keys, steps, out, stride);
  tile16_of<4>(queries, keys, steps, out, stride);
}

// ---- selection among 16-bit scores

inline __m512i load32(const int16_t* score) { return _mm512_loadu_si512(score); }
inline int64_t bits(uint64_t mask) { return __builtin_popcountll(mask); }

int64_t count16(const int16_t* score, int64_t n, int16_t least) {
  const __m512i bound = _mm512_set1_epi16(least);
  int64_t even = 0, odd = 0, i = 0;
  for (; i + 64 <= n; i += 64) {
    even += bits(_mm512_cmpge_epi16_mask(load32(score + i), bound));
    odd += bits(_mm512_cmpge_epi16_mask(load32(score + i + 32), bound));
  }
  if (i < n) even += bits(_mm512_cmpge_epi16_mask(load32(score + i), bound));
  return even + odd;
}

void range16(const int16_t* score, int64_t n, int16_t* low, int16_t* high) {
  const __m512i none = _mm512_set1_epi16(no_score);
  __m512i smallest = _mm512_set1_epi16(32767), largest = none;
  for (int64_t i = 0; i < n; i += 32) {
    const __m512i value = load32(score + i);
    largest = _mm512_max_epi16(largest, value);
    smallest = _mm512_mask_min_epi16(smallest, _mm512_cmpgt_epi16_mask(value, none), smallest, value);
  }
  alignas(64) int16_t s[32], l[32];
  _mm512_store_si512(s, smallest);
  _mm512_store_si512(l, largest);
  int16_t unused = 0;
  generic::range16(s, 32, low, &unused);
  generic::range16(l, 32, &unused, high);
}

Split collect16(const int16_t* score, int64_t n, int16_t low, int16_t high, int16_t* out) {
  const __m512i least = _mm512_set1_epi16(low), most = _mm512_set1_epi16(high);
  Split found{0, 0};
  for (int64_t i = 0; i < n; i += 32) {
    const __m512i value = load32(score + i);
    const __mmask32 above = _mm512_cmpgt_epi16_mask(value, most);
    const __mmask32 between = _mm512_cmpge_epi16_mask(value, least) & ~above;
    _mm512_storeu_si512(out + found.open, _mm512_maskz_compress_epi16(between, value));
    found.kept += bits(above);
    found.open += bits(between);
  }
  return found;
}

// Compression goes to a register and is stored whole: vpcompress to memory is microcoded on Zen 4.
inline void store_positions(uint32_t* out, __m512i low, __m512i high, __mmask32 mask) {
  const auto first = static_cast<__mmask16>(mask);
  const auto second = static_cast<__mmask16>(mask >> 16);
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(first, low));
  _mm512_storeu_si512(out + bits(first), _mm512_maskz_compress_epi32(second, high));
}

struct Split16 {
  template <bool listed, int rows>
  static Split of(const Columns& from, uint32_t first, int64_t n, int low, int high, const Columns& kept,
                  const Columns& open) {
    const __m512i least = _mm512_set1_epi16(static_cast<int16_t>(low));
    const __m512i sure = _mm512_set1_epi16(static_cast<int16_t>(high > 32767 ? 32767 : high));
    const __mmask32 reachable = high > 32767 ? 0u : ~0u;
    const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    Split found{0, 0};
    for (int64_t i = 0; i < n; i += 32) {
      const __m512i value = load32(from.score[0] + i);
      const __mmask32 in = _mm512_cmpge_epi16_mask(value, sure) & reachable;
      const __mmask32 undecided = _mm512_cmpge_epi16_mask(value, least) & ~in;
      if ((in | undecided) == 0) continue;
      __m512i p0, p1, other[rows];
      if constexpr (listed) {
        p0 = _mm512_loadu_si512(from.position + i);
        p1 = _mm512_loadu_si512(from.position + i + 16);
      } else {
        p0 = _mm512_add_epi32(iota, _mm512_set1_epi32(static_cast<int>(first + static_cast<uint32_t>(i))));
        p1 = _mm512_add_epi32(p0, _mm512_set1_epi32(16));
      }
      other[0] = value;
      for (int row = 1; row < rows; ++row) other[row] = load32(from.score[row] + i);
      store_positions(kept.position + found.kept, p0, p1, in);
      for (int row = 0; row < rows; ++row)
        _mm512_storeu_si512(kept.score[row] + found.kept, _mm512_maskz_compress_epi16(in, other[row]));
      found.kept += bits(in);
      if (undecided != 0) {
        store_positions(open.position + found.open, p0, p1, undecided);
        for (int row = 0; row < rows; ++row)
          _mm512_storeu_si512(open.score[row] + found.open, _mm512_maskz_compress_epi16(undecided, other[row]));
        found.open += bits(undecided);
      }
    }
    return found;
  }
};

Split split16(const Columns& from, uint32_t first, int64_t n, int rows, int low, int high, const Columns& kept,
              const Columns& open) {
  return generic::split16_by_rows<Split16>(from, first, n, rows, low, high, kept, open);
}

int64_t count_float(const float* value, int64_t n, float least) {
  const __m512 bound = _mm512_set1_ps(least);
  int64_t total = 0, i = 0;
  for (; i + 16 <= n; i += 16) total += bits(_mm512_cmp_ps_mask(_mm512_loadu_ps(value + i), bound, _CMP_GE_OQ));
  const auto rest = static_cast<__mmask16>((1u << (n - i)) - 1);
  return total + bits(_mm512_mask_cmp_ps_mask(rest, _mm512_maskz_loadu_ps(rest, value + i), bound, _CMP_GE_OQ));
}

void range_float(const float* value, int64_t n, float over, float* low, float* high) {
  const __m512 bound = _mm512_set1_ps(over);
  __m512 smallest = _mm512_set1_ps(__builtin_inff()), largest = _mm512_set1_ps(-__builtin_inff());
  for (int64_t i = 0; i < n; i += 16) {
    const auto there = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1u << (n - i)) - 1);
    const __m512 x = _mm512_maskz_loadu_ps(there, value + i);
    const __mmask16 counted = _mm512_mask_cmp_ps_mask(there, x, bound, _CMP_GT_OQ);
    smallest = _mm512_mask_min_ps(smallest, counted, smallest, x);
    largest = _mm512_mask_max_ps(largest, counted, largest, x);
  }
  *low = _mm512_reduce_min_ps(smallest);
  *high = _mm512_reduce_max_ps(largest);
}

// ---- 8-bit tiles: 6 queries x 64 keys in 24 accumulators

constexpr int queries8 = 6;

uint32_t tile8(const int8_t* queries, const uint8_t* keys, int64_t steps, const int32_t* start, const float* scale,
               const float* residual, const float* least, const float* beta, float* upper, uint64_t* lanes) {
  constexpr int parts = lanes8 / 16;
  __m512i sum[queries8][parts];
#pragma GCC unroll 6
  for (int q = 0; q < queries8; ++q)
    for (auto& each : sum[q]) each = _mm512_set1_epi32(start[q]);
  for (int64_t step = 0; step < steps; ++step) {
    const __m512i k0 = _mm512_load_si512(keys), k1 = _mm512_load_si512(keys + 64);
    const __m512i k2 = _mm512_load_si512(keys + 128), k3 = _mm512_load_si512(keys + 192);
    keys += 256;
#pragma GCC unroll 6
    for (int q = 0; q < queries8; ++q) {
      const __m512i word = broadcast(queries + (step * queries8 + q) * 4);
      add_products8(sum[q][0], k0, word);
      add_products8(sum[q][1], k1, word);
      add_products8(sum[q][2], k2, word);
      add_products8(sum[q][3], k3, word);
    }
  }
  __m512 s[parts], r[parts];
  for (int part = 0; part < parts; ++part) {
    s[part] = _mm512_load_ps(scale + 16 * part);
    r[part] = _mm512_load_ps(residual + 16 * part);
  }
  uint32_t any = 0;
#pragma GCC unroll 6
  for (int q = 0; q < queries8; ++q) {
    const __m512 b = _mm512_set1_ps(beta[q]), bound = _mm512_set1_ps(least[q]);
    __m512 u[parts];
    uint64_t reached = 0;
    for (int part = 0; part < parts; ++part) {
      u[part] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[q][part]), s[part], _mm512_mul_ps(b, r[part]));
      reached |= static_cast<uint64_t>(_mm512_cmp_ps_mask(u[part], bound, _CMP_GE_OQ)) << (16 * part);
    }
    lanes[q] = reached;
    if (reached != 0) {
      any |= 1u << q;
      for (int part = 0; part < parts; ++part) _mm512_storeu_ps(upper + q * lanes8 + 16 * part, u[part]);
    }
  }
  return any;
}

// ---- the loss's tiles

struct Floats16 {
  using type = __m512;
  using bits = uint32_t __attribute__((vector_size(64)));
  static constexpr int rows = 8;  // of accumulators, two vectors each
  static type all(float value) { return _mm512_set1_ps(value); }
  static type fma(type a, type b, type c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace

const Kernels& avx512_kernels() noexcept {
  static constexpr Kernels table{
      .name = "avx512",
      .dots = dots,
      .dots_float = dots_float,
      .enter = nullptr,
      .leave = nullptr,
      .tiles16 = generic::tiles16<tile16>,
      .queries16 = 12,
      .least16 = 4,
      .planes16 = false,
      .piece16 = 8192,
      .count16 = count16,
      .range16 = range16,
      .collect16 = collect16,
      .split16 = split16,
      .fuse16 = generic::fuse16,
      .count_float = count_float,
      .range_float = range_float,
      .tiles8 = generic::tiles8<tile8, queries8, false>,
      .queries8 = queries8,
      .by_row8 = false,
      .most8 = 127,
      .sums_runs = false,
      .fewest8 = 0,
      .few8 = 1024,
      .scores32 = contrast::scores32<Floats16>,
      .absorb32 = contrast::absorb32<Floats16>,
  };
  return table;
}

}  // namespace cascade::cpu
