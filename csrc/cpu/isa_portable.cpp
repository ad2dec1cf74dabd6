// Kernels in plain C++: what any machine runs, and what the others are compared with.
#include "cpu/contrast_tile.hpp"
#include "cpu/isa_generic.hpp"

namespace cascade::cpu {
namespace {

struct Floats4 {
  using type = float __attribute__((vector_size(16)));  // what SSE2 and NEON, their architectures' least, both have
  using bits = uint32_t __attribute__((vector_size(16)));
  static constexpr int rows = 6;
  static type all(float value) { return type{value, value, value, value}; }
  static type fma(type a, type b, type c) { return a * b + c; }
};

}  // namespace

const Kernels& portable_kernels() noexcept {
  static constexpr Kernels table{
      .name = "portable",
      .dots = generic::dots,
      .dots_float = generic::dots_float,
      .enter = nullptr,
      .leave = nullptr,
      .tiles16 = generic::tiles16<generic::tile16>,
      .queries16 = 12,
      .least16 = 4,
      .planes16 = false,
      .piece16 = 8192,
      .count16 = generic::count16,
      .range16 = generic::range16,
      .collect16 = generic::collect16,
      .split16 = generic::split16,
      .fuse16 = generic::fuse16,
      .count_float = generic::count_float,
      .range_float = generic::range_float,
      .tiles8 = nullptr,
      .queries8 = 0,
      .by_row8 = false,
      .most8 = 0,
      .sums_runs = false,
      .fewest8 = 0,
      .few8 = 0,
      .scores32 = contrast::scores32<Floats4>,
      .absorb32 = contrast::absorb32<Floats4>,
  };
  return table;
}

}  // namespace cascade::cpu
