#include "cpu/threshold.hpp"

#include <algorithm>
#include <cmath>

namespace cascade::cpu {
namespace {

// Narrows a bracket, count(>= low) = at_low >= m > at_high = count(>= high), until it is no wider than `slack`.
// Interpolates, with a bisection now and then where the scores are unevenly spread.
Threshold narrow(const Kernels& kernels, const int16_t* score, int64_t n, int64_t m, int low, int64_t at_low, int high,
                 int64_t at_high, int slack) {
  for (int round = 0; high - low > 1 + slack; ++round) {
    const auto reach = static_cast<int64_t>(high - low) * (at_low - m) / std::max<int64_t>(1, at_low - at_high);
    const int guess = round % 3 == 2 ? low + (high - low) / 2 : low + static_cast<int>(reach);
    const int middle = std::clamp(guess, low + 1, high - 1);
    const int64_t count = kernels.count16(score, n, static_cast<int16_t>(middle));
    if (count == m) return {middle, middle};
    if (count > m) {
      low = middle;
      at_low = count;
    } else {
      high = middle;
      at_high = count;
    }
  }
  return {low, high - 1};
}

}  // namespace

// A guess from 16 strided vectors brackets the m-th largest; one pass keeps the scores between; counts do the rest.
Threshold find_threshold(const Kernels& kernels, const int16_t* score, int64_t n, int64_t valid, int64_t m, int slack,
                         int16_t* middle) {
  constexpr int64_t sampled = 16;
  const int64_t vectors = n / lanes16;
  if (vectors > 6 * sampled) {
    alignas(64) int16_t sample[sampled * lanes16];
    for (int64_t j = 0; j < sampled; ++j)
      std::copy_n(score + j * (vectors - 1) / sampled * lanes16, lanes16, sample + j * lanes16);
    const auto size = static_cast<double>(sampled * lanes16);
    const double rank = static_cast<double>(m) * size / static_cast<double>(n);
    const double spread = 2.7 * std::sqrt(std::max(0.0, rank * (1 - rank / size))) + 2;
    int16_t low = 0, high = 0;
    kernels.range16(sample, sampled * lanes16, &low, &high);
    const int64_t there = kernels.count16(sample, sampled * lanes16, no_score + 1);
    const auto under = static_cast<int64_t>(std::ceil(rank + spread));
    const auto over = static_cast<int64_t>(std::floor(rank - spread));
    const auto at = [&](int64_t wanted) {
      return narrow(kernels, sample, sampled * lanes16, wanted, low, there, high + 1, 0, 8);
    };
    const int least = under < there ? at(under).low : no_score + 1;
    const int most = over >= 1 && over < there ? at(over).high : 32767;
    if (least <= most) {
      const Split found = kernels.collect16(score, n, static_cast<int16_t>(least), static_cast<int16_t>(most), middle);
      const int64_t wanted = m - found.kept, padded = pad_scores(middle, found.open);
      if (wanted >= 1 && wanted <= found.open)
        return narrow(kernels, middle, padded, wanted, least, found.open, most + 1, 0, slack);
    }
  }
  int16_t low = 0, high = 0;
  kernels.range16(score, n, &low, &high);
  return narrow(kernels, score, n, m, low, valid, high + 1, 0, slack);
}

int64_t pad_scores(int16_t* score, int64_t n) {
  const int64_t padded = (n + lanes16 - 1) / lanes16 * lanes16;
  std::fill(score + n, score + padded, no_score);
  return padded;
}

}  // namespace cascade::cpu
