// Where a call's time goes, noted while a profiler asks for it; at other times a span costs one load.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace cascade::cpu {

enum class Phase : int { score, select, repair };

struct NotedSpan {
  Phase phase;
  int thread;          // the threads that ever noted a span, numbered from 0
  int64_t begin, end;  // nanoseconds of steady_clock
};

extern std::atomic<bool> noting_spans;

// Notes the time from its birth to its end.
class Span {
 public:
  explicit Span(Phase phase) : phase_(phase), begin_(noting_spans.load(std::memory_order_relaxed) ? now() : 0) {}
  ~Span() {
    if (begin_ != 0) note();
  }
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;

 private:
  static int64_t now();
  void note() const noexcept;  // a span that finds no memory is lost

  Phase phase_;
  int64_t begin_;
};

// The spans noted since the last call, those that ended first in front.
std::vector<NotedSpan> take_spans();

}  // namespace cascade::cpu
