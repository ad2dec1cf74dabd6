// Stored values as float, exactly. Bit arithmetic only, so that any compiler can vectorise the loops that use it.
#pragma once

#include <bit>
#include <cstdint>

namespace cascade::cpu {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Unnamed: each instruction set's file gets its own copy, or the linker could keep one that the machine cannot run.
namespace {

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

// The exponent is re-biased by a multiplication with 2^112, which is exact and makes half's denormals normal.
[[maybe_unused]] inline float widen(Float16 value) {
  const float magnitude = std::bit_cast<float>(uint32_t{value.bits & 0x7fffu} << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | (uint32_t{value.bits & 0x8000u} << 16));
}

}  // namespace
}  // namespace cascade::cpu
