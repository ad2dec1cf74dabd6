// The CPU backend's border: what a call needs, checked by the caller, and where its answer goes.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/plan.hpp"
#include "core/views.hpp"
#include "cpu/isa.hpp"
#include "cpu/pool.hpp"

namespace cascade::cpu {

// What is kept of a bank between calls, beside its keys.
class Bank {
 public:
  // The keys must outlive the bank.
  Bank(std::vector<Matrix> views, const int64_t* key_video, Metric metric, const Kernels& kernels);

  int64_t size() const { return views_.empty() ? 0 : views_.front().rows; }
  std::span<const Matrix> views() const { return views_; }
  const int64_t* key_video() const { return key_video_; }
  Metric metric() const { return metric_; }
  const Kernels& kernels() const { return *kernels_; }

  // Each key's inner product with itself in the contract's order, [K]; empty for inner products, which need none.
  std::span<const double> squared_norms(int32_t view) const { return squared_norms_[view]; }

  // The keys in rows [first, first + count) were overwritten: bring what was made of them up to date.
  void update(int64_t first, int64_t count);

 private:
  std::vector<Matrix> views_;
  const int64_t* key_video_;
  Metric metric_;
  const Kernels* kernels_;
  std::vector<std::vector<double>> squared_norms_;
};

// Where a call writes. Rows short of candidates end in -1 and -infinity.
struct Answer {
  int64_t* index;                  // [B, k]
  float* similarity;               // [B, k]
  std::span<int64_t* const> kept;  // per stage [B, keep], or empty where no trace is wanted
};

// The plan's stages over a bank's keys. `queries` are per view of the bank; a view that no stage uses may have no data.
void mine(const Bank& bank, std::span<const Stage> stages, std::span<const Matrix> queries, int64_t batch,
          const Exclusion& exclude, const Control& control, const Answer& answer);

// The plan's stages over given similarities, float32 or float64, per view [B, K].
void select(std::span<const Stage> stages, std::span<const Matrix> similarities, const Exclusion& exclude,
            const Control& control, const Answer& answer);

}  // namespace cascade::cpu
