// Which keys were cut from a video: hash chains over the slots, changed in place as a queue overwrites them.
#pragma once

#include <cstdint>
#include <vector>

namespace cascade::cpu {

class VideoIndex {
 public:
  VideoIndex(const int64_t* key_video, int64_t keys);

  // The slots [first, first + count) now hold other keys.
  void update(int64_t first, int64_t count);

  // Calls `use(slot)` for every key of the video.
  template <class Use>
  void each(int64_t video, const Use& use) const {
    for (int32_t slot = heads_[bucket(video)]; slot >= 0; slot = next_[slot])
      if (video_[slot] == video) use(int64_t{slot});
  }

 private:
  uint64_t bucket(int64_t video) const { return static_cast<uint64_t>(video) * 0x9e3779b97f4a7c15u >> shift_; }
  void link(int32_t slot);

  const int64_t* key_video_;
  int shift_;
  std::vector<int64_t> video_;  // [K], what each slot was linked under
  std::vector<int32_t> heads_, next_, before_;
};

}  // namespace cascade::cpu
