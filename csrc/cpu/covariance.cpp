#include "cpu/covariance.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/buffer.hpp"

namespace cascade::cpu {
namespace {

constexpr int64_t block_rows = 1024;  // keys whose columns stay in the second-level cache while they are multiplied
constexpr double half_ulp = 0x1p-53;

int64_t triangle(int64_t dims) { return dims * (dims + 1) / 2; }

int64_t rounded_up(int64_t count) { return (count + 7) / 8 * 8; }

}  // namespace

Covariance::Covariance(std::span<const Matrix> bank, Metric metric, int32_t view, const Kernels& kernels)
    : kernels_(kernels), embedding_(bank, metric, {view}), keys_(bank.front().rows), dims_(embedding_.dims()) {}

void Covariance::divide(int64_t rows) {
  rows_ = std::max<int64_t>(1, rows);
  chunks_.assign((keys_ + rows_ - 1) / rows_, {});
}

// A bank that changes gets chunks that are small beside it, but no smaller than that their sums take a quarter of the
// memory of float32 rows (more of a small bank).
void Covariance::update(int64_t first, int64_t count) {
  if (!changes_) {
    changes_ = true;
    divide(std::max(dims_, std::min(4 * dims_, keys_ / 32)));
  }
  for (int64_t each = first / rows_; each <= (first + count - 1) / rows_ && count > 0; ++each)
    chunks_[each].stale = true;
}

// Symmetric: half of D products a key. Rounded up, so that what is stale costs something.
int64_t Covariance::cost() const {
  if (chunks_.empty()) return (dims_ + 1) / 2;
  int64_t stale = 0;
  for (const Chunk& chunk : chunks_) stale += chunk.stale ? rows_ : 0;
  return (std::min(stale, keys_) * dims_ + 2 * keys_ - 1) / (2 * keys_);
}

void Covariance::refresh(const Control& control, Residency* residency) {
  if (!learned_) embedding_.learn(residency);
  learned_ = true;
  if (chunks_.empty()) divide((keys_ + control.threads - 1) / std::max(1, control.threads));
  std::vector<int64_t> stale;
  for (size_t each = 0; each < chunks_.size(); ++each)
    if (chunks_[each].stale) stale.push_back(static_cast<int64_t>(each));
  if (stale.empty()) return;
  run_parts(static_cast<int>(stale.size()), control, [&](int part, int) {
    Chunk& chunk = chunks_[stale[part]];
    const int64_t begin = stale[part] * rows_, end = std::min(keys_, begin + rows_);
    chunk.longest.assign(1, 0.0);
    chunk.sum.assign(dims_, 0.0);
    chunk.products.assign(triangle(dims_), 0.0);
    for (int64_t row = begin; row < end && !should_stop(); row += block_rows)
      add_up(chunk, row, std::min(end, row + block_rows), residency);
  });
  if (should_stop()) return;
  for (const int64_t each : stale) chunks_[each].stale = false;
  finish();
}

// The rows as columns of float32, and every column's float64 products with those from it on.
void Covariance::add_up(Chunk& chunk, int64_t begin, int64_t end, Residency* residency) const {
  const int64_t width = rounded_up(end - begin);
  Buffer<float> columns(dims_ * width);
  std::fill_n(columns.data(), dims_ * width, 0.0f);
  std::vector<double> y(dims_), column(width), product(dims_);
  for (int64_t row = begin; row < end; ++row) {
    embedding_.key(row, y.data());
    embedding_.raise_longest(row, chunk.longest);
    for (int64_t d = 0; d < dims_; ++d) columns[d * width + row - begin] = static_cast<float>(y[d]);
  }
  if (residency != nullptr) residency->touched((end - begin) * dims_ * 4);
  const Matrix matrix{columns.data(), dims_, width, width, DType::float32};
  double* to = chunk.products.data();
  for (int64_t d = 0; d < dims_; ++d) {
    std::copy_n(&columns[d * width], width, column.data());
    for (const double value : column) chunk.sum[d] += value;
    kernels_.dots(column.data(), matrix, nullptr, d, dims_ - d, product.data());
    for (int64_t other = d; other < dims_; ++other) *to++ += product[other - d];
  }
}

// C from the chunks' sums, in float32.
//
// An entry of C is a sum of products, a few thousand additions deep, less the product of two means: with n for that
// depth it is off by at most 4 n 2^-53 (|y_i|, |y_j|), the bracket being the roots of the mean squares. As a quadratic
// form that is at most 4 n 2^-53 |p|^2 `size_`, by Cauchy-Schwarz. What rounding to float32 adds is measured: its
// Frobenius norm bounds the form.
void Covariance::finish() {
  std::vector<double> sum(dims_, 0.0), products(triangle(dims_), 0.0);
  longest_ = {0.0};
  for (const Chunk& chunk : chunks_) {
    longest_[0] = std::max(longest_[0], chunk.longest[0]);
    for (int64_t d = 0; d < dims_; ++d) sum[d] += chunk.sum[d];
    for (size_t i = 0; i < products.size(); ++i) products[i] += chunk.products[i];
  }
  const auto count = static_cast<double>(keys_);
  matrix_.resize(dims_ * dims_);
  double rounded = 0;
  size_ = 0;
  size_t next = 0;
  for (int64_t d = 0; d < dims_; ++d)
    for (int64_t other = d; other < dims_; ++other) {
      const double product = products[next++] / count;
      const double value = product - sum[d] / count * (sum[other] / count);
      const auto narrow = static_cast<float>(value);
      const double lost = value - static_cast<double>(narrow);
      if (other == d) size_ += product;
      rounded += (other == d ? 1 : 2) * lost * lost;
      matrix_[d * dims_ + other] = matrix_[other * dims_ + d] = narrow;
    }
  const double depth =
      static_cast<double>(block_rows + keys_ / block_rows + dims_ + 64) + static_cast<double>(chunks_.size());
  off_ = std::sqrt(rounded) * (1 + 1e-9) + 4 * depth * half_ulp * size_;
}

// The standard deviations of two lists of numbers differ by no more than the root of the mean square of the numbers'
// differences. Here these are at most |p| |y| 2^-24 for the rounding of the keys to float32, and `slack`. The
// contract's own summation over K keys adds a share of K 2^-53.
Covariance::Range Covariance::deviation(std::span<const Matrix> queries, int64_t row) const {
  thread_local std::vector<double> p, image;
  p.assign(rounded_up(dims_), 0.0);
  image.resize(dims_);
  embedding_.query(queries, row, {}, p.data());
  kernels_.dots(p.data(), {matrix_.data(), dims_, dims_, dims_, DType::float32}, nullptr, 0, dims_, image.data());
  double form = 0, squared = 0;
  for (int64_t d = 0; d < dims_; ++d) {
    form += p[d] * image[d];
    squared += p[d] * p[d];
  }
  const double off = squared * (off_ + static_cast<double>(4 * dims_) * half_ulp * size_);
  const double denormal = std::sqrt(static_cast<double>(dims_)) * 0x1p-149;
  const double apart = std::sqrt(squared) * (1.01 * 0x1p-24 * std::sqrt(size_) + denormal) +
                       embedding_.slack(queries, row, {}, longest_);
  const double sums = static_cast<double>(keys_ + 64) * 2 * half_ulp;
  const double low = (std::sqrt(std::max(0.0, form - off)) - apart) * (1 - sums);
  const double high = (std::sqrt(std::max(0.0, form + off)) + apart) * (1 + sums);
  return {std::max(0.0, low * embedding_.gain()), high * embedding_.gain()};
}

}  // namespace cascade::cpu
