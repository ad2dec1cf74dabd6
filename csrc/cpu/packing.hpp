// What packing rows in 16 and in 8 bits has in common: the arithmetic of fixed point, the passes over a bank's rows,
// and what a kept file holds.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "cpu/embedding.hpp"
#include "cpu/packed.hpp"
#include "cpu/pool.hpp"
#include "cpu/shelf.hpp"
#include "cpu/sums.hpp"

namespace cascade::cpu {

constexpr double round_up = 1 + 1e-9;  // over the rounding of norms themselves

inline double length(const double* x, int64_t n) {
  return std::sqrt(sum_of(n, [x](int64_t d) { return x[d] * x[d]; })) * round_up;
}

inline double largest(const double* x, int64_t n) {
  double most[side_by_side] = {};
  int64_t d = 0;
  for (; d + side_by_side <= n; d += side_by_side)
    for (int lane = 0; lane < side_by_side; ++lane) {
      const double size = std::abs(x[d + lane]);
      most[lane] = size > most[lane] ? size : most[lane];
    }
  for (; d < n; ++d) most[0] = std::max(most[0], std::abs(x[d]));
  return *std::max_element(most, most + side_by_side);
}

// To nearest even, for |value| < 2^51, in a form that compilers vectorise.
inline double rounded(double value) { return (value + 0x1.8p52) - 0x1.8p52; }

// Quantises to value * scale, at most `most` in size; returns the norm of what is lost, in the values' units.
template <class T>
double quantise(const double* x, int64_t n, double scale, double most, T* out) {
  const double back = 1 / scale;
  for (int64_t d = 0; d < n; ++d)
    out[d] = static_cast<T>(static_cast<int32_t>(std::min(most, std::max(-most, rounded(x[d] * scale)))));
  const auto lost = [=](int64_t d) {
    const double error = x[d] - out[d] * back;
    return error * error;
  };
  return std::sqrt(sum_of(n, lost)) * round_up;
}

// Tells where files are mapped that so many rows of all views were passed.
inline void passed(Shelf* shelf, int64_t rows, int64_t bytes_per_row) {
  if (shelf != nullptr) shelf->residency().touched(rows * bytes_per_row);
}

// The longest row and the largest coordinate; per view, the longest row as stored.
struct Extent {
  double norm = 0, most = 0;
  std::vector<double> stored;
};

Extent measure_rows(const Embedding& embedding, int64_t rows, const Control& control, Shelf* shelf);

// Packs all rows in the order of their blocks, a few blocks at a time, which stay in the cache while they are filled:
// each byte of a file is written once. `clear(begin, end)` is called for the blocks before their rows, `pack(row, y)`
// has room for a row in y. Returns the largest that `pack` returned.
template <class Clear, class Pack>
double pack_rows(const Layout& layout, int64_t dims, const Control& control, Shelf* shelf, const Clear& clear,
                 const Pack& pack) {
  constexpr int64_t together = 64;  // blocks: half a megabyte for D = 128
  const int64_t groups = (layout.blocks + together - 1) / together;
  std::vector<double> most(std::max(1, control.threads), 0.0);
  run_parts(static_cast<int>(most.size()), control, [&](int part, int parts) {
    std::vector<double> y(dims);
    for (int64_t group = groups * part / parts; group < groups * (part + 1) / parts; ++group) {
      if (should_stop()) return;
      const int64_t begin = group * together, end = std::min(layout.blocks, begin + together);
      clear(begin, end);
      for (int64_t lane = 0; lane < layout.lanes; ++lane)
        for (int64_t block = begin; block < end; ++block)
          if (const int64_t row = block + lane * layout.blocks; row < layout.keys)
            most[part] = std::max(most[part], pack(row, y.data()));
      passed(shelf, (end - begin) * layout.lanes, dims * 8);
    }
  });
  return *std::max_element(most.begin(), most.end());
}

// Calls `parameters(use)` as a packed bank's own does.
template <class Each>
int64_t count_parameters(const Each& parameters) {
  int64_t found = 0;
  parameters([&](double&) { ++found; });
  return found;
}

template <class Each>
void read_parameters(const KeptFile& file, const Each& parameters) {
  const double* from = file.parameters();
  parameters([&](double& value) { value = *from++; });
}

// Writes the parameters down and puts the file where others find it; nothing where there is no file.
template <class Each>
void finish(KeptFile* file, const Each& parameters, Shelf* shelf, const Control& control) {
  if (file == nullptr) return;
  double* to = file->parameters();
  parameters([&](double& value) { *to++ = value; });
  shelf->finish(*file, control);
}

}  // namespace cascade::cpu
