// The best of a list, and their order, by the one total order.
#pragma once

#include <cstdint>
#include <vector>

#include "core/order.hpp"

namespace cascade::cpu {

// Shortens `ranked` to its `keep` best, in no order.
void keep_best(std::vector<Ranked>& ranked, int64_t keep);

// Sorts by `before`.
void sort_best_first(std::vector<Ranked>& ranked);

}  // namespace cascade::cpu
