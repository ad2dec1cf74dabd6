// The CUDA backend as the rest of C++ sees it: no CUDA header, no Python. All pointers are device memory.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "cuda/arguments.hpp"

namespace cascade::cuda {

struct MineProblem {
  PlanArguments plan;
  Views views;  // those of the plan, in its numbering
  Metric metric;
  Exclusion exclude;
  int64_t queries;  // B
  int64_t keys;     // K
  Answer answer;
  int64_t workspace_limit;  // bytes; more queries go in several waves
};

struct SelectProblem {
  PlanArguments plan;
  Matrix scores[kMaxViews];  // [B, K], float32 or float64
  Exclusion exclude;
  int64_t queries;
  int64_t keys;
  Answer answer;
  int64_t workspace_limit;
};

// The bytes that a call needs, then the call: kernels queued on `stream`, nothing allocated, nothing waited for.
size_t mine_workspace(const MineProblem& problem);
void mine(const MineProblem& problem, void* workspace, void* stream);
size_t select_workspace(const SelectProblem& problem);
void select(const SelectProblem& problem, void* workspace, void* stream);

// Why nothing can run here, or an empty text.
std::string unavailable();
// Names and compute capabilities.
std::vector<std::string> devices();

}  // namespace cascade::cuda
