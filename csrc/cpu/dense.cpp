// Stages that keep a large share, on 16-bit scores.
//
// A tile's score v stands for a true score s (in its units, monotone in the contract's) with v - e <= s <= v + 1 + e, e
// certified per query (packed.hpp). With w > 1 + 2 e, v_a >= v_b + w proves that a comes before b. Let theta be the
// m-th largest score, m what the stage keeps. Then
//   v >= theta + w  is surely in: whatever could come before it has a score above theta, and fewer than m keys do;
//   v <= theta - w  is surely out: m keys surely come before it;
// and only the band between is ranked by the contract's float64 similarities. Survivors carry the scores of the views
// that later stages need, so every view is scored once, in tiles that stream through the cache.
//
// `min` and `max` of certified scores are certified scores: the views' rows are brought to one unit and fused, and the
// stage ranks by that row. A stage over the bank (`@bank`) is decided before candidates are lost: its threshold and its
// band are found among all eligible keys, and when its turn comes candidates are held against them.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/fast.hpp"
#include "cpu/spans.hpp"
#include "cpu/threshold.hpp"

namespace cascade::cpu {
namespace {

constexpr int64_t room = 2 * lanes16;  // kernels write whole vectors past the end
constexpr double hopeless = 4096;      // an error in score units with which the band is most of the bank
constexpr int64_t few = 24;            // so few candidates are ranked exactly at once
constexpr int64_t scores_in_cache =
    12 << 20;  // bytes of score rows that a thread holds, its share of a last-level cache
constexpr int64_t keys_in_cache = 384 << 10;  // bytes of packed keys that a run of tiles goes over

struct Open {
  Ranked ranked;
  int64_t from;
};

// Score rows and candidates of the queries a thread works on: kept from call to call, unless they are uncommonly large.
struct Scratch {
  std::vector<Buffer<int16_t>> rows;                  // per column: [queries at a time, positions + room]
  std::vector<Buffer<int32_t>> words;                 // per distinct packed view: the packed queries
  std::vector<std::vector<Packed16::Query>> queries;  // per distinct packed view: [queries at a time]
  Buffer<uint32_t> position, open_position;
  std::vector<Buffer<int16_t>> open_score;
  Buffer<int16_t> middle, kept_score;
  std::vector<int64_t> band, alive;
  std::vector<double> band_score;
  std::vector<Open> ranked_band;
  std::vector<std::vector<double>> errors;  // per column: [queries at a time]
};

// What a stage over the bank decided among all eligible keys.
struct BankRanking {
  int low, high;               // as in `split16`
  std::vector<uint32_t> kept;  // of the band: positions, ascending
};

thread_local Scratch kept_scratch;

class Dense {
 public:
  Dense(const MineCall& call, std::span<const StagePacks> packed)
      : call_(call),
        kernels_(call.bank->kernels()),
        layout_(packed.front().front()->layout()),
        padded_(layout_.positions() + room),
        stages_(call.stages.begin(), call.stages.end()),
        exact_(stages_, static_cast<int64_t>(call.bank->views().size()), call.bank->size()) {
    for (const StagePacks& packs : packed)
      for (const Packed16* each : packs)
        if (std::find(views_.begin(), views_.end(), each) == views_.end()) views_.push_back(each);
    size_t count = views_.size();
    for (const StagePacks& packs : packed) {
      std::vector<int>& sources = sources_.emplace_back();
      for (const Packed16* each : packs)
        sources.push_back(static_cast<int>(std::find(views_.begin(), views_.end(), each) - views_.begin()));
      stage_column_.push_back(packs.size() == 1 ? sources.front() : static_cast<int>(count++));
    }
    bank_ranking_.resize(packed.size());
    const auto at_least = [count](auto& each) { each.resize(std::max(each.size(), count)); };
    at_least(scratch_.rows);
    at_least(scratch_.words);
    at_least(scratch_.queries);
    at_least(scratch_.errors);
    at_least(scratch_.open_score);
    column_.resize(count);
    scratch_.position.reserve(padded_);
    scratch_.open_position.reserve(padded_);
    scratch_.middle.reserve(padded_);
    for (size_t view = 0; view < count; ++view) scratch_.open_score[view].reserve(padded_);
    const int64_t row_bytes = padded_ * static_cast<int64_t>(sizeof(int16_t) * count);
    at_once_ = std::clamp<int64_t>(scores_in_cache / row_bytes / queries16 * queries16, queries16, 4 * queries16);
    if (row_bytes * at_once_ > 8 * scores_in_cache) at_once_ = 4;
    keep_scratch_ = row_bytes * at_once_ <= 2 * scores_in_cache;
  }
  ~Dense() {
    if (!keep_scratch_) scratch_ = Scratch{};
  }
  Dense(const Dense&) = delete;
  Dense& operator=(const Dense&) = delete;

