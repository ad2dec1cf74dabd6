#include "cpu/pool.hpp"

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
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
// Of more workers, one on the caller's processor is a small loss, and barring each costs 1 us.
constexpr size_t few_workers = 8;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// What the threads of one call share.
struct Call {
  Call(const Control& control_, const std::function<void(int, int)>& work_, int parts_)
      : control(control_), work(work_), parts(parts_) {}

  const Control& control;
  const std::function<void(int, int)>& work;
  const int parts;
  std::atomic<int> next{0};
  std::atomic<bool> stop{false};
  Clock::time_point next_poll = Clock::now() + poll_every;
  std::mutex failing;
  std::exception_ptr failure;

  void poll() {  // on the calling thread
    if (control.interrupted == nullptr || stop.load(std::memory_order_relaxed) || Clock::now() < next_poll) return;
    next_poll = Clock::now() + poll_every;
    if (control.interrupted()) stop.store(true, std::memory_order_relaxed);
  }

  void take_parts();
};

thread_local Call* current = nullptr;
thread_local bool calling = false;

void Call::take_parts() {
  Call* const outer = current;
  current = this;
  try {
    const FloatMode mode;
    for (int part; !stop.load(std::memory_order_relaxed) && (part = next.fetch_add(1)) < parts;) work(part, parts);
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
  bool run(Call& call, int helpers) {
    const std::unique_lock busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    while (static_cast<int>(threads_.size()) < helpers) {
      threads_.emplace_back(&Pool::serve, this, static_cast<int>(threads_.size()), generation_.load());
      avoided_ = nowhere;
    }
    leave_to_caller();
    {
      const std::lock_guard lock(mutex_);
      call_ = &call;
      helpers_ = helpers;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    call.take_parts();
    {
      const std::lock_guard lock(mutex_);
      call_ = nullptr;  // a worker that has not come by now finds no part left, and is not waited for
    }
    for (int i = 0; i < spins && inside_.load() > 0; ++i) relax();
    std::unique_lock lock(mutex_);
    while (!done_.wait_for(lock, poll_every, [this] { return inside_.load() == 0; })) {
      lock.unlock();
      call.poll();
      lock.lock();
    }
    return true;
  }

 private:
  static constexpr int nowhere = -1;

  // Bars the workers from the processor that the caller is on. A worker that slept may be woken there although another
  // is idle, and then starts when the caller is done: two threads took as long as one.
  void leave_to_caller() {
#ifdef __linux__
    const int here = sched_getcpu();
    if (here == avoided_ || threads_.size() > few_workers) return;
    cpu_set_t allowed;
    if (here < 0 || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    if (CPU_COUNT(&allowed) > 1) CPU_CLR(here, &allowed);
    for (std::thread& thread : threads_) pthread_setaffinity_np(thread.native_handle(), sizeof allowed, &allowed);
    avoided_ = here;
#endif
  }

  void serve(int number, uint64_t seen) {
    for (;;) {
      for (int i = 0; i < spins && generation_.load() == seen; ++i) relax();
      Call* call = nullptr;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        seen = generation_.load();
        if (call_ == nullptr || number >= helpers_) continue;
        call = call_;
        inside_.fetch_add(1);
      }
      call->take_parts();
      if (inside_.fetch_sub(1) == 1) {
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
  std::atomic<int> inside_{0};  // workers that may read the call
  Call* call_ = nullptr;        // while it may be joined
  int helpers_ = 0;             // the workers that may join
  int avoided_ = nowhere;       // the processor that the workers are barred from
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

// Where the runs begin that `share_queries` makes, and the end of the last.
std::vector<int64_t> split(int64_t batch, int64_t threads, int64_t together) {
  if (threads == 1) together = batch;
  const int64_t least = std::min(together, (batch + threads - 1) / threads);
  std::vector<int64_t> begin{0};
  while (begin.back() < batch) {
    const int64_t share = 2 * (batch - begin.back()) / (3 * threads);
    begin.push_back(std::min(batch, begin.back() + std::max(least, (share + together / 2) / together * together)));
  }
  return begin;
}

}  // namespace

void run_parts(int parts, const Control& control, const std::function<void(int, int)>& work) {
  Call call(control, work, parts);
  const bool was_calling = calling;
  calling = true;
  const int helpers = std::min(parts, control.threads) - 1;
  if (helpers < 1 || !pool().run(call, helpers)) call.take_parts();
  calling = was_calling;
  if (call.failure) std::rethrow_exception(call.failure);
  if (call.stop.load()) throw Interrupted{};
}

void share_queries(int64_t batch, int64_t together, const Control& control,
                   const std::function<void(int64_t, int64_t)>& work) {
  const std::vector<int64_t> begin = split(batch, std::max(1, control.threads), together);
  run_parts(static_cast<int>(begin.size()) - 1, control, [&](int part, int) { work(begin[part], begin[part + 1]); });
}

std::thread::id& caller() {
  thread_local std::thread::id id = std::this_thread::get_id();
  return id;
}

bool should_stop() {
  if (current == nullptr) return false;
  if (calling) current->poll();
  return current->stop.load(std::memory_order_relaxed);
}

}  // namespace cascade::cpu
