// Sums in float64 over the values of a row, several running side by side, in a form that any compiler vectorises.
#pragma once

#include <cstdint>

namespace cascade::cpu {

constexpr int side_by_side = 8;

// term(0) + ... + term(n - 1)
template <class Term>
double sum_of(int64_t n, const Term& term) {
  double sum[side_by_side] = {};
  int64_t d = 0;
  for (; d + side_by_side <= n; d += side_by_side)
    for (int lane = 0; lane < side_by_side; ++lane) sum[lane] += term(d + lane);
  for (; d < n; ++d) sum[d % side_by_side] += term(d);
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

}  // namespace cascade::cpu
