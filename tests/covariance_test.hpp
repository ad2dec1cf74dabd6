// The standard deviation of a query's similarities, from the keys' covariance against all similarities.
#pragma once

#include <array>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/backend.hpp"
#include "cpu/covariance.hpp"
#include "cpu/exact.hpp"

namespace covariance_test {

using namespace cascade;  // a test reads best as its subject does

// A bank that changes twice, with a strong mean, unequal dims and lengths, or hardly any spread at all. Where the
// spread is no accident of rounding, what is found is also narrow enough to be of use.
inline bool deviations_hold(const cpu::Isa& isa, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  const auto keys = static_cast<int64_t>(1 + rng() % 3000), dims = std::array<int64_t, 4>{1, 8, 33, 70}[rng() % 4];
  const auto metric = static_cast<Metric>(rng() % 3);
  const float mean = rng() % 2 == 0 ? 0.0f : 5.0f, spread = rng() % 4 == 0 ? 1e-6f : 1.0f;
  const float sigma = rng() % 2 == 0 ? 0.0f : 2.0f;
  std::vector<float> query(dims), key(keys * dims);
  const auto draw = [&](float* row) {
    const float size = std::exp(sigma * normal(rng));
    for (int64_t d = 0; d < dims; ++d) row[d] = mean + spread * size * normal(rng) * (d % 5 == 0 ? 1.0f : 0.1f);
  };
  draw(query.data());
  for (int64_t row = 0; row < keys; ++row) draw(&key[row * dims]);
  const Matrix key_matrix{key.data(), keys, dims, dims, DType::float32};
  const Matrix query_matrix{query.data(), 1, dims, dims, DType::float32};
  cpu::Covariance covariance({&key_matrix, 1}, metric, 0, isa.kernels());
  for (int turn = 0; turn < 3; ++turn) {
    covariance.refresh({.threads = 1 + static_cast<int>(rng() % 3)}, nullptr);
    cpu::Bank bank({key_matrix}, nullptr, metric, isa.kernels());
    cpu::ExactView view;
    view.bind(bank, 0, query_matrix, 0);
    std::vector<double> score(keys);
    view.scores(nullptr, 0, keys, score.data());
    long double sum = 0, squares = 0;
    for (const double each : score) sum += static_cast<long double>(each);
    for (const double each : score) squares += (static_cast<long double>(each) - sum / keys) * (each - sum / keys);
    const auto wanted = static_cast<double>(std::sqrt(squares / keys));
    const auto [low, high] = covariance.deviation({&query_matrix, 1}, 0);
    const bool plain = keys > 100 && dims > 1 && mean == 0 && spread == 1;
    if (!(low <= wanted && wanted <= high) || (plain && !(high - low < 1e-3 * wanted))) {
      std::printf("%s: a deviation of %g over %ld keys, %ld dims, metric %d, turn %d, is not in [%g, %g]\n", isa.name,
                  wanted, static_cast<long>(keys), static_cast<long>(dims), static_cast<int>(metric), turn, low, high);
      return false;
    }
    const auto first = static_cast<int64_t>(rng() % keys), count = std::min<int64_t>(keys - first, 1 + rng() % 200);
    for (int64_t row = first; row < first + count; ++row) draw(&key[row * dims]);
    covariance.update(first, count);
  }
  return true;
}

}  // namespace covariance_test
