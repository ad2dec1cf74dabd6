// What a process has touched of mapped files counts as its memory, though the system can take it back at any time. For
// a bank larger than memory allows, pages are handed back once a fixed amount has been passed over. They stay in the
// system's cache and are there again when touched.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace cascade::cpu {

class Residency {
 public:
  static constexpr int64_t budget = int64_t{96} << 20;
  static constexpr int64_t around = int64_t{64} << 10;  // Linux maps so much around an address that is touched,
  static constexpr int64_t folio = int64_t{2} << 20;    // or, where its cache holds larger pieces, a whole piece

  // `begin` starts a page of a file that is mapped shared: of private memory the contents would be lost.
  void watch(void* begin, int64_t bytes) {
    // Else one touched byte may map 2 MB. Advice, which may fail.
    madvise(begin, static_cast<size_t>(bytes), MADV_NOHUGEPAGE);
    const std::lock_guard lock(mutex_);
    ranges_.emplace_back(begin, bytes);
    watching_ = true;
  }

  void forget(const void* begin) {
    const std::lock_guard lock(mutex_);
    std::erase_if(ranges_, [&](const auto& range) { return range.first == begin; });
  }

  bool watching() const { return watching_.load(std::memory_order_relaxed); }

  // To be told of what was passed over, at most a few megabytes at a time, by any thread.
  void touched(int64_t bytes) {
    if (!watching() || touched_.fetch_add(bytes, std::memory_order_relaxed) + bytes < budget) return;
    touched_ = 0;
    const std::lock_guard lock(mutex_);
    for (const auto& [begin, size] : ranges_) madvise(begin, static_cast<size_t>(size), MADV_DONTNEED);
  }

 private:
  std::atomic<bool> watching_ = false;
  std::atomic<int64_t> touched_ = 0;
  std::mutex mutex_;
  std::vector<std::pair<void*, int64_t>> ranges_;
};

}  // namespace cascade::cpu
