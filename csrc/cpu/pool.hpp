// A persistent pool of threads: a call costs a wake-up, not a thread's birth.
#pragma once

#include <cstdint>
#include <functional>
#include <thread>

namespace cascade::cpu {

// How a long call is shared and stopped.
struct Control {
  int threads = 1;
  bool (*interrupted)() = nullptr;  // asked now and then, from the calling thread only
};

// Raised in the calling thread once `Control::interrupted` has said yes; outputs are then undefined.
struct Interrupted {};

// Runs `work(part, parts)` once for every part. The calling thread and the pool's take parts in their order, one at a
// time: a thread that starts late or shares its processor takes fewer, and one that has not come when the last is taken
// is not waited for. While another call holds the pool, all parts run on the calling thread, which is never slower than
// waiting. Exceptions of a part reach the caller.
void run_parts(int parts, const Control& control, const std::function<void(int part, int parts)>& work);

// Shares `batch` queries: runs `work(begin, end)` for runs of consecutive ones. The runs grow smaller, so that all
// threads are done at about the same time, but have `together` queries or a thread's share, whichever is less.
void share_queries(int64_t batch, int64_t together, const Control& control,
                   const std::function<void(int64_t begin, int64_t end)>& work);

// Who called: this thread, or the one that waits while this one works for it (a signal's handler that calls in the
// midst of a call, for one).
std::thread::id& caller();

// Whether the call under way should stop. Cheap; to be asked between tiles. Reads the clock on the calling thread.
bool should_stop();

}  // namespace cascade::cpu
