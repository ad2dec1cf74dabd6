// The tiles, and the float products that follow, alone: at the edges of what their bounds admit.
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

// 8-bit tiles: few groups of queries and many, all layouts.
inline bool tiles8_right(const cpu::Isa& isa, std::mt19937& rng) {
  const cpu::Kernels& kernels = isa.kernels();
  if (kernels.tiles8 == nullptr) return true;
  const int64_t steps = std::array<int64_t, 9>{1, 2, 7, 8, 9, 17, 32, 33, 1024}[rng() % 9];
  const int64_t runs = kernels.sums_runs ? (steps + cpu::run8 - 1) / cpu::run8 : 1;
  const int64_t many = std::array<int64_t, 6>{1, 2, 3, 5, 9, 18}[rng() % 6];
  const int64_t groups = kernels.sums_runs ? std::min<int64_t>(many, 2) : many;  // at most as many queries as lanes
  const int64_t together = kernels.queries8, count = groups * together;
  const int64_t width = kernels.by_row8 ? (4 * steps + 63) / 64 * 64 : 4 * steps;
  cpu::Buffer<uint8_t> keys(steps * cpu::lanes8 * 4 + cpu::over_read);
  cpu::Buffer<float> scale(cpu::lanes8), residual(cpu::lanes8);
  cpu::Buffer<int8_t> queries(count * width);
  std::fill_n(queries.data(), count * width, int8_t{0});
  for (int64_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<uint8_t>(rng());
  std::vector<int8_t> query(4 * steps), key(4 * steps);
  std::vector<int32_t> start(count * runs);
  std::vector<std::vector<int8_t>> q(count), k(cpu::lanes8);
  const auto fraction = [&] { return static_cast<float>(rng() % 65536) / 65521; };
  const bool are_alike = rng() % 2 == 0;
  residual[0] = 100 * fraction();
  for (int i = 0; i < count || i < cpu::lanes8; ++i) {
    fill_halves(kernels, rng, steps, query, key);
    if (i < count) q[i] = query;
    if (i >= cpu::lanes8) continue;
    k[i] = key;
    if (kernels.sums_runs && i >= count) k[i] = k[i % count];  // fitting to its query
    scale[i] = rng() % 8 == 0 ? std::numeric_limits<float>::quiet_NaN() : 0.5f + fraction();
    residual[i] = are_alike ? residual[0] : 100 * fraction();
  }
  for (int64_t step = 0; step < steps; ++step) {
    for (int lane = 0; lane < cpu::lanes8; ++lane)
      for (int64_t byte = 0; byte < 4; ++byte)
        keys[(step * cpu::lanes8 + lane) * 4 + byte] = static_cast<uint8_t>(k[lane][4 * step + byte] + 128);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = i / together * together, place = i % together;
      int8_t* const to =
          kernels.by_row8 ? &queries[i * width + step * 4] : &queries[first * width + (step * together + place) * 4];
      std::memcpy(to, &q[i][4 * step], 4);
    }
  }
  // As Packed8::start_query does.
  for (int64_t i = 0; i < count; ++i)
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
  std::vector<float> least(count), beta(count, 0.5f);
  const auto bound = [&](int64_t i, int lane) {
    int64_t sum = 0;
    for (int64_t d = 0; d < 4 * steps; ++d) sum += int64_t{q[i][d]} * k[lane][d];
    return std::fma(static_cast<float>(sum), scale[lane], beta[i] * residual[lane]);
  };
  for (int64_t i = 0; i < count; ++i) {
    const float reached = bound(i, static_cast<int>(rng() % cpu::lanes8));  // by one lane exactly
    const bool is_near = rng() % 2 == 0 && !std::isnan(reached);
    least[i] = is_near ? reached : static_cast<float>(static_cast<int>(rng() % 200000) - 100000);
  }
  cpu::Buffer<float> upper(count * cpu::lanes8);
  std::vector<uint64_t> lanes(count);
  std::vector<uint32_t> any(groups);
  {
    const cpu::MatrixUnits units(kernels);
    kernels.tiles8(queries.data(), groups, keys.data(), steps, start.data(), scale.data(), residual.data(),
                   least.data(), beta.data(), upper.data(), lanes.data(), any.data());
  }
  for (int64_t i = 0; i < count; ++i) {
    bool same = true;
    for (int lane = 0; lane < cpu::lanes8; ++lane) {
      const bool fits = !kernels.sums_runs || lane % count == i;  // other keys' sums may not fit 16 bits
      const float u = bound(i, lane);
      const bool there = (any[i / together] >> (i % together) & 1) != 0 && (lanes[i] >> lane & 1) != 0;
      if (!fits) continue;
      same = same && there == (u >= least[i]);
      if (there) same = same && upper[i * cpu::lanes8 + lane] == u;
    }
    if (same) continue;
    std::printf("%s: an 8-bit tile of %ld steps is wrong in query %ld\n", isa.name, static_cast<long>(steps),
                static_cast<long>(i));
    return false;
  }
  return true;
}

