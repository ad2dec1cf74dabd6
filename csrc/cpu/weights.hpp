// The views' weights in `zsum` stages, found before anything is scored: a stage is a weighted sum then.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/plan.hpp"
#include "core/views.hpp"
#include "cpu/pool.hpp"

namespace cascade::cpu {

class Bank;

class Weights {
 public:
  // Null where no stage is a `zsum`, or where a bank's covariances cost more than they save.
  static std::unique_ptr<const Weights> find(Bank& bank, std::span<const Stage> stages, std::span<const Matrix> queries,
                                             int64_t batch, const Control& control);

  // A view's weight for a query; NaN where a bound on its standard deviation leaves the weight open.
  double of(int32_t view, int64_t row) const { return weight_[view][row]; }

  // The weights of a stage's views, none for stages that have none. False where one is open.
  bool of(const Stage& stage, int64_t row, std::vector<double>& out) const;

  // Whether none is open for a query.
  bool known(int64_t row) const;

 private:
  std::vector<std::vector<double>> weight_;  // per view of the bank, [B]
};

}  // namespace cascade::cpu
