// The loss's pass over the keys: an online softmax of every query over all keys that also sums the keys by their
// weights, as attention does; that sum is the query's gradient. `cascade_engine/nce.py` says what is made of it.
#pragma once

#include <cstdint>
#include <span>

#include "core/views.hpp"
#include "cpu/isa.hpp"
#include "cpu/pool.hpp"

namespace cascade::cpu {

// Pairs of a key and a query, slots ascending.
struct Pairs {
  std::span<const int64_t> slot;
  std::span<const int64_t> row;
};

struct ContrastCall {
  const float* query;  // [B, D]
  const float* own;    // [B], where the running softmax begins
  int64_t batch;
  Matrix keys;  // [K, D], float32, float16 or bfloat16
  double temperature;
  Pairs members;  // their scores are answered, and not part of the sums
  Pairs absent;   // not part of the sums
};

struct ContrastAnswer {
  float* top;        // [B], the largest score in the sums, or the own key's
  double* sum;       // [B], of exp(score - top)
  float* direction;  // [B, D], of exp(score - top) key; null where it is not wanted
  double* score;     // [members]
};

// The same bits for any number of threads.
void contrast(const Kernels& kernels, const ContrastCall& call, const Control& control, const ContrastAnswer& answer);

}  // namespace cascade::cpu
