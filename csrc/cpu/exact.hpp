// The contract in float64, query by query: the path that is always right, and what settles what bounds leave open.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/order.hpp"
#include "cpu/backend.hpp"
#include "cpu/weights.hpp"

namespace cascade::cpu {

constexpr double rrf_offset = 60;  // Cormack, Clarke, Buettcher, SIGIR 2009

// One query's similarities with the keys of one view, by the contract.
class ExactView {
 public:
  void bind(const Bank& bank, int32_t view, const Matrix& queries, int64_t row);
  void bind(const Matrix& similarities, int64_t row);

  // The similarities of `keys`, or of all keys from `first` on where `keys` is null.
  void scores(const int64_t* keys, int64_t first, int64_t count, double* out) const;

  // The query as it was stored, zero padded.
  std::span<const double> query() const { return query_; }

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
  // `weights` are the call's, or null: what is known of them need not be found here.
  ExactCascade(std::span<const Stage> stages, int64_t views, int64_t keys, const Weights* weights = nullptr);

  // To be called for each view that a stage uses, then `start`.
  ExactView& view(int64_t number) { return views_[number]; }

  // A new query. `exclude` says which keys are no candidates for row `row`.
  void start(const Exclusion& exclude, int64_t row);

  // The keys that are candidates, ascending.
  std::span<const int64_t> eligible();

  // A stage's scores of `keys`.
  void scores(const Stage& stage, std::span<const int64_t> keys, double* out);

  // Moves the `keep` best of `keys` by the stage's score to the front, in no order.
  void keep_best(const Stage& stage, std::vector<int64_t>& keys, int64_t keep);

  // Runs the stages from number `from` on, with `alive` (any order) as what the stages before left, and writes the row.
  // `known` may have that first stage's scores of `alive`, which must not be an @bank stage then.
  void run(std::span<const int64_t> alive, size_t from, const Answer& answer, std::span<const double> known = {});

 private:
  void column(int32_t view, std::span<const int64_t> keys, double* out);
  void score_all(int32_t view);
  double deviation(int32_t view);
  double weight(int32_t view);

  std::span<const Stage> stages_;
  int64_t keys_;
  const Weights* weights_;
  const Exclusion* exclude_ = nullptr;
  int64_t row_ = 0;
  std::vector<ExactView> views_;
  std::vector<std::vector<double>> all_;  // per view, scores of all keys once a stage has needed nearly all
  std::vector<bool> have_all_;
  bool have_eligible_ = false;
  std::vector<int64_t> eligible_, alive_;
  std::vector<Ranked> ranked_;
  std::vector<uint8_t> member_;
  std::vector<double> fused_, column_, ranking_;
};

// One row of a stored matrix as float64, zero padded to a multiple of 8.
void widen_row(const Matrix& matrix, int64_t row, std::vector<double>& out);

// At least the length of each of the rows.
double longest_row(const Matrix& matrix, int64_t first, int64_t count);

// Whether no value is infinite or not a number.
bool is_finite(const Matrix& matrix);

// bfloat16(1 / sigma), the weight of a view in zsum; 0 where sigma is 0.
double zsum_weight(double sigma);

}  // namespace cascade::cpu
