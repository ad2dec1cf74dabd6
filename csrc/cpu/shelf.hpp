// Where what is prepared of a bank outlives the process: files beside a feature store's phase, mapped when used.
//
// A file is a head (what it was made from, its parameters, two checksums) and arrays, each from a page's start. It is
// written under another name and renamed, and nothing is synced: what a crash damages, the checksums find, and what is
// damaged or made from other keys is made anew. Files of one kind are the same for every instruction set.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cpu/pool.hpp"
#include "cpu/residency.hpp"

namespace cascade::cpu {

class KeptFile {
 public:
  // Maps the file at `path` where it is whole and was made from `identity`; else a new one, which `finish` puts there.
  // `arrays` are sizes in bytes. Throws std::system_error where neither is possible.
  KeptFile(std::string path, std::string identity, int64_t parameters, std::span<const int64_t> arrays,
           Residency& residency, const Control& control);
  ~KeptFile();
  KeptFile(const KeptFile&) = delete;
  KeptFile& operator=(const KeptFile&) = delete;

  bool complete() const { return complete_; }
  const std::string& refused() const { return refused_; }  // why the file that was there is made anew, or empty

  double* parameters() const;
  template <class T>
  T* array(int64_t number) const {
    return reinterpret_cast<T*>(base_ + starts_[number]);
  }

  // To be called with all parameters and arrays written: from now on they are read-only, and others find the file.
  void finish(const Control& control);

 private:
  bool open(const Control& control);
  void create();
  void map(int file, int protection);
  void unmap();
  uint64_t head_sum() const;
  uint64_t array_sum(const Control& control) const;

  std::string path_, temporary_, identity_, refused_;
  int64_t parameters_, size_ = 0;
  std::vector<int64_t> starts_;
  Residency& residency_;
  char* base_ = nullptr;
  bool complete_ = false;
};

// The files of one bank.
class Shelf {
 public:
  // `identity` says which keys, for good; `suffix` ends the files' names; `names` are the views'.
  Shelf(std::string folder, std::string suffix, std::string identity, std::vector<std::string> names)
      : folder_(std::move(folder)),
        suffix_(std::move(suffix)),
        identity_(std::move(identity)),
        names_(std::move(names)) {}

  // The file of some views' `kind`; null where the disk refuses, and then `take_troubles` says why.
  std::unique_ptr<KeptFile> open(const std::string& kind, std::span<const int32_t> views, int64_t parameters,
                                 std::span<const int64_t> arrays, const Control& control);

  // The file's `finish`; where it cannot be named, its contents serve this process all the same.
  void finish(KeptFile& file, const Control& control);

  Residency& residency() { return residency_; }
  std::vector<std::string> take_troubles();

 private:
  std::string folder_, suffix_, identity_;
  std::vector<std::string> names_;
  Residency residency_;
  std::mutex mutex_;
  std::vector<std::string> troubles_;
};

}  // namespace cascade::cpu
