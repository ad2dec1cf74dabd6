// One table of kernels per instruction set, and the choice among them. A kernel never throws, allocates or starts
// threads.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "core/views.hpp"

namespace cascade::cpu {

struct Kernels {
  const char* name;

  // The contract's inner products of one query with chosen keys: eight running float64 sums, then a fixed tree.
  void (*dots)(const double* query,  // [D rounded up to 8], zero padded
               const Matrix& keys,   // [K, D]
               const int64_t* rows,  // [count], or null: the rows first, first + 1, ...
               int64_t first,        // used where `rows` is null
               int64_t count,        //
               double* out);         // [count]
};

// Each lives in a file of its own, compiled for that instruction set; it exports nothing else.
const Kernels& portable_kernels();

struct Isa {
  const char* name;
  const char* needs;            // what it asks of the machine, in words
  bool (*runs_here)();          //
  const Kernels& (*kernels)();  //
};

// The instruction sets built into this library, best first.
std::span<const Isa> isas();

// The one called `name`, or the best that runs here where `name` is empty.
// Throws std::invalid_argument for a name not built in, std::runtime_error for one that this machine lacks.
const Kernels& choose(const std::string& name);

}  // namespace cascade::cpu