// 16-bit tiles: several blocks, all layouts, rows as long as the contract allows.
inline bool tiles16_right(const cpu::Isa& isa, std::mt19937& rng) {
  const cpu::Kernels& kernels = isa.kernels();
  const int64_t dims = 4 * std::array<int64_t, 7>{1, 2, 15, 16, 17, 32, 129}[rng() % 7], steps = dims / 2;
  const int count = kernels.least16 * (1 + static_cast<int>(rng() % (kernels.queries16 / kernels.least16)));
  const int64_t blocks = 1 + static_cast<int64_t>(rng() % 3), n = blocks * cpu::lanes16;
  const int64_t padded = kernels.planes16 ? (dims + 63) / 64 * 64 : dims;
  const auto draw = [&](int64_t rows) {
    std::vector<std::vector<int16_t>> drawn(rows, std::vector<int16_t>(dims));
    const double longest = kernels.planes16 ? 46290 * cpu::finer_planes : 46290;
    const double most = std::min(32639.0, longest / std::sqrt(static_cast<double>(dims)));  // so long at most
    std::uniform_int_distribution<int> value(-static_cast<int>(most), static_cast<int>(most));
    const bool extreme = rng() % 2 == 0;
    for (auto& row : drawn)
      for (int16_t& each : row)
        each = static_cast<int16_t>(extreme ? (rng() % 2 == 0 ? most : -most) : static_cast<double>(value(rng)));
    return drawn;
  };
  const auto q = draw(count), k = draw(n);
  cpu::Buffer<int32_t> queries(count * padded / 2), keys(n * steps + cpu::over_read / 4);
  std::fill_n(queries.data(), queries.size(), 0);
  for (int64_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<int32_t>(rng());
  const auto lower = [](int16_t value) { return static_cast<int8_t>(static_cast<uint8_t>(value & 255)); };
  const auto byte = [&](int16_t value, int plane) {
    return plane == 1 ? lower(value) : static_cast<int8_t>((value - lower(value)) / 256);
  };
  for (int64_t d = 0; d < dims; ++d) {
    for (int64_t i = 0; i < count; ++i)
      if (!kernels.planes16) {
        reinterpret_cast<int16_t*>(queries.data())[(d / 2 * count + i) * 2 + d % 2] = q[i][d];
      } else {
        for (int plane = 0; plane < 2; ++plane)
          reinterpret_cast<int8_t*>(queries.data())[(plane * count + i) * padded + d] = byte(q[i][d], plane);
      }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t block = i / 32, lane = i % 32;
      if (!kernels.planes16) {
        reinterpret_cast<int16_t*>(keys.data())[((block * steps + d / 2) * 32 + lane) * 2 + d % 2] = k[i][d];
      } else {
        for (int64_t plane = 0; plane < 2; ++plane)
          reinterpret_cast<int8_t*>(
              keys.data())[((((block * 2 + plane) * 2 + lane % 2) * (dims / 4) + d / 4) * 16 + lane / 2) * 4 + d % 4] =
              byte(k[i][d], static_cast<int>(plane));
      }
    }
  }
  const int64_t stride = n + 32;
  std::vector<int16_t> out(count * stride);
  {
    const cpu::MatrixUnits units(kernels);
    kernels.tiles16(queries.data(), count, keys.data(), blocks, steps, out.data(), stride);
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < n; ++j) {
      int64_t sum = 0;
      for (int64_t d = 0; d < dims; ++d) sum += int64_t{q[i][d]} * k[j][d];
      if (out[i * stride + j] == static_cast<int16_t>(sum >> (kernels.planes16 ? 18 : 16))) continue;
      std::printf("%s: a 16-bit tile of %ld dims is wrong in query %ld, key %ld\n", isa.name, static_cast<long>(dims),
                  static_cast<long>(i), static_cast<long>(j));
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
