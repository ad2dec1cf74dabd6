// Kernels in plain C++: what any machine runs, and what the others are compared with.
#include "cpu/isa_generic.hpp"

namespace cascade::cpu {

const Kernels& portable_kernels() {
  static constexpr Kernels table{
      .name = "portable",
      .dots = generic::dots,
      .tile16 = generic::tile16,
      .count16 = generic::count16,
      .range16 = generic::range16,
      .collect16 = generic::collect16,
      .split16 = generic::split16,
      .count_float = generic::count_float,
      .range_float = generic::range_float,
      .tile8 = nullptr,
  };
  return table;
}

}  // namespace cascade::cpu
