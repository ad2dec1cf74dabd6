// A first stage that keeps few of many, on 8-bit scores against a running threshold.
//
// A tile gives upper bounds u; in its units a score lies in [u - 2 beta r - margin, u + margin] (packed.hpp). Write
// l = u - 2 beta r and let theta be at most the k-th largest l of the candidates: k of them score at least
// theta - margin, so a key with u + margin < theta - margin is surely out. Keys that pass are collected; when a
// query's list is full, theta is raised and the list swept. What is left in the end is ranked by the contract, the
// lists of many queries together (rescore.hpp).
//
// theta starts from a guess: the first blocks, a strided sample of the bank, are scored whole, and theta is their l of
// a rank that is low enough to be right almost always. Whether it was is checked in the end (k collected keys must have
// l >= theta), and the rare query for which it was not is searched again without the guess.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/fast.hpp"
#include "cpu/ranking.hpp"
#include "cpu/rescore.hpp"

namespace cascade::cpu {
namespace {

constexpr int64_t most_sampled = 8192;
constexpr int64_t blocks_per_poll = 64;
constexpr float lowest = -std::numeric_limits<float>::max();
constexpr float never = std::numeric_limits<float>::infinity();

struct Candidates {
  std::vector<float> upper, lower;
  std::vector<int32_t> position;
  int64_t size = 0;

  void reserve(int64_t room) {
    upper.resize(room);
    lower.resize(room);
    position.resize(room);
  }
  int64_t room() const { return static_cast<int64_t>(upper.size()); }
};

// A thread's lists outlive the call: their first touch would cost a small bank's search as much as its tiles do.
std::vector<Candidates>& kept_lists() {
  thread_local std::vector<Candidates> lists;
  return lists;
}

class Stream {
 public:
  Stream(const MineCall& call, const Packed8& packed)
      : call_(call),
        packed_(packed),
        kernels_(call.bank->kernels()),
        layout_(packed.layout()),
        keep_(std::min<int64_t>(call.stages[0].keep, layout_.keys)),
        most_(std::max<int64_t>(8 * keep_ + most_sampled, layout_.keys / 8)),
        rescorer_(call, layout_) {}

  std::vector<int64_t> run(int64_t begin, int64_t end) {
    std::vector<int64_t> rows(end - begin), hopeless;
    for (int64_t i = 0; i < end - begin; ++i) rows[i] = begin + i;
    rows = search(rows, sample(), hopeless);
    if (!rows.empty()) search(rows, 0, hopeless);
    return hopeless;
  }

 private:
  // How many keys the guess is made from. Selecting among n of them costs about 3 n ns, and a threshold that is 3
  // standard deviations too low lets 3 sqrt(keep keys / n) keys too many pass, each for some 75 ns: this n is the
  // cheapest.
  int64_t sample() const {
    const double both = static_cast<double>(keep_) * static_cast<double>(layout_.keys);
    return std::clamp<int64_t>(static_cast<int64_t>(std::pow(75 * 75 * both, 1.0 / 3)), 512, most_sampled);
  }

  // Searches and answers the rows; returns those whose guessed threshold was too high. Without a sample none is.
  std::vector<int64_t> search(std::span<const int64_t> rows, int64_t sample, std::vector<int64_t>& hopeless) {
    rows_ = rows;
    pack();
    const int64_t sampled = std::min(layout_.blocks, sample / lanes8);
    if (sampled > 0) guess(sampled);
    if (!scan(sampled)) return {};
    std::vector<int64_t> again;
    for (int64_t i = 0; i < static_cast<int64_t>(rows_.size()); ++i) {
      if (least_[i] == never) {
        hopeless.push_back(rows_[i]);
      } else if (sampled > 0 && !confirmed(i)) {
        again.push_back(rows_[i]);
      } else {
        raise(i);
        rescorer_.add(rows_[i], {found_[i].position.data(), static_cast<size_t>(found_[i].size)});
      }
    }
    rescorer_.finish();
    return again;
  }

