// The pool of threads: every part runs once, whoever calls and however many help.
#pragma once

#include <atomic>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/pool.hpp"

namespace pool_test {

inline bool runs_each_part_once(std::mt19937& rng) {
  using namespace cascade::cpu;
  const auto callers = static_cast<int>(1 + rng() % 2);
  const auto threads = static_cast<int>(1 + rng() % 5), parts = static_cast<int>(rng() % 40);
  std::atomic<int> wrong{0};
  const auto call = [&] {
    std::vector<std::atomic<int>> ran(static_cast<size_t>(parts));
    run_parts(parts, {.threads = threads}, [&](int part, int of) {
      ran[static_cast<size_t>(part)] += of == parts ? 1 : 2;
      if (part % 7 == 0) std::this_thread::yield();
    });
    for (const auto& times : ran) wrong += times != 1;
  };
  std::thread other(callers > 1 ? std::function<void()>(call) : [] {});
  call();
  other.join();
  if (wrong != 0) std::printf("pool: %d of %d parts not run once, %d threads\n", wrong.load(), parts, threads);
  return wrong == 0;
}

inline bool passes_on_what_a_part_throws(std::mt19937& rng) {
  using namespace cascade::cpu;
  const auto thrown = static_cast<int>(rng() % 9);
  try {
    run_parts(9, {.threads = 3}, [&](int part, int) {
      if (part == thrown) throw std::runtime_error("a part");
    });
  } catch (const std::runtime_error&) {
    return true;
  }
  std::printf("pool: what part %d threw is lost\n", thrown);
  return false;
}

inline bool stops_when_interrupted() {
  using namespace cascade::cpu;
  try {
    run_parts(3, {.threads = 2, .interrupted = [] { return true; }}, [](int, int) {
      while (!should_stop()) std::this_thread::yield();
    });
  } catch (const Interrupted&) {
    return true;
  }
  std::printf("pool: an interrupted call went on\n");
  return false;
}

}  // namespace pool_test
