#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/packed.hpp"
#include "cpu/packing.hpp"

namespace cascade::cpu {
namespace {

// Rows are scaled to at most this length: two of them multiply to less than 2^31 - 2^16.
constexpr double longest16 = 46290;
constexpr double largest16 = 32766;
constexpr double headroom = 1.02;  // for rows that a queue writes later

double scale16(double norm, double most, int64_t dims) {
  if (!(norm > 0)) return 1;
  return std::min((longest16 - 0.5 * std::sqrt(static_cast<double>(dims)) - 1) / norm, largest16 / most);
}

}  // namespace

Packed16::Packed16(std::span<const Matrix> bank, Metric metric, std::vector<int32_t> views, const Control& control,
                   Shelf* shelf)
    : embedding_(bank, metric, std::move(views)),
      layout_(bank.front().rows, lanes16),
      steps_((embedding_.dims() + 1) / 2),
      stored_(embedding_.views().size(), 0.0) {
  const int64_t words = layout_.blocks * steps_ * lanes16;
  const auto each = [this](const auto& use) { parameters(use); };
  if (shelf != nullptr)
    file_ = shelf->open("16bit", embedding_.views(), count_parameters(each), {{words * 4}}, control);
  if (file_ == nullptr) {
    words_.reserve(words);
  } else {
    words_.borrow(file_->array<int32_t>(0), words);
    if (file_->complete()) {
      read_parameters(*file_, each);
      return;
    }
  }
  embedding_.learn(shelf != nullptr ? &shelf->residency() : nullptr);
  const Extent extent = measure_rows(embedding_, layout_.keys, control, shelf);
  stored_ = extent.stored;
  longest_ = extent.norm * headroom;
  scale_ = scale16(longest_, extent.most * headroom, embedding_.dims());
  const auto clear = [&](int64_t begin, int64_t end) {
    std::fill(words_.data() + begin * steps_ * lanes16, words_.data() + end * steps_ * lanes16, 0);
  };
  residual_ = pack_rows(layout_, embedding_.dims(), control, shelf, clear,
                        [this](int64_t row, double* y) { return pack(row, y); });
  finish(file_.get(), each, shelf, control);
}

// Writes one row; returns the norm of what its integers lose.
double Packed16::pack(int64_t row, double* y) {
  thread_local std::vector<int16_t> integers;
  integers.assign(2 * steps_, 0);
  embedding_.key(row, y);
  const double lost = quantise(y, embedding_.dims(), scale_, largest16, integers.data());
  const int64_t position = layout_.position(row);
  int32_t* out = words_.data() + position / lanes16 * steps_ * lanes16 + position % lanes16;
  for (int64_t step = 0; step < steps_; ++step) std::memcpy(out + step * lanes16, &integers[2 * step], 4);
  return lost;
}

bool Packed16::update(int64_t first, int64_t count) {
  if (file_ != nullptr) return false;
  std::vector<double> y(embedding_.dims());
  for (int64_t row = first; row < first + count; ++row) {
    embedding_.key(row, y.data());
    if (length(y.data(), embedding_.dims()) > longest_ || largest(y.data(), embedding_.dims()) * scale_ > largest16)
      return false;
    embedding_.raise_longest(row, stored_);
    residual_ = std::max(residual_, pack(row, y.data()));
  }
  return true;
}

Packed16::Query Packed16::pack_query(std::span<const Matrix> queries, int64_t row, std::span<const double> weights,
                                     int32_t* words, int64_t stride) const {
  thread_local std::vector<double> p;
  thread_local std::vector<int16_t> integers;
  const int64_t dims = embedding_.dims();
  p.assign(dims, 0.0);
  integers.assign(2 * steps_, 0);
  embedding_.query(queries, row, weights, p.data());
  const double norm = length(p.data(), dims), scale = scale16(norm, largest(p.data(), dims), dims);
  const bool fits = std::isfinite(scale) && std::isfinite(1 / scale) && std::isfinite(1 / scale_) && scale_ > 0;
  const double lost = fits ? quantise(p.data(), dims, scale, largest16, integers.data()) : 0;
  for (int64_t step = 0; step < steps_; ++step) std::memcpy(words + step * stride, &integers[2 * step], 4);
  const double bound = lost * longest_ + (norm + lost) * residual_ + embedding_.slack(queries, row, weights, stored_);
  const double unit = scale * scale_ / 65536, error = bound * scale * scale_ / 65536 * round_up;
  return {fits && std::isfinite(error) ? error : std::numeric_limits<double>::infinity(), unit};
}

}  // namespace cascade::cpu
