#include "cpu/rescore.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/ranking.hpp"

namespace cascade::cpu {
namespace {

constexpr size_t queries_at_once = 128;
constexpr int64_t candidates_at_once = 1 << 18;
constexpr int64_t share_dropped = 4;  // float32 pays where it rules out at least one candidate in so many
constexpr int bisections = 24;
constexpr float never = std::numeric_limits<float>::infinity();
constexpr int64_t rows_in_cache = 256 << 10;  // bytes of stored keys that a run of blocks has

int64_t row_bytes(const Matrix& keys) { return keys.stride * (keys.dtype == DType::float32 ? 4 : 2); }

float below(float value) { return std::nextafter(value, -std::numeric_limits<float>::infinity()); }
float above(float value) { return std::nextafter(value, std::numeric_limits<float>::infinity()); }

}  // namespace

float float_error(int64_t dims, double query, double key) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  constexpr double underflow = 0x1p-149;
  constexpr int64_t most_dims = 1 << 17;
  const double size = query * key;
  if (!(size < 1e37) || dims > most_dims) return infinity;
  const auto terms = static_cast<double>(dims + 16);
  return std::nextafter(static_cast<float>(1.02 * terms * (0x1p-24 * size + underflow)), infinity);
}

Rescorer::Rescorer(const MineCall& call, const Layout& layout, size_t first)
    : call_(call),
      layout_(layout),
      first_(first),
      exact_(call.stages, static_cast<int64_t>(call.bank->views().size()), call.bank->size(), call.weights),
      queries_(queries_at_once),
      cursor_(queries_at_once) {}

void Rescorer::add(int64_t row, std::span<const int32_t> positions) {
  Query& query = queries_[count_++];
  query.row = row;
  query.block.resize(positions.size());
  query.slot.resize(positions.size());
  for (size_t i = 0; i < positions.size(); ++i) {
    query.block[i] = static_cast<int32_t>(positions[i] / layout_.lanes);
    query.slot[i] = query.block[i] + positions[i] % layout_.lanes * layout_.blocks;
  }
  held_ += query.size();
  if (count_ == queries_at_once || held_ > candidates_at_once) finish();
}

void Rescorer::finish() {
  if (count_ == 0) return;
  size_t number = first_;
  for (; number + 1 < call_.stages.size() && call_.is_plain(call_.stages[number]); ++number)
    narrow_down(call_.stages[number]);
  const Stage& stage = call_.stages[number];
  const bool last = call_.is_plain(stage);
  if (last) {
    bind(stage);
    score_near(stage);
    for (size_t i = 0; i < count_; ++i) drop(queries_[i], stage.keep);
    score_exactly(stage, [](const Query&) { return true; });
  }
  for (size_t i = 0; i < count_ && !should_stop(); ++i) answer(queries_[i], number, last);
  count_ = 0;
  held_ = 0;
}

// A stage that others follow: which candidates stay is all that counts.
void Rescorer::narrow_down(const Stage& stage) {
  bind(stage);
  score_near(stage);
  const auto undecided = [&](const Query& query) { return query.size() > stage.keep; };
  for (size_t i = 0; i < count_; ++i)
    if (undecided(queries_[i]) && queries_[i].error < never) settle(queries_[i], stage.keep);
  score_exactly(stage, undecided);
  for (size_t i = 0; i < count_; ++i)
    if (undecided(queries_[i])) keep_best(queries_[i], stage.keep);
}

void Rescorer::bind(const Stage& stage) {
  const bool one_product = stage.fusion == Fusion::none && call_.bank->metric() == Metric::inner_product;
  const Matrix& keys = call_.bank->views()[stage.views[0]];
  const double longest = one_product ? call_.bank->longest(stage.views[0]) : 0;
  for (size_t i = 0; i < count_; ++i) {
    Query& query = queries_[i];
    query.views.resize(stage.views.size());
    for (size_t number = 0; number < stage.views.size(); ++number)
      query.views[number].bind(*call_.bank, stage.views[number], call_.queries[stage.views[number]], query.row);
    call_.weigh(stage, query.row, query.weights);
    query.error = never;
    if (!one_product || query.size() <= stage.keep + stage.keep / share_dropped) continue;
    const auto stored = query.views[0].query();
    query.narrow.assign((stored.size() + 15) / 16 * 16, 0.0f);
    double squared = 0;
    for (size_t d = 0; d < stored.size(); ++d) {
      query.narrow[d] = static_cast<float>(stored[d]);  // exact: it was stored as float32 or less
      squared += stored[d] * stored[d];
    }
    query.error = float_error(keys.columns, std::sqrt(squared), longest);
  }
}

// Calls `score(query, first, count)` for the candidates of the wanted queries, a run of blocks at a time.
template <class Wanted, class Score>
void Rescorer::each_run(const Stage& stage, const Wanted& wanted, const Score& score) {
  int64_t bytes = 1;
  for (const int32_t view : stage.views) bytes += row_bytes(call_.bank->views()[view]);
  const int64_t run = std::max<int64_t>(1, rows_in_cache / (bytes * layout_.lanes));
  for (size_t i = 0; i < count_; ++i) cursor_[i] = wanted(queries_[i]) ? 0 : queries_[i].slot.size();
  for (int64_t end = run; end < layout_.blocks + run && !should_stop(); end += run)
    for (size_t i = 0; i < count_; ++i) {
      const auto& block = queries_[i].block;
      const size_t first = cursor_[i];
      size_t& at = cursor_[i];
      while (at < block.size() && block[at] < end) ++at;
      if (at > first) score(queries_[i], first, at - first);
    }
}

