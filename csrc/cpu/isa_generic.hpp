// Kernels in plain C++, written so that compilers vectorise what can be. Included by the instruction sets' files, each
// of which compiles its own copy with its own flags and replaces what intrinsics do better. Hence the unnamed
// namespace.
#pragma once

#include <type_traits>

#include "cpu/isa.hpp"
#include "cpu/widen.hpp"

namespace cascade::cpu {
namespace {
namespace generic {

constexpr int lanes = 8;

template <class T>
double dot(const double* query, const T* key, int64_t dim) {
  double sum[lanes] = {};
  int64_t d = 0;
  for (; d + lanes <= dim; d += lanes)
    for (int lane = 0; lane < lanes; ++lane) sum[lane] += query[d + lane] * static_cast<double>(widen(key[d + lane]));
  for (int lane = 0; d + lane < dim; ++lane) sum[lane] += query[d + lane] * static_cast<double>(widen(key[d + lane]));
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

template <class T>
void dots_of(const double* query, const Matrix& keys, const int64_t* rows, int64_t first, int64_t count, double* out) {
  const auto* data = static_cast<const T*>(keys.data);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows != nullptr ? rows[i] : first + i;
    out[i] = dot(query, data + row * keys.stride, keys.columns);
  }
}

[[maybe_unused]] void dots(const double* query, const Matrix& keys, const int64_t* rows, int64_t first, int64_t count,
                           double* out) {
  if (keys.dtype == DType::float32) dots_of<float>(query, keys, rows, first, count, out);
  if (keys.dtype == DType::float16) dots_of<Float16>(query, keys, rows, first, count, out);
  if (keys.dtype == DType::bfloat16) dots_of<BFloat16>(query, keys, rows, first, count, out);
}

// Calls `dot(keys, i)` for all rows, four at a time, whose independent sums hide the latency of one; then for the rest.
template <class T, class Row, class Dot>
void by_fours(int64_t count, const Row& row, const Dot& dot) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const T* const key[4] = {row(i), row(i + 1), row(i + 2), row(i + 3)};
    dot(key, i);
  }
  if (count - i == 3) {
    const T* const key[3] = {row(i), row(i + 1), row(i + 2)};
    dot(key, i);
  } else if (count - i == 2) {
    const T* const key[2] = {row(i), row(i + 1)};
    dot(key, i);
  } else if (count - i == 1) {
    const T* const key[1] = {row(i)};
    dot(key, i);
  }
}

template <class T>
void dots_float_of(const float* query, const Matrix& keys, const int64_t* rows, int64_t count, float* out) {
  constexpr int width = 16;
  for (int64_t i = 0; i < count; ++i) {
    const T* key = static_cast<const T*>(keys.data) + rows[i] * keys.stride;
    float sum[width] = {};
    int64_t d = 0;
    for (; d + width <= keys.columns; d += width)
      for (int lane = 0; lane < width; ++lane) sum[lane] += query[d + lane] * widen(key[d + lane]);
    for (int lane = 0; d + lane < keys.columns; ++lane) sum[lane] += query[d + lane] * widen(key[d + lane]);
    for (int half = width / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
    out[i] = sum[0];
  }
}

[[maybe_unused]] void dots_float(const float* query, const Matrix& keys, const int64_t* rows, int64_t count,
                                 float* out) {
  if (keys.dtype == DType::float32) dots_float_of<float>(query, keys, rows, count, out);
  if (keys.dtype == DType::float16) dots_float_of<Float16>(query, keys, rows, count, out);
  if (keys.dtype == DType::bfloat16) dots_float_of<BFloat16>(query, keys, rows, count, out);
}

inline int32_t low_half(int32_t word) { return static_cast<int16_t>(word & 0xffff); }
inline int32_t high_half(int32_t word) { return word >> 16; }

[[maybe_unused]] void tile16(const int32_t* queries, int count, const int32_t* keys, int64_t steps, int16_t* out,
                             int64_t stride) {
  for (int q = 0; q < count; ++q) {
    int32_t sum[lanes16] = {};
    for (int64_t step = 0; step < steps; ++step) {
      const int32_t a = low_half(queries[step * count + q]), b = high_half(queries[step * count + q]);
      for (int lane = 0; lane < lanes16; ++lane) {
        const int32_t key = keys[step * lanes16 + lane];
        sum[lane] += a * low_half(key) + b * high_half(key);
      }
    }
    for (int lane = 0; lane < lanes16; ++lane) out[q * stride + lane] = static_cast<int16_t>(sum[lane] >> 16);
  }
}

// `tiles16` of an instruction set whose tile is one block of keys.
using Tile16 = void (*)(const int32_t* queries, int count, const int32_t* keys, int64_t steps, int16_t* out,
                        int64_t stride);
template <Tile16 tile>
void tiles16(const int32_t* queries, int count, const int32_t* keys, int64_t blocks, int64_t steps, int16_t* out,
             int64_t stride) {
  for (int64_t block = 0; block < blocks; ++block)
    tile(queries, count, keys + block * steps * lanes16, steps, out + block * lanes16, stride);
}

// `tiles8` of one whose tile is a group of `count` queries, each with so many words of `start` as it has `runs`.
using Tile8 = uint32_t (*)(const int8_t* queries, const uint8_t* keys, int64_t steps, const int32_t* start,
                           const float* scale, const float* residual, const float* least, const float* beta,
                           float* upper, uint64_t* lanes);
template <Tile8 tile, int count, bool sums_runs>
void tiles8(const int8_t* queries, int64_t groups, const uint8_t* keys, int64_t steps, const int32_t* start,
            const float* scale, const float* residual, const float* least, const float* beta, float* upper,
            uint64_t* lanes, uint32_t* any) {
  const int64_t runs = sums_runs ? (steps + run8 - 1) / run8 : 1;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t at = group * count;
    any[group] = tile(queries + at * steps * 4, keys, steps, start + at * runs, scale, residual, least + at, beta + at,
                      upper + at * lanes8, lanes + at);
  }
}

[[maybe_unused]] int64_t count16(const int16_t* score, int64_t n, int16_t least) {
  int64_t total = 0;
  while (n > 0) {  // runs that a 16-bit counter in each lane survives
    const int64_t run = n < 65536 ? n : 65536;
    uint16_t counts[lanes16] = {};
    for (int64_t i = 0; i < run; i += lanes16)
      for (int lane = 0; lane < lanes16; ++lane) counts[lane] += score[i + lane] >= least;
    for (const uint16_t count : counts) total += count;
    score += run;
    n -= run;
  }
  return total;
}

[[maybe_unused]] void range16(const int16_t* score, int64_t n, int16_t* low, int16_t* high) {
  int16_t smallest = 32767, largest = no_score;
  for (int64_t i = 0; i < n; ++i) {
    const int16_t counted = score[i] == no_score ? int16_t{32767} : score[i];
    smallest = counted < smallest ? counted : smallest;
    largest = score[i] > largest ? score[i] : largest;
  }
  *low = smallest;
  *high = largest;
}

[[maybe_unused]] Split collect16(const int16_t* score, int64_t n, int16_t low, int16_t high, int16_t* out) {
  int64_t above = 0, copied = 0;
  for (int64_t i = 0; i < n; ++i) {
    above += score[i] > high;
    out[copied] = score[i];
    copied += static_cast<int64_t>(score[i] >= low) & static_cast<int64_t>(score[i] <= high);
  }
  return {above, copied};
}

[[maybe_unused]] Split split16(const Columns& from, uint32_t first, int64_t n, int rows, int low, int high,
                               const Columns& kept, const Columns& open) {
  Split found{0, 0};
  for (int64_t i = 0; i < n; ++i) {
    const int16_t value = from.score[0][i];
    if (value < low) continue;
    const uint32_t position = from.position != nullptr ? from.position[i] : first + static_cast<uint32_t>(i);
    const bool sure = value >= high;
    const Columns& to = sure ? kept : open;
    int64_t& at = sure ? found.kept : found.open;
    to.position[at] = position;
    for (int row = 0; row < rows; ++row) to.score[row][at] = from.score[row][i];
    ++at;
  }
  return found;
}

[[maybe_unused]] void fuse16(const int16_t* const* score, const float* gain, const float* offset, int count,
                             bool smaller, int64_t n, int16_t* out) {
  constexpr float above_zero = 32768;  // so that rounding to zero rounds down
  for (int64_t i = 0; i < n; i += lanes16) {
    float best[lanes16];
    for (int lane = 0; lane < lanes16; ++lane)
      best[lane] = static_cast<float>(score[0][i + lane]) * gain[0] + offset[0];
    for (int row = 1; row < count; ++row)
      for (int lane = 0; lane < lanes16; ++lane) {
        const float value = static_cast<float>(score[row][i + lane]) * gain[row] + offset[row];
        const float least = value < best[lane] ? value : best[lane], most = value > best[lane] ? value : best[lane];
        best[lane] = smaller ? least : most;
      }
    for (int lane = 0; lane < lanes16; ++lane)
      out[i + lane] = static_cast<int16_t>(static_cast<int32_t>(best[lane] + above_zero) - 32768);
  }
}

// `split16` by an instruction set's own loops, `Vectors::of<listed, rows>`, which there are for few rows.
template <class Vectors>
Split split16_by_rows(const Columns& from, uint32_t first, int64_t n, int rows, int low, int high, const Columns& kept,
                      const Columns& open) {
  const auto split = [&](auto listed) {
    if (rows == 1) return Vectors::template of<listed(), 1>(from, first, n, low, high, kept, open);
    if (rows == 2) return Vectors::template of<listed(), 2>(from, first, n, low, high, kept, open);
    if (rows == 3) return Vectors::template of<listed(), 3>(from, first, n, low, high, kept, open);
    return split16(from, first, n, rows, low, high, kept, open);
  };
  return from.position != nullptr ? split(std::true_type{}) : split(std::false_type{});
}

[[maybe_unused]] int64_t count_float(const float* value, int64_t n, float least) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += value[i] >= least;
  return total;
}

[[maybe_unused]] void range_float(const float* value, int64_t n, float over, float* low, float* high) {
  *low = __builtin_inff();
  *high = -__builtin_inff();
  for (int64_t i = 0; i < n; ++i) {
    if (!(value[i] > over)) continue;
    *low = value[i] < *low ? value[i] : *low;
    *high = value[i] > *high ? value[i] : *high;
  }
}

}  // namespace generic
}  // namespace
}  // namespace cascade::cpu
