// Candidates of a first stage that keeps few of many keys, on 16-bit scores of one piece of the bank after the other:
// of each, what reaches the threshold among those listed before, less the width of the bound. That threshold only
// grows, so none is missed that the last one admits, and what a thread holds depends on what the stage keeps, not on K.
// Where nothing can be ruled out, as among equal scores, a list is given up and its query takes the exact path.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/buffer.hpp"
#include "cpu/score_rows.hpp"

namespace cascade::cpu {

class CandidateLists {
 public:
  static constexpr int64_t most_together = 48;  // queries of a thread

  // Of a call where so many queries of a thread would fit with their scores of all keys.
  static bool are_worth(const MineCall& call, int64_t would_fit);
  // Of a call that they are worth: candidates that a query's list has at most beside a piece's.
  static int64_t limit(const MineCall& call);

  CandidateLists(const MineCall& call, ScoreRows& rows);
  ~CandidateLists();
  CandidateLists(const CandidateLists&) = delete;
  CandidateLists& operator=(const CandidateLists&) = delete;

  // Begins the list of query `query` of those scored together, the call's `row`.
  void start(int64_t row, int64_t query);
  // Lists its candidates of the piece that was scored last.
  void add(int64_t row, int64_t query);

  bool is_lost(int64_t query) const { return memory_.lists[query].is_lost; }
  int64_t count(int64_t query) const { return memory_.lists[query].count; }
  const uint32_t* positions(int64_t query) const { return memory_.lists[query].position.data(); }
  // The scores of its candidates in the columns of `rows`; null for columns that no stage has.
  void scores(int64_t query, std::vector<int16_t*>& column);

 private:
  struct List {
    Buffer<uint32_t> position;
    std::vector<Buffer<int16_t>> score;  // of each column
    std::vector<int64_t> of_video;       // positions that are no candidates
    int64_t count = 0, limit = 0;        // the threshold is found anew beyond
    int least = no_score + 1;
    bool is_lost = false;

    void reserve(int64_t size, size_t rows);
    Columns columns(int64_t from, size_t rows);
  };
  struct Memory {
    std::vector<List> lists;
    List open;  // what a split does not keep
    Buffer<int16_t> middle;
  };
  static Memory& kept_memory();

  void tighten(List& list, int64_t query);

  const MineCall& call_;
  const Kernels& kernels_;
  ScoreRows& rows_;
  int64_t first_limit_;
  std::vector<size_t> listed_;  // the columns that lists have
  Memory& memory_ = kept_memory();
};

}  // namespace cascade::cpu
