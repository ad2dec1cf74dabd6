#include "cpu/score_rows.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/spans.hpp"

namespace cascade::cpu {
namespace {

constexpr int64_t most_at_once = 48;   // queries
constexpr int64_t room = 2 * lanes16;  // kernels write whole vectors past the end
constexpr int64_t scores_in_cache =
    12 << 20;  // bytes of score rows that a thread holds, its share of a last-level cache
constexpr int64_t keys_in_cache = 384 << 10;  // bytes of packed keys that a run of tiles goes over

}  // namespace

ScoreRows::Memory& ScoreRows::kept_memory() {
  thread_local Memory memory;
  return memory;
}

ScoreRows::ScoreRows(const MineCall& call, std::span<const StagePacks> packed, int64_t piece, int64_t listed)
    : call_(call),
      kernels_(call.bank->kernels()),
      layout_(packed.front().front()->layout()),
      piece_(std::max<int64_t>(1, std::min(layout_.blocks, piece))),
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
  const int64_t row_bytes = padded_ * scores_bytes + listed * (scores_bytes + static_cast<int64_t>(sizeof(uint32_t)));
  const int64_t least = kernels_.least16;
  at_once_ = std::clamp<int64_t>(scores_in_cache / row_bytes / least * least, least, most_at_once);
  if (row_bytes * at_once_ > 8 * scores_in_cache) at_once_ = least;
  are_kept_ = row_bytes * at_once_ <= 2 * scores_in_cache;
}

ScoreRows::~ScoreRows() {
  if (!are_kept_) memory_ = Memory{};
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

// Groups of queries, as even as they come.
void ScoreRows::group(int64_t count) {
  groups_.clear();
  const int64_t needed = (count + kernels_.queries16 - 1) / kernels_.queries16;
  int64_t left = count;
  for (int64_t i = 0; i < needed; ++i) {
    const int64_t share = (left + (needed - i) - 1) / (needed - i);
    const int64_t least = kernels_.least16;
    groups_.push_back(static_cast<int>(std::min<int64_t>(kernels_.queries16, (share + least - 1) / least * least)));
    left = std::max<int64_t>(0, left - groups_.back());
  }
}

void ScoreRows::pack(int64_t first, int64_t count) {
  group(count);
  int64_t padded = 0;
  for (const int size : groups_) padded += size;
  std::vector<double> weights;
  for (size_t view = 0; view < views_.size(); ++view) {
    const Packed16& packed = *views_[view].packed;
    memory_.rows[view].reserve(padded * padded_);
    memory_.words[view].reserve(padded * packed.query_words());
    std::fill_n(memory_.words[view].data(), padded * packed.query_words(), 0);
    memory_.queries[view].assign(padded, {});
    memory_.errors[view].assign(padded, 0.0);
    int32_t* words = memory_.words[view].data();
    int64_t query = 0;
    weights.clear();
    for (const int size : groups_) {
      for (int i = 0; i < size && query < count; ++i, ++query) {
        Packed16::Query& made = memory_.queries[view][query];
        if (views_[view].weighs == nullptr || call_.weigh(*views_[view].weighs, first + query, weights))
          made = packed.pack_query(call_.queries, first + query, weights, words, i, size);
        else
          made.error = std::numeric_limits<double>::infinity();
        memory_.errors[view][query] = made.error;
      }
      words += size * packed.query_words();
    }
  }
}

// Every view's scores. Runs of key blocks stay in the cache while all groups of queries pass over them.
bool ScoreRows::score(int64_t first, int64_t count, int64_t piece) {
  const Span span(Phase::score);
  if (piece == 0) pack(first, count);
  begin_ = piece * piece_;
  end_ = std::min(layout_.blocks, begin_ + piece_);
  for (size_t view = 0; view < views_.size(); ++view) {
    const Packed16& packed = *views_[view].packed;
    const int64_t block_bytes = packed.steps() * lanes16 * 4;
    const int64_t run = std::max<int64_t>(1, keys_in_cache / block_bytes);
    for (int64_t start = begin_; start < end_; start += run) {
      if (should_stop()) return false;
      const int64_t stop = std::min(end_, start + run);
      call_.bank->passed((stop - start) * block_bytes);
      const MatrixUnits units(kernels_);
      const int32_t* words = memory_.words[view].data();
      int16_t* out = memory_.rows[view].data();
      for (const int size : groups_) {
        kernels_.tiles16(words, size, packed.block(start), stop - start, packed.steps(),
                         out + (start - begin_) * lanes16, padded_);
        words += size * packed.query_words();
        out += size * padded_;
      }
    }
  }
  fuse(first, count);
  return true;
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
  const bool* const mask = call_.exclude->mask == nullptr ? nullptr : call_.exclude->mask + row * layout_.keys;
  for (int64_t lane = 0; lane < layout_.lanes; ++lane) {
    const int64_t first = lane * layout_.blocks, there = std::clamp(layout_.keys - first, begin_, end_);
    const auto drop = [&](int64_t block) {
      score[(block - begin_) * layout_.lanes + lane] = no_score;
      --left;
    };
    for (int64_t block = begin_; block < there && mask != nullptr; ++block)
      if (mask[first + block]) drop(block);
    for (int64_t block = there; block < end_; ++block) drop(block);
  }
  return left;
}

// The rows of `min` and `max` stages. All views' scores are brought to the unit in which the largest possible fits.
void ScoreRows::fuse(int64_t first, int64_t count) {
  for (size_t number = 0; number < sources_.size(); ++number) {
    const std::vector<size_t>& sources = sources_[number];
    if (sources.size() == 1) continue;
    auto& row = memory_.rows[column_[number]];
    row.reserve(count * padded_);
    memory_.errors[column_[number]].resize(count);
    for (int64_t query = 0; query < count; ++query)
      memory_.errors[column_[number]][query] =
          fuse_row(sources, call_.stages[number].fusion == Fusion::min, first, query, row.data() + query * padded_);
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
