// The CUDA thread model on a CPU: the sources of csrc/cuda, compiled by g++, run as one fiber per CUDA thread.
//
// Blocks run one after the other; the threads of a block run in a chosen order (forward, reversed, seeded random) and
// meet at barriers and warp collectives only, so a kernel that leans on lock-step or on a missing barrier goes wrong.
// What real hardware would leave undefined is made visible: shared memory starts as 0xFF bytes and ends at a guard, an
// asynchronous copy lands at its wait and not before, a barrier or collective that some threads never reach is an
// error, and tensor-core sums are perturbed within the bound that the kernels claim to tolerate.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

// How threads are ordered, and what a launch may use.
struct Settings {
  uint64_t seed = 0;                // 0: forward, 1: reversed, otherwise a random order drawn anew in every round
  size_t shared_limit = 99 * 1024;  // bytes a block may ask for: the smallest opt-in limit from sm_80 on
  size_t stack = 64 * 1024;         // bytes per fiber
  bool perturb = true;              // tensor-core sums off by up to the documented bound
};

// What has been executed since the last reset.
struct Counters {
  uint64_t launches = 0, blocks = 0, barriers = 0, bytes_read = 0, bytes_written = 0, async_bytes = 0, matrix_ops = 0,
           matrix_loads = 0, multiply_adds = 0;
};

enum class Meeting { none, barrier, warp, ballot, shuffle, shuffle_up, shuffle_xor, matrix };

inline const char* name(Meeting meeting) {
  constexpr const char* names[] = {"none",        "__syncthreads",  "__syncwarp",      "__ballot_sync",
                                   "__shfl_sync", "__shfl_up_sync", "__shfl_xor_sync", "a matrix operation"};
  return names[static_cast<int>(meeting)];
}

struct Copy {
  void* to;
  const void* from;
  int group;
};

struct Fiber {
  uint3 thread{};
  unsigned number = 0;
  bool done = false;
  Meeting waits = Meeting::none;
  unsigned mask = 0;
  int operand = 0;         // source lane, offset
  uint64_t value = 0;      // what the thread brings
  uint64_t result = 0;     // what it takes away
  uint32_t words[8] = {};  // registers of a matrix operation
  std::vector<Copy> copies;
  int groups = 0;  // asynchronous copy groups committed
  void* stack_pointer = nullptr;
  ucontext_t context{};
};

struct Block {
  dim3 grid, size;
  uint3 index{};
  std::vector<Fiber> fibers;
  Fiber* running = nullptr;
  std::function<void()> body;
  std::string error;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  void* scheduler_stack = nullptr;
  ucontext_t scheduler{};
  std::mt19937_64 random;
};

inline Settings& settings() {
  static Settings value;
  return value;
}
inline Counters& counters() {
  static Counters value;
  return value;
}
// The phases launched since the last reset, each with a blank after it.
inline std::string& phases() {
  static std::string value;
  return value;
}
inline Block*& block() {
  static thread_local Block* value = nullptr;
  return value;
}
inline Fiber& self() { return *block()->running; }

#if defined(__x86_64__)
// Saves the callee's registers on this stack and continues on another: a tenth of swapcontext's cost.
__attribute__((naked, noinline)) inline void switch_stack(void** /*save*/, void* /*load*/) {
  __asm__ volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
inline void enter(Block& b, Fiber& f) { switch_stack(&b.scheduler_stack, f.stack_pointer); }
inline void leave(Block& b, Fiber& f) { switch_stack(&f.stack_pointer, b.scheduler_stack); }
#else
inline void enter(Block& b, Fiber& f) { swapcontext(&b.scheduler, &f.context); }
inline void leave(Block& b, Fiber& f) { swapcontext(&f.context, &b.scheduler); }
#endif

inline void run_fiber() {
  Block& b = *block();
  try {
    b.body();
    if (!self().copies.empty()) {
      throw std::runtime_error("a thread exits with asynchronous copies that nothing waited for");
    }
  } catch (const std::exception& e) {
    if (b.error.empty()) {
      b.error = e.what();
    }
  }
  self().done = true;
  for (;;) {
    leave(b, self());
  }
}

inline void prepare_fiber(Fiber& f, char* stack, size_t bytes) {
#if defined(__x86_64__)
  (void)f.context;
  auto** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
  *--top = nullptr;  // keeps the entry's stack aligned as a call would
  *--top = reinterpret_cast<void*>(run_fiber);
  for (int saved = 0; saved < 6; ++saved) {
    *--top = nullptr;
  }
  f.stack_pointer = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = stack;
  f.context.uc_stack.ss_size = bytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, run_fiber, 0);
#endif
}