  void pack() {
    const int64_t count = kernels_.queries8, bytes_of_steps = packed_.steps() * 4;
    groups_ = (static_cast<int64_t>(rows_.size()) + count - 1) / count;
    const int64_t padded = groups_ * count;
    query_bytes_ = kernels_.by_row8 ? (bytes_of_steps + matrix_dims - 1) / matrix_dims * matrix_dims : bytes_of_steps;
    const int64_t to_step = kernels_.by_row8 ? 4 : 4 * count, to_query = kernels_.by_row8 ? query_bytes_ : 4;
    bytes_.reserve(padded * query_bytes_);
    std::fill_n(bytes_.data(), padded * query_bytes_, int8_t{0});
    start_.assign(padded * packed_.runs(), 0);
    beta_.assign(padded, 0.0f);
    margin_.assign(padded, 0.0f);
    theta_.assign(padded, lowest);
    least_.assign(padded, never);  // rows that only fill up a tile never collect anything
    upper_.reserve(padded * lanes8);
    lanes_.resize(padded);
    any_.resize(groups_);
    if (static_cast<int64_t>(found_.size()) < padded) found_.resize(padded);
    std::vector<int8_t> bytes(bytes_of_steps);
    std::vector<double> weights;
    for (int64_t i = 0; i < static_cast<int64_t>(rows_.size()); ++i) {
      if (!call_.knows_weights(rows_[i])) continue;  // its `least` says that it is hopeless
      call_.weigh(call_.stages[0], rows_[i], weights);
      const auto query =
          packed_.pack_query(call_.queries, rows_[i], weights, bytes.data(), start_.data() + i * packed_.runs());
      int8_t* const out = bytes_.data() + i / count * count * query_bytes_ + i % count * to_query;
      for (int64_t step = 0; step < packed_.steps(); ++step)
        std::memcpy(out + step * to_step, bytes.data() + step * 4, 4);
      beta_[i] = query.beta;
      margin_[i] = query.margin;
      least_[i] = lowest;
      found_[i].size = 0;
      const int64_t room = std::max<int64_t>(1024, 4 * keep_ + 512);
      if (found_[i].room() < room) found_[i].reserve(room);
    }
  }

  // Bounds of one block of keys for some groups of queries; they are written from the first row of `upper_` on.
  void tiles(int64_t group, int64_t groups, int64_t block, const float* least) {
    const int64_t at = group * kernels_.queries8;
    kernels_.tiles8(bytes_.data() + at * query_bytes_, groups, packed_.block(block), packed_.steps(),
                    &start_[at * packed_.runs()], packed_.scale(block), packed_.residual(block), least, &beta_[at],
                    upper_.data(), lanes_.data(), any_.data());
  }

  // Scores the first blocks whole, sets thresholds from them, and collects what passes.
  void guess(int64_t blocks) {
    const int64_t keys = blocks * lanes8;
    const double share = std::min(1.0, static_cast<double>(keys) / static_cast<double>(layout_.keys));
    const double expected = static_cast<double>(keep_) * share;
    const int64_t rank = blocks == layout_.blocks
                             ? keep_
                             : std::min(keep_, static_cast<int64_t>(expected + 3 * std::sqrt(expected) + 2));
    const int64_t count = kernels_.queries8;
    float all[most_queries8];
    std::fill_n(all, count, lowest);
    sample_upper_.reserve(count * keys);
    sample_lower_.reserve(keys);
    for (int64_t group = 0; group < groups_ && !should_stop(); ++group) {
      const MatrixUnits units(kernels_);
      for (int64_t block = 0; block < blocks; ++block) {
        tiles(group, 1, block, all);
        for (int64_t q = 0; q < count; ++q)
          std::copy_n(upper_.data() + q * lanes8, lanes8, &sample_upper_[q * keys + block * lanes8]);
      }
      const int64_t first = group * count;
      for (int64_t i = first; i < std::min(first + count, static_cast<int64_t>(rows_.size())); ++i)
        if (least_[i] < never) seed(i, &sample_upper_[(i - first) * keys], keys, rank);
    }
  }

  void seed(int64_t i, float* upper, int64_t keys, int64_t rank) {
    const float* residual = packed_.residual(0);
    float* lower = sample_lower_.data();
    const float twice = 2 * beta_[i];
    for (int64_t j = 0; j < keys; ++j) lower[j] = upper[j] - twice * residual[j];
    const auto drop = [&](int64_t position) {
      if (position < keys) upper[position] = lower[position] = -never;
    };
    for (int64_t lane = 0; lane < layout_.lanes; ++lane)  // lanes past the last key
      for (int64_t block = std::max<int64_t>(0, layout_.keys - lane * layout_.blocks); block < keys / lanes8; ++block)
        drop(block * lanes8 + lane);
    const Exclusion& exclude = *call_.exclude;
    if (exclude.query_video != nullptr)
      call_.bank->videos().each(exclude.query_video[rows_[i]], [&](int64_t slot) { drop(layout_.position(slot)); });
    if (exclude.mask != nullptr)
      for (int64_t j = 0; j < keys; ++j)
        if (layout_.slot(j) < layout_.keys && is_excluded(i, layout_.slot(j))) drop(j);
    theta_[i] = kth_largest(kernels_, lower, keys, rank, lowest, 12).low;
    least_[i] = bound(i);
    for (int64_t block = 0; block < keys / lanes8; ++block) {
      const float* u = upper + block * lanes8;
      if (kernels_.count_float(u, lanes8, least_[i]) == 0) continue;
      uint64_t reached = 0;
      for (int64_t lane = 0; lane < lanes8; ++lane) reached |= static_cast<uint64_t>(u[lane] >= least_[i]) << lane;
      collect(i, block, reached, u);
    }
  }

