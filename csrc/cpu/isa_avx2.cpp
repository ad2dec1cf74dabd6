// AVX2 with FMA and F16C (Haswell, Zen and later): vpmaddwd and vpmaddubsw for the tiles; selection among 16-bit scores
// packs lanes to the left by table.
#include <immintrin.h>

#include <algorithm>
#include <array>

#include "cpu/avx2_floats.hpp"
#include "cpu/avx2_tile8.hpp"
#include "cpu/contrast_tile.hpp"
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

// The contract's sums s0..s3 and s4..s7 in two accumulators per key; several keys at a time hide latency.
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
  constexpr int64_t ahead = 8;
  const auto* data = static_cast<const T*>(keys.data);
  const auto row = [&](int64_t i) { return data + (rows != nullptr ? rows[i] : first + i) * keys.stride; };
  generic::by_fours<T>(count, row, [&](const auto& key, int64_t i) {
    if (rows != nullptr) avx2::prefetch<T>(keys, rows, i + ahead, i + ahead + 4, count);
    dot_rows(query, key, keys.columns, out + i);
  });
}

void dots(const double* query, const Matrix& keys, const int64_t* rows, int64_t first, int64_t count, double* out) {
  if (keys.dtype == DType::float32) dots_of<float>(query, keys, rows, first, count, out);
  if (keys.dtype == DType::float16) dots_of<Float16>(query, keys, rows, first, count, out);
  if (keys.dtype == DType::bfloat16) dots_of<BFloat16>(query, keys, rows, first, count, out);
}

// As assembly: with the intrinsics GCC 12 copies every accumulator in every step.
inline __m256i broadcast(const int32_t* word) {
  __m256i out;
  asm("vpbroadcastd %1, %0" : "=x"(out) : "m"(*word));
  return out;
}
inline void add_products16(__m256i& sum, __m256i a, __m256i b) {
  __m256i product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
}

// `rows` of the `count` queries x 16 keys, over both halves of the block. 6 rows fill the 16 registers.
template <int rows, int count>
inline void tile16_of(const int32_t* queries, const int32_t* keys, int64_t steps, int16_t* out, int64_t stride) {
  for (int half = 0; half < lanes16; half += 16) {
    __m256i sum[rows][2];
#pragma GCC unroll 6
    for (int row = 0; row < rows; ++row) sum[row][0] = sum[row][1] = _mm256_setzero_si256();
    const int32_t *word = queries, *key = keys + half;
    for (int64_t step = 0; step < steps; ++step) {
      const __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(key));
      const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(key + 8));
#pragma GCC unroll 6
      for (int row = 0; row < rows; ++row) {
        const __m256i both = broadcast(word + row);
        add_products16(sum[row][0], low, both);
        add_products16(sum[row][1], high, both);
      }
      key += lanes16;
      word += count;
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; ++row) {
      const __m256i packed = _mm256_packs_epi32(_mm256_srai_epi32(sum[row][0], 16), _mm256_srai_epi32(sum[row][1], 16));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + row * stride + half),
                          _mm256_permute4x64_epi64(packed, 0xd8));  // undoes the interleaving of packs
    }
  }
}

void tile16(const int32_t* queries, int count, const int32_t* keys, int64_t steps, int16_t* out, int64_t stride) {
  if (count == 12) {
    tile16_of<6, 12>(queries, keys, steps, out, stride);
    return tile16_of<6, 12>(queries + 6, keys, steps, out + 6 * stride, stride);
  }
  if (count == 8) {
    tile16_of<4, 8>(queries, keys, steps, out, stride);
    return tile16_of<4, 8>(queries + 4, keys, steps, out + 4 * stride, stride);
  }
  tile16_of<4, 4>(queries, keys, steps, out, stride);
}

// ---- selection among 16-bit scores

// For every mask of 8 lanes the order that brings the chosen ones to the front, for 16-bit and for 32-bit lanes.
struct LeftPack {
  alignas(64) std::array<std::array<uint8_t, 16>, 256> words{};
  alignas(64) std::array<std::array<uint8_t, 8>, 256> doubles{};

  constexpr LeftPack() {
    for (size_t mask = 0; mask < 256; ++mask)
      for (size_t lane = 0, at = 0; lane < 8; ++lane) {
        if ((mask >> lane & 1) == 0) continue;
        words[mask][2 * at] = static_cast<uint8_t>(2 * lane);
        words[mask][2 * at + 1] = static_cast<uint8_t>(2 * lane + 1);
        doubles[mask][at++] = static_cast<uint8_t>(lane);
      }
  }
};
constexpr LeftPack left_pack;

inline __m256i load16(const int16_t* score) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(score)); }
inline __m128i load8(const int16_t* score) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(score)); }
inline int64_t bits(uint32_t mask) { return _mm_popcnt_u32(mask); }

// Which of 16 lanes hold more than `bound`.
inline uint32_t over(__m256i value, __m256i bound) {
  const __m256i greater = _mm256_cmpgt_epi16(value, bound);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(greater), _mm256_extracti128_si256(greater, 1));
  return static_cast<uint32_t>(_mm_movemask_epi8(bytes));
}

inline void store_words(int16_t* out, __m128i value, uint32_t mask) {
  const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(left_pack.words[mask].data()));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(value, order));
}

inline void store_doubles(uint32_t* out, __m256i value, uint32_t mask) {
  const __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(left_pack.doubles[mask].data()));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(value, _mm256_cvtepu8_epi32(order)));
}

