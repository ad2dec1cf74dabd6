// The kernels of the 8-bit stream alone, at the edges of what their bounds admit.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/buffer.hpp"
#include "cpu/isa.hpp"
#include "cpu/ranking.hpp"
#include "cpu/rescore.hpp"

namespace bounds_test {

using namespace cascade;  // a test reads best as its subject does

// Half a run's queries and keys for which the sum of products is near the largest that fits 16 bits, on either side.
inline void fill_halves(const cpu::Kernels& kernels, std::mt19937& rng, int64_t steps, std::vector<int8_t>& query,
                        std::vector<int8_t>& key) {
  const int kind = static_cast<int>(rng() % 4), most = kernels.most8;
  const auto sign = [&] { return rng() % 2 == 0 ? 1 : -1; };
  for (int64_t first = 0; first < steps; first += cpu::run8)
    for (int64_t half = 0; half < 2; ++half) {
      const int lone = static_cast<int>(rng() % cpu::run8), both = sign();
      for (int64_t step = first; step < std::min(steps, first + cpu::run8); ++step)
        for (int64_t byte = 0; byte < 2; ++byte) {
          int8_t &q = query[4 * step + 2 * half + byte], &k = key[4 * step + 2 * half + byte];
          k = static_cast<int8_t>(127 * sign());
          if (kind == 0) q = static_cast<int8_t>(static_cast<int>(rng() % 33) - 16);  // whatever the keys
          if (kind == 1) q = static_cast<int8_t>(16 * both * (k > 0 ? 1 : -1));       // all add up: 32,512
          if (kind == 2) q = step - first == lone ? static_cast<int8_t>(most * sign()) : int8_t{0};  // pairs: 64 * 254
          if (kind == 3) {
            q = static_cast<int8_t>(static_cast<int>(rng() % 127) - 63);
            k = static_cast<int8_t>(static_cast<int>(rng() % 61) - 30);  // |q| |k| < 63 * 4 * 30 * 4
          }
          if (!kernels.sums_runs && kind != 3) q = static_cast<int8_t>(most * sign());
        }
    }
}

inline bool tiles_right(const cpu::Isa& isa, std::mt19937& rng) {
  const cpu::Kernels& kernels = isa.kernels();
  if (kernels.tile8 == nullptr) return true;
  const int64_t steps = std::array<int64_t, 8>{1, 2, 7, 8, 9, 32, 33, 1024}[rng() % 8];
  const int64_t runs = kernels.sums_runs ? (steps + cpu::run8 - 1) / cpu::run8 : 1;
  cpu::Buffer<uint8_t> keys;
  cpu::Buffer<float> scale, residual;
  keys.reserve(steps * cpu::lanes8 * 4);
  scale.reserve(cpu::lanes8);
  residual.reserve(cpu::lanes8);
  std::vector<int8_t> queries(cpu::queries8 * steps * 4), query(4 * steps), key(4 * steps);
  std::vector<int32_t> start(cpu::queries8 * runs);
  std::vector<std::vector<int8_t>> q(cpu::queries8), k(cpu::lanes8);
  for (int i = 0; i < cpu::lanes8; ++i) {
    fill_halves(kernels, rng, steps, query, key);
    k[i] = key;
    if (i < cpu::queries8) q[i] = query;
    if (kernels.sums_runs && i >= cpu::queries8) k[i] = k[i % cpu::queries8];  // fitting to its query
    scale.data()[i] = rng() % 8 == 0 ? std::numeric_limits<float>::quiet_NaN() : 1.0f;
    residual.data()[i] = static_cast<float>(rng() % 100);
  }
  for (int64_t step = 0; step < steps; ++step) {
    for (int lane = 0; lane < cpu::lanes8; ++lane)
      for (int64_t byte = 0; byte < 4; ++byte)
        keys.data()[(step * cpu::lanes8 + lane) * 4 + byte] = static_cast<uint8_t>(k[lane][4 * step + byte] + 128);
    for (int i = 0; i < cpu::queries8; ++i) std::memcpy(&queries[(step * cpu::queries8 + i) * 4], &q[i][4 * step], 4);
  }
  // As Packed8::start_query does.
  for (int i = 0; i < cpu::queries8; ++i)
    for (int64_t run = 0; run < runs; ++run) {
      int32_t half[2] = {};
      const int64_t first = kernels.sums_runs ? run * cpu::run8 : 0;
      for (int64_t d = 4 * first; d < 4 * (kernels.sums_runs ? std::min(steps, first + cpu::run8) : steps); ++d)
        half[d % 4 / 2] -= 128 * q[i][d];
      start[i * runs + run] =
          kernels.sums_runs
              ? static_cast<int32_t>((static_cast<uint32_t>(half[0]) & 0xffff) | static_cast<uint32_t>(half[1]) << 16)
              : half[0] + half[1];
    }
  std::vector<float> least(cpu::queries8), beta(cpu::queries8, 0.5f), upper(cpu::queries8 * cpu::lanes8);
  for (float& each : least) each = static_cast<float>(static_cast<int>(rng() % 200000) - 100000);
  uint64_t lanes[cpu::queries8] = {};
  const uint32_t any = kernels.tile8(queries.data(), keys.data(), steps, start.data(), scale.data(), residual.data(),
                                     least.data(), beta.data(), upper.data(), lanes);
  for (int i = 0; i < cpu::queries8; ++i) {
    uint64_t reached = 0;
    bool same = true;
    for (int lane = 0; lane < cpu::lanes8; ++lane) {
      int64_t sum = 0;
      for (int64_t d = 0; d < 4 * steps; ++d) sum += int64_t{q[i][d]} * k[lane][d];
      const bool fits = !kernels.sums_runs || lane % cpu::queries8 == i;  // other keys' sums may not fit 16 bits
      const float u = std::fma(static_cast<float>(sum), scale.data()[lane], 0.5f * residual.data()[lane]);
      const bool there = (any >> i & 1) != 0 && (lanes[i] >> lane & 1) != 0;
      if (!fits) continue;
      if (u >= least[i]) reached |= uint64_t{1} << lane;
      same = same && there == (u >= least[i]);
      if (there) same = same && upper[i * cpu::lanes8 + lane] == u;
    }
    if (same) continue;
    std::printf("%s: a tile of %ld steps is wrong in query %d\n", isa.name, static_cast<long>(steps), i);
    return false;
  }
  return true;
}

// float32 inner products within `float_error` of the contract's: huge, tiny, denormal, cancelling, lone and many
// values.
inline bool float_products_right(const cpu::Isa& isa, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  const int64_t dim = std::array<int64_t, 7>{1, 2, 15, 16, 17, 129, 4096}[rng() % 7], count = 1 + rng() % 9;
  const auto exponent = static_cast<int>(rng() % 72) - 44, other = static_cast<int>(rng() % 80) - 44;
  const bool cancels = rng() % 2 == 0;
  std::vector<float> query((dim + 15) / 16 * 16, 0.0f), key(count * dim), found(count);
  for (int64_t d = 0; d < dim; ++d) query[d] = normal(rng) * std::pow(10.0f, static_cast<float>(exponent));
  for (int64_t i = 0; i < count * dim; ++i) key[i] = normal(rng) * std::pow(10.0f, static_cast<float>(other));
  for (int64_t i = 0; cancels && i < count; ++i)
    for (int64_t d = 1; d < dim; d += 2) key[i * dim + d] = -key[i * dim + d - 1] * query[d - 1] / query[d];
  for (float& each : key)
    if (!(std::abs(each) < std::numeric_limits<float>::infinity())) each = 0;
  std::vector<int64_t> rows(count);
  for (int64_t i = 0; i < count; ++i) rows[i] = count - 1 - i;
  isa.kernels().dots_float(query.data(), {key.data(), count, dim, dim, DType::float32}, rows.data(), count,
                           found.data());
  const auto length = [&](const float* x) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += static_cast<double>(x[d]) * static_cast<double>(x[d]);
    return std::sqrt(sum);
  };
  for (int64_t i = 0; i < count; ++i) {
    const float* x = key.data() + rows[i] * dim;
    long double sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += static_cast<long double>(query[d]) * static_cast<long double>(x[d]);
    const float error = cpu::float_error(dim, length(query.data()), length(x));
    if (!(error < std::numeric_limits<float>::infinity())) continue;
    if (std::abs(static_cast<long double>(found[i]) - sum) <= static_cast<long double>(error)) continue;
    std::printf("%s: a float32 product of %ld values is %g, not %Lg +- %g\n", isa.name, static_cast<long>(dim),
                static_cast<double>(found[i]), sum, static_cast<double>(error));
    return false;
  }
  return true;
}