  // All other blocks, each once: its keys stay in the first-level cache while all queries pass over them.
  bool scan(int64_t first) {
    for (int64_t start = first; start < layout_.blocks; start += blocks_per_poll) {
      if (should_stop()) return false;
      call_.bank->passed(blocks_per_poll * packed_.steps() * lanes8 * 4);
      const MatrixUnits units(kernels_);
      for (int64_t block = start; block < std::min(layout_.blocks, start + blocks_per_poll); ++block) {
        tiles(0, groups_, block, least_.data());
        for (int64_t group = 0; group < groups_; ++group)
          for (uint32_t any = any_[group]; any != 0; any &= any - 1) {
            const int64_t i = group * kernels_.queries8 + __builtin_ctz(any);
            collect(i, block, lanes_[i], upper_.data() + i * lanes8);
          }
      }
    }
    return true;
  }

  bool is_excluded(int64_t i, int64_t slot) const {
    const Exclusion& exclude = *call_.exclude;
    if (exclude.mask != nullptr) return exclude.mask[rows_[i] * layout_.keys + slot] != 0;
    return exclude.query_video != nullptr && exclude.key_video[slot] == exclude.query_video[rows_[i]];
  }

  void collect(int64_t i, int64_t block, uint64_t reached, const float* upper) {
    if (least_[i] == never) return;  // given up, with no room for more
    Candidates& found = found_[i];
    const float* residual = packed_.residual(block);
    for (; reached != 0; reached &= reached - 1) {
      const int lane = __builtin_ctzll(reached);
      const int64_t slot = block + lane * layout_.blocks;
      if (is_excluded(i, slot)) continue;
      found.upper[found.size] = upper[lane];
      found.lower[found.size] = upper[lane] - 2 * beta_[i] * residual[lane];
      found.position[found.size++] = static_cast<int32_t>(block * lanes8 + lane);
    }
    if (found.size + lanes8 > found.room()) make_room(i);
  }

  void make_room(int64_t i) {
    raise(i);
    Candidates& found = found_[i];
    if (found.size > most_) {
      least_[i] = never;  // the bound separates too little: leave the query to the exact path
    } else if (found.size > found.room() - found.room() / 4) {
      found.reserve(2 * found.room());
    }
  }

  // Sets theta from the list and drops what is surely out.
  void raise(int64_t i) {
    Candidates& found = found_[i];
    const float theta = kth_largest(kernels_, found.lower.data(), found.size, keep_, theta_[i], 20).low;
    if (!(theta > theta_[i])) return;
    theta_[i] = theta;
    least_[i] = bound(i);
    int64_t left = 0;
    for (int64_t j = 0; j < found.size; ++j) {
      found.upper[left] = found.upper[j];
      found.lower[left] = found.lower[j];
      found.position[left] = found.position[j];
      left += found.upper[j] >= least_[i];
    }
    found.size = left;
  }

  // theta - 2 margin, rounded down.
  float bound(int64_t i) const {
    if (!(theta_[i] > lowest)) return lowest;
    return std::max(lowest, std::nextafter(theta_[i] - 2 * margin_[i], -never));
  }

  bool confirmed(int64_t i) const {
    return kernels_.count_float(found_[i].lower.data(), found_[i].size, theta_[i]) >= keep_ || theta_[i] == lowest;
  }

  const MineCall& call_;
  const Packed8& packed_;
  const Kernels& kernels_;
  Layout layout_;
  int64_t keep_;
  int64_t most_;  // candidates beyond which the bound is no help
  Rescorer rescorer_;
  std::span<const int64_t> rows_;
  int64_t groups_ = 0;
  int64_t query_bytes_ = 0;
  Buffer<int8_t> bytes_;
  std::vector<int32_t> start_;
  std::vector<float> beta_, margin_, theta_, least_;
  std::vector<Candidates>& found_ = kept_lists();
  Buffer<float> sample_upper_, sample_lower_;
  Buffer<float> upper_;  // [queries, 64], of the block at hand
  std::vector<uint64_t> lanes_;
  std::vector<uint32_t> any_;
};

}  // namespace

std::vector<int64_t> stream_queries(const MineCall& call, const Packed8& packed, int64_t begin, int64_t end) {
  return Stream(call, packed).run(begin, end);
}

}  // namespace cascade::cpu
