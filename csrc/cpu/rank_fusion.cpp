// A first stage by `rrf`, sum of 1 / (60 + rank), that keeps few keys, from 16-bit scores.
//
// With scores certified to a width w (dense.cpp), a key's rank in a view lies between 1 + the number of scores at or
// above its own plus w, which surely come before it, and the number of scores above its own less w, itself among them.
// Counts come from a histogram of the scores, whose bins only widen those ranges. So each key's fused score lies in
// [l, u], sums over the views of what tables say of its bins. Let theta be the n-th largest l, n what the stage keeps:
// a key with u < theta is surely out. The few others get exact ranks: in each view those that surely come before are
// counted, those that may are ranked with it by the contract.
#include <algorithm>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/buffer.hpp"
#include "cpu/fast.hpp"
#include "cpu/ranking.hpp"
#include "cpu/score_rows.hpp"
#include "cpu/spans.hpp"
#include "cpu/workers.hpp"

namespace cascade::cpu {
namespace {

constexpr int64_t most_open = 1024;  // exact ranks of many more would cost as much as scoring all keys exactly
constexpr int most_bins = 4096;      // tables that stay in the first-level cache
constexpr int bisections = 20;
constexpr float never = std::numeric_limits<float>::infinity();

// Of a score's bin: at most and at least its term of the fused score, up to rounding.
struct Term {
  float upper, lower;
};

// The histogram of a view's scores. Bins count from 1; bin 0 is for what is no candidate.
struct Bins {
  int reach = 0;                     // scores further than so many bins apart are surely in order
  Buffer<int16_t> of;                // [positions]
  std::vector<int32_t> above, next;  // per bin: how many scores are in it or a later one; where its next is listed
  Buffer<int32_t> order;             // [positions]

  // How many scores surely come before those of a bin, and how many do at most, these among them.
  std::pair<int64_t, int64_t> near(int bin) const {
    const int last = static_cast<int>(above.size()) - 1;
    return {above[std::min(bin + 1 + reach, last)], above[std::max(bin - reach, 1)]};
  }
};

class RankFusion {
 public:
  // `rows` has a column for each of the stage's views.
  RankFusion(const MineCall& call, ScoreRows& rows)
      : call_(call),
        kernels_(call.bank->kernels()),
        views_(call.stages[0].views),
        rows_(rows),
        layout_(rows_.layout()),
        exact_(call.stages, static_cast<int64_t>(call.bank->views().size()), call.bank->size(), call.weights),
        bins_(views_.size()) {
    upper_.reserve(rows_.padded());
    lower_.reserve(rows_.padded());
  }

  // Answers the queries first + [begin, end), those from `first` on being scored.
  void run(int64_t first, int64_t begin, int64_t end) {
    hopeless_.clear();
    for (int64_t i = begin; i < end && !should_stop(); ++i)
      if (!answer(first + i, i)) hopeless_.push_back(first + i);
    exact_queries(call_, hopeless_);
  }

 private:
  // False where the bounds are of no help.
  bool answer(int64_t row, int64_t query) {
    const Span span(Phase::select);
    for (size_t each = 0; each < views_.size(); ++each)
      if (!(rows_.error(each, query) < hopeless16)) return false;
    const int64_t n = layout_.positions();
    std::fill_n(upper_.data(), n, 0.0f);
    std::fill_n(lower_.data(), n, 0.0f);
    int64_t eligible = 0;
    for (size_t each = 0; each < views_.size(); ++each) {
      int16_t* const score = rows_.row(rows_.column(each), query);
      eligible = rows_.mark(row, score);
      if (eligible == 0) return false;
      add_terms(score, n, rows_.width(each, query), bins_[each]);
    }
    const int64_t keep = std::min(call_.stages[0].keep, eligible);
    // Floats round each term and each addition by 2^-24 of it at most.
    const float rounding = 1 - 1e-6f * static_cast<float>(views_.size() + 1);
    const float theta = kth_largest(kernels_, lower_.data(), n, keep, -never, bisections).low * rounding;
    position_.clear();
    for (int64_t i = 0; i < n; ++i)
      if (upper_[i] >= theta) position_.push_back(i);
    if (static_cast<int64_t>(position_.size()) > most_open) return false;
    rank(row, query);
    return true;
  }

