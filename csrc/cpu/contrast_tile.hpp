// The loss's tiles: 32 queries side by side in the lanes, keys one after the other as they are stored, so that nothing
// of the keys is packed for one pass. Included by the instruction sets' files like isa_generic.hpp, hence the unnamed
// namespace. `V` is the set's vector of floats: its type, that of its bits, `all` and `fma`.
//
// Float32 throughout, sums of weights in float64: the loss is compared with float32 losses, not ranked by.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa.hpp"

namespace cascade::cpu {
namespace {
namespace contrast {

template <class V>
using Floats = typename V::type;
template <class V>
using Bits = typename V::bits;
template <class V>
constexpr int width = sizeof(Floats<V>) / sizeof(float);

template <class V>
inline Floats<V> load(const float* from) {
  Floats<V> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class V>
inline void store(float* to, Floats<V> value) {
  std::memcpy(to, &value, sizeof value);
}

// e^x for x <= 0 to about one unit in the last place; 0 below -87, where float32 loses its digits.
// x = n ln 2 + r, |r| <= ln(2) / 2; the polynomial is e^r's Taylor series, whose next term is under 2^-25.
template <class V>
inline Floats<V> exp_negative(Floats<V> x) {
  const Floats<V> least = V::all(-87.0f);
  const Floats<V> clamped = x > least ? x : least;
  const Floats<V> shift = V::all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats<V> shifted = V::fma(clamped, V::all(1.44269504f), shift);
  const Floats<V> n = shifted - shift;
  Floats<V> r = V::fma(n, V::all(-0.693359375f), clamped);  // ln 2 in two parts, the first exact in 9 bits
  r = V::fma(n, V::all(2.12194440e-4f), r);
  Floats<V> e = V::all(1.0f / 5040);
  e = V::fma(e, r, V::all(1.0f / 720));
  e = V::fma(e, r, V::all(1.0f / 120));
  e = V::fma(e, r, V::all(1.0f / 24));
  e = V::fma(e, r, V::all(1.0f / 6));
  e = V::fma(e, r, V::all(0.5f));
  e = V::fma(e, r, V::all(1.0f));
  e = V::fma(e, r, V::all(1.0f));
  const auto scaled = reinterpret_cast<Bits<V>>(e) + (reinterpret_cast<Bits<V>>(shifted) << 23);
  const Floats<V> zero{};
  return x > least ? reinterpret_cast<Floats<V>>(scaled) : zero;
}

// Lines to be fetched into the cache, one at a time between the products: a burst of them fills the buffers that a core
// has for lines on their way, and then it waits.
class Ahead {
 public:
  Ahead(const float* from, int64_t count) : next_(from), end_(from + count) {}
  void fetch() {
    if (next_ >= end_) return;
    __builtin_prefetch(next_);
    next_ += 16;
  }

 private:
  const float *next_, *end_;
};

// to[i][lane] += sum over j of value[j * along + i * across] * lanes[j][lane], for `rows` consecutive i and two vectors
// of lanes: both of a tile's products are this, with keys and dimensions in each other's place.
template <class V, int rows>
inline void products(const float* value, int64_t along, int64_t across, const float* lanes, int64_t n, Ahead& ahead,
                     Floats<V> (&sum)[rows][2]) {
  constexpr int64_t between = 4;
  const auto add = [&](int64_t j) {
    const Floats<V> first = load<V>(lanes + j * lanes32), second = load<V>(lanes + j * lanes32 + width<V>);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Floats<V> each = V::all(value[j * along + i * across]);
      sum[i][0] = V::fma(each, first, sum[i][0]);
      sum[i][1] = V::fma(each, second, sum[i][1]);
    }
  };
  int64_t j = 0;
  for (; j + between <= n; j += between) {
    ahead.fetch();
#pragma GCC unroll 4
    for (int64_t i = 0; i < between; ++i) add(j + i);
  }
  for (; j < n; ++j) add(j);
}

template <class V, int rows>
inline void score_rows(const float* queries, const float* keys, int64_t stride, int64_t dim, const float (&inverse)[2],
                       Ahead& ahead, float* out) {
  for (int64_t lane = 0; lane < lanes32; lane += 2 * width<V>) {
    Floats<V> sum[rows][2] = {};
    products<V, rows>(keys, 1, stride, queries + lane, dim, ahead, sum);
    for (int i = 0; i < rows; ++i)
      for (int half = 0; half < 2; ++half)
        store<V>(out + i * lanes32 + lane + half * width<V>,
                 V::fma(sum[i][half], V::all(inverse[0]), sum[i][half] * V::all(inverse[1])));
  }
}

template <class V, int rows>
inline void direction_rows(const float* weights, const float* keys, int64_t stride, int64_t n, Ahead& ahead,
                           float* direction) {
  for (int64_t lane = 0; lane < lanes32; lane += 2 * width<V>) {
    Floats<V> sum[rows][2];
    for (int i = 0; i < rows; ++i)
      for (int half = 0; half < 2; ++half) sum[i][half] = load<V>(direction + i * lanes32 + lane + half * width<V>);
    products<V, rows>(keys, stride, 1, weights + lane, n, ahead, sum);
    for (int i = 0; i < rows; ++i)
      for (int half = 0; half < 2; ++half) store<V>(direction + i * lanes32 + lane + half * width<V>, sum[i][half]);
  }
}

template <class V>
void scores32(const float* queries, const float* keys, int64_t stride, int64_t n, int64_t dim, const float* next,
              int64_t ahead, const float (&inverse)[2], float* out) {
  Ahead lines(next, ahead);
  int64_t i = 0;
  for (; i + V::rows <= n; i += V::rows)
    score_rows<V, V::rows>(queries, keys + i * stride, stride, dim, inverse, lines, out + i * lanes32);
  for (; i < n; ++i) score_rows<V, 1>(queries, keys + i * stride, stride, dim, inverse, lines, out + i * lanes32);
}

template <class V>
void absorb32(float* score, const float* keys, int64_t stride, int64_t n, int64_t dim, const float* next, int64_t ahead,
              float* top, double* sum, float* direction) {
  alignas(64) float shrink[lanes32];
  bool grown = false;
  for (int64_t lane = 0; lane < lanes32; lane += width<V>) {
    const Floats<V> known = load<V>(top + lane);
    Floats<V> most = known, total{};
    for (int64_t i = 0; i < n; ++i) {
      const Floats<V> each = load<V>(score + i * lanes32 + lane);
      most = each > most ? each : most;
    }
    for (int64_t i = 0; i < n; ++i) {
      const Floats<V> weight = exp_negative<V>(load<V>(score + i * lanes32 + lane) - most);
      store<V>(score + i * lanes32 + lane, weight);
      total += weight;
    }
    store<V>(top + lane, most);
    store<V>(shrink + lane, exp_negative<V>(known - most));
    for (int64_t i = lane; i < lane + width<V>; ++i) {
      grown = grown || shrink[i] != 1;
      sum[i] = sum[i] * static_cast<double>(shrink[i]) + static_cast<double>(total[i - lane]);
    }
  }
  if (direction == nullptr) return;
  if (grown)
    for (int64_t d = 0; d < dim; ++d)
      for (int lane = 0; lane < lanes32; ++lane) direction[d * lanes32 + lane] *= shrink[lane];
  Ahead lines(next, ahead);
  int64_t d = 0;
  for (; d + V::rows <= dim; d += V::rows)
    direction_rows<V, V::rows>(score, keys + d, stride, n, lines, direction + d * lanes32);
  for (; d < dim; ++d) direction_rows<V, 1>(score, keys + d, stride, n, lines, direction + d * lanes32);
}

}  // namespace contrast
}  // namespace
}  // namespace cascade::cpu