  void run(int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end && !should_stop(); first += at_once_) {
      const int64_t count = std::min(at_once_, end - first);
      if (!score(first, count)) return;
      for (int64_t i = 0; i < count; ++i) cascade(first + i, i);
    }
  }

 private:
  // Groups of 12, 8 or 4 queries, as even as they come.
  void group(int64_t count) {
    groups_.clear();
    const int64_t needed = (count + queries16 - 1) / queries16;
    int64_t left = count;
    for (int64_t i = 0; i < needed; ++i) {
      const int64_t share = (left + (needed - i) - 1) / (needed - i);
      groups_.push_back(static_cast<int>(std::min<int64_t>(queries16, (share + 3) / 4 * 4)));
      left = std::max<int64_t>(0, left - groups_.back());
    }
  }

  void pack(int64_t first, int64_t count) {
    group(count);
    int64_t padded = 0;
    for (const int size : groups_) padded += size;
    for (size_t view = 0; view < views_.size(); ++view) {
      const Packed16& packed = *views_[view];
      scratch_.rows[view].reserve(padded * padded_);
      scratch_.words[view].reserve(padded * packed.steps());
      std::fill_n(scratch_.words[view].data(), padded * packed.steps(), 0);
      scratch_.queries[view].assign(padded, {});
      scratch_.errors[view].assign(padded, 0.0);
      int32_t* words = scratch_.words[view].data();
      int64_t query = 0;
      for (const int size : groups_) {
        for (int i = 0; i < size && query < count; ++i, ++query) {
          scratch_.queries[view][query] = packed.pack_query(call_.queries, first + query, {}, words + i, size);
          scratch_.errors[view][query] = scratch_.queries[view][query].error;
        }
        words += size * packed.steps();
      }
    }
  }

  // Every view's scores of all keys. Runs of key blocks stay in the cache while all groups of queries pass over them.
  bool score(int64_t first, int64_t count) {
    const Span span(Phase::score);
    pack(first, count);
    for (size_t view = 0; view < views_.size(); ++view) {
      const Packed16& packed = *views_[view];
      const int64_t block_bytes = packed.steps() * lanes16 * 4;
      const int64_t run = std::max<int64_t>(1, keys_in_cache / block_bytes);
      for (int64_t start = 0; start < layout_.blocks; start += run) {
        if (should_stop()) return false;
        const int64_t stop = std::min(layout_.blocks, start + run);
        call_.bank->passed((stop - start) * block_bytes);
        const int32_t* words = scratch_.words[view].data();
        int16_t* out = scratch_.rows[view].data();
        for (const int size : groups_) {
          for (int64_t block = start; block < stop; ++block)
            kernels_.tile16(words, size, packed.block(block), packed.steps(), out + block * lanes16, padded_);
          words += size * packed.steps();
          out += size * padded_;
        }
      }
    }
    fuse(first, count);
    return true;
  }

