#include "cpu/packed.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace cascade::cpu {
namespace {

// 16-bit rows are scaled to at most this length: two of them multiply to less than 2^31 - 2^16.
constexpr double longest16 = 46290;
constexpr double largest16 = 32766;
constexpr double headroom = 1.02;      // for rows that a queue writes later
constexpr double round_up = 1 + 1e-9;  // over the rounding of norms themselves
constexpr double no_smaller = 1e-30;   // scales relative to the longest key: floats never turn denormal
// float operations in the 8-bit tile: conversion of the integer, two products' roundings, each 2^-24 of at most
// |p^| |y^| + |p^| |e_y| <= 4 |p| |y|; twice that for the comparison values.
constexpr double float_rounding = 4e-6;

double length(const double* x, int64_t n) {
  double sum[4] = {};
  for (int64_t d = 0; d < n; ++d) sum[d % 4] += x[d] * x[d];
  return std::sqrt((sum[0] + sum[1]) + (sum[2] + sum[3])) * round_up;
}

double largest(const double* x, int64_t n) {
  double most = 0;
  for (int64_t d = 0; d < n; ++d) most = std::max(most, std::abs(x[d]));
  return most;
}

// To nearest even, for |value| < 2^51, in a form that compilers vectorise.
inline double rounded(double value) { return (value + 0x1.8p52) - 0x1.8p52; }

// Quantises to value * scale, at most `most` in size; returns the norm of what is lost, in the values' units.
template <class T>
double quantise(const double* x, int64_t n, double scale, double most, T* out) {
  double lost[4] = {};
  const double back = 1 / scale;
  for (int64_t d = 0; d < n; ++d) {
    const double integer = std::min(most, std::max(-most, rounded(x[d] * scale)));
    const double error = x[d] - integer * back;
    out[d] = static_cast<T>(static_cast<int32_t>(integer));
    lost[d % 4] += error * error;
  }
  return std::sqrt((lost[0] + lost[1]) + (lost[2] + lost[3])) * round_up;
}

float up(double value) { return std::nextafter(static_cast<float>(value), std::numeric_limits<float>::infinity()); }

double scale16(double norm, double most, int64_t dims) {
  if (!(norm > 0)) return 1;
  return std::min((longest16 - 0.5 * std::sqrt(static_cast<double>(dims)) - 1) / norm, largest16 / most);
}

// Tells where files are mapped that so many rows of all views were passed.
void passed(Shelf* shelf, int64_t rows, int64_t bytes_per_row) {
  if (shelf != nullptr) shelf->residency().touched(rows * bytes_per_row);
}

// Runs `use(part, row, y)` for all rows over the threads of `control`.
template <class Use>
void for_rows(int64_t rows, int64_t dims, const Control& control, Shelf* shelf, const Use& use) {
  run_parts(control.threads, control, [&](int part, int parts) {
    std::vector<double> y(dims);
    for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
      if (row % 1024 == 0) {
        if (should_stop()) return;
        passed(shelf, 1024, dims * 4);
      }
      use(part, row, y.data());
    }
  });
}

// The same in the order of the packed blocks, a few of them at a time, which stay in the cache while they are filled:
// each byte of a file is written once. `start(begin, end)` is called for the blocks before their rows.
template <class Start, class Use>
void for_blocks(const Layout& layout, int64_t dims, const Control& control, Shelf* shelf, const Start& start,
                const Use& use) {
  constexpr int64_t together = 64;  // blocks: half a megabyte for D = 128
  const int64_t groups = (layout.blocks + together - 1) / together;
  run_parts(control.threads, control, [&](int part, int parts) {
    std::vector<double> y(dims);
    for (int64_t group = groups * part / parts; group < groups * (part + 1) / parts; ++group) {
      if (should_stop()) return;
      const int64_t begin = group * together, end = std::min(layout.blocks, begin + together);
      start(begin, end);
      for (int64_t lane = 0; lane < layout.lanes; ++lane)
        for (int64_t block = begin; block < end; ++block)
          if (const int64_t row = block + lane * layout.blocks; row < layout.keys) use(part, row, y.data());
      passed(shelf, (end - begin) * layout.lanes, dims * 8);
    }
  });
}

// Reads the parameters that a file holds, or writes them there.
template <class Each>
void take_over(const KeptFile& file, const Each& parameters) {
  const double* from = file.parameters();
  parameters([&](double& value) { value = *from++; });
}

template <class Each>
void write_down(const KeptFile& file, const Each& parameters) {
  double* to = file.parameters();
  parameters([&](double& value) { *to++ = value; });
}

template <class Each>
int64_t count(const Each& parameters) {
  int64_t found = 0;
  parameters([&](double&) { ++found; });
  return found;
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
  if (shelf != nullptr) file_ = shelf->open("16bit", embedding_.views(), count(each), {{words * 4}}, control);
  if (file_ == nullptr) {
    words_.reserve(words);
  } else {
    words_.borrow(file_->array<int32_t>(0), words);
    if (file_->complete()) {
      take_over(*file_, each);
      return;
    }
  }
  embedding_.learn(shelf != nullptr ? &shelf->residency() : nullptr);
  measure(control, shelf);
  std::vector<double> residuals(std::max(1, control.threads), 0.0);
  const auto clear = [&](int64_t begin, int64_t end) {
    std::fill(words_.data() + begin * steps_ * lanes16, words_.data() + end * steps_ * lanes16, 0);
  };
  for_blocks(layout_, embedding_.dims(), control, shelf, clear,
             [&](int part, int64_t row, double* y) { residuals[part] = std::max(residuals[part], pack(row, y)); });
  residual_ = *std::max_element(residuals.begin(), residuals.end());
  if (file_ == nullptr) return;
  write_down(*file_, each);
  shelf->finish(*file_, control);
}

