// The CPU backend's border: what a call needs, checked by the caller, and where its answer goes.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "core/plan.hpp"
#include "core/views.hpp"
#include "cpu/covariance.hpp"
#include "cpu/isa.hpp"
#include "cpu/packed.hpp"
#include "cpu/pool.hpp"
#include "cpu/shelf.hpp"
#include "cpu/video_index.hpp"

namespace cascade::cpu {

// A bank with all that is prepared for its searches: each part is made when first needed and kept.
class Bank {
 public:
  // The keys must outlive the bank. With a shelf, whose keys are in files that are mapped shared and never change, what
  // is large is kept there, and all that is mapped is held to `Residency::budget` bytes of memory.
  Bank(std::vector<Matrix> views, const int64_t* key_video, Metric metric, const Kernels& kernels,
       std::unique_ptr<Shelf> shelf = nullptr);

  int64_t size() const { return views_.empty() ? 0 : views_.front().rows; }
  std::span<const Matrix> views() const { return views_; }
  const int64_t* key_video() const { return key_video_; }
  Metric metric() const { return metric_; }
  const Kernels& kernels() const { return *kernels_; }

  // Each key's inner product with itself in the contract's order, [K]; empty for inner products, which need none.
  std::span<const double> squared_norms(int32_t view) const { return squared_norms_[view]; }

  // The contract's inner products with `keys`, or with `count` keys from `first` on where `keys` is null.
  void dots(const double* query, int32_t view, const int64_t* keys, int64_t first, int64_t count, double* out) const;

  // To be told of packed bytes that were passed over.
  void passed(int64_t bytes) const {
    if (shelf_ != nullptr) shelf_->residency().touched(bytes);
  }
  Shelf* shelf() const { return shelf_.get(); }

  // Side by side packed views, and the index of videos; safe to call from several threads.
  const Packed16& packed16(std::span<const int32_t> views, const Control& control);
  const Packed8& packed8(std::span<const int32_t> views, const Control& control);
  const VideoIndex& videos();

  // For a call of `batch` queries; null until so many have asked that finding it costs less than scoring theirs.
  const Covariance* covariance(int32_t view, int64_t batch, const Control& control);

  // No stored row of the view is longer; infinity where finding out would cost a pass over a mapped file.
  double longest(int32_t view);

  // Inner products with `keys` in float32 (isa.hpp); the query is padded to a multiple of 16.
  void dots_float(const float* query, int32_t view, const int64_t* keys, int64_t count, float* out) const;

  // Counts queries, so that one lonely query does not pay for packing a large bank: true once packing is worth it.
  bool worth_packing(int64_t batch);

  // The keys in rows [first, first + count) were overwritten: brings what was made of them up to date.
  void update(int64_t first, int64_t count);

 private:
  template <class Use>
  void in_reach(int64_t count, int64_t reach, const Use& use) const;

  std::vector<Matrix> views_;
  const int64_t* key_video_;
  Metric metric_;
  const Kernels* kernels_;
  std::unique_ptr<Shelf> shelf_;  // outlives what is packed in its files
  std::vector<std::vector<double>> squared_norms_;
  // Making takes long and asks for signals meanwhile, whose handlers may mine with this bank: the caller may come again
  // while it is making. It then makes what it needs in memory and leaves alone what is being made.
  class Making {
   public:
    explicit Making(Bank& bank) : bank_(bank), is_nested_(bank.maker_ == caller()) {
      if (is_nested_) return;
      bank_.making_.lock();
      bank_.maker_ = caller();
    }
    ~Making() {
      if (is_nested_) return;
      bank_.maker_ = std::thread::id();
      bank_.making_.unlock();
    }
    Making(const Making&) = delete;
    Making& operator=(const Making&) = delete;
    bool is_nested() const { return is_nested_; }

   private:
    Bank& bank_;
    bool is_nested_;
  };
  template <class Packed>
  const Packed& made(std::map<std::vector<int32_t>, std::unique_ptr<Packed>>& all, std::span<const int32_t> views,
                     const Control& control, const Making& making);

  std::mutex making_;
  std::atomic<std::thread::id> maker_;  // the caller that is making
  std::vector<double> longest_;         // per view; negative where not yet known
  std::map<std::vector<int32_t>, std::unique_ptr<Packed16>> packed16_;
  std::map<std::vector<int32_t>, std::unique_ptr<Packed8>> packed8_;
  struct Spread {
    std::unique_ptr<Covariance> covariance;
    int64_t asked = 0;  // queries since it was found
  };
  std::vector<Spread> spreads_;  // per view
  std::unique_ptr<VideoIndex> videos_;
  int64_t asked_ = 0;
  int64_t overwritten_ = 0;  // keys since the packed views learned their means and scales
};

// Where a call writes. Rows short of candidates end in -1 and -infinity.
struct Answer {
  int64_t* index;                  // [B, k]
  float* similarity;               // [B, k]
  std::span<int64_t* const> kept;  // per stage [B, keep], or empty where no trace is wanted
};

// The plan's stages over a bank's keys. `queries` are per view of the bank; a view that no stage uses may have no data.
void mine(Bank& bank, std::span<const Stage> stages, std::span<const Matrix> queries, int64_t batch,
          const Exclusion& exclude, const Control& control, const Answer& answer);

// The plan's stages over given similarities, float32 or float64, per view [B, K].
void select(std::span<const Stage> stages, std::span<const Matrix> similarities, const Exclusion& exclude,
            const Control& control, const Answer& answer);

}  // namespace cascade::cpu
