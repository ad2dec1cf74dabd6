// The CUDA backend as the rest of C++ sees it: no CUDA header, no Python. All pointers are device memory.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "cuda/arguments.hpp"

namespace cascade::cuda {

// What pack_rows makes of a view's keys; see pack.cuh.
struct PackedRange;
struct PackedKeys {
  uint16_t* rows;      // [K, pitch] halves of x' (metric cosine: of x / |x|); null where not prepared
  float* squares;      // [K] |x'|^2
  PackedRange* range;  // largest values over all rows; zeros at first
  int64_t pitch;       // halves per row: D rounded up to packed_pitch
};
constexpr int kPackedRangeBytes = 24;

struct PackProblem {
  Matrix keys[kMaxViews];  // [K, D]
  PackedKeys packed[kMaxViews];
  int view_count;
  Metric metric;
  int64_t first, rows;  // rows first to first + rows - 1
  bool measure;         // find the longest row first: once per bank, it fixes the scale
};

// One view of a push. The newest `ring.rows` keys of the batch go into the ring.
struct PushView {
  Matrix batch;       // [n, D], oldest first
  Matrix ring;        // [size, D]
  void* to;           // `ring.data`, to be written
  PackedKeys packed;  // of the ring; null where it is not prepared
};
struct PushColumn {
  const int64_t* batch;  // [n], or null: -1 for all
  int64_t* ring;         // [size]
};
constexpr int kMaxColumns = 4;

struct PushProblem {
  PushView views[kMaxViews];
  int view_count;
  PushColumn columns[kMaxColumns];
  int column_count;
  Metric metric;   // the packed form's
  int64_t cursor;  // the slot that row 0 of the batch takes, were the ring long enough
  bool normalise;  // scale each key to unit length, in float64 by the contract's order of summation
};

struct MineProblem {
  PlanArguments plan;
  Views views;                   // those of the plan, in its numbering
  PackedKeys packed[kMaxViews];  // of the same views
  Metric metric;
  Exclusion exclude;
  int64_t queries;  // B
  int64_t keys;     // K
  Answer answer;
  int64_t workspace_limit;  // bytes; more queries go in several waves
  int64_t blocks;           // that tiles of keys are shared among, if there are as many
  int64_t split_keys;       // banks of more than twice as many keys are preselected in splits of so many
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

// What the keys of a query's own video are to it: keys like others, in neither sum, or members of P.
enum class Siblings : int { negative, ignore, positive };

// The contrastive loss with its gradients; what they are is defined in nce.py.
struct NceProblem {
  Matrix queries;              // [B, D] float32
  Matrix keys;                 // [K, D]
  const float* own;            // [B] scores of the queries' own keys, divided by the temperature
  const int64_t* members;      // [B, width] slots of P's members but own keys and siblings: distinct, -1 for none
  int64_t width;               //
  const int64_t* query_video;  // [B], or null: there are no siblings
  const int64_t* key_video;    // [K]
  Siblings siblings;
  const bool* drop;  // [B] the own key leaves P where P has another member
  double temperature;
  bool own_positive, mean_log;
  int64_t blocks;   // that tiles of keys are shared among, if there are as many
  double* loss;     // [B]
  bool* counted;    // [B] whether P has a member; the loss is 0 where not
  float* to_query;  // [B, D], or null where no gradients are wanted
  float* to_own;    // [B], the same
};

// Halves per packed row of D columns.
int64_t packed_pitch(int64_t columns);
// Whether the current device has the shared memory for bounds on views of so many columns. Wider ones need no packing.
bool bounds_fit(int64_t columns);
void pack(const PackProblem& problem, void* stream);
void push(const PushProblem& problem, void* stream);

// On the current device: the bytes that a call needs, then the call: kernels queued on `stream`, nothing allocated,
// nothing waited for.
size_t mine_workspace(const MineProblem& problem);
void mine(const MineProblem& problem, void* workspace, void* stream);
size_t select_workspace(const SelectProblem& problem);
void select(const SelectProblem& problem, void* workspace, void* stream);
size_t contrast_workspace(const NceProblem& problem);
void contrast(const NceProblem& problem, void* workspace, void* stream);

// Why nothing can run here, or an empty text.
std::string unavailable();
// Names and compute capabilities.
std::vector<std::string> devices();

}  // namespace cascade::cuda
