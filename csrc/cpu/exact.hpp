// The contract in float64, query by query: the path that is always right, and what settles what bounds leave open.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/order.hpp"
#include "cpu/backend.hpp"

namespace cascade::cpu {

// One row of a stored matrix as float64, zero padded to a multiple of 8.
void widen_row(const Matrix& matrix, int64_t row, std::vector<double>& out);

// One query's similarities with the keys of one view, by the contract.
class ExactView {
 public:
  void bind(const Bank& bank, int32_t view, const Matrix& queries, int64_t row);
  void bind(const Matrix& similarities, int64_t row);

  // The similarities of `keys`, or of all keys from `first` on where `keys` is null.
  void scores(const int64_t* keys, int64_t first, int64_t count, double* out) const;

 private:
  const Bank* bank_ = nullptr;
  int32_t view_ = 0;
  std::vector<double> query_;
  double squared_norm_ = 0;
  const Matrix* given_ = nullptr;
  int64_t row_ = 0;
};

// One query's way through the stages. Reused from query to query so that its memory is.
class ExactCascade {
 public:
  ExactCascade(std::span<const Stage> stages, int64_t views, int64_t keys);

  std::span<ExactView> views() { return views_; }

  // Runs the stages from number `from` on, with `alive` (any order) as what stage `from - 1` left, and `excluded` [K]
  // non-zero for keys that are no candidates. Writes row `row` of the answer.
  void run(std::span<const uint8_t> excluded, std::vector<int64_t>& alive, size_t from, int64_t row,
           const Answer& answer);

 private:
  void fuse(const Stage& stage, std::span<const int64_t> keys, double* out);
  void column(int32_t view, std::span<const int64_t> keys, double* out);
  double deviation(int32_t view);
  void rank(std::span<const int64_t> keys, std::span<const double> value, double* out);

  std::span<const Stage> stages_;
  int64_t keys_;
  std::vector<ExactView> views_;
  std::vector<std::vector<double>> all_;  // per view, scores of all keys once a stage has needed (nearly) all
  std::vector<bool> have_all_;
  std::vector<int64_t> eligible_;
  std::vector<Ranked> ranked_;
  std::vector<uint8_t> member_;
  std::vector<double> fused_, column_;
};

// bfloat16(1 / sigma), the weight of a view in zsum; 0 where sigma is 0.
double zsum_weight(double sigma);

// Marks the keys that are no candidates for one query.
void mark_excluded(const Exclusion& exclude, int64_t row, std::span<uint8_t> excluded);

}  // namespace cascade::cpu
