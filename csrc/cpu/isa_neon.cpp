// NEON (any AArch64): widening multiplies for the tiles, float64 pairs for the contract's sums; selection is compiled
// from the plain loops.
#include <arm_neon.h>

#include "cpu/contrast_tile.hpp"
#include "cpu/isa_generic.hpp"

namespace cascade::cpu {
namespace {

// The contract's sums s0..s7 in four accumulators of two.
template <class T>
double dot(const double* query, const T* key, int64_t dim) {
  float64x2_t sum[4] = {vdupq_n_f64(0), vdupq_n_f64(0), vdupq_n_f64(0), vdupq_n_f64(0)};
  for (int64_t d = 0; d < dim; d += 8) {
    float wide[8] = {};
    for (int64_t lane = 0; lane < 8 && d + lane < dim; ++lane) wide[lane] = widen(key[d + lane]);
    const float32x4_t low = vld1q_f32(wide), high = vld1q_f32(wide + 4);
    sum[0] = vfmaq_f64(sum[0], vld1q_f64(query + d), vcvt_f64_f32(vget_low_f32(low)));
    sum[1] = vfmaq_f64(sum[1], vld1q_f64(query + d + 2), vcvt_high_f64_f32(low));
    sum[2] = vfmaq_f64(sum[2], vld1q_f64(query + d + 4), vcvt_f64_f32(vget_low_f32(high)));
    sum[3] = vfmaq_f64(sum[3], vld1q_f64(query + d + 6), vcvt_high_f64_f32(high));
  }
  // (s0+s4, s1+s5) + (s2+s6, s3+s7), then the two lanes
  return vaddvq_f64(vaddq_f64(vaddq_f64(sum[0], sum[2]), vaddq_f64(sum[1], sum[3])));
}

template <class T>
void dots_of(const double* query, const Matrix& keys, const int64_t* rows, int64_t first, int64_t count, double* out) {
  const auto* data = static_cast<const T*>(keys.data);
  for (int64_t i = 0; i < count; ++i)
    out[i] = dot(query, data + (rows != nullptr ? rows[i] : first + i) * keys.stride, keys.columns);
}

void dots(const double* query, const Matrix& keys, const int64_t* rows, int64_t first, int64_t count, double* out) {
  if (keys.dtype == DType::float32) dots_of<float>(query, keys, rows, first, count, out);
  if (keys.dtype == DType::float16) dots_of<Float16>(query, keys, rows, first, count, out);
  if (keys.dtype == DType::bfloat16) dots_of<BFloat16>(query, keys, rows, first, count, out);
}

// 4 queries x 8 keys at a time: products of 16-bit pairs, added pairwise.
void tile16(const int32_t* queries, int count, const int32_t* keys, int64_t steps, int16_t* out, int64_t stride) {
  constexpr int together = 4;
  for (int q = 0; q < count; q += together)
    for (int lane = 0; lane < lanes16; lane += 8) {
      int32x4_t sum[together][2];
      for (auto& each : sum) each[0] = each[1] = vdupq_n_s32(0);
      for (int64_t step = 0; step < steps; ++step) {
        const int32_t* block = keys + step * lanes16 + lane;
        const int16x8_t low = vreinterpretq_s16_s32(vld1q_s32(block));
        const int16x8_t high = vreinterpretq_s16_s32(vld1q_s32(block + 4));
        for (int row = 0; row < together; ++row) {
          const int16x8_t word = vreinterpretq_s16_s32(vdupq_n_s32(queries[step * count + q + row]));
          const auto pairs = [&](int16x8_t key) {
            return vpaddq_s32(vmull_s16(vget_low_s16(key), vget_low_s16(word)), vmull_high_s16(key, word));
          };
          sum[row][0] = vaddq_s32(sum[row][0], pairs(low));
          sum[row][1] = vaddq_s32(sum[row][1], pairs(high));
        }
      }
      for (int row = 0; row < together; ++row)
        vst1q_s16(out + (q + row) * stride + lane,
                  vcombine_s16(vshrn_n_s32(sum[row][0], 16), vshrn_n_s32(sum[row][1], 16)));
    }
}

// ---- the loss's tiles

struct Floats4 {
  using type = float32x4_t;
  using bits = uint32_t __attribute__((vector_size(16)));
  static constexpr int rows = 8;  // of accumulators, two vectors each
  static type all(float value) { return vdupq_n_f32(value); }
  static type fma(type a, type b, type c) { return vfmaq_f32(c, a, b); }
};

}  // namespace

const Kernels& neon_kernels() noexcept {
  static constexpr Kernels table{
      .name = "neon",
      .dots = dots,
      .dots_float = generic::dots_float,
      .enter = nullptr,
      .leave = nullptr,
      .tiles16 = generic::tiles16<tile16>,
      .queries16 = 12,
      .least16 = 4,
      .planes16 = false,
      .piece16 = 8192,
      .count16 = generic::count16,
      .range16 = generic::range16,
      .collect16 = generic::collect16,
      .split16 = generic::split16,
      .fuse16 = generic::fuse16,
      .count_float = generic::count_float,
      .range_float = generic::range_float,
      .tiles8 = nullptr,
      .queries8 = 0,
      .by_row8 = false,
      .most8 = 0,
      .sums_runs = false,
      .fewest8 = 0,
      .few8 = 0,
      .scores32 = contrast::scores32<Floats4>,
      .absorb32 = contrast::absorb32<Floats4>,
  };
  return table;
}

}  // namespace cascade::cpu
