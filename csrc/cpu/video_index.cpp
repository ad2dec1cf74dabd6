#include "cpu/video_index.hpp"

#include <bit>
#include <cstddef>

namespace cascade::cpu {

VideoIndex::VideoIndex(const int64_t* key_video, int64_t keys)
    : key_video_(key_video),
      shift_(64 - std::bit_width(static_cast<uint64_t>(keys) | 1)),
      video_(keys),
      heads_(std::size_t{1} << (64 - shift_), -1),
      next_(keys),
      before_(keys) {
  for (int64_t slot = keys - 1; slot >= 0; --slot) link(static_cast<int32_t>(slot));
}

void VideoIndex::link(int32_t slot) {
  video_[slot] = key_video_[slot];
  int32_t& head = heads_[bucket(video_[slot])];
  next_[slot] = head;
  before_[slot] = -1;
  if (head >= 0) before_[head] = slot;
  head = slot;
}

void VideoIndex::update(int64_t first, int64_t count) {
  for (int64_t at = first; at < first + count; ++at) {
    const auto slot = static_cast<int32_t>(at);
    (before_[slot] >= 0 ? next_[before_[slot]] : heads_[bucket(video_[slot])]) = next_[slot];
    if (next_[slot] >= 0) before_[next_[slot]] = before_[slot];
    link(slot);
  }
}

}  // namespace cascade::cpu
