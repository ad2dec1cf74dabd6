// Kernels in plain C++: what any machine runs, and what the others are compared with.
#include "cpu/isa.hpp"
#include "cpu/widen.hpp"

namespace cascade::cpu {
namespace {

constexpr int lanes = 8;

template <class T>
double dot(const double* query, const T* key, int64_t dim) {
  double sum[lanes] = {};
  int64_t d = 0;
  for (; d + lanes <= dim; d += lanes)
    for (int lane = 0; lane < lanes; ++lane) sum[lane] += query[d + lane] * static_cast<double>(widen(key[d + lane]));
  for (int lane = 0; d + lane < dim; ++lane) sum[lane] += query[d + lane] * static_cast<double>(widen(key[d + lane]));
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

template <class T>
void dots_of(const double* query, const Matrix& keys, const int64_t* rows, int64_t first, int64_t count, double* out) {
  const auto* data = static_cast<const T*>(keys.data);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows != nullptr ? rows[i] : first + i;
    out[i] = dot(query, data + row * keys.stride, keys.columns);
  }
}

void dots(const double* query, const Matrix& keys, const int64_t* rows, int64_t first, int64_t count, double* out) {
  if (keys.dtype == DType::float32) dots_of<float>(query, keys, rows, first, count, out);
  if (keys.dtype == DType::float16) dots_of<Float16>(query, keys, rows, first, count, out);
  if (keys.dtype == DType::bfloat16) dots_of<BFloat16>(query, keys, rows, first, count, out);
}

}  // namespace

const Kernels& portable_kernels() {
  static constexpr Kernels table{.name = "portable", .dots = dots};
  return table;
}

}  // namespace cascade::cpu