// Waits until all threads of the block (or all lanes of `mask`) are at the same meeting.
inline uint64_t meet(Meeting meeting, unsigned mask, uint64_t value = 0, int operand = 0) {
  Fiber& f = self();
  if (meeting != Meeting::barrier && !(mask >> (f.number & 31) & 1)) {
    throw std::runtime_error(std::string(name(meeting)) + ": the calling lane is not in its mask");
  }
  f.waits = meeting;
  f.mask = mask;
  f.value = value;
  f.operand = operand;
  leave(*block(), f);
  return f.result;
}

inline bool release_barrier(Block& b) {
  size_t live = 0, there = 0;
  for (const Fiber& f : b.fibers) {
    live += !f.done;
    there += !f.done && f.waits == Meeting::barrier;
  }
  if (!live || there != live) {
    return false;
  }
  if (live != b.fibers.size()) {
    b.error = "__syncthreads: some threads of the block have exited";
    return false;
  }
  for (Fiber& f : b.fibers) {
    f.waits = Meeting::none;
  }
  ++counters().barriers;
  return true;
}

// Gives every lane of a complete collective its result.
inline void finish_collective(Block& b, Fiber* lanes, unsigned mask) {
  uint64_t ballot = 0;
  for (int l = 0; l < 32; ++l) {
    if (mask >> l & 1) {
      ballot |= static_cast<uint64_t>(lanes[l].value != 0) << l;
    }
  }
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) {
      continue;
    }
    Fiber& f = lanes[l];
    int source = l;
    if (f.waits == Meeting::shuffle) {
      source = f.operand & 31;
    } else if (f.waits == Meeting::shuffle_up) {
      source = l >= f.operand ? l - f.operand : l;
    } else if (f.waits == Meeting::shuffle_xor) {
      source = l ^ f.operand;
    }
    if (!(mask >> source & 1)) {
      b.error = std::string(name(f.waits)) + ": the source lane takes no part";
      return;
    }
    f.result = f.waits == Meeting::ballot ? ballot : lanes[source].value;
  }
  for (int l = 0; l < 32; ++l) {
    if (mask >> l & 1) {
      lanes[l].waits = Meeting::none;
    }
  }
}

inline bool release_warps(Block& b) {
  bool progress = false;
  for (size_t first = 0; first < b.fibers.size() && b.error.empty(); first += 32) {
    const size_t lanes = std::min<size_t>(32, b.fibers.size() - first);
    for (size_t l = 0; l < lanes && b.error.empty(); ++l) {
      const Fiber& f = b.fibers[first + l];
      if (f.done || f.waits == Meeting::none || f.waits == Meeting::barrier) {
        continue;
      }
      bool complete = true;
      for (size_t other = 0; other < 32 && complete; ++other) {
        if (!(f.mask >> other & 1)) {
          continue;
        }
        if (other >= lanes || b.fibers[first + other].done) {
          b.error = std::string(name(f.waits)) + ": its mask names a lane that is not there";
          return false;
        }
        const Fiber& g = b.fibers[first + other];
        complete = g.waits == f.waits && g.mask == f.mask;
      }
      if (complete) {
        finish_collective(b, &b.fibers[first], f.mask);
        progress = true;
      }
    }
  }
  return progress;
}

inline std::string deadlock(const Block& b) {
  std::string text = "deadlock:";
  int shown = 0;
  for (const Fiber& f : b.fibers) {
    if (!f.done && shown++ < 4) {
      text += " thread " + std::to_string(f.number) + " waits at " + name(f.waits) + ";";
    }
  }
  return text;
}

inline void run_threads(Block& b) {
  std::vector<unsigned> order(b.fibers.size());
  for (unsigned i = 0; i < order.size(); ++i) {
    order[i] = settings().seed == 1 ? static_cast<unsigned>(order.size()) - 1 - i : i;
  }
  for (;;) {
    if (settings().seed > 1) {
      std::shuffle(order.begin(), order.end(), b.random);
    }
    // A random half of the warps sits out each round, so that the others run ahead as far as barriers let them.
    const uint32_t resting = settings().seed > 1 ? static_cast<uint32_t>(b.random()) : 0;
    bool ran = false, live = false, held = false;
    for (unsigned i : order) {
      Fiber& f = b.fibers[i];
      live |= !f.done;
      if (f.done || f.waits != Meeting::none) {
        continue;
      }
      if (resting >> (i / 32) & 1) {
        held = true;
        continue;
      }
      ran = true;
      b.running = &f;
      enter(b, f);
      if (!b.error.empty()) {
        return;
      }
    }
    if (!live) {
      return;
    }
    const bool released = release_barrier(b) | release_warps(b);
    if (!ran && !held && !released && b.error.empty()) {
      b.error = deadlock(b);
    }
    if (!b.error.empty()) {
      return;
    }
  }
}

constexpr size_t kGuard = 256;

