// The 16-bit scores of all keys for some queries at a time, a row a query: what stages that keep a large share work
// on. The threads of a call share the keys, so that each key meets all those queries while it is in a cache, and go on
// with a row each as they come free. Or, within a thread, the scores of one piece of the keys after the other, for a
// first stage that keeps few of them.
//
// There is a column of rows for each distinct packed view, once more where a `zsum` weighs its queries, and after those
// one for each stage of several (`min`, `max`). Such a stage's views are brought to one unit and fused: the smaller or
// larger of certified scores is a certified score.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "cpu/buffer.hpp"
#include "cpu/fast.hpp"
#include "cpu/pool.hpp"

namespace cascade::cpu {

constexpr double hopeless16 = 4096;  // an error in score units with which the band is most of the bank

class ScoreRows {
 public:
  struct Extent {
    int64_t piece = all_blocks;  // blocks of keys that a row has
    int64_t listed = 0;          // candidates of a query that are held beside it, a score in each column
    int threads = 1;             // that work on the rows
    int64_t at_most = 256;       // queries scored together, for each thread
  };

  // `packed` as in `dense_queries`. Rows are kept by the thread from call to call, unless they are uncommonly large.
  ScoreRows(const MineCall& call, std::span<const StagePacks> packed, const Extent& extent);
  ~ScoreRows();
  ScoreRows(const ScoreRows&) = delete;
  ScoreRows& operator=(const ScoreRows&) = delete;

  static constexpr int64_t all_blocks = int64_t{1} << 40;

  const Layout& layout() const { return layout_; }
  int64_t pieces() const { return (layout_.blocks + piece_ - 1) / piece_; }
  int64_t padded() const { return padded_; }    // a row's length with the room that kernels write past the end
  int64_t at_once() const { return at_once_; }  // queries that are scored together, at most
  bool are_kept() const { return are_kept_; }
  int64_t key_bytes() const;  // of all views' packed keys
  size_t columns() const { return columns_; }
  size_t stages() const { return column_.size(); }
  size_t column(size_t stage) const { return column_[stage]; }

  // Scores the queries [begin, end) with all keys on the threads of `control`, as many queries together as there is
  // memory for, and calls `use(first, from, to)` for runs of them: the queries first + [from, to), `first` the first of
  // those scored together.
  void score_all(int64_t begin, int64_t end, const Control& control,
                 const std::function<void(int64_t first, int64_t from, int64_t to)>& use);
  // With a piece's keys, the pieces in turn, on this thread; false where the call is to stop.
  bool score_piece(int64_t first, int64_t count, int64_t piece);

  // Makes a query's rows of `min` and `max` stages from those of their views; to be called before they are asked for.
  void fuse(int64_t first, int64_t query);

  uint32_t first_position() const { return static_cast<uint32_t>(begin_ * layout_.lanes); }  // of the piece scored last
  int64_t positions() const { return (end_ - begin_) * layout_.lanes; }                      //

  // Marks what is no candidate for a query in its scores of all keys; returns how many candidates are left.
  int64_t mark(int64_t row, int16_t* score) const;
  // In its scores of a piece, where the positions of all keys of the query's video are known, in order.
  void mark(int64_t row, int16_t* score, std::span<const int64_t> of_video) const;
  // Those positions, none where no video is excluded.
  void find_video(int64_t row, std::vector<int64_t>& positions) const;

  // Of the query first + `query`: its scores [positions], and by how much a stage's may be off.
  int16_t* row(size_t column, int64_t query) { return memory_.rows[column].data() + query * padded_; }
  double error(size_t stage, int64_t query) const { return memory_.errors[column_[stage]][query]; }
  // The least difference of two scores that proves their order.
  int width(size_t stage, int64_t query) const { return static_cast<int>(1 + 2 * error(stage, query)) + 1; }

 private:
  int64_t mark_others(int64_t row, int16_t* score) const;

  struct Memory {
    std::vector<Buffer<int16_t>> rows;                  // per column: [queries at a time, padded]
    std::vector<std::vector<double>> errors;            // per column: [queries at a time]
    std::vector<Buffer<int32_t>> words;                 // per view: the packed queries
    std::vector<std::vector<Packed16::Query>> queries;  // per view: [queries at a time]
  };
  struct Source {
    const Packed16* packed;
    const Stage* weighs;  // or null
  };
  static Memory& kept_memory();

  size_t source(const Packed16* packed, const Stage& stage);

  void score(int64_t first, int64_t count, const Control& control);
  void lay(int64_t count);
  void pack(int64_t first, int64_t begin, int64_t end);
  void tiles(size_t view, int64_t start, int64_t stop);
  int64_t blocks_in_cache(size_t view) const;
  double fuse_row(const std::vector<size_t>& sources, bool smaller, int64_t first, int64_t query, int16_t* out) const;

  const MineCall& call_;
  const Kernels& kernels_;
  Layout layout_;
  int64_t piece_;        // blocks
  int64_t begin_, end_;  // blocks
  int64_t padded_;
  std::vector<Source> views_;
  std::vector<size_t> column_;                // per bounded stage
  std::vector<std::vector<size_t>> sources_;  // per bounded stage, the views that its column is made of
  size_t columns_ = 0;
  std::vector<int> groups_;
  int64_t at_once_;
  bool are_kept_;
  Memory& memory_ = kept_memory();
};

}  // namespace cascade::cpu
