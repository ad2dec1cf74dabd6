#include "cpu/score_rows.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/spans.hpp"

namespace cascade::cpu {
namespace {

constexpr int64_t room = 2 * lanes16;         // kernels write whole vectors past the end
constexpr int64_t keys_in_cache = 384 << 10;  // bytes of packed keys that a run of tiles goes over
constexpr int64_t packed_together = 4;        // queries that a thread takes at a time, at least
constexpr int64_t used_together = 2;          // and of those scored
constexpr int64_t runs_each = 8;              // of tiles over a view's keys, for a thread to share them evenly

struct Run {
  size_t view;
  int64_t start, stop;  // blocks
};

}  // namespace

ScoreRows::Memory& ScoreRows::kept_memory() {
  thread_local Memory memory;
  return memory;
}

ScoreRows::ScoreRows(const MineCall& call, std::span<const StagePacks> packed, const Extent& extent)
    : call_(call),
      kernels_(call.bank->kernels()),
      layout_(packed.front().front()->layout()),
      piece_(std::max<int64_t>(1, std::min(layout_.blocks, extent.piece))),
      begin_(0),
      end_(piece_),
      padded_(piece_ * layout_.lanes + room) {
  for (size_t stage = 0; stage < packed.size(); ++stage) {
    std::vector<size_t>& sources = sources_.emplace_back();
    for (const Packed16* each : packed[stage]) sources.push_back(source(each, call.stages[stage]));
  }
  columns_ = views_.size();
  for (const auto& sources : sources_) column_.push_back(sources.size() == 1 ? sources.front() : columns_++);
  const auto at_least = [](auto& each, size_t count) { each.resize(std::max(each.size(), count)); };
  at_least(memory_.rows, columns_);
  at_least(memory_.errors, columns_);
  at_least(memory_.words, views_.size());
  at_least(memory_.queries, views_.size());
  const auto scores_bytes = static_cast<int64_t>(sizeof(int16_t) * columns_);
  const int64_t row_bytes =
      padded_ * scores_bytes + extent.listed * (scores_bytes + static_cast<int64_t>(sizeof(uint32_t)));
  const int64_t least = kernels_.least16, held = extent.threads * kernels_.rows16;
  at_once_ = std::clamp<int64_t>(held / row_bytes / least * least, least, extent.at_most * extent.threads);
  if (row_bytes * at_once_ > 8 * held) at_once_ = least;
  are_kept_ = row_bytes * at_once_ <= 2 * held;
}

ScoreRows::~ScoreRows() {
  if (!are_kept_ && !groups_.empty()) memory_ = Memory{};
}

// The number among `views_`, which gets it where it was not there.
size_t ScoreRows::source(const Packed16* packed, const Stage& stage) {
  const Stage* const weighs = stage.fusion == Fusion::zsum ? &stage : nullptr;
  const auto same = [&](const Source& each) {
    return each.packed == packed && (each.weighs == nullptr) == (weighs == nullptr);
  };
  const auto found = std::find_if(views_.begin(), views_.end(), same);
  if (found == views_.end()) views_.push_back({packed, weighs});
  return static_cast<size_t>(std::find_if(views_.begin(), views_.end(), same) - views_.begin());
}

// Groups of queries, as even as they come, and their memory.
void ScoreRows::lay(int64_t count) {
  groups_.clear();
  const int64_t needed = (count + kernels_.queries16 - 1) / kernels_.queries16;
  int64_t left = count, padded = 0;
  for (int64_t i = 0; i < needed; ++i) {
    const int64_t share = (left + (needed - i) - 1) / (needed - i);
    const int64_t least = kernels_.least16;
    groups_.push_back(static_cast<int>(std::min<int64_t>(kernels_.queries16, (share + least - 1) / least * least)));
    left = std::max<int64_t>(0, left - groups_.back());
    padded += groups_.back();
  }
  for (size_t view = 0; view < views_.size(); ++view) {
    const int64_t words = padded * views_[view].packed->query_words();
    memory_.words[view].reserve(words);
    std::fill_n(memory_.words[view].data(), words, 0);
    memory_.queries[view].assign(padded, {});
  }
  for (size_t column = 0; column < columns_; ++column) {
    memory_.rows[column].reserve(padded * padded_);
    memory_.errors[column].assign(padded, 0.0);
  }
}

// Packs the queries first + [begin, end) of those that were laid.
void ScoreRows::pack(int64_t first, int64_t begin, int64_t end) {
  std::vector<double> weights;
  for (size_t view = 0; view < views_.size(); ++view) {
    const Packed16& packed = *views_[view].packed;
    int32_t* words = memory_.words[view].data();
    int64_t start = 0;
    weights.clear();
    for (const int size : groups_) {
      for (int64_t query = std::max(begin, start); query < std::min(end, start + size); ++query) {
        Packed16::Query& made = memory_.queries[view][query];
        if (views_[view].weighs == nullptr || call_.weigh(*views_[view].weighs, first + query, weights))
          made = packed.pack_query(call_.queries, first + query, weights, words, query - start, size);
        else
          made.error = std::numeric_limits<double>::infinity();
        memory_.errors[view][query] = made.error;
      }
      words += size * packed.query_words();
      start += size;
    }
  }
}

// One view's scores with the blocks [start, stop), which stay in the cache while all groups of queries pass over them.
void ScoreRows::tiles(size_t view, int64_t start, int64_t stop) {
  const Packed16& packed = *views_[view].packed;
  call_.bank->passed((stop - start) * packed.steps() * lanes16 * 4);
  const MatrixUnits units(kernels_);
  const int32_t* words = memory_.words[view].data();
  int16_t* out = memory_.rows[view].data();
  for (const int size : groups_) {
    kernels_.tiles16(words, size, packed.block(start), stop - start, packed.steps(), out + (start - begin_) * lanes16,
                     padded_);
    words += size * packed.query_words();
    out += size * padded_;
  }
}

int64_t ScoreRows::key_bytes() const {
  int64_t bytes = 0;
  for (const Source& view : views_) bytes += layout_.blocks * view.packed->steps() * lanes16 * 4;
  return bytes;
}

int64_t ScoreRows::blocks_in_cache(size_t view) const {
  return std::max<int64_t>(1, keys_in_cache / (views_[view].packed->steps() * lanes16 * 4));
}

bool ScoreRows::score_piece(int64_t first, int64_t count, int64_t piece) {
  const Span span(Phase::score);
  if (piece == 0) {
    lay(count);
    pack(first, 0, count);
  }
  begin_ = piece * piece_;
  end_ = std::min(layout_.blocks, begin_ + piece_);
  for (size_t view = 0; view < views_.size(); ++view) {
    const int64_t run = blocks_in_cache(view);
    for (int64_t start = begin_; start < end_; start += run) {
      if (should_stop()) return false;
      tiles(view, start, std::min(end_, start + run));
    }
  }
  return true;
}

void ScoreRows::score_all(int64_t begin, int64_t end, const Control& control,
                          const std::function<void(int64_t, int64_t, int64_t)>& use) {
  for (int64_t first = begin; first < end; first += at_once_) {
    const int64_t count = std::min(at_once_, end - first);
    score(first, count, control);
    share_queries(count, used_together, control, [&](int64_t from, int64_t to) { use(first, from, to); });
  }
}

void ScoreRows::score(int64_t first, int64_t count, const Control& control) {
  lay(count);
  share_queries(count, packed_together, control, [&](int64_t begin, int64_t end) {
    const Span span(Phase::score);
    pack(first, begin, end);
  });
  std::vector<Run> runs;
  for (size_t view = 0; view < views_.size(); ++view) {
    const int64_t share = layout_.blocks / (runs_each * std::max(1, control.threads));
    const int64_t run = std::clamp<int64_t>(share, 1, blocks_in_cache(view));
    for (int64_t start = 0; start < layout_.blocks; start += run)
      runs.push_back({view, start, std::min(layout_.blocks, start + run)});
  }
  run_parts(static_cast<int>(runs.size()), control, [&](int part, int) {
    if (should_stop()) return;
    const Span span(Phase::score);
    tiles(runs[part].view, runs[part].start, runs[part].stop);
  });
}

int64_t ScoreRows::mark(int64_t row, int16_t* score) const {
  int64_t left = mark_others(row, score);
  const Exclusion& exclude = *call_.exclude;
  if (exclude.mask == nullptr && exclude.query_video != nullptr)
    call_.bank->videos().each(exclude.query_video[row], [&](int64_t slot) {
      score[layout_.position(slot)] = no_score;
      --left;
    });
  return left;
}

void ScoreRows::mark(int64_t row, int16_t* score, std::span<const int64_t> of_video) const {
  mark_others(row, score);
  const int64_t first = first_position(), end = first + positions();
  for (auto each = std::lower_bound(of_video.begin(), of_video.end(), first); each != of_video.end() && *each < end;
       ++each)
    score[*each - first] = no_score;
}

void ScoreRows::find_video(int64_t row, std::vector<int64_t>& positions) const {
  positions.clear();
  const Exclusion& exclude = *call_.exclude;
  if (exclude.mask != nullptr || exclude.query_video == nullptr) return;
  call_.bank->videos().each(exclude.query_video[row],
                            [&](int64_t slot) { positions.push_back(layout_.position(slot)); });
  std::sort(positions.begin(), positions.end());
}

// Marks lanes past the last key and keys that a mask excludes; returns how many are left.
int64_t ScoreRows::mark_others(int64_t row, int16_t* score) const {
  int64_t left = positions();
  const uint8_t* const mask = call_.exclude->mask == nullptr ? nullptr : call_.exclude->mask + row * layout_.keys;
  for (int64_t lane = 0; lane < layout_.lanes; ++lane) {
    const int64_t first = lane * layout_.blocks, there = std::clamp(layout_.keys - first, begin_, end_);
    const auto drop = [&](int64_t block) {
      score[(block - begin_) * layout_.lanes + lane] = no_score;
      --left;
    };
    for (int64_t block = begin_; block < there && mask != nullptr; ++block)
      if (mask[first + block] != 0) drop(block);
    for (int64_t block = there; block < end_; ++block) drop(block);
  }
  return left;
}

// All views' scores are brought to the unit in which the largest possible fits.
void ScoreRows::fuse(int64_t first, int64_t query) {
  for (size_t number = 0; number < sources_.size(); ++number) {
    const std::vector<size_t>& sources = sources_[number];
    if (sources.size() == 1) continue;
    const Span span(Phase::score);
    memory_.errors[column_[number]][query] = fuse_row(sources, call_.stages[number].fusion == Fusion::min, first, query,
                                                      memory_.rows[column_[number]].data() + query * padded_);
  }
}

// Returns the row's error in its own units, infinite where the views have no unit in common.
double ScoreRows::fuse_row(const std::vector<size_t>& sources, bool smaller, int64_t first, int64_t query,
                           int16_t* out) const {
  constexpr double largest = 32700;  // leaves room for rounding
  constexpr double rounding = 0.02;  // of the floats in `fuse16`: a few units in the last place of 2^15 and 2^16
  std::vector<double> constant;
  std::vector<float> gain, offset;
  std::vector<const int16_t*> rows;
  double reach = 0, error = 0;
  for (const size_t view : sources) {
    constant.push_back(views_[view].packed->embedding().constant(call_.queries, first + query));
    reach = std::max(reach, 32768 / memory_.queries[view][query].unit + std::abs(constant.back()));
  }
  const double unit = largest / reach;
  for (size_t i = 0; i < sources.size(); ++i) {
    const Packed16::Query& packed = memory_.queries[sources[i]][query];
    const double factor = unit / packed.unit;
    if (!(packed.error < hopeless16) || !std::isfinite(factor) || !std::isfinite(unit * constant[i]))
      return std::numeric_limits<double>::infinity();
    error = std::max(error, factor * (1 + packed.error) + rounding);
    gain.push_back(static_cast<float>(factor));
    offset.push_back(static_cast<float>(unit * constant[i]));
    rows.push_back(memory_.rows[sources[i]].data() + query * padded_);
  }
  kernels_.fuse16(rows.data(), gain.data(), offset.data(), static_cast<int>(rows.size()), smaller, positions(), out);
  return error;
}

}  // namespace cascade::cpu