  // The rows of `min` and `max` stages. All views' scores are brought to the unit in which the largest possible fits.
  void fuse(int64_t first, int64_t count) {
    for (size_t number = 0; number < sources_.size(); ++number) {
      const std::vector<int>& sources = sources_[number];
      if (sources.size() == 1) continue;
      auto& row = scratch_.rows[stage_column_[number]];
      row.reserve(count * padded_);
      scratch_.errors[stage_column_[number]].resize(count);
      for (int64_t query = 0; query < count; ++query)
        scratch_.errors[stage_column_[number]][query] =
            fuse_row(sources, stages_[number].fusion == Fusion::min, first, query, row.data() + query * padded_);
    }
  }

  // Returns the row's error in its own units, infinite where the views have no unit in common.
  double fuse_row(const std::vector<int>& sources, bool smaller, int64_t first, int64_t query, int16_t* out) const {
    constexpr double largest = 32700;  // leaves room for rounding
    constexpr double rounding = 0.02;  // of the floats in `fuse16`: a few units in the last place of 2^15 and 2^16
    std::vector<double> constant;
    std::vector<float> gain, offset;
    std::vector<const int16_t*> rows;
    double reach = 0, error = 0;
    for (const int view : sources) {
      constant.push_back(views_[view]->embedding().constant(call_.queries, first + query));
      reach = std::max(reach, 32768 / scratch_.queries[view][query].unit + std::abs(constant.back()));
    }
    const double unit = largest / reach;
    for (size_t i = 0; i < sources.size(); ++i) {
      const Packed16::Query& packed = scratch_.queries[sources[i]][query];
      const double factor = unit / packed.unit;
      if (!(packed.error < hopeless) || !std::isfinite(factor) || !std::isfinite(unit * constant[i]))
        return std::numeric_limits<double>::infinity();
      error = std::max(error, factor * (1 + packed.error) + rounding);
      gain.push_back(static_cast<float>(factor));
      offset.push_back(static_cast<float>(unit * constant[i]));
      rows.push_back(scratch_.rows[sources[i]].data() + query * padded_);
    }
    kernels_.fuse16(rows.data(), gain.data(), offset.data(), static_cast<int>(rows.size()), smaller,
                    layout_.positions(), out);
    return error;
  }

  // Marks what is no candidate in a stage's scores of all keys; returns how many candidates are left.
  int64_t mark(int64_t row, int16_t* score) {
    for (int64_t lane = 0; lane < layout_.lanes; ++lane)  // lanes past the last key
      for (int64_t block = std::max<int64_t>(0, layout_.keys - lane * layout_.blocks); block < layout_.blocks; ++block)
        score[block * layout_.lanes + lane] = no_score;
    int64_t left = layout_.keys;
    const auto drop = [&](int64_t slot) {
      score[layout_.position(slot)] = no_score;
      --left;
    };
    const Exclusion& exclude = *call_.exclude;
    if (exclude.mask != nullptr) {
      const bool* mask = exclude.mask + row * layout_.keys;
      for (int64_t slot = 0; slot < layout_.keys; ++slot)
        if (mask[slot]) drop(slot);
    } else if (exclude.query_video != nullptr) {
      call_.bank->videos().each(exclude.query_video[row], drop);
    }
    return left;
  }