// One block's shared memory: poisoned, exactly as large as asked for, with a guard behind it.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes), memory_(bytes + kGuard + 128, static_cast<char>(0xFF)) {
    begin_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_.data()) + 127) & ~uintptr_t{127});
    std::memset(begin_ + bytes_, 0xA5, kGuard);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(begin_ + bytes_, kGuard);
#endif
  }
  ~SharedMemory() {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(begin_ + bytes_, kGuard);
#endif
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  char* begin() const { return begin_; }
  bool intact() const {
#if defined(__SANITIZE_ADDRESS__)
    return true;
#else
    return std::all_of(begin_ + bytes_, begin_ + bytes_ + kGuard, [](char c) { return c == static_cast<char>(0xA5); });
#endif
  }

 private:
  size_t bytes_;
  std::vector<char> memory_;
  char* begin_;
};

// The stacks of a block's fibers, mapped once per OS thread and reused.
class Stacks {
 public:
  char* take(size_t count) {
    const size_t wanted = count * settings().stack;
    if (wanted > bytes_) {
      release();
      base_ = static_cast<char*>(
          mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      bytes_ = wanted;
    }
    return base_;
  }
  ~Stacks() { release(); }

 private:
  void release() {
    if (base_ != nullptr) {
      munmap(base_, bytes_);
    }
  }
  char* base_ = nullptr;
  size_t bytes_ = 0;
};

inline void run_block(Block& b) {
  static thread_local Stacks stacks;
  const size_t threads = size_t{b.size.x} * b.size.y * b.size.z;
  const SharedMemory shared(b.shared_bytes);
  b.shared = shared.begin();
  b.random.seed(settings().seed * 0x9E3779B97F4A7C15ull + b.index.x + 7919u * b.index.y + 104729u * b.index.z);
  b.fibers.assign(threads, Fiber{});
  char* base = stacks.take(threads);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(base, threads * settings().stack);  // fibers end in frames that never return
#endif
  block() = &b;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = b.fibers[i];
    f.number = i;
    f.thread = {i % b.size.x, i / b.size.x % b.size.y, i / (b.size.x * b.size.y)};
    prepare_fiber(f, base + i * settings().stack, settings().stack);
  }
  run_threads(b);
  block() = nullptr;
  ++counters().blocks;
  if (b.error.empty() && !shared.intact()) {
    b.error = "shared memory was written past its end";
  }
  if (!b.error.empty()) {
    throw std::runtime_error("block (" + std::to_string(b.index.x) + ", " + std::to_string(b.index.y) +
                             "): " + b.error);
  }
}

// Runs `body` as a kernel. Throws where the launch is one that hardware would refuse, or a block goes wrong.
inline void launch(dim3 grid, dim3 size, size_t shared_bytes, std::function<void()> body) {
  const size_t threads = size_t{size.x} * size.y * size.z;
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || !threads || threads > 1024) {
    throw std::runtime_error("launch: a grid or block of a size that hardware refuses");
  }
  if (shared_bytes > settings().shared_limit) {
    throw std::runtime_error("launch: " + std::to_string(shared_bytes) + " bytes of shared memory are over the limit");
  }
  ++counters().launches;
  Block b;
  b.grid = grid;
  b.size = size;
  b.shared_bytes = shared_bytes;
  b.body = std::move(body);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        b.index = {x, y, z};
        run_block(b);
      }
    }
  }
}

template <class T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}
template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

}  // namespace emulation

#define threadIdx (::emulation::self().thread)
#define blockIdx (::emulation::block()->index)
#define blockDim (::emulation::block()->size)
#define gridDim (::emulation::block()->grid)

inline void __syncthreads() { emulation::meet(emulation::Meeting::barrier, 0); }
inline void __syncwarp(unsigned mask = ~0u) { emulation::meet(emulation::Meeting::warp, mask); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(emulation::meet(emulation::Meeting::ballot, mask, predicate != 0));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulation::from_word<T>(emulation::meet(emulation::Meeting::shuffle, mask, emulation::to_word(value), lane));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned offset) {
  return emulation::from_word<T>(
      emulation::meet(emulation::Meeting::shuffle_up, mask, emulation::to_word(value), static_cast<int>(offset)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulation::from_word<T>(
      emulation::meet(emulation::Meeting::shuffle_xor, mask, emulation::to_word(value), bits));
}
// Blocks and fibers take turns on one OS thread, so plain memory operations are atomic here.
template <class T>
T atomicAdd(T* at, T value) {
  return std::exchange(*at, static_cast<T>(*at + value));
}
template <class T>
T atomicOr(T* at, T value) {
  return std::exchange(*at, static_cast<T>(*at | value));
}
template <class T>
T atomicMax(T* at, T value) {
  return std::exchange(*at, std::max(*at, value));
}
inline void __threadfence() {}
