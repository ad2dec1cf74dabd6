// Memory for packed keys and scores: aligned for whole vectors, and for huge pages where it is large; or mapped.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace cascade::cpu {

// An uninitialised array of a trivial type. Growing forgets what it held.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) { reserve(size); }

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_.get()[i]; }
  const T& operator[](int64_t i) const { return data_.get()[i]; }

  void reserve(int64_t size) {
    if (size <= size_) return;
    constexpr size_t huge_page = size_t{2} << 20;
    const size_t bytes = static_cast<size_t>(size) * sizeof(T);
    const size_t alignment = bytes >= 2 * huge_page ? huge_page : 64;
    data_ = {};
    size_ = 0;
    data_.reset(static_cast<T*>(std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment)));
    if (!data_) throw std::bad_alloc();
    if (alignment == huge_page) madvise(data_.get(), bytes, MADV_HUGEPAGE);  // advice: may fail, nothing depends on it
    size_ = size;
  }

  // Memory of someone else's, who outlives the buffer: a mapped file.
  void borrow(T* memory, int64_t size) {
    data_ = {memory, Free{.owned = false}};
    size_ = size;
  }

 private:
  struct Free {
    bool owned = true;
    void operator()(T* memory) const {
      if (owned) std::free(memory);
    }
  };
  std::unique_ptr<T[], Free> data_;
  int64_t size_ = 0;
};

}  // namespace cascade::cpu
