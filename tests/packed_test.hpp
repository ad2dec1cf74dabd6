// What packed keys promise, read off their bytes: every key's score within its bound, whatever the lengths.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "cpu/isa.hpp"
#include "cpu/packed.hpp"

namespace packed_test {

using namespace cascade;  // a test reads best as its subject does

// Keys lie along, or against, what quantising a query loses: there the bound is as tight as it gets. Among them are the
// query itself, rows of lengths spread by up to exp(3 normal), and a giant. The scale of a query's scores is not told,
// so what is asked is that there is one that all bounds admit.
inline bool bounds8_hold(const cpu::Isa& isa, std::mt19937& rng) {
  const cpu::Kernels& kernels = isa.kernels();
  if (kernels.most8 == 0) return true;
  std::normal_distribution<double> normal;
  const int64_t dims = std::array<int64_t, 4>{1, 40, 128, 333}[rng() % 4], keys = 300;
  const double sigma = static_cast<double>(rng() % 4);
  const bool giant = rng() % 2 == 0, whole = rng() % 2 == 0;
  std::vector<float> query(dims), key(keys * dims);
  for (float& each : query) each = static_cast<float>(normal(rng));
  double extent = 0;
  for (const float each : query) extent = std::max(extent, std::abs(static_cast<double>(each)));
  const double scale = extent / kernels.most8;
  for (int64_t row = 0; row < keys; ++row) {
    const double size = std::exp(sigma * normal(rng)) * (giant && row == 7 ? 1e6 : 1);
    const int kind = static_cast<int>(rng() % 4);
    for (int64_t d = 0; d < dims; ++d) {
      const auto q = static_cast<double>(query[d]);
      const double lost = q - std::nearbyint(q / scale) * scale;
      const double along = whole ? (lost > 0 ? 1 : -1) : lost;
      key[row * dims + d] = static_cast<float>(size * (kind == 0   ? normal(rng)
                                                       : kind == 1 ? q
                                                       : kind == 2 ? along
                                                                   : -along));
    }
  }
  const Matrix key_matrix{key.data(), keys, dims, dims, DType::float32};
  const Matrix query_matrix{query.data(), 1, dims, dims, DType::float32};
  const cpu::Packed8 packed({&key_matrix, 1}, Metric::inner_product, {0}, kernels, {});
  std::vector<int8_t> bytes(packed.steps() * 4);
  std::vector<int32_t> start(packed.runs());
  const auto bound = packed.pack_query({&query_matrix, 1}, 0, {}, bytes.data(), start.data());
  const cpu::Layout& layout = packed.layout();
  const double constant = packed.embedding().constant({&query_matrix, 1}, 0);
  double least = -std::numeric_limits<double>::infinity(), most = std::numeric_limits<double>::infinity();
  for (int64_t row = 0; row < keys; ++row) {
    const int64_t position = layout.position(row), block = position / cpu::lanes8, lane = position % cpu::lanes8;
    int64_t sum = 0;
    for (int64_t d = 0; d < dims; ++d)
      sum += bytes[d] * (int64_t{packed.block(block)[(d / 4 * cpu::lanes8 + lane) * 4 + d % 4]} - 128);
    const float term = bound.beta * packed.residual(block)[lane];
    const float upper = std::fma(static_cast<float>(sum), packed.scale(block)[lane], term), lower = upper - 2 * term;
    double score = -constant;
    for (int64_t d = 0; d < dims; ++d)
      score += static_cast<double>(query[d]) * static_cast<double>(key[row * dims + d]);
    // unit * score in [lower - margin, upper + margin]
    const double low = static_cast<double>(lower) - static_cast<double>(bound.margin);
    const double high = static_cast<double>(upper) + static_cast<double>(bound.margin);
    if (score > 0) {
      least = std::max(least, low / score);
      most = std::min(most, high / score);
    } else if (score < 0) {
      least = std::max(least, high / score);
      most = std::min(most, low / score);
    }
  }
  if (least <= most) return true;
  std::printf("%s: 8-bit bounds of %ld dims, lengths spread by %g, contradict each other: %g > %g\n", isa.name,
              static_cast<long>(dims), sigma, least, most);
  return false;
}

}  // namespace packed_test
