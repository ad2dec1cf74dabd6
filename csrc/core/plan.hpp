// A cascade plan as the kernels see it: views are numbers, counts are resolved.
#pragma once

#include <cstdint>
#include <span>

namespace cascade {

enum class Fusion : int { none, sum, min, max, zsum, rrf };

// Rank the candidates by the fused score of `views` and keep the best `keep`.
struct Stage {
  std::span<const int32_t> views;
  Fusion fusion;
  int64_t keep;
  bool over_bank;  // rank all eligible keys, keep those candidates that are among its best
};

}  // namespace cascade
