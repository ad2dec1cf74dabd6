#include "cpu/candidate_lists.hpp"

#include <algorithm>
#include <type_traits>

#include "cpu/spans.hpp"
#include "cpu/threshold.hpp"

namespace cascade::cpu {
namespace {

constexpr int64_t share_listed = 16;  // a first stage that keeps one key in so many at most has its candidates listed
constexpr int64_t share_first = 8;    // of a piece: candidates that a list has, at least, when its threshold is found
constexpr int64_t share_lost = 4;     // of the bank: a list that is longer even then is given up

}  // namespace

void CandidateLists::List::reserve(int64_t size, size_t rows) {
  const auto grow = [&](auto& buffer) {
    if (size <= buffer.size()) return;
    std::remove_reference_t<decltype(buffer)> larger(std::max(size, buffer.size() * 3 / 2));
    std::copy_n(buffer.data(), count, larger.data());
    buffer = std::move(larger);
  };
  grow(position);
  for (size_t row = 0; row < rows; ++row) grow(score[row]);
}

Columns CandidateLists::List::columns(int64_t from, size_t rows) {
  Columns made{.position = position.data() + from, .score = {}};
  for (size_t row = 0; row < rows; ++row) made.score[row] = score[row].data() + from;
  return made;
}

CandidateLists::Memory& CandidateLists::kept_memory() {
  thread_local Memory memory;
  return memory;
}

bool CandidateLists::are_worth(const MineCall& call, int64_t would_fit) {
  const auto over_bank = [](const Stage& stage) { return stage.over_bank; };
  return would_fit < most_together && call.stages[0].keep <= call.bank->size() / share_listed &&
         std::none_of(call.stages.begin() + 1, call.stages.end(), over_bank);
}

int64_t CandidateLists::limit(const MineCall& call) {
  return 2 * std::max(call.stages[0].keep, call.bank->kernels().piece16 / share_first);
}

CandidateLists::CandidateLists(const MineCall& call, ScoreRows& rows)
    : call_(call), kernels_(call.bank->kernels()), rows_(rows), first_limit_(limit(call)) {
  for (size_t stage = 0; stage < rows.stages(); ++stage)
    if (std::find(listed_.begin(), listed_.end(), rows.column(stage)) == listed_.end())
      listed_.push_back(rows.column(stage));
  memory_.lists.resize(std::max(memory_.lists.size(), static_cast<size_t>(rows.at_once())));
  const auto have = [&](List& list) { list.score.resize(std::max(list.score.size(), listed_.size())); };
  std::for_each(memory_.lists.begin(), memory_.lists.end(), have);
  have(memory_.open);
}

CandidateLists::~CandidateLists() {
  if (!rows_.are_kept()) memory_ = Memory{};
}

void CandidateLists::start(int64_t row, int64_t query) {
  List& list = memory_.lists[query];
  list.count = 0;
  list.limit = first_limit_;
  list.least = no_score + 1;
  list.is_lost = false;
  rows_.find_video(row, list.of_video);
}

void CandidateLists::add(int64_t row, int64_t query) {
  const Span span(Phase::select);
  const size_t rows = listed_.size();
  List& list = memory_.lists[query];
  list.is_lost = list.is_lost || !(rows_.error(0, query) < hopeless16);
  if (list.is_lost) return;
  Columns from{.position = nullptr, .score = {}};
  for (size_t each = 0; each < rows; ++each) from.score[each] = rows_.row(listed_[each], query);
  rows_.mark(row, from.score[0], list.of_video);
  list.reserve(list.limit + rows_.padded(), rows);
  memory_.open.reserve(rows_.padded(), rows);
  list.count += kernels_
                    .split16(from, rows_.first_position(), rows_.positions(), static_cast<int>(rows), list.least,
                             list.least, list.columns(list.count, rows), memory_.open.columns(0, rows))
                    .kept;
  if (list.count > list.limit) tighten(list, query);
}

// Finds the threshold anew and drops what is below.
void CandidateLists::tighten(List& list, int64_t query) {
  const size_t rows = listed_.size();
  const int width = rows_.width(0, query);
  const int64_t room = list.count + 3 * lanes16;
  memory_.open.reserve(room, rows);
  memory_.middle.reserve(room);
  const Columns all = list.columns(0, rows);
  const int64_t n = pad_scores(all.score[0], list.count);
  const Threshold theta =
      find_threshold(kernels_, all.score[0], n, list.count, call_.stages[0].keep, width / 8, memory_.middle.data());
  list.least = std::max(theta.low - width + 1, no_score + 1);
  list.count =
      kernels_.split16(all, 0, n, static_cast<int>(rows), list.least, list.least, all, memory_.open.columns(0, rows))
          .kept;
  list.limit = std::max(first_limit_, 2 * list.count);
  list.is_lost = list.count > rows_.layout().keys / share_lost;
}

void CandidateLists::scores(int64_t query, std::vector<int16_t*>& column) {
  for (size_t each = 0; each < listed_.size(); ++each) column[listed_[each]] = memory_.lists[query].score[each].data();
}

}  // namespace cascade::cpu
