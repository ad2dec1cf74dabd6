// Non-owning views of what the kernels read and write. The caller owns all memory; shapes are checked at the border.
#pragma once

#include <cstdint>

namespace cascade {

enum class DType : int { float32, float16, bfloat16, float64 };
enum class Metric : int { inner_product, cosine, l2 };

// A row-major matrix of stored features; rows are `stride` elements apart.
struct Matrix {
  const void* data;  // [rows, columns]
  int64_t rows;
  int64_t columns;
  int64_t stride;
  DType dtype;
};

// Which keys are no candidates: by video id, by mask, or none (all null).
struct Exclusion {
  const int64_t* key_video;    // [K]
  const int64_t* query_video;  // [B]
  const uint8_t* mask;         // [B, K], other than 0: excluded
};

}  // namespace cascade
