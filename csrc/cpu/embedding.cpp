#include "cpu/embedding.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include "cpu/exact.hpp"
#include "cpu/sums.hpp"

namespace cascade::cpu {
namespace {

constexpr int64_t sample_rows = 1024;

double squared(std::span<const double> x) {
  return sum_of(static_cast<int64_t>(x.size()), [&](int64_t d) { return x[d] * x[d]; });
}

// Scales to unit length; a zero vector stays.
void normalise(std::span<double> x) {
  const double norm = std::sqrt(squared(x));
  if (norm != 0)
    for (double& value : x) value /= norm;
}

// The Hadamard transform of a power of two of coordinates, orthonormal.
void hadamard(double* x, int64_t n) {
  for (int64_t half = 1; half < n; half *= 2)
    for (int64_t block = 0; block < n; block += 2 * half)
      for (int64_t i = block; i < block + half; ++i) {
        const double a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
  const double scale = 1 / std::sqrt(static_cast<double>(n));
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
}

// A fixed pseudo-random sign for each coordinate.
bool negated(int64_t d) { return (static_cast<uint64_t>(d) * 0x9e3779b97f4a7c15u >> 61 & 1) != 0; }

}  // namespace

Embedding::Embedding(std::span<const Matrix> bank, Metric metric, std::vector<int32_t> views)
    : metric_(metric), views_(std::move(views)) {
  for (const int32_t view : views_) {
    Side& side = sides_.emplace_back();
    side.keys = bank[view];
    side.offset = dims_;
    side.centre.assign(side.keys.columns, 0.0);
    dims_ += side.keys.columns + (metric_ == Metric::l2 ? 1 : 0);
  }
}

void Embedding::learn(Side& side, Residency* residency) const {
  const int64_t rows = side.keys.rows, step = std::max<int64_t>(1, rows / sample_rows);
  std::vector<double> row, mean(side.keys.columns, 0.0);
  double before = 0, after = 0, count = 0;
  const auto each = [&](auto&& use) {
    for (int64_t r = 0; r < rows; r += step) {
      widen_row(side.keys, r, row);
      row.resize(side.keys.columns);
      if (metric_ == Metric::cosine) normalise(row);
      use();
      if (residency != nullptr) residency->touched(Residency::folio);  // rows far apart, of a piece each
    }
  };
  each([&] {
    ++count;
    before += squared(row);
    for (size_t d = 0; d < mean.size(); ++d) mean[d] += row[d];
  });
  if (count == 0) return;
  for (double& value : mean) value /= count;
  each([&] {
    for (size_t d = 0; d < mean.size(); ++d) row[d] -= mean[d];
    after += squared(row);
  });
  constexpr double worth_it = 0.9;
  if (after < worth_it * before) side.centre = std::move(mean);
  const double rest = std::min(before, after) / count;
  side.width = rest > 0 ? std::sqrt(rest) : 1;
  side.height = rest / 2;
}

void Embedding::place(const Side& side, const double* row, double* out) const {
  for (size_t d = 0; d < side.centre.size(); ++d) out[d] = row[d] - side.centre[d];
}

void Embedding::turn(double* vector) const {
  if (!rotated_) return;
  for (int64_t d = 0; d < dims_; ++d)
    if (negated(d)) vector[d] = -vector[d];
  int64_t done = 0;
  while (done < dims_) {
    const auto block = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(dims_ - done)));
    hadamard(vector + done, block);
    done += block;
  }
}

void Embedding::key(int64_t row, double* y) const {
  thread_local std::vector<double> stored;
  for (const Side& side : sides_) {
    widen_row(side.keys, row, stored);
    const int64_t columns = side.keys.columns;
    if (metric_ == Metric::cosine) normalise(stored);
    double* out = y + side.offset;
    place(side, stored.data(), out);
    if (metric_ == Metric::l2)
      out[columns] = (side.height - squared({out, static_cast<size_t>(columns)}) / 2) / side.width;
  }
  turn(y);
}

void Embedding::raise_longest(int64_t row, std::span<double> longest) const {
  thread_local std::vector<double> stored;
  for (size_t view = 0; view < sides_.size(); ++view) {
    widen_row(sides_[view].keys, row, stored);
    longest[view] = std::max(longest[view], std::sqrt(squared(stored)));
  }
}

void Embedding::query(std::span<const Matrix> queries, int64_t row, std::span<const double> weights, double* p) const {
  thread_local std::vector<double> stored;
  for (size_t view = 0; view < sides_.size(); ++view) {
    const Side& side = sides_[view];
    widen_row(queries[views_[view]], row, stored);
    const int64_t columns = side.keys.columns;
    if (metric_ == Metric::cosine) normalise(stored);
    double* out = p + side.offset;
    if (metric_ == Metric::l2) {
      place(side, stored.data(), out);
      out[columns] = side.width;
    } else {
      std::copy_n(stored.data(), columns, out);
    }
    if (!weights.empty())
      for (int64_t d = 0; d < columns + (metric_ == Metric::l2 ? 1 : 0); ++d) out[d] *= weights[view];
  }
  turn(p);
}

double Embedding::constant(std::span<const Matrix> queries, int64_t row) const {
  thread_local std::vector<double> stored;
  double total = 0;
  for (size_t view = 0; view < sides_.size(); ++view) {
    const Side& side = sides_[view];
    widen_row(queries[views_[view]], row, stored);
    const size_t columns = side.centre.size();
    if (metric_ == Metric::cosine) normalise(stored);
    double sum = 0;
    for (size_t d = 0; d < columns; ++d) {
      const double apart = stored[d] - side.centre[d];
      sum += metric_ == Metric::l2 ? apart * apart : stored[d] * side.centre[d];
    }
    total += metric_ == Metric::l2 ? -sum / 2 - side.height : sum;
  }
  return total;
}

double Embedding::slack(std::span<const Matrix> queries, int64_t row, std::span<const double> weights,
                        std::span<const double> longest) const {
  thread_local std::vector<double> stored;
  double total = 0;
  for (size_t view = 0; view < sides_.size(); ++view) {
    widen_row(queries[views_[view]], row, stored);
    const double norm = std::sqrt(squared(stored)), key = longest[view];
    const double size = metric_ == Metric::cosine          ? 1
                        : metric_ == Metric::inner_product ? norm * key
                                                           : (norm + key) * (norm + key);
    total += (weights.empty() ? 1 : weights[view]) * size;
  }
  return total * static_cast<double>(dims_ + 64) * 0x1p-50;
}

}  // namespace cascade::cpu
