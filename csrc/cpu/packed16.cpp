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
constexpr double largest16 = 32639;  // 127 * 256 + 127: both bytes are signed
constexpr double headroom = 1.02;    // for rows that a queue writes later
constexpr double widely = 1.25;      // for their largest values where it is these that set the scale

// Values may be `finer` times as large as sums of 32 bits would admit.
double scale16(double norm, double most, int64_t dims, double finer) {
  if (!(norm > 0)) return 1;
  return std::min((finer * longest16 - 0.5 * std::sqrt(static_cast<double>(dims)) - 1) / norm, largest16 / most);
}

// value = 256 * upper + lower, for |value| <= largest16
inline void split(int16_t value, int8_t& upper, int8_t& lower) {
  lower = static_cast<int8_t>(value);
  upper = static_cast<int8_t>((value + 128) >> 8);
}

}  // namespace

Packed16::Packed16(std::span<const Matrix> bank, Metric metric, std::vector<int32_t> views, const Kernels& kernels,
                   const Control& control, Shelf* shelf)
    : embedding_(bank, metric, std::move(views)),
      layout_(bank.front().rows, lanes16),
      planes_(kernels.planes16),
      steps_(planes_ ? (embedding_.dims() + 3) / 4 * 2 : (embedding_.dims() + 1) / 2),
      stored_(embedding_.views().size(), 0.0) {
  const int64_t words = layout_.blocks * steps_ * lanes16 + over_read / 4;
  const auto each = [this](const auto& use) { parameters(use); };
  if (shelf != nullptr)
    file_ = shelf->open(planes_ ? "16bit-finer-planes" : "16bit", embedding_.views(), count_parameters(each),
                        {{words * 4}}, control);
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
  scale_ = scale16(longest_, extent.most * headroom, embedding_.dims(), 1);
  if (planes_) scale_ = std::max(scale_, scale16(longest_, extent.most * widely, embedding_.dims(), finer_planes));
  const auto clear = [&](int64_t begin, int64_t end) {
    std::fill(words_.data() + begin * steps_ * lanes16, words_.data() + end * steps_ * lanes16, 0);
  };
  residual_ = pack_rows(layout_, embedding_.dims(), control, shelf, clear, [this](int64_t row, double* y) {
    embedding_.key(row, y);
    return pack(row, y);
  });
  finish(file_.get(), each, shelf, control);
}

// Writes one row, y; returns the norm of what its integers lose.
double Packed16::pack(int64_t row, const double* y) {
  thread_local std::vector<int16_t> integers;
  integers.assign(2 * steps_, 0);
  const double lost = quantise(y, embedding_.dims(), scale_, largest16, integers.data());
  place_key(layout_.position(row), integers.data());
  return lost;
}

void Packed16::place_key(int64_t position, const int16_t* integers) {
  int32_t* const block = words_.data() + position / lanes16 * steps_ * lanes16;
  const int64_t lane = position % lanes16;
  if (!planes_) {
    for (int64_t step = 0; step < steps_; ++step) std::memcpy(block + step * lanes16 + lane, integers + 2 * step, 4);
    return;
  }
  const int64_t half = steps_ / 2 * (lanes16 / 2);  // words of a plane's even or odd keys
  for (int64_t group = 0; group < steps_ / 2; ++group) {
    int8_t upper[4], lower[4];
    for (int i = 0; i < 4; ++i) split(integers[4 * group + i], upper[i], lower[i]);
    int32_t* const out = block + lane % 2 * half + group * (lanes16 / 2) + lane / 2;
    std::memcpy(out, upper, 4);
    std::memcpy(out + 2 * half, lower, 4);
  }
}

void Packed16::place_query(const int16_t* integers, int32_t* words, int64_t place, int64_t count) const {
  if (!planes_) {
    for (int64_t step = 0; step < steps_; ++step) std::memcpy(words + step * count + place, integers + 2 * step, 4);
    return;
  }
  auto* const upper = reinterpret_cast<int8_t*>(words) + place * padded_dims();
  int8_t* const lower = upper + count * padded_dims();
  for (int64_t d = 0; d < 2 * steps_; ++d) split(integers[d], upper[d], lower[d]);
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
                                     int32_t* words, int64_t place, int64_t count) const {
  thread_local std::vector<double> p;
  thread_local std::vector<int16_t> integers;
  const int64_t dims = embedding_.dims();
  p.assign(dims, 0.0);
  integers.assign(2 * steps_, 0);
  embedding_.query(queries, row, weights, p.data());
  const double norm = length(p.data(), dims), finer = planes_ ? finer_planes : 1;
  const double scale = scale16(norm, largest(p.data(), dims), dims, finer);
  const bool fits = std::isfinite(scale) && std::isfinite(1 / scale) && std::isfinite(1 / scale_) && scale_ > 0;
  const double lost = fits ? quantise(p.data(), dims, scale, largest16, integers.data()) : 0;
  place_query(integers.data(), words, place, count);
  const double bound = lost * longest_ + (norm + lost) * residual_ + embedding_.slack(queries, row, weights, stored_);
  const double unit = scale * scale_ / (65536 * finer * finer), error = bound * unit * round_up;
  return {fits && std::isfinite(error) ? error : std::numeric_limits<double>::infinity(), unit};
}

}  // namespace cascade::cpu