  // One query's stages. Candidates are columns: first all positions, then lists, compacted in place.
  void cascade(int64_t row, int64_t query) {
    const Span span(Phase::select);
    for (size_t view = 0; view < call_.queries.size(); ++view)
      if (call_.queries[view].data != nullptr)
        exact_.view(static_cast<int64_t>(view)).bind(*call_.bank, static_cast<int32_t>(view), call_.queries[view], row);
    exact_.start(*call_.exclude, row);
    for (size_t each = 0; each < column_.size(); ++each) column_[each] = scratch_.rows[each].data() + query * padded_;
    std::copy(call_.stages.begin(), call_.stages.end(), stages_.begin());
    stages_.front().over_bank = false;             // all eligible keys are candidates then
    const size_t decided = rank_bank(row, query);  // no stage over the bank before it needs all similarities
    int64_t alive = mark(row, column_[stage_column_[0]]);
    bool listed = false;
    size_t number = 0;
    for (; number < stage_column_.size() && alive > (listed && number >= decided ? few : 0); ++number) {
      Stage& stage = stages_[number];
      const bool last = number + 1 == stages_.size();
      if (stage.over_bank && number > 0) {
        if (number >= decided || !listed) break;
        alive = meet(number, alive);
        stage.over_bank = false;  // all that are left are among the bank's best
        if (last) break;
        continue;
      }
      const int64_t keep = std::min(stage.keep, alive);
      if (listed && keep == alive && !last) continue;
      const double error = scratch_.errors[stage_column_[number]][query];
      if (!(error < hopeless)) break;
      alive = narrow_down(stage, number, last, listed, alive, keep, width_of(error));
      listed = true;
      if (last) break;
    }
    const Span repair(Phase::repair);
    if (!listed) return exact_.run(exact_.eligible(), 0, *call_.answer);
    scratch_.alive.resize(alive);
    for (int64_t i = 0; i < alive; ++i) scratch_.alive[i] = layout_.slot(scratch_.position[i]);
    exact_.run(scratch_.alive, number, *call_.answer);
  }

  static int width_of(double error) { return static_cast<int>(std::floor(1 + 2 * error)) + 1; }

  // Decides the stages over the bank from the second on, as many as bounds help; returns the number after the last.
  size_t rank_bank(int64_t row, int64_t query) {
    size_t decided = 0;
    for (size_t number = 1; number < stage_column_.size(); ++number) {
      const Stage& stage = stages_[number];
      if (!stage.over_bank) continue;
      const double error = scratch_.errors[stage_column_[number]][query];
      if (!(error < hopeless)) break;
      int16_t* const score = column_[stage_column_[number]];
      const int64_t eligible = mark(row, score), keep = std::min(stage.keep, eligible);
      BankRanking& ranking = bank_ranking_[number];
      ranking = {no_score + 1, no_score + 1, {}};
      decided = number + 1;
      if (keep == eligible) continue;
      const int width = width_of(error);
      const Threshold theta =
          find_threshold(kernels_, score, layout_.positions(), eligible, keep, width / 8, scratch_.middle.data());
      ranking.low = std::max(theta.low - width + 1, no_score + 1);
      ranking.high = std::min(theta.high + width, 32768);
      scratch_.open_score[0].reserve(padded_);
      scratch_.kept_score.reserve(padded_);
      const Columns from{.position = nullptr, .score = {score}};
      const Columns kept{.position = scratch_.position.data(), .score = {scratch_.kept_score.data()}};
      const Columns open{.position = scratch_.open_position.data(), .score = {scratch_.open_score[0].data()}};
      const Split found = kernels_.split16(from, 0, layout_.positions(), 1, ranking.low, ranking.high, kept, open);
      const int64_t in = settle(stage, keep, found, 1, kept, open);
      ranking.kept.assign(kept.position + found.kept, kept.position + in);
      std::sort(ranking.kept.begin(), ranking.kept.end());
    }
    return decided;
  }

  // The candidates that stage `number` over the bank keeps; returns how many they are.
  int64_t meet(size_t number, int64_t alive) {
    const BankRanking& ranking = bank_ranking_[number];
    Columns from{.position = scratch_.position.data(), .score = {}};
    Columns open{.position = scratch_.open_position.data(), .score = {}};
    const int rows = columns(number, from, open);
    const Split found =
        kernels_.split16(from, 0, pad_scores(from.score[0], alive), rows, ranking.low, ranking.high, from, open);
    int64_t in = found.kept;
    for (int64_t i = 0; i < found.open; ++i) {
      if (!std::binary_search(ranking.kept.begin(), ranking.kept.end(), open.position[i])) continue;
      from.position[in] = open.position[i];
      for (int each = 0; each < rows; ++each) from.score[each][in] = open.score[each][i];
      ++in;
    }
    return in;
  }

