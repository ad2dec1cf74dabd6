#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/packed.hpp"
#include "cpu/packing.hpp"

namespace cascade::cpu {
namespace {

constexpr double no_smaller = 1e-30;  // scales relative to the longest key: floats never turn denormal
// Roundings of the tile's floats, 2^-24 each: those of the integer and its product, at most |p^| |y^| <= 4 |p| |y|, in
// u and again in l, relative to |p| |y|; and those of beta residual, relative to it.
constexpr double float_rounding = 4e-6, beta_rounding = 1 + 1e-6;
// A key that came later and is so much longer than those the unit was learnt from: bounds, up to 1e10 times its
// residual, would not be floats.
constexpr float too_far = 1e20f;
constexpr double double_rounding = 1e-15;  // of |y|: dividing by the unit and measuring what is lost

float up(double value) { return std::nextafter(static_cast<float>(value), std::numeric_limits<float>::infinity()); }

}  // namespace

Packed8::Packed8(std::span<const Matrix> bank, Metric metric, std::vector<int32_t> views, const Kernels& kernels,
                 const Control& control, Shelf* shelf)
    : embedding_(bank, metric, std::move(views)),
      layout_(bank.front().rows, lanes8),
      steps_((embedding_.dims() + 3) / 4),
      most8_(kernels.most8),
      sums_runs_(kernels.sums_runs),
      stored_(embedding_.views().size(), 0.0) {
  const int64_t keys = layout_.positions(), bytes = keys * steps_ * 4 + over_read;
  const auto each = [this](const auto& use) { parameters(use); };
  if (shelf != nullptr)
    file_ = shelf->open("8bit", embedding_.views(), count_parameters(each), {{bytes, keys * 4, keys * 4}}, control);
  if (file_ == nullptr) {
    bytes_.reserve(bytes);
    scale_.reserve(keys);
    residual_.reserve(keys);
  } else {
    bytes_.borrow(file_->array<uint8_t>(0), bytes);
    scale_.borrow(file_->array<float>(1), keys);
    residual_.borrow(file_->array<float>(2), keys);
    if (file_->complete()) {
      read_parameters(*file_, each);
      return;
    }
  }
  embedding_.learn(shelf != nullptr ? &shelf->residency() : nullptr);
  learn(shelf);
  const Extent extent = measure_rows(embedding_, layout_.keys, control, shelf);
  stored_ = extent.stored;
  unit_ = extent.norm > 0 ? extent.norm : 1;
  const auto clear = [&](int64_t begin, int64_t end) {
    std::fill(bytes_.data() + begin * steps_ * lanes8 * 4, bytes_.data() + end * steps_ * lanes8 * 4, uint8_t{128});
    std::fill(scale_.data() + begin * lanes8, scale_.data() + end * lanes8, std::numeric_limits<float>::quiet_NaN());
    std::fill(residual_.data() + begin * lanes8, residual_.data() + end * lanes8, 0.0f);
  };
  loudest_ = pack_rows(layout_, embedding_.dims(), control, shelf, clear,
                       [this](int64_t row, double* y) { return pack(row, y); });
  finish(file_.get(), each, shelf, control);
}

// From a sample of the keys: whether to rotate, and what share of their length queries may be expected to lose.
void Packed8::learn(Shelf* shelf) {
  Embedding turned = embedding_;
  turned.rotate();
  const int64_t dims = embedding_.dims();
  std::vector<double> y(dims);
  std::vector<int8_t> unused(dims);
  struct Seen {
    double largest = 0, lost = 0;
  } plain, rotated;
  double seen = 0;
  const auto look = [&](const Embedding& embedding, int64_t row, Seen& sum) {
    embedding.key(row, y.data());
    const double norm = length(y.data(), dims), most = largest(y.data(), dims);
    if (!(norm > 0) || !std::isfinite(most8_ / most)) return false;
    sum.largest += most / norm;
    sum.lost += quantise(y.data(), dims, most8_ / most, most8_, unused.data()) / norm;
    return true;
  };
  const int64_t step = std::max<int64_t>(1, layout_.keys / 256);
  for (int64_t row = 0; row < layout_.keys; row += step) {
    seen += look(embedding_, row, plain) && look(turned, row, rotated) ? 1 : 0;
    passed(shelf, 1, Residency::folio);
  }
  // Rotating costs time when packing and when querying, so only where it makes the largest coordinates clearly smaller.
  constexpr double worth_it = 0.75, least_share = 1e-4;
  const bool rotates = rotated.largest < worth_it * plain.largest;
  if (rotates) embedding_.rotate();
  share_ = std::max(least_share, (rotates ? rotated : plain).lost / std::max(1.0, seen));
}

// The largest sum of squares over half of a run's bytes: the first two of each step, or the last two.
double Packed8::squared_half_run(const int8_t* integers) const {
  int64_t most = 0;
  for (int64_t first = 0; first < steps_; first += run8) {
    int64_t sum[2] = {};
    for (int64_t d = 4 * first; d < 4 * std::min(steps_, first + run8); ++d)
      sum[d % 4 / 2] += int64_t{integers[d]} * integers[d];
    most = std::max({most, sum[0], sum[1]});
  }
  return static_cast<double>(most);
}

double Packed8::longest(int32_t view) const {
  const auto views = embedding_.views();
  const auto found = std::find(views.begin(), views.end(), view);
  return found != views.end() ? stored_[found - views.begin()] : -1;
}

// Takes back the 128 that keys' bytes carry, in the sums that the tile keeps.
void Packed8::start_query(const int8_t* bytes, int32_t* start) const {
  if (!sums_runs_) {
    *start = 0;
    for (int64_t d = 0; d < 4 * steps_; ++d) *start -= 128 * bytes[d];
    return;
  }
  for (int64_t run = 0; run < runs(); ++run) {
    uint32_t half[2] = {};
    for (int64_t d = 4 * run * run8; d < 4 * std::min(steps_, (run + 1) * run8); ++d)
      half[d % 4 / 2] -= static_cast<uint32_t>(128 * bytes[d]);
    start[run] = static_cast<int32_t>((half[0] & 0xffff) | half[1] << 16);
  }
}

// Returns the largest `squared_half_run` of the row.
double Packed8::pack(int64_t row, double* y) {
  thread_local std::vector<int8_t> integers;
  const int64_t dims = embedding_.dims(), position = layout_.position(row);
  integers.assign(4 * steps_, 0);
  embedding_.key(row, y);
  for (int64_t d = 0; d < dims; ++d) y[d] /= unit_;
  const auto scale = static_cast<float>(std::max(no_smaller, largest(y, dims) / 127));
  const double lost = quantise(y, dims, 1 / static_cast<double>(scale), 127, integers.data());
  scale_[position] = scale;
  residual_[position] = up(lost + (share_ + double_rounding) * length(y, dims) + no_smaller);
  uint8_t* out = bytes_.data() + position / lanes8 * steps_ * lanes8 * 4 + position % lanes8 * 4;
  for (int64_t step = 0; step < steps_; ++step)
    for (int64_t i = 0; i < 4; ++i) out[step * lanes8 * 4 + i] = static_cast<uint8_t>(integers[4 * step + i] + 128);
  return squared_half_run(integers.data());
}

bool Packed8::update(int64_t first, int64_t count) {
  if (file_ != nullptr) return false;
  std::vector<double> y(embedding_.dims());
  for (int64_t row = first; row < first + count; ++row) {
    loudest_ = std::max(loudest_, pack(row, y.data()));
    if (!(residual_[layout_.position(row)] < too_far)) return false;
    embedding_.raise_longest(row, stored_);
  }
  return true;
}

Packed8::Query Packed8::pack_query(std::span<const Matrix> queries, int64_t row, std::span<const double> weights,
                                   int8_t* bytes, int32_t* start) const {
  thread_local std::vector<double> p;
  const int64_t dims = embedding_.dims();
  p.assign(dims, 0.0);
  std::fill_n(bytes, 4 * steps_, int8_t{0});
  std::fill_n(start, runs(), 0);
  embedding_.query(queries, row, weights, p.data());
  const double given = length(p.data(), dims);
  const double slack = embedding_.slack(queries, row, weights, stored_);
  if (!(given > 0)) return {0, 0};  // every score is the same: all bounds are 0, nothing is ruled out
  for (double& value : p) value /= given;
  const double extent = largest(p.data(), dims);
  double most = most8_, scale = 0, lost = 0;
  for (;;) {
    scale = extent / most;
    lost = quantise(p.data(), dims, 1 / scale, most, bytes);
    // Half a run's inner product is at most |q| |k| by Cauchy-Schwarz and must fit 16 bits. With bytes up to 16 it does
    // whatever the keys, so that this ends: (16 * 16^2) * (16 * 127^2) < 32767^2.
    const double size = sums_runs_ ? std::sqrt(squared_half_run(bytes) * loudest_) : 0;
    if (size <= 32767) break;
    most = std::max(16.0, std::min(most - 1, std::floor(most * 32767 / size)));
  }
  start_query(bytes, start);
  const double beta = std::max(1 + lost, (lost + float_rounding) / share_) * beta_rounding;
  return {up(beta * round_up / scale), up(slack / (given * unit_) * round_up / scale)};
}

}  // namespace cascade::cpu
