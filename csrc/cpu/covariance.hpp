// How far a query's similarities spread over all keys of a bank, without scoring them.
//
// A similarity is gain <p, y> + c(q) (embedding.hpp), so its variance over the keys is gain^2 p' C p with C the
// covariance of the y: D^2 operations a query in place of K D. C is found once, from sums over chunks of keys; a push
// to a queue renews the chunks it wrote to.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu/embedding.hpp"
#include "cpu/isa.hpp"
#include "cpu/pool.hpp"

namespace cascade::cpu {

class Covariance {
 public:
  static constexpr int64_t most_dims = 2048;  // beyond, the matrix itself is large

  // Nothing is found before `refresh`.
  Covariance(std::span<const Matrix> bank, Metric metric, int32_t view, const Kernels& kernels);

  // Rows [first, first + count) were written.
  void update(int64_t first, int64_t count);

  // What `refresh` would cost, in queries of which each key is scored once.
  int64_t cost() const;
  void refresh(const Control& control, Residency* residency);

  // The contract's standard deviation of a query's similarities lies in [low, high]; high is not finite where nothing
  // is known.
  struct Range {
    double low, high;
  };
  Range deviation(std::span<const Matrix> queries, int64_t row) const;

 private:
  struct Chunk {
    bool stale = true;
    std::vector<double> longest;   // [1], of the rows as stored
    std::vector<double> sum;       // [D]
    std::vector<double> products;  // the upper triangle, row by row
  };
  void divide(int64_t rows);
  void add_up(Chunk& chunk, int64_t begin, int64_t end, Residency* residency) const;
  void finish();

  const Kernels& kernels_;
  Embedding embedding_;
  int64_t keys_, dims_;
  bool learned_ = false, changes_ = false;
  int64_t rows_ = 0;  // of a chunk
  std::vector<Chunk> chunks_;
  std::vector<double> longest_;  // [1]
  std::vector<float> matrix_;    // C, [D, D]
  double size_ = 0;              // the mean of |y|^2
  double off_ = 0;               // how far matrix_ may be from C: of p' C p, times |p|^2
};

}  // namespace cascade::cpu
