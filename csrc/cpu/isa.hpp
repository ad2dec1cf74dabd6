// One table of kernels per instruction set, and the choice among them. A kernel never throws, allocates or starts
// threads.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "core/views.hpp"

namespace cascade::cpu {

constexpr int lanes16 = 32;           // keys in a block of 16-bit keys
constexpr int lanes8 = 64;            // keys in a block of 8-bit keys
constexpr int most_queries8 = 16;     // queries that an 8-bit tile takes at most
constexpr int lanes32 = 32;           // queries side by side in the loss's tiles
constexpr int64_t run8 = 8;           // steps of an 8-bit tile whose products may be summed in 16 bits
constexpr int16_t no_score = -32768;  // marks keys that are no candidates; real 16-bit scores are above it
constexpr int max_rows16 = 16;        // score rows that `split16` carries at most
constexpr int64_t matrix_dims = 64;   // bytes of a row of a matrix tile
constexpr int64_t over_read = 4096;   // bytes past the last packed key that tiles may read, whatever they are

struct Split {
  int64_t kept;
  int64_t open;
};

// Candidates as columns: where each key sits in the packed bank, and its 16-bit score in each view that is still
// needed.
struct Columns {
  uint32_t* position;          // [n]
  int16_t* score[max_rows16];  // each [n]; the first is what the stage ranks by
};

constexpr int finer_planes = 2;

struct Kernels {
  const char* name;

  // The contract's inner products of one query with chosen keys: eight running float64 sums, then a fixed tree.
  void (*dots)(const double* query,  // [D rounded up to 8], zero padded
               const Matrix& keys,   // [K, D]
               const int64_t* rows,  // [count], or null: the rows first, first + 1, ...
               int64_t first,        // used where `rows` is null
               int64_t count,        //
               double* out);         // [count]

  // The same inner products in float32, in any order: off by at most float_error (rescore.cpp) of the true ones.
  void (*dots_float)(const float* query,  // [D rounded up to 16], zero padded
                     const Matrix& keys,  //
                     const int64_t* rows, int64_t count, float* out);

  // Tiles on matrix units: the calling thread enters before it calls `tiles16` or `tiles8` and leaves after; see
  // MatrixUnits. Null elsewhere.
  void (*enter)();
  void (*leave)();

  // Scores as the upper halves of 32-bit sums. |query| |key| < 2^31 - 2^16 in 16-bit units, so by Cauchy-Schwarz no
  // partial sum overflows, in whatever order, and no score reaches `no_score`. Where values lie in `planes16`, their
  // upper and lower bytes lie apart, both signed (packed.hpp has the layouts), and their sums as well: values may be
  // `finer_planes` times as large on either side, and a sum is divided by the square of that, rounded down. Else two
  // values are a word.
  void (*tiles16)(const int32_t* queries,  // [steps, count], or planes
                  int count,               // a multiple of `least16`, at most `queries16`
                  const int32_t* keys,     // [blocks, steps, 32], or planes
                  int64_t blocks,          //
                  int64_t steps,           //
                  int16_t* out,            // [count, blocks * 32], rows `stride` apart
                  int64_t stride);
  int queries16;
  int least16;
  bool planes16;
  int64_t piece16;  // keys whose scores are held at a time for a first stage that keeps few of many: whole blocks
  int64_t rows16 = 12 << 20;  // bytes of scores that a thread holds otherwise, its share of a last-level cache

  // How many of the scores are at least `least`. n is a multiple of 32 in all that follows.
  int64_t (*count16)(const int16_t* score, int64_t n, int16_t least);

  // The smallest score above `no_score` (32767 where none is) and the largest.
  void (*range16)(const int16_t* score, int64_t n, int16_t* low, int16_t* high);

  // Copies the scores in [low, high] and returns {how many were above, how many were copied}. Room for 32 more.
  Split (*collect16)(const int16_t* score, int64_t n, int16_t low, int16_t high, int16_t* out);

  // Moves candidates of score >= high to `kept`, those in [low, high) to `open`; low > no_score. `from.position` may be
  // null: then it is first, first + 1, ... `kept` may be `from`. `high` may be 32768. Room for 32 more in both.
  Split (*split16)(const Columns& from, uint32_t first, int64_t n, int rows, int low, int high, const Columns& kept,
                   const Columns& open);

  // The smaller (or larger) of gain * score + offset over `count` rows, rounded down; |gain * score + offset| < 32767.
  void (*fuse16)(const int16_t* const* score,  // [count] rows of n
                 const float* gain,            // [count]
                 const float* offset,          // [count]
                 int count,                    //
                 bool smaller,                 //
                 int64_t n,                    //
                 int16_t* out);                // [n]

