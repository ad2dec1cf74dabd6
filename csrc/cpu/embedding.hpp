// How a stage's score becomes one inner product of real vectors, whatever the metric and the fusion.
//
//   score(q, x) = gain * <p, y> + c(q)      with gain > 0 and c(q) the same for all keys,
//
// so ranking by <p, y> is ranking by the score, up to the contract's own rounding, which `slack` bounds:
//   ip      p = q            y = x - m                                   c = <q, m>
//   cosine  p = q / |q|      y = x / |x| - m                             c = <q, m> / |q|
//   l2      p = (q - m, w)   y = (x - m, (h - |x - m|^2 / 2) / w)        gain 2, c = -|q - m|^2 - 2 h
//   sum     the views' p and y side by side, as a sum of inner products is the inner product of the sides
//   zsum    the same, with the query's weight of each view on its side of p
// m is any vector: the mean of a sample of keys where that makes the rest shorter, else zero. w and h are any numbers.
// Afterwards both sides may be rotated by the same orthogonal matrix (random signs, then Hadamard transforms), which
// leaves <p, y> as it is and spreads outliers over all coordinates, where fixed-point rounding needs them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/views.hpp"
#include "cpu/residency.hpp"

namespace cascade::cpu {

class Embedding {
 public:
  // `views` side by side. Afterwards either `learn` or `parameters` must say what m, w and h are.
  Embedding(std::span<const Matrix> bank, Metric metric, std::vector<int32_t> views);

  // Learns m, w and h from a sample of the keys; where they are in mapped files, `residency` is told.
  void learn(Residency* residency) {
    for (Side& side : sides_) learn(side, residency);
  }

  // Calls `use(double&)` for everything that was learned, to write it down or to take it over.
  template <class Use>
  void parameters(const Use& use) {
    for (Side& side : sides_) {
      for (double& value : side.centre) use(value);
      use(side.width);
      use(side.height);
    }
    auto rotated = static_cast<double>(rotated_);
    use(rotated);
    rotated_ = rotated != 0;
  }

  int64_t dims() const { return dims_; }
  double gain() const { return metric_ == Metric::l2 ? 2 : 1; }
  void rotate() { rotated_ = true; }

  // y of the key in slot `row`, [dims].
  void key(int64_t row, double* y) const;

  // The longest stored row of one of the key's views: what `slack` must know. `longest` [views] is raised.
  void raise_longest(int64_t row, std::span<double> longest) const;

  // p of a query, [dims]; `weights` [views] or empty for ones.
  void query(std::span<const Matrix> queries, int64_t row, std::span<const double> weights, double* p) const;

  // c(q) / gain, whatever is the same for all keys, without weights.
  double constant(std::span<const Matrix> queries, int64_t row) const;

  // How far the contract's float64 score / gain, c(q) / gain and <p, y> of the vectors written here, may lie from the
  // real numbers they stand for, together. A sum of D products in float64 is off by at most D u |q| |x| with u = 2^-53;
  // norms, the subtraction of m, log2(D) additions of a rotation and the fusion add less than (D + 64) u of the
  // magnitudes involved: |q| |x| for inner products, 1 for cosine, (|q| + |x|)^2 for distances, of which m and h are
  // parts.
  double slack(std::span<const Matrix> queries, int64_t row, std::span<const double> weights,
               std::span<const double> longest) const;

  std::span<const int32_t> views() const { return views_; }

 private:
  struct Side {
    Matrix keys;
    std::vector<double> centre;  // [D]
    double width = 1;            // w
    double height = 0;           // h
    int64_t offset = 0;          // where this view's coordinates start
  };

  void learn(Side& side, Residency* residency) const;
  void place(const Side& side, const double* row, double* out) const;
  void turn(double* vector) const;

  Metric metric_;
  std::vector<int32_t> views_;
  std::vector<Side> sides_;
  int64_t dims_ = 0;
  bool rotated_ = false;
};

}  // namespace cascade::cpu
