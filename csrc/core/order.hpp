// The one total order: similarity descending, then key index ascending. Every selection uses it.
#pragma once

#include <bit>
#include <cstdint>

#if defined(__CUDACC__)
#define CASCADE_HOST_DEVICE __host__ __device__
#else
#define CASCADE_HOST_DEVICE
#endif

namespace cascade {

// A key of the bank and its score for one query.
struct Ranked {
  double score;
  int64_t key;
};

// Whether `a` comes before `b`. -0.0 equals +0.0; NaN never enters (refused at the border).
CASCADE_HOST_DEVICE constexpr bool before(const Ranked& a, const Ranked& b) {
  return a.score != b.score ? a.score > b.score : a.key < b.key;
}

// The score as an integer whose unsigned order is the score's: equal scores map to equal integers, -0.0 included.
CASCADE_HOST_DEVICE inline uint64_t ordered(double score) {
  const double plus_zero = score + 0.0;  // -0.0 + 0.0 is +0.0
#if defined(__CUDA_ARCH__)
  const auto bits = static_cast<uint64_t>(__double_as_longlong(plus_zero));
#else
  const auto bits = std::bit_cast<uint64_t>(plus_zero);
#endif
  return bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
}

}  // namespace cascade
