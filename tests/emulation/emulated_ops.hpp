// csrc/cuda/ops.cuh in plain C++, for the emulation.
#pragma once

#include <array>

#include "emulation.hpp"

namespace cascade::cuda::ops {

inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(emulation::block()->shared); }

template <class T>
T load(const T* at) {
  emulation::counters().bytes_read += sizeof(T);
  return *at;
}
template <class T>
void store(T* at, T value) {
  emulation::counters().bytes_written += sizeof(T);
  *at = value;
}
template <class T>
T load_shared_by_blocks(const T* at) {
  return load(at);
}

inline double add(double a, double b) { return a + b; }
inline double multiply(double a, double b) { return a * b; }
inline double divide(double a, double b) { return a / b; }
inline double root(double a) { return std::sqrt(a); }
inline double fused(double a, double b, double c) {
  ++emulation::counters().multiply_adds;
  return std::fma(a, b, c);
}

inline uint32_t float_to_bits(float value) { return std::bit_cast<uint32_t>(value); }
inline float bits_to_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline double bits_to_double(uint64_t bits) { return std::bit_cast<double>(bits); }

inline float decode_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const auto fraction = static_cast<float>(bits & 1023);
  float value = 0;
  if (exponent == 31) {
    value = fraction != 0 ? NAN : INFINITY;
  } else {
    value = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  }
  return bits >> 15 ? -value : value;
}
inline float half_to_float(uint16_t bits) {
  static const auto table = [] {
    std::array<float, 65536> values{};
    for (int i = 0; i < 65536; ++i) {
      values[i] = decode_half(static_cast<uint16_t>(i));
    }
    return values;
  }();
  return table[bits];
}
// To the nearest half, ties to even, infinity past 65520.
inline uint16_t float_to_half(float value) {
  const auto sign = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16 & 0x8000);
  const double size = std::fabs(static_cast<double>(value));
  if (std::isnan(value)) {
    return sign | 0x7E00;
  }
  if (size >= 65520) {
    return sign | 0x7C00;
  }
  int exponent = 0;
  std::frexp(size, &exponent);                    // size in [2^(exponent-1), 2^exponent)
  const int step = std::max(exponent - 11, -24);  // a unit in the last place is 2^step
  const double units = std::nearbyint(std::ldexp(size, -step));
  const auto magnitude = static_cast<int>(units);  // up to 2048: the carry runs into the exponent
  return static_cast<uint16_t>(sign | (magnitude < 1024 ? magnitude : ((step + 24) << 10) + magnitude));
}

// The bytes are poison until the thread waits for the group they were committed in.
inline void copy_async_16(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    throw std::runtime_error("copy_async_16: an address is not a multiple of 16 bytes");
  }
  auto& f = emulation::self();
  std::memset(to, 0xFF, 16);
  f.copies.push_back({to, from, f.groups});
  emulation::counters().async_bytes += 16;
}
inline void commit_copies() { ++emulation::self().groups; }
template <int Pending>
void wait_copies() {
  auto& f = emulation::self();
  std::erase_if(f.copies, [&](const emulation::Copy& copy) {
    const bool lands = copy.group < f.groups - Pending;
    if (lands) {
      std::memcpy(copy.to, copy.from, 16);
    }
    return lands;
  });
}

inline emulation::Fiber* warp() {
  const unsigned first = emulation::self().number & ~31u;
  return &emulation::block()->fibers[first];
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  auto& f = emulation::self();
  if (reinterpret_cast<uintptr_t>(row) % 16) {
    throw std::runtime_error("load_matrices: a row's address is not a multiple of 16 bytes");
  }
  f.words[0] = static_cast<uint32_t>(static_cast<const char*>(row) - emulation::block()->shared);
  emulation::meet(emulation::Meeting::matrix, ~0u);
  const int lane = static_cast<int>(f.number & 31);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const char* from = emulation::block()->shared + warp()[matrix * 8 + lane / 4].words[0];
    std::memcpy(&r[matrix], from + (lane % 4) * 4, 4);
  }
  emulation::meet(emulation::Meeting::matrix, ~0u);
  emulation::counters().matrix_loads += lane == 0;
}

// Exact products, summed exactly, then off by up to what `kMatrixError` of csrc/cuda/bound.cuh allows for: 48 units of
// 2^-23 of the largest addend or sum.
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  auto& f = emulation::self();
  std::copy(a, a + 4, f.words);
  std::copy(b, b + 2, f.words + 4);
  emulation::meet(emulation::Meeting::matrix, ~0u);
  const int lane = static_cast<int>(f.number & 31), group = lane / 4, pair = lane % 4;
  const auto half_of = [](uint32_t word, int k) { return half_to_float(static_cast<uint16_t>(word >> (k & 1) * 16)); };
  for (int i = 0; i < 4; ++i) {
    const int row = group + 8 * (i / 2), column = pair * 2 + i % 2;
    double sum = c[i], largest = std::fabs(sum);
    for (int k = 0; k < 16; ++k) {
      const double left = half_of(warp()[(row % 8) * 4 + k % 8 / 2].words[row / 8 + 2 * (k / 8)], k);
      const double right = half_of(warp()[column * 4 + k % 8 / 2].words[4 + k / 8], k);
      sum += left * right;
      largest = std::max({largest, std::fabs(left * right), std::fabs(sum)});
    }
    if (emulation::settings().perturb) {
      std::uniform_real_distribution<double> unit(-1, 1);
      sum += unit(emulation::block()->random) * 47 * 0x1p-23 * largest;  // rounding to float takes the 48th
    }
    c[i] = static_cast<float>(sum);
  }
  emulation::meet(emulation::Meeting::matrix, ~0u);
  emulation::counters().matrix_ops += lane == 0;
}

}  // namespace cascade::cuda::ops
