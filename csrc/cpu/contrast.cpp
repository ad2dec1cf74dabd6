#include "cpu/contrast.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/buffer.hpp"
#include "cpu/widen.hpp"

namespace cascade::cpu {
namespace {

constexpr int64_t most_chunks = 16;        // runs of keys with sums of their own, however many threads there are
constexpr int64_t chunk_at_least = 1024;   // keys
constexpr int64_t block_bytes = 32 << 10;  // of keys, which stay in the first-level cache between the two products
constexpr int64_t block_at_most = 128;     // keys: their weights are summed in float32 before they go to float64
constexpr float absent = -__builtin_inff();

// 32 queries' sums over a run of keys.
struct Sums {
  Buffer<float> top, direction;  // [32], [D, 32]
  Buffer<double> sum;            // [32]
};

template <class T>
void widen_rows(const Matrix& keys, int64_t first, int64_t count, float* out) {
  const auto* data = static_cast<const T*>(keys.data);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < keys.columns; ++d) out[i * keys.columns + d] = widen(data[(first + i) * keys.stride + d]);
}

class Contrast {
 public:
  Contrast(const Kernels& kernels, const ContrastCall& call, const ContrastAnswer& answer)
      : kernels_(kernels),
        call_(call),
        answer_(answer),
        dim_(call.keys.columns),
        groups_((call.batch + lanes32 - 1) / lanes32),
        inverse_{
            static_cast<float>(1 / call.temperature),
            static_cast<float>(1 / call.temperature - static_cast<double>(static_cast<float>(1 / call.temperature)))},
        block_(std::clamp<int64_t>(block_bytes / static_cast<int64_t>(sizeof(float)) / std::max<int64_t>(1, dim_), 8,
                                   block_at_most)),
        chunk_(std::max((call.keys.rows + most_chunks - 1) / most_chunks, chunk_at_least)),
        chunks_((call.keys.rows + chunk_ - 1) / chunk_),
        sums_(static_cast<size_t>(std::max<int64_t>(1, chunks_) * groups_)) {
    lay_queries();
  }

  void run(const Control& control) {
    run_parts(static_cast<int>(chunks_), control, [&](int chunk, int) {
      Buffer<float> score(block_ * lanes32), wide(call_.keys.dtype == DType::float32 ? 0 : block_ * dim_);
      pass(chunk, score.data(), wide.data());
    });
    for (int64_t query = 0; query < call_.batch; ++query) merge(query);
  }

 private:
  // Queries with the lanes innermost; lanes past the last query are zero.
  void lay_queries() {
    queries_.reserve(groups_ * dim_ * lanes32);
    std::fill_n(queries_.data(), groups_ * dim_ * lanes32, 0.0f);
    for (int64_t query = 0; query < call_.batch; ++query)
      for (int64_t d = 0; d < dim_; ++d)
        queries_[(query / lanes32 * dim_ + d) * lanes32 + query % lanes32] = call_.query[query * dim_ + d];
  }

  Sums& sums(int64_t chunk, int64_t group) { return sums_[static_cast<size_t>(chunk * groups_ + group)]; }

  void start(Sums& each, int64_t group) {
    each.top.reserve(lanes32);
    each.sum.reserve(lanes32);
    for (int64_t lane = 0; lane < lanes32; ++lane) {
      const int64_t query = group * lanes32 + lane;
      each.top[lane] = query < call_.batch ? call_.own[query] : 0.0f;
      each.sum[lane] = 0;
    }
    if (answer_.direction == nullptr) return;
    each.direction.reserve(dim_ * lanes32);
    std::fill_n(each.direction.data(), dim_ * lanes32, 0.0f);
  }

  void pass(int64_t chunk, float* score, float* wide) {
    for (int64_t group = 0; group < groups_; ++group) start(sums(chunk, group), group);
    const int64_t end = std::min(call_.keys.rows, (chunk + 1) * chunk_);
    for (int64_t first = chunk * chunk_; first < end && !should_stop(); first += block_) {
      const int64_t count = std::min(block_, end - first);
      const float* keys = wide;
      int64_t stride = dim_;
      if (call_.keys.dtype == DType::float32) {
        keys = static_cast<const float*>(call_.keys.data) + first * call_.keys.stride;
        stride = call_.keys.stride;
      } else if (call_.keys.dtype == DType::float16) {
        widen_rows<Float16>(call_.keys, first, count, wide);
      } else {
        widen_rows<BFloat16>(call_.keys, first, count, wide);
      }
      for (int64_t group = 0; group < groups_; ++group) {
        Sums& to = sums(chunk, group);
        kernels_.scores32(queries_.data() + group * dim_ * lanes32, keys, stride, count, dim_,
                          group == 0 && keys != wide, inverse_, score);
        take(call_.members, first, count, group, score, answer_.score);
        take(call_.absent, first, count, group, score, nullptr);
        kernels_.absorb32(score, keys, stride, count, dim_, to.top.data(), to.sum.data(),
                          answer_.direction != nullptr ? to.direction.data() : nullptr);
      }
    }
  }

  // Takes the pairs' scores out of a block.
  static void take(const Pairs& pairs, int64_t first, int64_t count, int64_t group, float* score, double* to) {
    const auto begin = std::lower_bound(pairs.slot.begin(), pairs.slot.end(), first);
    for (auto at = begin; at != pairs.slot.end() && *at < first + count; ++at) {
      const auto pair = static_cast<size_t>(at - pairs.slot.begin());
      if (pairs.row[pair] / lanes32 != group) continue;
      float& each = score[(*at - first) * lanes32 + pairs.row[pair] % lanes32];
      if (to != nullptr) to[pair] = static_cast<double>(each);
      each = absent;
    }
  }

  // One query's sums over all chunks, in their order.
  void merge(int64_t query) {
    const int64_t group = query / lanes32, lane = query % lanes32;
    float top = call_.own[query];
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) top = std::max(top, sums(chunk, group).top[lane]);
    double sum = 0;
    float* direction = answer_.direction != nullptr ? answer_.direction + query * dim_ : nullptr;
    if (direction != nullptr) std::fill_n(direction, dim_, 0.0f);
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const Sums& each = sums(chunk, group);
      const double shrink = std::exp(static_cast<double>(each.top[lane]) - static_cast<double>(top));
      sum += shrink * each.sum[lane];
      if (direction == nullptr || shrink == 0) continue;
      const auto by = static_cast<float>(shrink);
      for (int64_t d = 0; d < dim_; ++d) direction[d] += by * each.direction[d * lanes32 + lane];
    }
    answer_.top[query] = top;
    answer_.sum[query] = sum;
  }

  const Kernels& kernels_;
  const ContrastCall& call_;
  const ContrastAnswer& answer_;
  int64_t dim_, groups_;
  float inverse_[2];  // 1 / temperature in two parts: a rounded one would be wrong alike in every score
  int64_t block_, chunk_, chunks_;
  std::vector<Sums> sums_;
  Buffer<float> queries_;  // [groups, D, 32]
};

}  // namespace

void contrast(const Kernels& kernels, const ContrastCall& call, const Control& control, const ContrastAnswer& answer) {
  Contrast(kernels, call, answer).run(control);
}

}  // namespace cascade::cpu
