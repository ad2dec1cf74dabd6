#include "cpu/pool.hpp"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/float_mode.hpp"

namespace cascade::cpu {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto poll_every = std::chrono::milliseconds(30);
constexpr int spins = 4000;  // about 20 us: shorter than a sleep and wake-up, too short to hurt a neighbour

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// What the parts of one call share.
struct Call {
  const Control* control = nullptr;
  std::atomic<bool> stop{false};
  Clock::time_point next_poll = Clock::now() + poll_every;
  std::mutex failing;
  std::exception_ptr failure;

  void poll() {  // on the calling thread
    if (control->interrupted == nullptr || stop.load(std::memory_order_relaxed) || Clock::now() < next_poll) return;
    next_poll = Clock::now() + poll_every;
    if (control->interrupted()) stop.store(true, std::memory_order_relaxed);
  }

  void run(const std::function<void(int, int)>& work, int part, int parts);
};

thread_local Call* current = nullptr;
thread_local bool calling = false;

void Call::run(const std::function<void(int, int)>& work, int part, int parts) {
  Call* const outer = current;
  current = this;
  try {
    const FloatMode mode;
    work(part, parts);
  } catch (...) {
    const std::lock_guard lock(failing);
    if (!failure) failure = std::current_exception();
    stop.store(true, std::memory_order_relaxed);
  }
  current = outer;
}

class Pool {
 public:
  // False where another call holds the pool.
  bool run(Call& call, const std::function<void(int, int)>& work, int parts) {
    const std::unique_lock busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    while (static_cast<int>(threads_.size()) < parts - 1)
      threads_.emplace_back(&Pool::serve, this, static_cast<int>(threads_.size()) + 1, generation_.load());
    call_ = &call;
    work_ = &work;
    parts_ = parts;
    // Every worker answers every generation, also those without a part: none may still read the call when it ends.
    left_.store(static_cast<int>(threads_.size()));
    {
      const std::lock_guard lock(mutex_);
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    call.run(work, 0, parts);
    for (int i = 0; i < spins && left_.load() > 0; ++i) relax();
    std::unique_lock lock(mutex_);
    while (!done_.wait_for(lock, poll_every, [this] { return left_.load() == 0; })) {
      lock.unlock();
      call.poll();
      lock.lock();
    }
    return true;
  }

 private:
  void serve(int part, uint64_t seen) {
    for (;;) {
      for (int i = 0; i < spins && generation_.load() == seen; ++i) relax();
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        seen = generation_.load();
      }
      if (part < parts_) call_->run(*work_, part, parts_);
      if (left_.fetch_sub(1) == 1) {
        const std::lock_guard lock(mutex_);
        done_.notify_one();
      }
    }
  }

  std::mutex busy_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> left_{0};
  Call* call_ = nullptr;
  const std::function<void(int, int)>* work_ = nullptr;
  int parts_ = 0;
  std::vector<std::thread> threads_;
};

// Never destroyed: its threads outlive static teardown. A forked child has none of them, so it gets a pool of its own.
std::atomic<Pool*> shared{nullptr};

Pool& pool() {
  static const bool registered = [] {
    shared.store(new Pool);
    pthread_atfork(nullptr, nullptr, [] { shared.store(new Pool); });
    return true;
  }();
  static_cast<void>(registered);
  return *shared.load();
}

}  // namespace

void run_parts(int parts, const Control& control, const std::function<void(int, int)>& work) {
  Call call;
  call.control = &control;
  const bool was_calling = calling;
  calling = true;
  if (parts <= 1 || !pool().run(call, work, parts))
    for (int part = 0; part < parts; ++part) call.run(work, part, parts);
  calling = was_calling;
  if (call.failure) std::rethrow_exception(call.failure);
  if (call.stop.load()) throw Interrupted{};
}

bool should_stop() {
  if (current == nullptr) return false;
  if (calling) current->poll();
  return current->stop.load(std::memory_order_relaxed);
}

}  // namespace cascade::cpu
