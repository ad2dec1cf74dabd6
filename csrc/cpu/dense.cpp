// Stages on 16-bit scores: those that keep a large share, and what 8 bits are not used for.
//
// A tile's score v stands for a true score s (in its units, monotone in the contract's) with v - e <= s <= v + 1 + e, e
// certified per query (packed.hpp). With w > 1 + 2 e, v_a >= v_b + w proves that a comes before b. Let theta be the
// m-th largest score, m what the stage keeps. Then
//   v >= theta + w  is surely in: whatever could come before it has a score above theta, and fewer than m keys do;
//   v <= theta - w  is surely out: m keys surely come before it;
// and only the band between is ranked by the contract's float64 similarities. Survivors carry the scores of the views
// that later stages need, so every view is scored once, in tiles that stream through the cache.
//
// Where the first stage keeps few of many keys, its scores are not there all at once: candidates are listed
// (candidate_lists.hpp).
//
// A stage over the bank (`@bank`) is decided before candidates are lost: its threshold and its band are found among all
// eligible keys, and when its turn comes candidates are held against them.
#include <algorithm>
#include <memory>
#include <optional>

#include "cpu/candidate_lists.hpp"
#include "cpu/fast.hpp"
#include "cpu/rescore.hpp"
#include "cpu/score_rows.hpp"
#include "cpu/spans.hpp"
#include "cpu/threshold.hpp"
#include "cpu/workers.hpp"

namespace cascade::cpu {
namespace {

constexpr int64_t some_queries = 8;    // that a thread takes at a time where a tile is no larger
constexpr int64_t few = 24;            // so few candidates are ranked exactly at once
constexpr int64_t worth_sharing = 64;  // candidates of a query: their rows are then other queries' too

struct Open {
  Ranked ranked;
  int64_t from;
};

// Candidates of the query a thread works on: kept from call to call as the score rows are.
struct Scratch {
  Buffer<uint32_t> position, open_position;
  std::vector<Buffer<int16_t>> open_score;
  Buffer<int16_t> middle, kept_score;
  std::vector<int64_t> band, alive;
  std::vector<double> band_score;
  std::vector<Open> ranked_band;
};

// What a stage over the bank decided among all eligible keys.
struct BankRanking {
  int low, high;               // as in `split16`
  std::vector<uint32_t> kept;  // of the band: positions, ascending
};

thread_local Scratch kept_scratch;

class Dense {
 public:
  Dense(const MineCall& call, ScoreRows& rows)
      : call_(call),
        kernels_(call.bank->kernels()),
        rows_(rows),
        layout_(rows_.layout()),
        stages_(call.stages.begin(), call.stages.end()),
        exact_(stages_, static_cast<int64_t>(call.bank->views().size()), call.bank->size(), call.weights),
        shared_from_(std::min(rows_.stages(), call.stages.size() - 1)),
        rescorer_(call, layout_, shared_from_),
        bank_ranking_(rows_.stages()),
        column_(rows_.columns()) {}
  Dense(const Dense&) = delete;
  Dense& operator=(const Dense&) = delete;

  // Scores the queries piece by piece and answers them from lists.
  void run_listed(int64_t begin, int64_t end) {
    enter();
    lists_.emplace(call_, rows_);
    for (int64_t first = begin; first < end && !should_stop(); first += rows_.at_once()) {
      const int64_t count = std::min(rows_.at_once(), end - first);
      for (int64_t i = 0; i < count; ++i) lists_->start(first + i, i);
      for (int64_t piece = 0; piece < rows_.pieces(); ++piece) {
        if (!rows_.score_piece(first, count, piece)) return;
        for (int64_t i = 0; i < count; ++i) {
          rows_.fuse(first, i);
          lists_->add(first + i, i);
        }
      }
      for (int64_t i = 0; i < count; ++i) cascade(first + i, i);
    }
    finish();
  }

  // Answers the queries first + [begin, end), those from `first` on being scored; some not before `finish`.
  void run(int64_t first, int64_t begin, int64_t end) {
    enter();
    for (int64_t i = begin; i < end && !should_stop(); ++i) {
      rows_.fuse(first, i);
      cascade(first + i, i);
    }
  }
  void finish() { rescorer_.finish(); }

 private:
  // To be called by the thread that goes on with this object.
  void enter() {
    scratch_ = rows_.are_kept() ? &kept_scratch : &own_scratch_;
    scratch_->open_score.resize(std::max(scratch_->open_score.size(), rows_.columns()));
    reserve(rows_.padded());
  }

  // Of candidates at most.
  void reserve(int64_t count) {
    scratch_->position.reserve(count);
    scratch_->open_position.reserve(count);
    scratch_->middle.reserve(count);
    for (size_t each = 0; each < rows_.columns(); ++each) scratch_->open_score[each].reserve(count);
  }