// The longest row and the largest coordinate, and the scale that suits them.
void Packed16::measure(const Control& control, Shelf* shelf) {
  struct Extent {
    double norm = 0, most = 0;
    std::vector<double> stored;
  };
  std::vector<Extent> extents(std::max(1, control.threads));
  for (Extent& extent : extents) extent.stored = stored_;
  for_rows(layout_.keys, embedding_.dims(), control, shelf, [&](int part, int64_t row, double* y) {
    embedding_.key(row, y);
    embedding_.raise_longest(row, extents[part].stored);
    extents[part].norm = std::max(extents[part].norm, length(y, embedding_.dims()));
    extents[part].most = std::max(extents[part].most, largest(y, embedding_.dims()));
  });
  double most = 0;
  for (const Extent& extent : extents) {
    longest_ = std::max(longest_, extent.norm * headroom);
    most = std::max(most, extent.most * headroom);
    for (size_t view = 0; view < stored_.size(); ++view) stored_[view] = std::max(stored_[view], extent.stored[view]);
  }
  scale_ = scale16(longest_, most, embedding_.dims());
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

Packed8::Packed8(std::span<const Matrix> bank, Metric metric, std::vector<int32_t> views, const Kernels& kernels,
                 const Control& control, Shelf* shelf)
    : embedding_(bank, metric, std::move(views)),
      layout_(bank.front().rows, lanes8),
      steps_((embedding_.dims() + 3) / 4),
      most8_(kernels.most8),
      sums_runs_(kernels.sums_runs),
      stored_(embedding_.views().size(), 0.0) {
  const int64_t keys = layout_.positions(), bytes = keys * steps_ * 4;
  const auto each = [this](const auto& use) { parameters(use); };
  if (shelf != nullptr)
    file_ = shelf->open("8bit", embedding_.views(), count(each), {{bytes, keys * 4, keys * 4}}, control);
  if (file_ == nullptr) {
    bytes_.reserve(bytes);
    scale_.reserve(keys);
    residual_.reserve(keys);
  } else {
    bytes_.borrow(file_->array<uint8_t>(0), bytes);
    scale_.borrow(file_->array<float>(1), keys);
    residual_.borrow(file_->array<float>(2), keys);
    if (file_->complete()) {
      take_over(*file_, each);
      return;
    }
  }
  embedding_.learn(shelf != nullptr ? &shelf->residency() : nullptr);
  choose_rotation(shelf);
  measure(control, shelf);
  const auto clear = [&](int64_t begin, int64_t end) {
    std::fill(bytes_.data() + begin * steps_ * lanes8 * 4, bytes_.data() + end * steps_ * lanes8 * 4, uint8_t{128});
    std::fill(scale_.data() + begin * lanes8, scale_.data() + end * lanes8, std::numeric_limits<float>::quiet_NaN());
    std::fill(residual_.data() + begin * lanes8, residual_.data() + end * lanes8, 0.0f);
  };
  std::vector<double> loudest(std::max(1, control.threads), 0.0);
  for_blocks(layout_, embedding_.dims(), control, shelf, clear,
             [&](int part, int64_t row, double* y) { loudest[part] = std::max(loudest[part], pack(row, y)); });
  loudest_ = *std::max_element(loudest.begin(), loudest.end());
  if (file_ == nullptr) return;
  write_down(*file_, each);
  shelf->finish(*file_, control);
}

// The longest row, by which all are divided.
void Packed8::measure(const Control& control, Shelf* shelf) {
  struct Extent {
    double norm = 0;
    std::vector<double> stored;
  };
  std::vector<Extent> extents(std::max(1, control.threads));
  for (Extent& extent : extents) extent.stored = stored_;
  for_rows(layout_.keys, embedding_.dims(), control, shelf, [&](int part, int64_t row, double* y) {
    embedding_.key(row, y);
    embedding_.raise_longest(row, extents[part].stored);
    extents[part].norm = std::max(extents[part].norm, length(y, embedding_.dims()));
  });
  double norm = 0;
  for (const Extent& extent : extents) {
    norm = std::max(norm, extent.norm);
    for (size_t view = 0; view < stored_.size(); ++view) stored_[view] = std::max(stored_[view], extent.stored[view]);
  }
  unit_ = norm > 0 ? norm : 1;
  longest_ = 1 * round_up;
}

// Rotating costs time when packing and when querying, so only where it makes the largest coordinates clearly smaller.
void Packed8::choose_rotation(Shelf* shelf) {
  Embedding turned = embedding_;
  turned.rotate();
  std::vector<double> y(embedding_.dims());
  double plain = 0, rotated = 0;
  const int64_t step = std::max<int64_t>(1, layout_.keys / 256);
  for (int64_t row = 0; row < layout_.keys; row += step) {
    embedding_.key(row, y.data());
    passed(shelf, 1, Residency::folio);
    const double norm = length(y.data(), embedding_.dims());
    if (!(norm > 0)) continue;
    plain += largest(y.data(), embedding_.dims()) / norm;
    turned.key(row, y.data());
    rotated += largest(y.data(), embedding_.dims()) / norm;
  }
  constexpr double worth_it = 0.75;
  if (rotated < worth_it * plain) embedding_.rotate();
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
  residual_[position] = up(lost + 1e-15);
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
    longest_ = std::max(longest_, length(y.data(), embedding_.dims()));  // pack left y / unit
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
  const double rest = lost * longest_ + float_rounding * longest_ + slack / (given * unit_);
  return {up((1 + lost) * round_up / scale), up(rest * round_up / scale)};
}

}  // namespace cascade::cpu
