// Keys in fixed point, packed once and searched many times.
//
// The bound. Write p = p^ + e_p and y = y^ + e_y, where p^ and y^ are what the integers stand for. Then
//   <p, y> - <p^, y^> = <e_p, y> + <p^, e_y>,   so   |<p, y> - <p^, y^>| <= |e_p| |y| + |p^| |e_y|.
// <p^, y^> is an exact integer times the two scales. The norms on the right are not estimated: they are measured in
// float64 when a row is packed, and rounded up.
//
// 8-bit keys have a bound each, one product long. Where a query loses the share |e_p| / |p^| of its length, the right
// is |p^| (|e_y| + |e_p| / |p^| |y|); a key stores r = |e_y| + share |y| for the share that queries are expected to
// lose, and beta = max(|p^|, |e_p| / share) makes beta r no less than that for any query. So what a long key costs is
// its own: with the bank's longest row in place of |y|, a stage over keys of widely spread lengths ruled nothing out.
//
// Keys are interleaved: slot = block + lane * blocks, so that every block is a strided sample of the bank even where
// neighbours are clips of one video, and thresholds guessed from a few blocks are fair.
#pragma once

#include <bit>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cpu/buffer.hpp"
#include "cpu/embedding.hpp"
#include "cpu/isa.hpp"
#include "cpu/pool.hpp"
#include "cpu/shelf.hpp"

namespace cascade::cpu {

// Slots and positions (block * lanes + lane) of an interleaved bank.
struct Layout {
  int64_t keys;
  int64_t blocks;
  int64_t lanes;  // a power of two

  Layout(int64_t keys_, int64_t lanes_) : keys(keys_), blocks((keys_ + lanes_ - 1) / lanes_), lanes(lanes_) {}
  int64_t positions() const { return blocks * lanes; }
  int64_t slot(int64_t position) const {
    return (position >> std::countr_zero(static_cast<uint64_t>(lanes))) + (position & (lanes - 1)) * blocks;
  }
  int64_t position(int64_t slot) const { return slot % blocks * lanes + slot / blocks; }
};

// 16 bits a value, one scale for the whole bank: integer scores of a query compare directly.
//
// Two values are a word, [blocks, steps, 32 keys]. Or, for units that multiply matrices of bytes, the upper and the
// lower bytes of the values lie in planes: four dims of a key are a word, [blocks, plane, key % 2, steps / 2, key / 2],
// of a query [plane, query, dims filled up to a multiple of 64]. value = 256 * upper + lower, both signed.
class Packed16 {
 public:
  // Where there is a shelf, packed in a file of its, or taken from there. Then rows cannot be repacked.
  Packed16(std::span<const Matrix> bank, Metric metric, std::vector<int32_t> views, const Kernels& kernels,
           const Control& control, Shelf* shelf = nullptr);

  // Repacks rows in place. False where a row is too long for the bank's scale: the whole bank must be packed anew.
  bool update(int64_t first, int64_t count);

  const Embedding& embedding() const { return embedding_; }
  const Layout& layout() const { return layout_; }
  int64_t steps() const { return steps_; }
  const int32_t* block(int64_t number) const { return words_.data() + number * steps_ * lanes16; }

  struct Query {
    double error;  // of scores, in units of the tiles' scores; infinite where the query fits no scale
    double unit;   // of scores: <p, y> * unit lies in [score - error, score + 1 + error]
  };
  // Words of a tile's queries that each of them takes.
  int64_t query_words() const { return planes_ ? padded_dims() / 2 : steps_; }
  // Writes the words of the query that is number `place` of `count` in a tile, whose words start at `words`.
  Query pack_query(std::span<const Matrix> queries, int64_t row, std::span<const double> weights, int32_t* words,
                   int64_t place, int64_t count) const;

 private:
  template <class Use>
  void parameters(const Use& use) {
    embedding_.parameters(use);
    for (double* value : {&scale_, &longest_, &residual_}) use(*value);
    for (double& value : stored_) use(value);
  }
  double pack(int64_t row, const double* y);
  void place_key(int64_t position, const int16_t* integers);
  void place_query(const int16_t* integers, int32_t* words, int64_t place, int64_t count) const;
  int64_t padded_dims() const { return (2 * steps_ + matrix_dims - 1) / matrix_dims * matrix_dims; }

  std::unique_ptr<KeptFile> file_;  // what words_ lies in, or null
  Embedding embedding_;
  Layout layout_;
  bool planes_;
  int64_t steps_;               // pairs of dims
  double scale_ = 1;            // integer = value * scale
  double longest_ = 0;          // the largest |y| that the scale admits
  double residual_ = 0;         // the largest |e_y|
  std::vector<double> stored_;  // per view, the longest row as stored
  Buffer<int32_t> words_;       // of the keys
};

// Four 8-bit values a word, a scale and r for each key.
class Packed8 {
 public:
  Packed8(std::span<const Matrix> bank, Metric metric, std::vector<int32_t> views, const Kernels& kernels,
          const Control& control, Shelf* shelf = nullptr);

  // Repacks rows in place; false where that cannot be.
  bool update(int64_t first, int64_t count);

  const Embedding& embedding() const { return embedding_; }
  const Layout& layout() const { return layout_; }
  int64_t steps() const { return steps_; }
  const uint8_t* block(int64_t number) const { return bytes_.data() + number * steps_ * lanes8 * 4; }
  const float* scale(int64_t number) const { return scale_.data() + number * lanes8; }
  const float* residual(int64_t number) const { return residual_.data() + number * lanes8; }

  // How many words of a tile's `start` belong to a query.
  int64_t runs() const { return sums_runs_ ? (steps_ + run8 - 1) / run8 : 1; }

  // The longest row of a view as it is stored, or a little less by rounding; negative where the view is not packed
  // here.
  double longest(int32_t view) const;

  struct Query {
    float beta;    // in the tile's units: how much of a key's r an upper bound adds
    float margin;  // the rest of the bound, the same for all keys: the contract's own rounding
  };
  // In the tile's units the score lies in [u - 2 beta residual - margin, u + margin] for the tile's result u.
  // Writes its bytes [steps * 4], in order, and its words of `start` [runs].
  Query pack_query(std::span<const Matrix> queries, int64_t row, std::span<const double> weights, int8_t* bytes,
                   int32_t* start) const;

 private:
  template <class Use>
  void parameters(const Use& use) {
    embedding_.parameters(use);
    for (double* value : {&unit_, &share_, &loudest_}) use(*value);
    for (double& value : stored_) use(value);
  }
  double pack(int64_t row, double* y);
  double squared_half_run(const int8_t* integers) const;
  void start_query(const int8_t* bytes, int32_t* start) const;
  void learn(Shelf* shelf);

  std::unique_ptr<KeptFile> file_;  // what the buffers lie in, or null
  Embedding embedding_;
  Layout layout_;
  int64_t steps_;
  int most8_;
  bool sums_runs_;
  double loudest_ = 0;  // the largest `squared_half_run` of a key
  double unit_ = 1;     // keys are divided by this, so that floats serve whatever the features' size
  double share_ = 1;    // of its length that a query is expected to lose
  std::vector<double> stored_;
  Buffer<uint8_t> bytes_;   // [blocks, steps, 64, 4], 128 added
  Buffer<float> scale_;     // [blocks, 64], NaN in empty lanes
  Buffer<float> residual_;  // [blocks, 64], r
};

}  // namespace cascade::cpu