  // Makes a query's list the candidates that stages go on with; returns how many they are.
  int64_t take_list(int64_t query) {
    const int64_t count = lists_->count(query);
    reserve(count + 3 * lanes16);
    std::copy_n(lists_->positions(query), count, scratch_->position.data());
    lists_->scores(query, column_);
    return count;
  }

  // One query's stages. Candidates are columns: first all positions, then lists, compacted in place.
  void cascade(int64_t row, int64_t query) {
    const Span span(Phase::select);
    for (size_t view = 0; view < call_.queries.size(); ++view)
      if (call_.queries[view].data != nullptr)
        exact_.view(static_cast<int64_t>(view)).bind(*call_.bank, static_cast<int32_t>(view), call_.queries[view], row);
    exact_.start(*call_.exclude, row);
    for (size_t each = 0; each < column_.size(); ++each) column_[each] = rows_.row(each, query);
    std::copy(call_.stages.begin(), call_.stages.end(), stages_.begin());
    stages_.front().over_bank = false;             // all eligible keys are candidates then
    const size_t decided = rank_bank(row, query);  // no stage over the bank before it needs all similarities
    bool listed = lists_ && !lists_->is_lost(query);
    if (lists_ && !listed) return exact_.run(exact_.eligible(), 0, *call_.answer);
    int64_t alive = listed ? take_list(query) : rows_.mark(row, column_[rows_.column(0)]);
    size_t number = 0;
    for (; number < rows_.stages() && alive > (listed && number >= decided ? few : 0); ++number) {
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
      if (!(rows_.error(number, query) < hopeless16)) break;
      alive = narrow_down(stage, number, last, listed, alive, keep, rows_.width(number, query));
      listed = true;
      if (last) break;
    }
    const Span repair(Phase::repair);
    if (!listed) return exact_.run(exact_.eligible(), 0, *call_.answer);
    if (number == shared_from_ && alive >= worth_sharing && call_.is_plain(call_.stages[number]) &&
        call_.knows_weights(row)) {
      std::sort(scratch_->position.data(), scratch_->position.data() + alive);
      return rescorer_.add(row,
                           {reinterpret_cast<const int32_t*>(scratch_->position.data()), static_cast<size_t>(alive)});
    }
    scratch_->alive.resize(alive);
    for (int64_t i = 0; i < alive; ++i) scratch_->alive[i] = layout_.slot(scratch_->position[i]);
    exact_.run(scratch_->alive, number, *call_.answer);
  }

  // Decides the stages over the bank from the second on, as many as bounds help; returns the number after the last.
  size_t rank_bank(int64_t row, int64_t query) {
    size_t decided = 0;
    for (size_t number = 1; number < rows_.stages(); ++number) {
      const Stage& stage = stages_[number];
      if (!stage.over_bank) continue;
      if (!(rows_.error(number, query) < hopeless16)) break;
      int16_t* const score = column_[rows_.column(number)];
      const int64_t eligible = rows_.mark(row, score), keep = std::min(stage.keep, eligible);
      BankRanking& ranking = bank_ranking_[number];
      ranking = {no_score + 1, no_score + 1, {}};
      decided = number + 1;
      if (keep == eligible) continue;
      const int width = rows_.width(number, query);
      const Threshold theta =
          find_threshold(kernels_, score, rows_.positions(), eligible, keep, width / 8, scratch_->middle.data());
      ranking.low = std::max(theta.low - width + 1, no_score + 1);
      ranking.high = std::min(theta.high + width, 32768);
      scratch_->open_score[0].reserve(rows_.padded());
      scratch_->kept_score.reserve(rows_.padded());
      const Columns from{.position = nullptr, .score = {score}};
      const Columns kept{.position = scratch_->position.data(), .score = {scratch_->kept_score.data()}};
      const Columns open{.position = scratch_->open_position.data(), .score = {scratch_->open_score[0].data()}};
      const Split found = kernels_.split16(from, 0, rows_.positions(), 1, ranking.low, ranking.high, kept, open);
      const int64_t in = settle(stage, keep, found, 1, kept, open);
      ranking.kept.assign(kept.position + found.kept, kept.position + in);
      std::sort(ranking.kept.begin(), ranking.kept.end());
    }
    return decided;
  }

  // The candidates that stage `number` over the bank keeps; returns how many they are.
  int64_t meet(size_t number, int64_t alive) {
    const BankRanking& ranking = bank_ranking_[number];
    Columns from{.position = scratch_->position.data(), .score = {}};
    Columns open{.position = scratch_->open_position.data(), .score = {}};
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
    Columns from{.position = listed ? scratch_->position.data() : nullptr, .score = {}};
    Columns open{.position = scratch_->open_position.data(), .score = {}};
    const int rows = columns(number, from, open);
    const int64_t n = listed ? pad_scores(from.score[0], alive) : rows_.positions();
    int low = no_score + 1, high = low;
    if (keep < alive) {
      const Threshold theta =
          find_threshold(kernels_, from.score[0], n, alive, keep, width / 8, scratch_->middle.data());
      low = std::max(theta.low - width + 1, low);
      high = last ? low : theta.high + width;
    }
    Columns kept = from;
    kept.position = scratch_->position.data();
    const Split found = kernels_.split16(from, 0, n, rows, low, std::min(high, 32768), kept, open);
    return last ? found.kept : settle(stage, keep, found, rows, kept, open);
  }

