#include "cpu/spans.hpp"

#include <chrono>
#include <mutex>
#include <new>
#include <utility>

namespace cascade::cpu {
namespace {

std::mutex writing;
std::vector<NotedSpan> noted;

int this_thread() {
  static std::atomic<int> next{0};
  thread_local const int number = next++;
  return number;
}

}  // namespace

std::atomic<bool> noting_spans{false};

int64_t Span::now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

void Span::note() const noexcept {
  try {
    const NotedSpan span{phase_, this_thread(), begin_, now()};
    const std::lock_guard lock(writing);
    noted.push_back(span);
  } catch (const std::bad_alloc&) {
    return;
  }
}

std::vector<NotedSpan> take_spans() {
  const std::lock_guard lock(writing);
  return std::exchange(noted, {});
}

}  // namespace cascade::cpu
