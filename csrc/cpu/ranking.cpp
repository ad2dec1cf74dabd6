#include "cpu/ranking.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

namespace cascade::cpu {
namespace {

constexpr size_t radix_from = 96;  // shorter lists sort faster by comparison
constexpr int digit = 11;
constexpr int passes = 2;

// An integer whose order is that of the scores, ties aside: subtraction and product round monotonically.
struct Coarse {
  uint32_t code;
  uint32_t from;
};

void code_scores(const std::vector<Ranked>& ranked, std::vector<Coarse>& out) {
  double low = ranked[0].score, high = ranked[0].score;
  for (const Ranked& each : ranked) {
    low = std::min(low, each.score);
    high = std::max(high, each.score);
  }
  constexpr double top = (1 << (digit * passes)) - 1;
  const double scale = top / (high - low);
  const bool usable = std::isfinite(scale) && std::isfinite(high - low);
  out.resize(ranked.size());
  for (size_t i = 0; i < ranked.size(); ++i)
    out[i] = {usable ? static_cast<uint32_t>(std::min(top, (high - ranked[i].score) * scale)) : 0,
              static_cast<uint32_t>(i)};
}

}  // namespace

void keep_best(std::vector<Ranked>& ranked, int64_t keep) {
  if (keep >= static_cast<int64_t>(ranked.size())) return;
  std::nth_element(ranked.begin(), ranked.begin() + keep, ranked.end(), before);
  ranked.resize(keep);
}

// Radix sort by the leading bits of the scores, then each run of equal codes by comparison.
void sort_best_first(std::vector<Ranked>& ranked) {
  if (ranked.size() < radix_from) return std::sort(ranked.begin(), ranked.end(), before);
  thread_local std::vector<Coarse> codes, other;
  thread_local std::vector<Ranked> sorted;
  code_scores(ranked, codes);
  other.resize(codes.size());
  for (int pass = 0; pass < passes; ++pass) {
    std::array<uint32_t, (1 << digit)> starts{};
    const auto bucket = [pass](const Coarse& each) { return each.code >> (pass * digit) & ((1u << digit) - 1); };
    for (const Coarse& each : codes) ++starts[bucket(each)];
    uint32_t total = 0;
    for (uint32_t& start : starts) total += std::exchange(start, total);
    for (const Coarse& each : codes) other[starts[bucket(each)]++] = each;
    codes.swap(other);
  }
  sorted.resize(ranked.size());
  for (size_t i = 0; i < codes.size(); ++i) sorted[i] = ranked[codes[i].from];
  for (size_t first = 0; first < codes.size();) {
    size_t end = first + 1;
    while (end < codes.size() && codes[end].code == codes[first].code) ++end;
    if (end - first > 1)
      std::sort(sorted.begin() + static_cast<int64_t>(first), sorted.begin() + static_cast<int64_t>(end), before);
    first = end;
  }
  ranked.swap(sorted);
}

Bracket kth_largest(const Kernels& kernels, const float* value, int64_t n, int64_t k, float known, int rounds) {
  constexpr float lowest = -std::numeric_limits<float>::max();
  const Bracket nowhere{lowest, std::numeric_limits<float>::infinity()};
  if (n < k) return nowhere;
  Bracket found = nowhere;
  kernels.range_float(value, n, lowest, &found.low, &found.high);
  if (known > found.low && known < found.high && kernels.count_float(value, n, known) >= k) found.low = known;
  if (kernels.count_float(value, n, found.low) < k) return nowhere;
  for (int round = 0; round < rounds; ++round) {
    const float middle = 0.5f * found.low + 0.5f * found.high;
    if (!(middle > found.low && middle < found.high)) break;
    const int64_t count = kernels.count_float(value, n, middle);
    (count >= k ? found.low : found.high) = middle;
    if (count == k) {  // the least of those k is the one
      float unused = 0;
      kernels.range_float(value, n, std::nextafter(middle, lowest), &found.low, &unused);
      found.high = found.low;
      break;
    }
  }
  return found;
}

}  // namespace cascade::cpu