  // One stage: what is surely in stays, the band is ranked exactly. Of the last stage all that may be in stays, as the
  // exact path puts it in order anyway. Returns how many candidates are left.
  int64_t narrow_down(const Stage& stage, size_t number, bool last, bool listed, int64_t alive, int64_t keep,
                      int width) {
    Columns from{.position = listed ? scratch_.position.data() : nullptr, .score = {}};
    Columns open{.position = scratch_.open_position.data(), .score = {}};
    const int rows = columns(number, from, open);
    const int64_t n = listed ? pad_scores(from.score[0], alive) : layout_.positions();
    int low = no_score + 1, high = low;
    if (keep < alive) {
      const Threshold theta =
          find_threshold(kernels_, from.score[0], n, alive, keep, width / 8, scratch_.middle.data());
      low = std::max(theta.low - width + 1, low);
      high = last ? low : theta.high + width;
    }
    Columns kept = from;
    kept.position = scratch_.position.data();
    const Split found = kernels_.split16(from, 0, n, rows, low, std::min(high, 32768), kept, open);
    return last ? found.kept : settle(stage, keep, found, rows, kept, open);
  }

  // The score rows that stage `number` and those after it need, its own first, where they are and where the band's go.
  int columns(size_t number, Columns& from, Columns& open) {
    int rows = 0;
    for (size_t later = number; later < stage_column_.size(); ++later) {
      int16_t* const row = column_[stage_column_[later]];
      if (std::find(from.score, from.score + rows, row) != from.score + rows) continue;
      open.score[rows] = scratch_.open_score[rows].data();
      from.score[rows++] = row;
    }
    return rows;
  }

  // Ranks the open candidates exactly and keeps as many as the stage still has room for.
  int64_t settle(const Stage& stage, int64_t keep, const Split& found, int rows, const Columns& kept,
                 const Columns& open) {
    const int64_t wanted = std::min(keep - found.kept, found.open);
    scratch_.ranked_band.resize(found.open);
    scratch_.band.resize(found.open);
    scratch_.band_score.resize(found.open);
    for (int64_t i = 0; i < found.open; ++i) scratch_.band[i] = layout_.slot(open.position[i]);
    if (wanted < found.open && wanted > 0) {
      const Span repair(Phase::repair);
      exact_.scores(stage, scratch_.band, scratch_.band_score.data());
      for (int64_t i = 0; i < found.open; ++i)
        scratch_.ranked_band[i] = {{scratch_.band_score[i], scratch_.band[i]}, i};
      std::nth_element(scratch_.ranked_band.begin(), scratch_.ranked_band.begin() + wanted, scratch_.ranked_band.end(),
                       [](const Open& a, const Open& b) { return before(a.ranked, b.ranked); });
    } else {
      for (int64_t i = 0; i < found.open; ++i) scratch_.ranked_band[i].from = i;
    }
    for (int64_t i = 0; i < wanted; ++i) {
      kept.position[found.kept + i] = open.position[scratch_.ranked_band[i].from];
      for (int row = 0; row < rows; ++row)
        kept.score[row][found.kept + i] = open.score[row][scratch_.ranked_band[i].from];
    }
    return found.kept + wanted;
  }

  const MineCall& call_;
  const Kernels& kernels_;
  Layout layout_;
  int64_t padded_;
  std::vector<Stage> stages_;  // the call's; `over_bank` is cleared once that is decided for the current query
  ExactCascade exact_;
  std::vector<const Packed16*> views_;
  std::vector<int> stage_column_;          // per bounded stage, the column of scores that it ranks by
  std::vector<std::vector<int>> sources_;  // per bounded stage, the views that its column is made of
  std::vector<BankRanking> bank_ranking_;  // per bounded stage, for the current query
  std::vector<int> groups_;
  int64_t at_once_ = queries16;
  bool keep_scratch_ = true;
  std::vector<int16_t*> column_;  // the current query's scores: per distinct packed view, then fused
  Scratch& scratch_ = kept_scratch;
};

}  // namespace

void dense_queries(const MineCall& call, std::span<const StagePacks> packed, int64_t begin, int64_t end) {
  Dense(call, packed).run(begin, end);
}

}  // namespace cascade::cpu
