#pragma once
// What the AMX tiles share.
#include <immintrin.h>

#include <algorithm>

#include "cpu/isa.hpp"

namespace cascade::cpu {
namespace {
namespace amx {

constexpr int rows = 16;                 // of a tile: queries
constexpr int64_t row_bytes = 64;        // of a tile
constexpr int64_t tile_words = 16 * 16;  // of sums

// Lines of memory to fetch, so many at each call. Tiles take whole lines from afar one by one;
// asked for while others are at work, they are near. As few at a time as will do: a core has room for a dozen on their
// way, and what asks for more waits until one is there.
template <int lines>
class Ahead {
 public:
  explicit Ahead(const void* first) : line_(static_cast<const char*>(first)) {}
  void fetch() {
#pragma GCC unroll 16
    for (int i = 0; i < lines; ++i) _mm_prefetch(line_ + i * row_bytes, _MM_HINT_T0);
    line_ += lines * row_bytes;
  }

 private:
  const char* line_;
};

}  // namespace amx
}  // namespace
}  // namespace cascade::cpu
