#pragma once
// 16-bit tiles on AMX: value = 256 u + l of both sides, so a product is 65536 u u' + 256 (u l' + l u') + l l'
//
// The sums of a tile come back through memory; they are put together while the products of the next tile run.
#include "cpu/amx_tile.hpp"

namespace cascade::cpu {
namespace {
namespace amx {

// Sums of 16 queries and a block of 32 keys, on their way to scores.
struct Sums16 {
  const int32_t* row;  // even keys and odd: [even: [u u', u l' + l u', l l'], odd: ...][queries]
  int16_t* out;
  int64_t stride;

  // The quarter of a sum, rounded down as l l' is. It fits 32 bits, so parts that do not are right but for what is lost
  // beyond.
  static __m512i joined(const int32_t* sums) {
    static_assert(finer_planes * finer_planes == 4);
    const __m512i upper = _mm512_slli_epi32(_mm512_load_si512(sums), 14);
    const __m512i middle = _mm512_slli_epi32(_mm512_load_si512(sums + tile_words), 6);
    const __m512i lower = _mm512_srai_epi32(_mm512_load_si512(sums + 2 * tile_words), 2);
    return _mm512_add_epi32(upper, _mm512_add_epi32(middle, lower));
  }
  template <int queries>
  void write() {
#pragma GCC unroll 16
    for (int i = 0; i < queries; ++i, row += 16, out += stride) {
      const __m512i even = joined(row), odd = joined(row + 3 * tile_words);
      _mm512_storeu_si512(out, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd));
    }
  }
};

// One step of 64 dims. After each product `written` queries of the sums before are written.
template <int written, int lines>
[[gnu::always_inline]] inline void step16(const int8_t* queries, int64_t dims, int64_t planes, const int8_t* key,
                                          int64_t half, Ahead<lines>& ahead, Sums16& before) {
  const auto between = [&] {
    ahead.fetch();
    before.write<written>();
  };
  _tile_loadd(6, queries, dims);
  _tile_loadd(7, key, row_bytes);
  _tile_dpbssd(0, 6, 7);
  between();
  _tile_loadd(7, key + half, row_bytes);
  _tile_dpbssd(3, 6, 7);
  between();
  _tile_loadd(7, key + 2 * half, row_bytes);
  _tile_dpbssd(1, 6, 7);
  between();
  _tile_loadd(7, key + 3 * half, row_bytes);
  _tile_dpbssd(4, 6, 7);
  between();
  _tile_loadd(6, queries + planes, dims);
  _tile_dpbssd(5, 6, 7);
  between();
  _tile_loadd(7, key + 2 * half, row_bytes);
  _tile_dpbssd(2, 6, 7);
  between();
  _tile_loadd(7, key, row_bytes);
  _tile_dpbssd(1, 6, 7);
  between();
  _tile_loadd(7, key + half, row_bytes);
  _tile_dpbssd(4, 6, 7);
  between();
}

// The sums of 16 queries and a block; those before are written meanwhile. The queries' lower bytes are `planes` after
// the upper ones.
template <int lines>
[[gnu::always_inline]] inline void multiply16(const int8_t* queries, int64_t planes, const int8_t* keys, int64_t words,
                                              Ahead<lines>& ahead, int32_t (&sums)[6 * tile_words], Sums16 before) {
  const int64_t dims = (words + 15) / 16 * row_bytes, half = words * row_bytes, last = dims - row_bytes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t d = 0; d < last; d += row_bytes)  // a row of a tile is 4 dims of 16 keys
    step16<0>(queries + d, dims, planes, keys + d * 16, half, ahead, before);
  step16<2>(queries + last, dims, planes, keys + last * 16, half, ahead, before);
  _tile_stored(0, sums, row_bytes);
  _tile_stored(1, sums + tile_words, row_bytes);
  _tile_stored(2, sums + 2 * tile_words, row_bytes);
  _tile_stored(3, sums + 3 * tile_words, row_bytes);
  _tile_stored(4, sums + 4 * tile_words, row_bytes);
  _tile_stored(5, sums + 5 * tile_words, row_bytes);
}

template <int groups>
void tiles16_of(const int8_t* queries, const int8_t* keys, int64_t blocks, int64_t words, int16_t* out,
                int64_t stride) {
  constexpr int lines = (8 + groups - 1) / groups;  // products of a step and lines of its keys: 8 and 64
  alignas(64) int32_t sums[2][6 * tile_words] = {};
  alignas(64) int16_t nowhere[rows * lanes16];
  const int64_t dims = (words + 15) / 16 * row_bytes, block_bytes = 2 * words * row_bytes * 2;
  Sums16 before{sums[1], nowhere, lanes16};
  int turn = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int8_t* const key = keys + block * block_bytes;
    Ahead<lines> ahead(key + block_bytes);
    for (int64_t group = 0; group < groups; ++group) {
      multiply16(queries + group * rows * dims, groups * rows * dims, key, words, ahead, sums[turn], before);
      before = {sums[turn], out + group * rows * stride + block * lanes16, stride};
      turn ^= 1;
    }
  }
  before.write<rows>();
}

void tiles16(const int32_t* queries, int count, const int32_t* keys, int64_t blocks, int64_t steps, int16_t* out,
             int64_t stride) {
  constexpr decltype(&tiles16_of<1>) of[] = {tiles16_of<1>, tiles16_of<2>, tiles16_of<3>};
  of[count / rows - 1](reinterpret_cast<const int8_t*>(queries), reinterpret_cast<const int8_t*>(keys), blocks,
                       steps / 2, out, stride);
}

}  // namespace amx
}  // namespace
}  // namespace cascade::cpu