  // The score rows that stage `number` and those after it need, its own first, where they are and where the band's go.
  int columns(size_t number, Columns& from, Columns& open) {
    int rows = 0;
    for (size_t later = number; later < rows_.stages(); ++later) {
      int16_t* const row = column_[rows_.column(later)];
      if (std::find(from.score, from.score + rows, row) != from.score + rows) continue;
      open.score[rows] = scratch_->open_score[rows].data();
      from.score[rows++] = row;
    }
    return rows;
  }

  // Ranks the open candidates exactly and keeps as many as the stage still has room for.
  int64_t settle(const Stage& stage, int64_t keep, const Split& found, int rows, const Columns& kept,
                 const Columns& open) {
    const int64_t wanted = std::min(keep - found.kept, found.open);
    scratch_->ranked_band.resize(found.open);
    scratch_->band.resize(found.open);
    scratch_->band_score.resize(found.open);
    for (int64_t i = 0; i < found.open; ++i) scratch_->band[i] = layout_.slot(open.position[i]);
    if (wanted < found.open && wanted > 0) {
      const Span repair(Phase::repair);
      exact_.scores(stage, scratch_->band, scratch_->band_score.data());
      for (int64_t i = 0; i < found.open; ++i)
        scratch_->ranked_band[i] = {{scratch_->band_score[i], scratch_->band[i]}, i};
      std::nth_element(scratch_->ranked_band.begin(), scratch_->ranked_band.begin() + wanted,
                       scratch_->ranked_band.end(),
                       [](const Open& a, const Open& b) { return before(a.ranked, b.ranked); });
    } else {
      for (int64_t i = 0; i < found.open; ++i) scratch_->ranked_band[i].from = i;
    }
    for (int64_t i = 0; i < wanted; ++i) {
      kept.position[found.kept + i] = open.position[scratch_->ranked_band[i].from];
      for (int row = 0; row < rows; ++row)
        kept.score[row][found.kept + i] = open.score[row][scratch_->ranked_band[i].from];
    }
    return found.kept + wanted;
  }

  const MineCall& call_;
  const Kernels& kernels_;
  ScoreRows& rows_;
  std::optional<CandidateLists> lists_;
  const Layout& layout_;
  std::vector<Stage> stages_;  // the call's; `over_bank` is cleared once that is decided for the current query
  ExactCascade exact_;
  size_t shared_from_;  // the stage from which candidates of many queries are ranked together
  Rescorer rescorer_;
  std::vector<BankRanking> bank_ranking_;  // per bounded stage, for the current query
  std::vector<int16_t*> column_;           // the current query's scores
  Scratch own_scratch_, *scratch_ = nullptr;
};

// Whether threads do better with queries of their own: where the keys stay in a thread's own cache, sharing them saves
// nothing, and the threads' meetings take some 15 us. Not of many queries, as signals wait for a thread's share then.
bool meets_alone(const ScoreRows& rows, int64_t batch, int64_t occupies_all) {
  constexpr int64_t own_cache = 2 << 20;  // bytes
  return rows.key_bytes() <= own_cache && batch >= occupies_all && batch <= 4 * occupies_all;
}

}  // namespace

void dense_queries(const MineCall& call, std::span<const StagePacks> packed, int64_t batch, const Control& control) {
  const int threads = std::max(1, control.threads);
  const int64_t together = std::max<int64_t>(some_queries, call.bank->kernels().least16);
  ScoreRows rows(call, packed, {.threads = threads});
  if (meets_alone(rows, batch, threads * together)) {
    return share_queries(batch, together, control, [&](int64_t begin, int64_t end) {
      ScoreRows own(call, packed, {});
      Dense dense(call, own);
      own.score_all(begin, end, {}, [&](int64_t first, int64_t from, int64_t to) { dense.run(first, from, to); });
      dense.finish();
    });
  }
  if (CandidateLists::are_worth(call, rows.at_once() / threads)) {
    const int64_t piece = call.bank->kernels().piece16;
    return share_queries(batch, together, control, [&](int64_t begin, int64_t end) {
      ScoreRows pieces(call, packed,
                       {.piece = piece / lanes16,
                        .listed = CandidateLists::limit(call) + piece,
                        .at_most = CandidateLists::most_together});
      Dense(call, pieces).run_listed(begin, end);
    });
  }
  Workers<Dense> workers([&] { return std::make_unique<Dense>(call, rows); });
  rows.score_all(0, batch, control, [&](int64_t first, int64_t begin, int64_t end) {
    workers.lend([&](Dense& dense) { dense.run(first, begin, end); });
  });
  workers.each(control, [](Dense& dense) { dense.finish(); });
}

}  // namespace cascade::cpu
