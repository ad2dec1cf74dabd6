// AMX (Sapphire Rapids and later): 16 x 16 tiles of sums over 64 dims of bytes, each a matrix product of 16 cycles, and
// AVX-512 for all the rest.
//
// A thread's tiles are eight registers of 16 rows of 64 bytes. The sums of a tile come back through memory; they are
// worked on while the products of the next tile run.
#include <immintrin.h>

#include "cpu/isa.hpp"

namespace cascade::cpu {
namespace {

constexpr int rows = 16;                 // of a tile: queries
constexpr int64_t row_bytes = 64;        // of a tile
constexpr int64_t tile_words = 16 * 16;  // of sums

struct alignas(64) Shapes {
  uint8_t palette = 1;
  uint8_t first_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void enter() {
  static constexpr Shapes shapes{};
  _tile_loadconfig(&shapes);
}

void leave() { _tile_release(); }

// ---- 16 bits: value = 256 u + l of both sides, so a product is 65536 u u' + 256 (u l' + l u') + l l'

// Asks for the lines [8 number, 8 number + 8) after `bytes`. Tiles take whole lines from afar one by one; asked for
// while the block before is at work, they are near.
template <int number>
inline void fetch(const void* bytes) {
  const char* const line = static_cast<const char*>(bytes) + 8 * number * row_bytes;
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) _mm_prefetch(line + i * row_bytes, _MM_HINT_T0);
}

// Sums of 16 queries and a block of 32 keys, even keys and odd: [even: u u', u l' + l u', l l', odd: ...]. The queries'
// lower bytes are `planes` after the upper ones; `next` are the keys to fetch.
inline void multiply16(const int8_t* queries, int64_t planes, const int8_t* keys, int64_t words, const int8_t* next,
                       int32_t (&sums)[6 * tile_words]) {
  const int64_t dims = (words + 15) / 16 * row_bytes, half = words * row_bytes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t d = 0; d < dims; d += row_bytes) {
    const int8_t* const key = keys + d * 16;  // a row of a tile is 4 dims of 16 keys
    const int8_t* const ahead = next + d * 64;
    _tile_loadd(6, queries + d, dims);
    _tile_loadd(7, key, row_bytes);
    _tile_dpbssd(0, 6, 7);
    fetch<0>(ahead);
    _tile_loadd(7, key + half, row_bytes);
    _tile_dpbssd(3, 6, 7);
    fetch<1>(ahead);
    _tile_loadd(7, key + 2 * half, row_bytes);
    _tile_dpbssd(1, 6, 7);
    fetch<2>(ahead);
    _tile_loadd(7, key + 3 * half, row_bytes);
    _tile_dpbssd(4, 6, 7);
    fetch<3>(ahead);
    _tile_loadd(6, queries + planes + d, dims);
    _tile_dpbssd(5, 6, 7);
    fetch<4>(ahead);
    _tile_loadd(7, key + 2 * half, row_bytes);
    _tile_dpbssd(2, 6, 7);
    fetch<5>(ahead);
    _tile_loadd(7, key, row_bytes);
    _tile_dpbssd(1, 6, 7);
    fetch<6>(ahead);
    _tile_loadd(7, key + half, row_bytes);
    _tile_dpbssd(4, 6, 7);
    fetch<7>(ahead);
  }
  _tile_stored(0, sums, row_bytes);
  _tile_stored(1, sums + tile_words, row_bytes);
  _tile_stored(2, sums + 2 * tile_words, row_bytes);
  _tile_stored(3, sums + 3 * tile_words, row_bytes);
  _tile_stored(4, sums + 4 * tile_words, row_bytes);
  _tile_stored(5, sums + 5 * tile_words, row_bytes);
}

inline __m512i joined(const int32_t* sums) {
  const __m512i upper = _mm512_slli_epi32(_mm512_load_si512(sums), 8);
  const __m512i middle = _mm512_slli_epi32(_mm512_add_epi32(upper, _mm512_load_si512(sums + tile_words)), 8);
  return _mm512_add_epi32(middle, _mm512_load_si512(sums + 2 * tile_words));
}

inline void write16(const int32_t (&sums)[6 * tile_words], int16_t* out, int64_t stride) {
  for (int q = 0; q < rows; ++q) {
    const __m512i even = joined(sums + q * 16), odd = joined(sums + 3 * tile_words + q * 16);
    _mm512_storeu_si512(out + q * stride, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd));
  }
}

void tiles16(const int32_t* queries, int count, const int32_t* keys, int64_t blocks, int64_t steps, int16_t* out,
             int64_t stride) {
  alignas(64) int32_t sums[2][6 * tile_words];
  const int64_t dims = (steps / 2 + 15) / 16 * row_bytes, block_bytes = steps * lanes16 * 4;
  const auto* query = reinterpret_cast<const int8_t*>(queries);
  const auto* key = reinterpret_cast<const int8_t*>(keys);
  int16_t* before = nullptr;
  int turn = 0;
  for (int64_t block = 0; block < blocks; ++block)
    for (int first = 0; first < count; first += rows) {
      const int8_t* const here = key + block * block_bytes;
      multiply16(query + first * dims, count * dims, here, steps / 2, here + (first == 0 ? block_bytes : 0),
                 sums[turn]);
      turn ^= 1;
      if (before != nullptr) write16(sums[turn], before, stride);
      before = out + first * stride + block * lanes16;
    }
  if (before != nullptr) write16(sums[turn ^ 1], before, stride);
}