// The bracket holds the k-th largest, among many equal values and such that do not count.
inline bool brackets_right(const cpu::Isa& isa, std::mt19937& rng) {
  const auto n = static_cast<int64_t>(1 + rng() % 500), k = static_cast<int64_t>(1 + rng() % n);
  std::vector<float> value(n);
  const int kinds = 1 + static_cast<int>(rng() % 1000);
  for (float& each : value) {
    each = static_cast<float>(rng() % kinds) - 100.5f;
    if (rng() % 10 == 0) each = -std::numeric_limits<float>::infinity();
  }
  const float known = rng() % 2 == 0 ? -std::numeric_limits<float>::infinity() : value[rng() % n];
  const auto found = cpu::kth_largest(isa.kernels(), value.data(), n, k, known, static_cast<int>(rng() % 25));
  std::sort(value.begin(), value.end(), [](float a, float b) { return a > b; });
  const float wanted = value[k - 1];
  const bool there = wanted > -std::numeric_limits<float>::infinity();
  if (there ? found.low <= wanted && wanted <= found.high : found.low == -std::numeric_limits<float>::max())
    return true;
  std::printf("%s: the %ld-th of %ld values is %g, the bracket [%g, %g]\n", isa.name, static_cast<long>(k),
              static_cast<long>(n), static_cast<double>(wanted), static_cast<double>(found.low),
              static_cast<double>(found.high));
  return false;
}

}  // namespace bounds_test
