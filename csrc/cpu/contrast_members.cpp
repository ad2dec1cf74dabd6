#include "cpu/contrast_members.hpp"

#include <algorithm>
#include <bit>

namespace cascade::cpu {
namespace {

constexpr uint64_t heads_a_query = 32;  // so few keys of other videos meet a chain

}  // namespace

Members::Members(const ContrastCall& call, int64_t chunk, int64_t chunks)
    : call_(call), chunk_(chunk), chunks_(chunks) {
  for (int64_t query = 0; query < call.batch; ++query)
    for (int64_t i = 0; i < call.width; ++i)
      if (const int64_t slot = call.mined[query * call.width + i]; slot >= 0)
        chunks_[static_cast<size_t>(slot / chunk_)].members.push_back({slot, query, 0});
  if (call.query_video == nullptr) return;
  const uint64_t heads = std::bit_ceil((static_cast<uint64_t>(call.batch) + 1) * heads_a_query);
  shift_ = 64 - std::countr_zero(heads);
  heads_.assign(heads, -1);
  next_.resize(static_cast<size_t>(call.batch));
  for (int64_t query = 0; query < call.batch; ++query) {
    int32_t& head = heads_[bucket(call.query_video[query])];
    next_[static_cast<size_t>(query)] = head;
    head = static_cast<int32_t>(query);
  }
}

void Members::find(int64_t number, int64_t end) {
  std::vector<Pair>&members = chunk(number).members, &left_out = chunk(number).left_out;
  const auto before = [](const Pair& a, const Pair& b) {
    return a.slot != b.slot ? a.slot < b.slot : a.query < b.query;
  };
  const auto same = [](const Pair& a, const Pair& b) { return a.slot == b.slot && a.query == b.query; };
  const bool has_siblings = call_.query_video != nullptr;
  if (has_siblings)
    std::erase_if(members,
                  [&](const Pair& each) { return call_.key_video[each.slot] == call_.query_video[each.query]; });
  std::sort(members.begin(), members.end(), before);
  members.erase(std::unique(members.begin(), members.end(), same), members.end());
  if (!has_siblings || call_.siblings == Siblings::negative) return;
  std::vector<Pair>& siblings = call_.siblings == Siblings::positive ? members : left_out;
  const auto mined = static_cast<int64_t>(siblings.size());
  for (int64_t slot = number * chunk_; slot < end; ++slot)
    queries_of(call_.key_video[slot], [&](int64_t query) { siblings.push_back({slot, query, 0}); });
  std::inplace_merge(siblings.begin(), siblings.begin() + mined, siblings.end(),
                     [](const Pair& a, const Pair& b) { return a.slot < b.slot; });
}

void Members::by_query() {
  begin_.assign(static_cast<size_t>(call_.batch) + 1, 0);
  for (const Chunk& each : chunks_)
    for (const Pair& pair : each.members) ++begin_[static_cast<size_t>(pair.query) + 1];
  for (size_t query = 0; query + 1 < begin_.size(); ++query) begin_[query + 1] += begin_[query];
  found_.resize(begin_.back());
  std::vector<size_t> next(begin_.begin(), begin_.end());
  for (const Chunk& each : chunks_)
    for (const Pair& pair : each.members) found_[next[static_cast<size_t>(pair.query)]++] = pair;
}

}  // namespace cascade::cpu