int64_t count16(const int16_t* score, int64_t n, int16_t least) {
  if (least == no_score) return n;
  const __m256i under = _mm256_set1_epi16(static_cast<int16_t>(least - 1)), ones = _mm256_set1_epi16(1);
  __m256i total = _mm256_setzero_si256();
  for (int64_t i = 0; i < n;) {
    const int64_t end = n - i < 65536 ? n : i + 65536;  // what 16-bit counters survive
    __m256i even = _mm256_setzero_si256(), odd = even;
    for (; i < end; i += 32) {
      even = _mm256_sub_epi16(even, _mm256_cmpgt_epi16(load16(score + i), under));
      odd = _mm256_sub_epi16(odd, _mm256_cmpgt_epi16(load16(score + i + 16), under));
    }
    total = _mm256_add_epi32(total, _mm256_add_epi32(_mm256_madd_epi16(even, ones), _mm256_madd_epi16(odd, ones)));
  }
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), total);
  int64_t sum = 0;
  for (const int32_t lane : lanes) sum += lane;
  return sum;
}

void range16(const int16_t* score, int64_t n, int16_t* low, int16_t* high) {
  // One less turns `no_score` into the largest value, which no real score is then.
  const __m256i one = _mm256_set1_epi16(1);
  __m256i smallest = _mm256_set1_epi16(32767), largest = _mm256_set1_epi16(no_score);
  for (int64_t i = 0; i < n; i += 16) {
    const __m256i value = load16(score + i);
    smallest = _mm256_min_epi16(smallest, _mm256_sub_epi16(value, one));
    largest = _mm256_max_epi16(largest, value);
  }
  smallest = _mm256_adds_epi16(smallest, one);
  alignas(32) int16_t s[16], l[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(s), smallest);
  _mm256_store_si256(reinterpret_cast<__m256i*>(l), largest);
  *low = *std::min_element(s, s + 16);
  *high = *std::max_element(l, l + 16);
}

Split collect16(const int16_t* score, int64_t n, int16_t low, int16_t high, int16_t* out) {
  if (low == no_score) return generic::collect16(score, n, low, high, out);
  const __m256i under = _mm256_set1_epi16(static_cast<int16_t>(low - 1)), most = _mm256_set1_epi16(high);
  Split found{0, 0};
  for (int64_t i = 0; i < n; i += 16) {
    const __m256i value = load16(score + i);
    const uint32_t above = over(value, most), between = over(value, under) & ~above;
    const uint32_t first = between & 255;
    store_words(out + found.open, _mm256_castsi256_si128(value), first);
    store_words(out + found.open + bits(first), _mm256_extracti128_si256(value, 1), between >> 8);
    found.kept += bits(above);
    found.open += bits(between);
  }
  return found;
}

// 8 candidates in registers: where they sit and their scores.
template <int rows>
struct Eight {
  __m256i position;
  __m128i score[rows];

  void store(const Columns& to, int64_t& at, uint32_t mask) const {
    store_doubles(to.position + at, position, mask);
    for (int row = 0; row < rows; ++row) store_words(to.score[row] + at, score[row], mask);
    at += bits(mask);
  }
};

struct Split16 {
  template <bool listed, int rows>
  static Split of(const Columns& from, uint32_t first, int64_t n, int low, int high, const Columns& to_keep,
                  const Columns& to_open) {
    const __m256i under = _mm256_set1_epi16(static_cast<int16_t>(low - 1));
    const __m256i unsure = _mm256_set1_epi16(static_cast<int16_t>(high - 1));
    const Columns source = from, kept = to_keep, open = to_open;  // copies: stores through them alias nothing
    const __m256i iota = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    Split found{0, 0};
    for (int64_t i = 0; i < n; i += 16) {
      const __m256i value = load16(source.score[0] + i);
      const uint32_t possible = over(value, under);
      if (possible == 0) continue;
      const uint32_t in = over(value, unsure), undecided = possible & ~in;
      for (int half = 0; half < 2; ++half) {
        const int64_t at = i + 8 * half;
        Eight<rows> eight;
        if constexpr (listed)
          eight.position = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source.position + at));
        else
          eight.position =
              _mm256_add_epi32(iota, _mm256_set1_epi32(static_cast<int>(first + static_cast<uint32_t>(at))));
        eight.score[0] = half == 0 ? _mm256_castsi256_si128(value) : _mm256_extracti128_si256(value, 1);
        for (int row = 1; row < rows; ++row) eight.score[row] = load8(source.score[row] + at);
        eight.store(kept, found.kept, in >> 8 * half & 255);
        if (undecided != 0) eight.store(open, found.open, undecided >> 8 * half & 255);
      }
    }
    return found;
  }
};

Split split16(const Columns& from, uint32_t first, int64_t n, int rows, int low, int high, const Columns& kept,
              const Columns& open) {
  return generic::split16_by_rows<Split16>(from, first, n, rows, low, high, kept, open);
}

// ---- the loss's tiles

struct Floats8 {
  using type = __m256;
  using bits = uint32_t __attribute__((vector_size(32)));
  static constexpr int rows = 6;  // of accumulators, two vectors each
  static type all(float value) { return _mm256_set1_ps(value); }
  static type fma(type a, type b, type c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace

const Kernels& avx2_kernels() noexcept {
  static constexpr Kernels table{
      .name = "avx2",
      .dots = dots,
      .dots_float = avx2::dots_float,
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
      .count_float = avx2::count_float,
      .range_float = avx2::range_float,
      .tiles8 = generic::tiles8<avx2::tile8, avx2::queries8, true>,
      .queries8 = avx2::queries8,
      .by_row8 = false,
      .most8 = 64,
      .sums_runs = true,
      .fewest8 = 8192,
      .few8 = 16,
      .scores32 = contrast::scores32<Floats8>,
      .absorb32 = contrast::absorb32<Floats8>,
  };
  return table;
}

}  // namespace cascade::cpu
