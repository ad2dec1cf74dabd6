// The contract's scores of many queries' candidates at once, and the stages that follow.
//
// A query's candidates lie all over the bank. Ranked one query after another, nearly all of their rows would come from
// main memory, for every query again. Here a run of keys is taken at a time with all queries' candidates among them, so
// that a row that several queries ask for comes from memory once.
//
// Inner products are taken in float32 first, with an error of at most e (float_error). Let t be the n-th largest of the
// float scores, n what the stage keeps. n keys score t - e at least, so a key with a float score under t - 2 e is
// surely out; fewer than n keys have a float score above t, and only those can come before a key with one over t + 2 e,
// which is surely in. What is in between is ranked by the contract, and of the last stage all that is not out.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu/exact.hpp"
#include "cpu/fast.hpp"

namespace cascade::cpu {

// At least how far a float32 inner product of D stored values, with a query and a key of these lengths, lies from the
// contract's. `dots_float` multiplies and adds, fused or not, in any order, over the D values and up to 15 zeros. With
// u = 2^-24 a term passes its product's rounding and those of the additions above it, of which there are at most D +
// 15, so its weight in the sum lies in (1 +- u)^(D + 16); for D <= 2^17 that is 1 +- 1.01 (D + 16) u, and the error at
// most 1.01 (D + 16) u (|q_1 x_1| + ... + |q_D x_D|), where the bracket is at most |q| |x| by Cauchy-Schwarz. A product
// that ends in the denormals is off by at most 2^-150 beyond that, and sums of floats that end there are exact: D times
// as much, once more weighted, is under 2^-149 (D + 16). The threads that work here count denormals (float_mode.hpp).
// Partial sums stay below 1.01 |q| |x| in size: under 1e37 none is infinite; from there on the error is. The contract's
// own distance from the true product, (D + 8) 2^-53 |q| |x|, and the lengths' own roundings disappear in the last
// hundredth of 1.02.
float float_error(int64_t dims, double query, double key);

class Rescorer {
 public:
  // Of the stages from `first` on; those before were settled for all that is added.
  Rescorer(const MineCall& call, const Layout& layout, size_t first = 0);

  // The candidates of a query whose weights are known, as positions of the interleaved bank in ascending order of their
  // blocks.
  void add(int64_t row, std::span<const int32_t> positions);

  // Runs the plan for the queries added since the last time and writes their answers. `add` calls it when it has many.
  void finish();

 private:
  struct Query {
    int64_t row;
    std::vector<int32_t> block;  // ascending
    std::vector<int64_t> slot;
    std::vector<float> near;       // float32 scores
    std::vector<double> score;     // the contract's
    std::vector<ExactView> views;  // those of the stage at hand
    std::vector<double> weights;   // theirs, or none
    std::vector<float> narrow;     // the query, zero padded to a multiple of 16
    float error;                   // of `near`, or infinity where float32 is of no use

    int64_t size() const { return static_cast<int64_t>(slot.size()); }
  };

  void bind(const Stage& stage);
  template <class Wanted, class Score>
  void each_run(const Stage& stage, const Wanted& wanted, const Score& score);
  void score_near(const Stage& stage);
  template <class Wanted>
  void score_exactly(const Stage& stage, const Wanted& wanted);
  void narrow_down(const Stage& stage);
  void drop(Query& query, int64_t keep);
  void settle(Query& query, int64_t keep);
  void keep_best(Query& query, int64_t keep);
  template <class Keep>
  void filter(Query& query, const Keep& keep);
  void answer(Query& query, size_t number, bool scored);

  const MineCall& call_;
  Layout layout_;
  size_t first_;
  ExactCascade exact_;
  std::vector<Query> queries_;
  size_t count_ = 0;
  int64_t held_ = 0;  // candidates of all queries
  std::vector<size_t> cursor_;
  std::vector<double> column_;
  std::vector<int64_t> band_;
  std::vector<double> band_score_;
  std::vector<Ranked> ranked_;
};

}  // namespace cascade::cpu
