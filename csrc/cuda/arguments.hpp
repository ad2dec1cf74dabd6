// What the kernels are told: plain structs, passed by value.
#pragma once

#include <cstdint>

#include "core/plan.hpp"
#include "core/views.hpp"

namespace cascade::cuda {

constexpr int kMaxViews = 8;    // of one plan
constexpr int kMaxStages = 32;  // of one plan; both keep the arguments well under the 4 KiB a launch may carry

struct StageArguments {
  int64_t keep;
  Fusion fusion;
  int view_count;
  uint8_t views[kMaxViews];
  bool over_bank;
};

struct PlanArguments {
  int view_count;
  int stage_count;
  StageArguments stages[kMaxStages];
};

// One view's queries and keys, as stored.
struct ViewArguments {
  Matrix queries;  // [B, D]
  Matrix keys;     // [K, D]
};

struct Views {
  ViewArguments view[kMaxViews];
};

// Where answers go: slots best first, -1 padded, and the last stage's score rounded to float32.
struct Answer {
  int64_t* index;             // [B, k]
  float* similarity;          // [B, k]
  int64_t* kept[kMaxStages];  // per stage [B, n_s], or null where no trace is asked for
};

}  // namespace cascade::cuda