// ---- 8 bits

constexpr int parts = lanes8 / 16;

inline void multiply8(const int8_t* queries, const uint8_t* keys, int64_t steps, const uint8_t* next,
                      int32_t (&sums)[parts * tile_words]) {
  constexpr int64_t key_row = lanes8 * 4;
  const int64_t dims = (steps + 15) / 16 * row_bytes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t d = 0; d < dims; d += row_bytes) {
    const uint8_t *const key = keys + d / 4 * key_row, *const ahead = next + d / 4 * key_row;
    _tile_loadd(4, queries + d, dims);
    _tile_loadd(5, key, key_row);
    _tile_dpbsud(0, 4, 5);
    fetch<0>(ahead);
    fetch<1>(ahead);
    _tile_loadd(6, key + row_bytes, key_row);
    _tile_dpbsud(1, 4, 6);
    fetch<2>(ahead);
    fetch<3>(ahead);
    _tile_loadd(5, key + 2 * row_bytes, key_row);
    _tile_dpbsud(2, 4, 5);
    fetch<4>(ahead);
    fetch<5>(ahead);
    _tile_loadd(6, key + 3 * row_bytes, key_row);
    _tile_dpbsud(3, 4, 6);
    fetch<6>(ahead);
    fetch<7>(ahead);
  }
  _tile_stored(0, sums, row_bytes);
  _tile_stored(1, sums + tile_words, row_bytes);
  _tile_stored(2, sums + 2 * tile_words, row_bytes);
  _tile_stored(3, sums + 3 * tile_words, row_bytes);
}

// As `tiles8` says, for the 16 queries of one group.
inline uint32_t write8(const int32_t (&sums)[parts * tile_words], const int32_t* start, const float* scale,
                       const float* residual, const float* least, const float* beta, float* upper, uint64_t* lanes) {
  __m512 s[parts], r[parts];
#pragma GCC unroll 4
  for (int part = 0; part < parts; ++part) {
    s[part] = _mm512_load_ps(scale + 16 * part);
    r[part] = _mm512_load_ps(residual + 16 * part);
  }
  uint32_t any = 0;
  for (int q = 0; q < rows; ++q) {
    const __m512 b = _mm512_set1_ps(beta[q]), bound = _mm512_set1_ps(least[q]);
    const __m512i first = _mm512_set1_epi32(start[q]);
    __m512 u[parts];
    uint64_t reached = 0;
#pragma GCC unroll 4
    for (int part = 0; part < parts; ++part) {
      const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums + part * tile_words + q * 16), first);
      u[part] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), s[part], _mm512_mul_ps(b, r[part]));
      reached |= static_cast<uint64_t>(_mm512_cmp_ps_mask(u[part], bound, _CMP_GE_OQ)) << (16 * part);
    }
    lanes[q] = reached;
    if (reached != 0) {
      any |= 1u << q;
#pragma GCC unroll 4
      for (int part = 0; part < parts; ++part) _mm512_storeu_ps(upper + q * lanes8 + 16 * part, u[part]);
    }
  }
  return any;
}

void tiles8(const int8_t* queries, int64_t groups, const uint8_t* keys, int64_t steps, const int32_t* start,
            const float* scale, const float* residual, const float* least, const float* beta, float* upper,
            uint64_t* lanes, uint32_t* any) {
  alignas(64) int32_t sums[2][parts * tile_words];
  const int64_t group_bytes = rows * ((steps + 15) / 16) * row_bytes;
  const auto write = [&](int64_t group) {
    const int64_t at = group * rows;
    any[group] =
        write8(sums[group % 2], start + at, scale, residual, least + at, beta + at, upper + at * lanes8, lanes + at);
  };
  for (int64_t group = 0; group < groups; ++group) {
    const uint8_t* const next = group == 0 ? keys + steps * lanes8 * 4 : keys;
    multiply8(queries + group * group_bytes, keys, steps, next, sums[group % 2]);
    if (group > 0) write(group - 1);
  }
  if (groups > 0) write(groups - 1);
}

}  // namespace

const Kernels& amx_kernels() noexcept {
  static const Kernels table = []() noexcept {
    Kernels made = avx512_kernels();
    made.name = "amx";
    made.enter = enter;
    made.leave = leave;
    made.tiles16 = tiles16;
    made.queries16 = 3 * rows;
    made.least16 = rows;
    made.planes16 = true;
    made.tiles8 = tiles8;
    made.queries8 = rows;
    made.by_row8 = true;
    return made;
  }();
  return table;
}

}  // namespace cascade::cpu
