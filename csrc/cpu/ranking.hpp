// The best of a list, and their order, by the one total order.
#pragma once

#include <cstdint>
#include <vector>

#include "core/order.hpp"
#include "cpu/isa.hpp"

namespace cascade::cpu {

// Shortens `ranked` to its `keep` best, in no order.
void keep_best(std::vector<Ranked>& ranked, int64_t keep);

// Sorts by `before`.
void sort_best_first(std::vector<Ranked>& ranked);

// Where the k-th largest of `n` values lies: at least k are at or above `low`, fewer than k above `high`.
struct Bracket {
  float low;
  float high;
};

// By `rounds` of bisection, starting from `known`, which may be a good guess. Values of -infinity do not count; where
// fewer than k are left, `low` is the lowest float and `high` infinity.
Bracket kth_largest(const Kernels& kernels, const float* value, int64_t n, int64_t k, float known, int rounds);

}  // namespace cascade::cpu
