// What the threads of a call work with: objects that are costly to make or gather something over many parts.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/pool.hpp"

namespace cascade::cpu {

// Lends each part an object that no other part has meanwhile; there are never more than threads.
template <class Worker>
class Workers {
 public:
  explicit Workers(std::function<std::unique_ptr<Worker>()> make) : make_(std::move(make)) {}

  // Calls `use(worker)`.
  template <class Use>
  void lend(const Use& use) {
    std::unique_ptr<Worker> worker = take();
    use(*worker);
    const std::lock_guard lock(mutex_);
    idle_.push_back(std::move(worker));
  }

  // Calls `use(worker)` for each there is, on the threads of the call, once no part has one.
  template <class Use>
  void each(const Control& control, const Use& use) {
    run_parts(static_cast<int>(idle_.size()), control, [&](int part, int) { use(*idle_[part]); });
  }

 private:
  std::unique_ptr<Worker> take() {
    {
      const std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        std::unique_ptr<Worker> worker = std::move(idle_.back());
        idle_.pop_back();
        return worker;
      }
    }
    return make_();
  }

  std::function<std::unique_ptr<Worker>()> make_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> idle_;
};

}  // namespace cascade::cpu
