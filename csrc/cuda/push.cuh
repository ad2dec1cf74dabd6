// A key queue's push in one launch: the newest keys of a batch, at unit length where that is asked for, rounded to the
// ring's type and written to their slots, with their columns, and packed again where the view has been searched.
#pragma once

#include "cuda/pack.cuh"

namespace cascade::cuda {

constexpr int kPushThreads = 256;  // a warp per key and view

// To the nearest bfloat16, ties to even; NaN stays one.
__device__ inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = ops::float_to_bits(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
    return static_cast<uint16_t>(bits >> 16 | 0x40u);
  }
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

__device__ inline void put_element(void* data, int64_t at, DType dtype, float value) {
  if (dtype == DType::float32) {
    ops::store(static_cast<float*>(data) + at, value);
  } else {
    ops::store(static_cast<uint16_t*>(data) + at,
               dtype == DType::float16 ? ops::float_to_half(value) : float_to_bfloat16(value));
  }
}

// grid: (ceil(rows / 8), views), where `rows` of the batch, from row `first` on, go into the ring
__global__ void __launch_bounds__(kPushThreads, 2) push_rows(const PushProblem p, const int64_t first) {
  const PushView& view = p.views[blockIdx.y];
  const int lane = static_cast<int>(threadIdx.x & 31);
  const int64_t row = first + static_cast<int64_t>(blockIdx.x) * (kPushThreads / 32) + threadIdx.x / 32;
  if (row >= view.batch.rows) {
    return;
  }
  const int64_t slot = (p.cursor + row) % view.ring.rows;
  if (blockIdx.y == 0 && lane < p.column_count) {
    const PushColumn& column = p.columns[lane];
    ops::store(column.ring + slot, column.batch == nullptr ? int64_t{-1} : ops::load(column.batch + row));
  }
  double length = 1;
  if (p.normalise) {  // zeros stay zeros
    const double norm = ops::root(dot_by_eight(view.batch, row, view.batch, row));
    length = norm > 0 ? norm : 1;
  }
  for (int64_t d = lane; d < view.batch.columns; d += 32) {
    const float given = element(view.batch.data, row * view.batch.stride + d, view.batch.dtype);
    const float value = p.normalise ? static_cast<float>(ops::divide(given, length)) : given;
    put_element(view.to, slot * view.ring.stride + d, view.ring.dtype, value);
  }
  if (view.packed.rows != nullptr) {
    __syncwarp();  // what the warp has written is packed as it is stored
    pack_stored_row(view.ring, view.packed, p.metric, slot);
  }
}

}  // namespace cascade::cuda
