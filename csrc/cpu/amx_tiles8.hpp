#pragma once
// 8-bit tiles on AMX: bounds of 16 queries and a block of 64 keys, four tiles of sums.
//
// The sums of a group of queries come back through memory; they become bounds while the products of the next group run.
#include "cpu/amx_tile.hpp"

namespace cascade::cpu {
namespace {
namespace amx {

constexpr int parts = lanes8 / 16;

template <int lines>
inline void multiply8(const int8_t* queries, const uint8_t* keys, int64_t steps, Ahead<lines>& ahead,
                      int32_t (&sums)[parts * tile_words]) {
  constexpr int64_t key_row = lanes8 * 4;
  const int64_t dims = (steps + 15) / 16 * row_bytes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t d = 0; d < dims; d += row_bytes) {
    const uint8_t* const key = keys + d / 4 * key_row;
    _tile_loadd(4, queries + d, dims);
    _tile_loadd(5, key, key_row);
    _tile_dpbsud(0, 4, 5);
    ahead.fetch();
    _tile_loadd(6, key + row_bytes, key_row);
    _tile_dpbsud(1, 4, 6);
    ahead.fetch();
    _tile_loadd(5, key + 2 * row_bytes, key_row);
    _tile_dpbsud(2, 4, 5);
    ahead.fetch();
    _tile_loadd(6, key + 3 * row_bytes, key_row);
    _tile_dpbsud(3, 4, 6);
    ahead.fetch();
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

template <int lines>
void tiles8_of(const int8_t* queries, int64_t groups, const uint8_t* keys, int64_t steps, const int32_t* start,
               const float* scale, const float* residual, const float* least, const float* beta, float* upper,
               uint64_t* lanes, uint32_t* any) {
  alignas(64) int32_t sums[2][parts * tile_words];
  const int64_t group_bytes = rows * ((steps + 15) / 16) * row_bytes;
  const auto write = [&](int64_t group) {
    const int64_t at = group * rows;
    any[group] =
        write8(sums[group % 2], start + at, scale, residual, least + at, beta + at, upper + at * lanes8, lanes + at);
  };
  Ahead<lines> ahead(keys + steps * lanes8 * 4);
  for (int64_t group = 0; group < groups; ++group) {
    multiply8(queries + group * group_bytes, keys, steps, ahead, sums[group % 2]);
    if (group > 0) write(group - 1);
  }
  if (groups > 0) write(groups - 1);
}

void tiles8(const int8_t* queries, int64_t groups, const uint8_t* keys, int64_t steps, const int32_t* start,
            const float* scale, const float* residual, const float* least, const float* beta, float* upper,
            uint64_t* lanes, uint32_t* any) {
  // A step has 4 products a group and 64 lines of keys.
  const auto of = groups >= 16  ? tiles8_of<1>
                  : groups >= 8 ? tiles8_of<2>
                  : groups >= 4 ? tiles8_of<4>
                  : groups >= 2 ? tiles8_of<8>
                                : tiles8_of<16>;
  of(queries, groups, keys, steps, start, scale, residual, least, beta, upper, lanes, any);
}

}  // namespace amx
}  // namespace
}  // namespace cascade::cpu