  // Adds a view's bounds to those of the fused score; to what is no candidate, -infinity.
  void add_terms(const int16_t* score, int64_t n, int width, Bins& bins) {
    int16_t least = 0, most = 0;
    kernels_.range16(score, n, &least, &most);
    int shift = 0;
    while ((most - least) >> shift >= most_bins) ++shift;
    const int count = ((most - least) >> shift) + 1, first = least - (1 << shift);  // bin 0 is for what does not count
    bins.reach = (width - 1 + (1 << shift) - 1) >> shift;
    bins.of.reserve(n);
    for (int64_t i = 0; i < n; ++i)
      bins.of[i] = static_cast<int16_t>((std::max<int>(score[i], first) - first) >> shift);
    bins.above.assign(count + 2, 0);
    for (int64_t i = 0; i < n; ++i) ++bins.above[bins.of[i]];
    for (int bin = count; bin > 0; --bin) bins.above[bin] += bins.above[bin + 1];
    term_.resize(count + 1);
    term_[0] = {-never, -never};
    for (int bin = 1; bin <= count; ++bin) {
      const auto [surely, perhaps] = bins.near(bin);
      term_[bin] = {static_cast<float>(1 / (rrf_offset + static_cast<double>(1 + surely))),
                    static_cast<float>(1 / (rrf_offset + static_cast<double>(perhaps)))};
    }
    for (int64_t i = 0; i < n; ++i) {
      const Term& term = term_[bins.of[i]];
      upper_[i] += term.upper;
      lower_[i] += term.lower;
    }
  }

  // The candidates' exact scores, and the plan with them.
  void rank(int64_t row, int64_t query) {
    const Span span(Phase::repair);
    for (size_t view = 0; view < call_.queries.size(); ++view)
      if (call_.queries[view].data != nullptr)
        exact_.view(static_cast<int64_t>(view)).bind(*call_.bank, static_cast<int32_t>(view), call_.queries[view], row);
    exact_.start(*call_.exclude, row);
    alive_.resize(position_.size());
    fused_.assign(position_.size(), 0.0);
    for (size_t i = 0; i < position_.size(); ++i) alive_[i] = layout_.slot(position_[i]);
    for (size_t each = 0; each < views_.size(); ++each) {
      sort(bins_[each], layout_.positions());
      for (size_t i = 0; i < position_.size(); ++i)
        fused_[i] += 1 / (rrf_offset + static_cast<double>(1 + before_in(each, query, position_[i])));
    }
    exact_.run(alive_, 0, *call_.answer, fused_);
  }

  // Lists the positions of all candidates by their bins, the highest first.
  static void sort(Bins& bins, int64_t n) {
    bins.next.assign(bins.above.begin() + 1, bins.above.end());
    bins.order.reserve(n);
    for (int64_t i = 0; i < n; ++i)
      if (bins.of[i] > 0) bins.order[bins.next[bins.of[i]]++] = static_cast<int32_t>(i);
  }

  // How many candidates come before the one at `position` in a view.
  int64_t before_in(size_t each, int64_t query, int64_t position) {
    const int16_t* score = rows_.row(rows_.column(each), query);
    const Bins& bins = bins_[each];
    const int reach = rows_.width(each, query), own = score[position];
    const auto [surely, perhaps] = bins.near(bins.of[position]);
    int64_t count = surely;
    near_.assign(1, layout_.slot(position));
    for (int64_t i = surely; i < perhaps; ++i) {
      const int32_t other = bins.order[i];
      if (score[other] >= own + reach)
        ++count;
      else if (score[other] > own - reach && other != position)
        near_.push_back(layout_.slot(other));
    }
    near_score_.resize(near_.size());
    exact_.view(views_[each]).scores(near_.data(), 0, static_cast<int64_t>(near_.size()), near_score_.data());
    for (size_t i = 1; i < near_.size(); ++i)
      count += before({near_score_[i], near_[i]}, {near_score_[0], near_[0]}) ? 1 : 0;
    return count;
  }

  const MineCall& call_;
  const Kernels& kernels_;
  std::span<const int32_t> views_;
  ScoreRows& rows_;
  const Layout& layout_;
  ExactCascade exact_;
  std::vector<Bins> bins_;  // per view
  std::vector<Term> term_;
  Buffer<float> upper_, lower_;
  std::vector<int64_t> position_, alive_, near_, hopeless_;
  std::vector<double> fused_, near_score_;
};

}  // namespace

void rank_queries(const MineCall& call, std::span<const StagePacks> packed, int64_t batch, const Control& control) {
  std::vector<Stage> single;  // for each view, so that each has scores of its own
  for (const int32_t& view : call.stages[0].views) single.push_back({{&view, 1}, Fusion::none, 1, false});
  const MineCall plain{call.bank, single, call.queries, call.exclude, call.answer, nullptr};
  ScoreRows rows(plain, packed, {.threads = std::max(1, control.threads)});
  Workers<RankFusion> workers([&] { return std::make_unique<RankFusion>(call, rows); });
  rows.score_all(0, batch, control, [&](int64_t first, int64_t begin, int64_t end) {
    workers.lend([&](RankFusion& fusion) { fusion.run(first, begin, end); });
  });
}

}  // namespace cascade::cpu
