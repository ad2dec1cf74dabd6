// Which pairs of a query and a key the loss keeps out of its running sums: the members of P, and siblings left out.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu/contrast.hpp"

namespace cascade::cpu {

struct Pair {
  int64_t slot;
  int64_t query;
  double score;
};

// Of a run of keys, slots ascending.
struct Chunk {
  std::vector<Pair> members, left_out;
};

class Members {
 public:
  // For `chunks` runs of `chunk` keys.
  Members(const ContrastCall& call, int64_t chunk, int64_t chunks);

  // Fills a run of keys, whose last is before `end`. Runs may be filled at the same time.
  void find(int64_t number, int64_t end);
  Chunk& chunk(int64_t number) { return chunks_[static_cast<size_t>(number)]; }

  // To be called once all runs are filled: lets `of` know each query's members, by slot.
  void by_query();
  std::span<Pair> of(int64_t query) {
    return {found_.data() + begin_[static_cast<size_t>(query)], found_.data() + begin_[static_cast<size_t>(query) + 1]};
  }

 private:
  // Calls `use(query)` for the queries of a video.
  template <class Use>
  void queries_of(int64_t video, const Use& use) const {
    for (int32_t query = heads_[bucket(video)]; query >= 0; query = next_[static_cast<size_t>(query)])
      if (call_.query_video[query] == video) use(int64_t{query});
  }
  uint64_t bucket(int64_t video) const { return static_cast<uint64_t>(video) * 0x9e3779b97f4a7c15u >> shift_; }

  const ContrastCall& call_;
  int64_t chunk_;
  std::vector<Chunk> chunks_;  // first with what was mined
  int shift_ = 63;
  std::vector<int32_t> heads_, next_;  // hash chains of the queries by their videos
  std::vector<Pair> found_;
  std::vector<size_t> begin_;  // [B + 1]
};

}  // namespace cascade::cpu
