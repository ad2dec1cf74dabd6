#include "cpu/contrast.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
#include <vector>

#include "cpu/buffer.hpp"
#include "cpu/contrast_members.hpp"
#include "cpu/float_mode.hpp"
#include "cpu/widen.hpp"

namespace cascade::cpu {
namespace {

constexpr int64_t most_chunks = 16;        // runs of keys with sums of their own, however many threads there are
constexpr int64_t chunk_at_least = 1024;   // keys
constexpr int64_t block_bytes = 32 << 10;  // of keys, which stay in the first-level cache between the two products
constexpr int64_t block_at_most = 128;     // keys: their weights are summed in float32 before they go to float64
constexpr int64_t slice = 4;               // queries whose gradients are finished together
constexpr int64_t kept_at_most = 2 << 20;  // floats of sums that a thread keeps from call to call
constexpr float absent = -__builtin_inff();
constexpr double none = -__builtin_inf();

template <class T>
void widen_rows(const Matrix& keys, int64_t first, int64_t count, float* out) {
  const auto* data = static_cast<const T*>(keys.data);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < keys.columns; ++d) out[i * keys.columns + d] = widen(data[(first + i) * keys.stride + d]);
}

template <class T>
void add_row(const Matrix& keys, int64_t row, float weight, float* to) {
  const auto* from = static_cast<const T*>(keys.data) + row * keys.stride;
  for (int64_t d = 0; d < keys.columns; ++d) to[d] += weight * widen(from[d]);
}

void prefetch_row(const Matrix& keys, int64_t row) {
  const int64_t item = keys.dtype == DType::float32 ? 4 : 2;
  const auto* from = static_cast<const char*>(keys.data) + row * keys.stride * item;
  for (int64_t byte = 0; byte < keys.columns * item; byte += 64) __builtin_prefetch(from + byte);
}

using Slice = float __attribute__((vector_size(slice * sizeof(float))));

Slice load(const float* from) {
  Slice value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// log(exp(a) + exp(b))
double log_add(double a, double b) {
  const double most = std::max(a, b);
  return most == none ? none : most + std::log1p(std::exp(std::min(a, b) - most));
}

// A query's loss, and what its gradients are made of.
struct Solved {
  bool counts = false;  // its P has a member
  double loss = 0;
  double rest = 0;  // weight of the sum over the keys outside P, as far as it is relative to `top`
  double own = 0;   // weight of the own key
};

// Memory of the running sums, kept from call to call.
struct Scratch {
  Buffer<float> queries, top, direction, score, wide;
  Buffer<double> sum;
};
thread_local Scratch kept_scratch;

class Contrast {
 public:
  Contrast(const Kernels& kernels, const ContrastCall& call, ContrastAnswer& answer)
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
        differentiates_(answer.to_query != nullptr || answer.to_own != nullptr),
        own_(call.batch),
        members_(call, chunk_, chunks_) {
    const int64_t sums = chunks_ * groups_;
    top_ = sized(scratch_.top, sums * lanes32);
    sum_ = sized(scratch_.sum, sums * lanes32);
    if (differentiates_) direction_ = sized(scratch_.direction, sums * dim_ * lanes32);
    lay_queries();
  }
  ~Contrast() {
    if (scratch_.direction.size() > kept_at_most || scratch_.queries.size() > kept_at_most) scratch_ = Scratch{};
  }
  Contrast(const Contrast&) = delete;
  Contrast& operator=(const Contrast&) = delete;

  void run(const Control& control) {
    run_parts(static_cast<int>(chunks_), control, [&](int chunk, int) { pass(chunk); });
    members_.by_query();
    solved_.resize(call_.batch);
    const auto slices = static_cast<int>((call_.batch + slice - 1) / slice);
    run_parts(slices, control, [&](int part, int) {
      const int64_t begin = part * slice, end = std::min(call_.batch, begin + slice);
      for (int64_t query = begin; query < end; ++query) solved_[query] = solve(query);
      if (differentiates_) differentiate(begin, end);
    });
    double total = 0, counted = 0;
    for (const Solved& each : solved_) {
      total += each.loss;
      counted += each.counts ? 1 : 0;
    }
    answer_.loss = counted > 0 ? total / counted : 0;
    answer_.counted = counted;
  }

 private:
  template <class T>
  static T* sized(Buffer<T>& buffer, int64_t size) {
    buffer.reserve(std::max<int64_t>(1, size));
    return buffer.data();
  }

  // Queries with the lanes innermost; lanes past the last query are zero. Their scores of their own keys.
  void lay_queries() {
    queries_ = sized(scratch_.queries, groups_ * dim_ * lanes32);
    std::fill_n(queries_, groups_ * dim_ * lanes32, 0.0f);
    for (int64_t query = 0; query < call_.batch; ++query) {
      float* const lane = queries_ + query / lanes32 * dim_ * lanes32 + query % lanes32;
      double sum = 0;
      for (int64_t d = 0; d < dim_; ++d) {
        const float each = call_.query[query * dim_ + d];
        lane[d * lanes32] = each;
        sum += static_cast<double>(each) * static_cast<double>(call_.own[query * dim_ + d]);
      }
      own_[query] = static_cast<double>(static_cast<float>(sum / call_.temperature));  // as the keys' scores are
    }
  }

  int64_t at(int64_t chunk, int64_t group) const { return (chunk * groups_ + group) * lanes32; }

  void start(int64_t chunk, int64_t group) {
    const int64_t place = at(chunk, group);
    for (int64_t lane = 0; lane < lanes32; ++lane) {
      const int64_t query = group * lanes32 + lane;
      top_[place + lane] = query < call_.batch ? static_cast<float>(own_[query]) : 0.0f;
      sum_[place + lane] = 0;
    }
    if (differentiates_) std::fill_n(direction_ + place * dim_, dim_ * lanes32, 0.0f);
  }

  void pass(int64_t chunk) {
    float* const score = sized(kept_scratch.score, block_ * lanes32);
    float* const wide = call_.keys.dtype == DType::float32 ? nullptr : sized(kept_scratch.wide, block_ * dim_);
    for (int64_t group = 0; group < groups_; ++group) start(chunk, group);
    const int64_t end = std::min(call_.keys.rows, (chunk + 1) * chunk_);
    members_.find(chunk, end);
    Chunk& apart = members_.chunk(chunk);
    auto member = apart.members.begin(), left_out = apart.left_out.begin();
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
      const std::span<Pair> now[] = {until(member, apart.members.end(), first + count),
                                     until(left_out, apart.left_out.end(), first + count)};
      // The next block is fetched while the first queries meet this one, half of it in either product.
      const bool fetches = keys != wide && stride == dim_ && first + count < end;
      const int64_t half = (fetches ? std::min(count, end - first - count) * dim_ : 0) / 2;
      for (int64_t group = 0; group < groups_; ++group) {
        const int64_t place = at(chunk, group), ahead = group == 0 ? half : 0;
        const float* const next = keys + count * dim_;
        kernels_.scores32(queries_ + group * dim_ * lanes32, keys, stride, count, dim_, next, ahead, inverse_, score);
        for (const std::span<Pair>& pairs : now) take(pairs, first, group, score);
        kernels_.absorb32(score, keys, stride, count, dim_, next + ahead, ahead, top_ + place, sum_ + place,
                          differentiates_ ? direction_ + place * dim_ : nullptr);
      }
    }
  }

  // The pairs from `from` on with slots under `slot`; moves `from` behind them.
  static std::span<Pair> until(std::vector<Pair>::iterator& from, std::vector<Pair>::iterator end, int64_t slot) {
    const auto begin = from;
    while (from != end && from->slot < slot) ++from;
    return {begin, from};
  }

  // Takes the pairs' scores out of a block.
  static void take(std::span<Pair> pairs, int64_t first, int64_t group, float* score) {
    for (Pair& pair : pairs) {
      if (pair.query / lanes32 != group) continue;
      float& each = score[(pair.slot - first) * lanes32 + pair.query % lanes32];
      pair.score = static_cast<double>(each);
      each = absent;
    }
  }

  // Members' scores become their weights, and tops their shares.
  Solved solve(int64_t query) {
    const std::span<Pair> inside = members_.of(query);
    const int64_t group = query / lanes32, lane = query % lanes32;
    const double own = own_[query];
    auto top = static_cast<float>(own);
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) top = std::max(top, top_[at(chunk, group) + lane]);
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      float& each = top_[at(chunk, group) + lane];
      const double shrink = std::exp(static_cast<double>(each) - static_cast<double>(top));
      sum += shrink * sum_[at(chunk, group) + lane];
      each = static_cast<float>(shrink);
    }
    const bool dropped = call_.drop != nullptr && call_.drop[query] && !inside.empty();
    const bool kept = call_.own_positive && !dropped;
    if (!kept && inside.empty()) return {};
    const double rest = log_add(static_cast<double>(top) + std::log(sum), kept ? none : own);
    double most = kept ? own : none, scores = kept ? own : 0;
    for (const Pair& pair : inside) {
      most = std::max(most, pair.score);
      scores += pair.score;
    }
    double masses = kept ? std::exp(own - most) : 0;  // within P, relative to its largest
    for (Pair& pair : inside) masses += pair.score = std::exp(pair.score - most);
    const double in = most + std::log(masses);
    const double all = log_add(rest, in), size = static_cast<double>(inside.size()) + (kept ? 1 : 0);
    const double share = -1 / (1 + std::exp(in - rest));  // N's of the mass
    const double by = call_.mean_log ? std::exp(most - all) : share / masses, less = call_.mean_log ? 1 / size : 0;
    for (Pair& pair : inside) pair.score = pair.score * by - less;
    return {.counts = true,
            .loss = call_.mean_log ? all - scores / size : log_add(rest - in, 0),
            .rest = std::exp(static_cast<double>(top) - all),
            .own = kept ? std::exp(own - most) * by - less : std::exp(own - all)};
  }

  // The gradients of a slice of queries: the sums over all chunks, in their order, the members of P and the own key.
  void differentiate(int64_t begin, int64_t end) {
    const int64_t group = begin / lanes32, lane = begin % lanes32;
    std::vector<Slice> rest(answer_.to_query != nullptr ? dim_ : 0, Slice{});
    std::vector<float> inside(dim_);
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const Slice shrink = load(top_ + at(chunk, group) + lane);
      const float* from = direction_ + at(chunk, group) * dim_ + lane;
      for (Slice& each : rest) {
        each += shrink * load(from);
        from += lanes32;
      }
    }
    const double scale = 1 / call_.temperature;
    for (int64_t query = begin; query < end; ++query) {
      const Solved& weights = solved_[query];
      const float *const self = call_.query + query * dim_, *const own = call_.own + query * dim_;
      if (answer_.to_own != nullptr)
        for (int64_t d = 0; d < dim_; ++d)
          answer_.to_own[query * dim_ + d] = static_cast<float>(scale * weights.own * static_cast<double>(self[d]));
      if (answer_.to_query == nullptr) continue;
      add_members(members_.of(query), inside);
      for (int64_t d = 0; d < dim_; ++d)
        answer_.to_query[query * dim_ + d] =
            static_cast<float>(scale * (weights.rest * static_cast<double>(rest[d][query - begin]) +
                                        weights.own * static_cast<double>(own[d]) + static_cast<double>(inside[d])));
    }
  }

  void add_members(std::span<const Pair> pairs, std::vector<float>& to) const {
    std::fill(to.begin(), to.end(), 0.0f);
    for (size_t i = 0; i < pairs.size(); ++i) {
      if (i + 2 < pairs.size()) prefetch_row(call_.keys, pairs[i + 2].slot);
      const auto weight = static_cast<float>(pairs[i].score);
      if (call_.keys.dtype == DType::float32) add_row<float>(call_.keys, pairs[i].slot, weight, to.data());
      if (call_.keys.dtype == DType::float16) add_row<Float16>(call_.keys, pairs[i].slot, weight, to.data());
      if (call_.keys.dtype == DType::bfloat16) add_row<BFloat16>(call_.keys, pairs[i].slot, weight, to.data());
    }
  }

  const Kernels& kernels_;
  const ContrastCall& call_;
  ContrastAnswer& answer_;
  int64_t dim_, groups_;
  float inverse_[2];  // 1 / temperature in two parts: a rounded one would be wrong alike in every score
  int64_t block_, chunk_, chunks_;
  bool differentiates_;
  std::vector<double> own_;  // [B], scores of the own keys
  Members members_;
  std::vector<Solved> solved_;  // [B]
  Scratch& scratch_ = kept_scratch;
  float* queries_ = nullptr;    // [groups, D, 32]
  float* top_ = nullptr;        // [chunks, groups, 32]; once solved, exp(top - the top of all chunks)
  double* sum_ = nullptr;       // [chunks, groups, 32]
  float* direction_ = nullptr;  // [chunks, groups, D, 32]
};

}  // namespace

void contrast(const Kernels& kernels, const ContrastCall& call, const Control& control, ContrastAnswer& answer) {
  const FloatMode mode;
  Contrast(kernels, call, answer).run(control);
}

}  // namespace cascade::cpu