void Rescorer::score_near(const Stage& stage) {
  for (size_t i = 0; i < count_; ++i) queries_[i].near.resize(queries_[i].slot.size());
  each_run(
      stage, [](const Query& query) { return query.error < never; },
      [&](Query& query, size_t first, size_t count) {
        call_.bank->dots_float(query.narrow.data(), stage.views[0], query.slot.data() + first,
                               static_cast<int64_t>(count), query.near.data() + first);
      });
}

template <class Wanted>
void Rescorer::score_exactly(const Stage& stage, const Wanted& wanted) {
  for (size_t i = 0; i < count_; ++i) queries_[i].score.resize(queries_[i].slot.size());
  each_run(stage, wanted, [&](Query& query, size_t first, size_t count) {
    const int64_t* slot = query.slot.data() + first;
    double* out = query.score.data() + first;
    column_.resize(count);
    for (size_t number = 0; number < query.views.size(); ++number) {
      double* const column = number == 0 ? out : column_.data();
      query.views[number].scores(slot, 0, static_cast<int64_t>(count), column);
      if (!query.weights.empty())
        for (size_t i = 0; i < count; ++i) column[i] *= query.weights[number];
      for (size_t i = 0; number > 0 && i < count; ++i) out[i] += column[i];
    }
  });
}

// Keeps the candidates for which `keep(number)` holds, asked once each in turn, in the order they have.
template <class Keep>
void Rescorer::filter(Query& query, const Keep& keep) {
  size_t left = 0;
  for (size_t i = 0; i < query.slot.size(); ++i) {
    query.block[left] = query.block[i];
    query.slot[left] = query.slot[i];
    left += keep(i) ? 1 : 0;
  }
  query.block.resize(left);
  query.slot.resize(left);
}

// What is surely out of the `keep` best goes.
void Rescorer::drop(Query& query, int64_t keep) {
  if (!(query.error < never)) return;
  const Bracket t = kth_largest(call_.bank->kernels(), query.near.data(), query.size(), keep, -never, bisections);
  const float least = below(t.low - 2 * query.error);
  filter(query, [&](size_t i) { return query.near[i] >= least; });
}

// Keeps the `keep` best: what is surely among them, and the best of the band.
void Rescorer::settle(Query& query, int64_t keep) {
  const Bracket t = kth_largest(call_.bank->kernels(), query.near.data(), query.size(), keep, -never, bisections);
  const float least = below(t.low - 2 * query.error), sure = above(t.high + 2 * query.error);
  int64_t room = keep;
  band_.clear();
  for (size_t i = 0; i < query.slot.size(); ++i) {
    if (query.near[i] > sure)
      --room;
    else if (query.near[i] >= least)
      band_.push_back(query.slot[i]);
  }
  band_score_.resize(band_.size());
  query.views[0].scores(band_.data(), 0, static_cast<int64_t>(band_.size()), band_score_.data());
  ranked_.resize(band_.size());
  for (size_t i = 0; i < band_.size(); ++i) ranked_[i] = {band_score_[i], band_[i]};
  const bool all = room >= static_cast<int64_t>(band_.size());
  if (!all) std::nth_element(ranked_.begin(), ranked_.begin() + room, ranked_.end(), before);
  const Ranked first_out = all ? Ranked{} : ranked_[room];
  size_t next = 0;
  filter(query, [&](size_t i) {
    if (query.near[i] > sure) return true;
    if (!(query.near[i] >= least)) return false;
    const Ranked each{band_score_[next], band_[next]};
    ++next;
    return all || before(each, first_out);
  });
}

void Rescorer::keep_best(Query& query, int64_t keep) {
  ranked_.resize(query.slot.size());
  for (size_t i = 0; i < ranked_.size(); ++i) ranked_[i] = {query.score[i], query.slot[i]};
  std::nth_element(ranked_.begin(), ranked_.begin() + keep, ranked_.end(), before);
  const Ranked first_out = ranked_[keep];
  filter(query, [&](size_t i) { return before({query.score[i], query.slot[i]}, first_out); });
}

// The rest of the plan from stage `number` on, whose scores are known where they are `scored`.
void Rescorer::answer(Query& query, size_t number, bool scored) {
  if (!scored || query.slot.empty())
    for (size_t view = 0; view < call_.queries.size(); ++view)
      if (call_.queries[view].data != nullptr)
        exact_.view(static_cast<int64_t>(view))
            .bind(*call_.bank, static_cast<int32_t>(view), call_.queries[view], query.row);
  exact_.start(*call_.exclude, query.row);
  exact_.run(query.slot, number, *call_.answer,
             scored ? std::span<const double>(query.score) : std::span<const double>());
}

}  // namespace cascade::cpu