  // How many of the values are at least `least`; any n.
  int64_t (*count_float)(const float* value, int64_t n, float least);

  // The smallest and largest of the values above `over`; +infinity and -infinity where none is.
  void (*range_float)(const float* value, int64_t n, float over, float* low, float* high);

  // Upper bounds u = scale * I + beta * residual, I the integer inner product, of groups of n = `queries8` queries and
  // 64 keys. Null where this instruction set has no 8-bit product. `any` tells which queries of each group have a lane
  // with u >= least; the rows of others say nothing. Queries must lie within `most8`. Where it `sums_runs`, the inner
  // product over the first two bytes of `run8` steps must fit 16 bits, and so that over the last two (packed8.cpp sees
  // to it).
  void (*tiles8)(const int8_t* queries,  // [groups, steps, n, 4]; or `by_row8` [groups, n, steps, 4], the steps' bytes
                                         // filled up with zeros to a multiple of `matrix_dims`
                 int64_t groups,         //
                 const uint8_t* keys,    // [steps, 64, 4], 128 added to each
                 int64_t steps,          //
                 const int32_t* start,   // [groups, n]: -128 times the sum of the query; or [groups, n, runs]: in each
                                         // half of a word that of the half's bytes
                 const float* scale,     // [64]; NaN in empty lanes, so that no comparison holds
                 const float* residual,  // [64]
                 const float* least,     // [groups, n]
                 const float* beta,      // [groups, n]
                 float* upper,           // [groups, n, 64]
                 uint64_t* lanes,        // [groups, n]: the lanes that reach `least`
                 uint32_t* any);         // [groups]
  int queries8;                          // at most `most_queries8`
  bool by_row8;                          //
  int most8;                             // the largest byte of a query
  bool sums_runs;                        // sums products of `run8` steps in 16 bits, not all in 32
  int64_t fewest8;                       // a smaller bank takes 16 bits: a query's preparation costs more than tiles
  int64_t few8;                          // a stage that keeps more than one key in so many takes 16 bits too

  // The loss's scores of 32 queries and some keys: inner products in float32, divided by the temperature.
  void (*scores32)(const float* queries,       // [D, 32]
                   const float* keys,          // [n, D], rows `stride` apart
                   int64_t stride,             //
                   int64_t n,                  //
                   int64_t dim,                //
                   const float* next,          // values wanted soon:
                   int64_t ahead,              // so many are fetched into the cache by the way
                   const float (&inverse)[2],  // 1 / temperature in two parts
                   float* out);                // [n, 32]

  // Takes those scores into a running softmax; they become its weights, exp(score - top). -infinity does not count.
  void (*absorb32)(float* score,       // [n, 32]
                   const float* keys,  // [n, D], rows `stride` apart
                   int64_t stride,     //
                   int64_t n,          //
                   int64_t dim,        //
                   const float* next, int64_t ahead,
                   float* top,         // [32], finite
                   double* sum,        // [32], of all weights
                   float* direction);  // [D, 32], of weight times key; null where it is not wanted
};

// The calling thread's right to use `tiles16` and `tiles8` while this object lives. Not beyond a `should_stop`: that
// runs signal handlers, and what they call may use the units too and leave them.
class MatrixUnits {
 public:
  explicit MatrixUnits(const Kernels& kernels) : leave_(kernels.leave) {
    if (kernels.enter != nullptr) kernels.enter();
  }
  ~MatrixUnits() {
    if (leave_ != nullptr) leave_();
  }
  MatrixUnits(const MatrixUnits&) = delete;
  MatrixUnits& operator=(const MatrixUnits&) = delete;

 private:
  void (*leave_)();
};

// Each lives in a file of its own, compiled for that instruction set; it exports nothing else.
const Kernels& portable_kernels() noexcept;
#if defined(__x86_64__)
const Kernels& avx2_kernels() noexcept;
const Kernels& avx512_kernels() noexcept;
const Kernels& amx_kernels() noexcept;
#elif defined(__aarch64__)
const Kernels& neon_kernels() noexcept;
#endif

struct Isa {
  const char* name;
  const char* needs;            // what it asks of the machine, in words
  bool (*runs_here)();          //
  const Kernels& (*kernels)();  //
};

// The instruction sets built into this library, best first.
std::span<const Isa> isas();

// The one called `name`, or the best that runs here where `name` is empty.
// Throws std::invalid_argument for a name not built in, std::runtime_error for one that this machine lacks.
const Kernels& choose(const std::string& name);

}  // namespace cascade::cpu
