// The loss and its gradients in one pass over the keys: an online softmax of every query over all keys that also sums
// the keys by their weights, as attention does; that sum is the query's gradient. `cascade_engine/nce.py` says why the
// members of P are kept apart.
#pragma once

#include <cstdint>

#include "core/views.hpp"
#include "cpu/isa.hpp"
#include "cpu/pool.hpp"

namespace cascade::cpu {

enum class Siblings : int { negative, ignored, positive };  // as SIBLINGS in nce.py

struct ContrastCall {
  const float* query;  // [B, D]
  const float* own;    // [B, D], each query's own key
  int64_t batch;
  Matrix keys;                 // [K, D], float32, float16 or bfloat16
  const int64_t* mined;        // [B, width] slots; -1 is none, duplicates count once, siblings are siblings first
  int64_t width;               //
  const int64_t* query_video;  // [B], ids that make keys of the same id siblings; null: there are none
  const int64_t* key_video;    // [K]
  Siblings siblings;           //
  const bool* drop;            // [B], the own key leaves P where P has another member; null: of nobody
  double temperature;          //
  bool own_positive;           //
  bool mean_log;               // LSE_all - mean_P, not LSE_all - LSE_P
};

struct ContrastAnswer {
  double loss;      // the mean over the queries whose P is not empty, 0 where all are
  double counted;   // how many they are
  float* to_query;  // [B, D], the gradients of each query's own loss; null where they are not wanted
  float* to_own;    // [B, D]
};

// The same bits for any number of threads.
void contrast(const Kernels& kernels, const ContrastCall& call, const Control& control, ContrastAnswer& answer);

}  // namespace cascade::cpu
