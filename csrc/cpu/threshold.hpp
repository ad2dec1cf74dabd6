// Where the m-th largest of many 16-bit scores lies.
#pragma once

#include <cstdint>

#include "cpu/isa.hpp"

namespace cascade::cpu {

// The m-th largest score lies in [low, high].
struct Threshold {
  int low;
  int high;
};

// The m-th largest of n scores, a multiple of 32, of which `valid` are above `no_score`, 1 <= m <= valid; in a bracket
// no wider than `slack`. `middle` has room for n + 64.
Threshold find_threshold(const Kernels& kernels, const int16_t* score, int64_t n, int64_t valid, int64_t m, int slack,
                         int16_t* middle);

// Fills up the last vector with `no_score`; returns the padded length.
int64_t pad_scores(int16_t* score, int64_t n);

}  // namespace cascade::cpu
