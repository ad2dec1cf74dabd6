#include "cpu/shelf.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

namespace cascade::cpu {
namespace {

constexpr char magic[8] = {'c', 'a', 's', 'c', 'a', 'd', 'e', 'P'};
constexpr uint32_t byte_order = 0x01020304;
constexpr uint32_t version = 2;  // of the head, of the arrays' layout and of what the parameters mean
constexpr int64_t page = 4096;
constexpr int64_t piece = int64_t{1} << 20;  // bytes that one checksum is taken of; their sum is kept

struct Head {
  char magic[8];
  uint32_t byte_order;
  uint32_t version;
  int64_t size;
  int64_t identity;    // bytes, after the head
  int64_t parameters;  // float64, after the identity
  uint64_t array_sum;
  uint64_t head_sum;  // of the pages before the first array, with 0 here
};

int64_t up_to(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

// Every step can be undone, so that no single changed word goes unseen.
uint64_t mixed(uint64_t sum, uint64_t word) {
  sum = (sum ^ word) * 0x9e3779b97f4a7c15u;
  return sum ^ sum >> 29;
}

// A checksum against accidents; `bytes` is a multiple of 32.
uint64_t checksum(const char* data, int64_t bytes, uint64_t seed) {
  uint64_t lane[4] = {seed, seed + 1, seed + 2, seed + 3};
  for (int64_t i = 0; i < bytes; i += 32) {
    uint64_t word[4];
    std::memcpy(word, data + i, 32);
    for (int l = 0; l < 4; ++l) lane[l] = mixed(lane[l], word[l]);
  }
  return mixed(mixed(mixed(mixed(seed, lane[0]), lane[1]), lane[2]), lane[3]);
}

class Descriptor {
 public:
  explicit Descriptor(int file) : file_(file) {}
  ~Descriptor() {
    if (file_ >= 0) close(file_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return file_; }

 private:
  int file_;
};

[[noreturn]] void fail(int code, const std::string& path) {
  throw std::system_error(code, std::generic_category(), path);
}

}  // namespace

KeptFile::KeptFile(std::string path, std::string identity, int64_t parameters, std::span<const int64_t> arrays,
                   Residency& residency, const Control& control)
    : path_(std::move(path)), identity_(std::move(identity)), parameters_(parameters), residency_(residency) {
  const auto named = up_to(static_cast<int64_t>(sizeof(Head) + identity_.size()), 8);
  size_ = up_to(named + parameters_ * 8, page);
  for (const int64_t bytes : arrays) {
    starts_.push_back(size_);
    size_ += up_to(bytes, page);
  }
  try {
    complete_ = open(control);
    if (!complete_) create();
  } catch (...) {
    unmap();
    throw;
  }
}

KeptFile::~KeptFile() {
  unmap();
  if (!temporary_.empty()) unlink(temporary_.c_str());
}

double* KeptFile::parameters() const {
  return reinterpret_cast<double*>(base_ + up_to(static_cast<int64_t>(sizeof(Head) + identity_.size()), 8));
}

bool KeptFile::open(const Control& control) {
  const Descriptor file(::open(path_.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.get() < 0) {
    if (errno != ENOENT) refused_ = path_ + ": " + std::generic_category().message(errno);
    return false;
  }
  struct stat about{};
  if (fstat(file.get(), &about) != 0) fail(errno, path_);
  refused_ = path_ + ": damaged";
  if (about.st_size < static_cast<int64_t>(sizeof(Head))) return false;
  if (about.st_size != size_) {
    refused_ = path_ + ": made from other keys, in another format, or damaged";
    return false;
  }
  map(file.get(), PROT_READ);
  Head head;
  std::memcpy(&head, base_, sizeof(Head));
  const bool ours = std::memcmp(head.magic, magic, sizeof(magic)) == 0 && head.byte_order == byte_order &&
                    head.version == version && head.size == size_ && head.parameters == parameters_ &&
                    head.identity == static_cast<int64_t>(identity_.size()) &&
                    std::memcmp(base_ + sizeof(Head), identity_.data(), identity_.size()) == 0;
  if (!ours) {
    refused_ = path_ + ": made from other keys, in another format, or damaged";
  } else if (head.head_sum == head_sum() && head.array_sum == array_sum(control)) {
    refused_.clear();
    return true;
  }
  unmap();
  return false;
}

void KeptFile::create() {
  static std::atomic<int> made = 0;
  temporary_ = path_ + ".new-" + std::to_string(made++) + "-" + std::to_string(getpid());
  const Descriptor file(::open(temporary_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (file.get() < 0) fail(errno, std::exchange(temporary_, {}));
  // Space is taken now: a disk that fills up later would end the process at a write to mapped memory.
  const int code = posix_fallocate(file.get(), 0, size_);
  if (code != 0) {
    unlink(temporary_.c_str());
    fail(code, std::exchange(temporary_, {}));
  }
  map(file.get(), PROT_READ | PROT_WRITE);
}

void KeptFile::finish(const Control& control) {
  Head head{{}, byte_order, version, size_, static_cast<int64_t>(identity_.size()), parameters_, 0, 0};
  std::memcpy(head.magic, magic, sizeof(magic));
  head.array_sum = array_sum(control);
  std::memcpy(base_, &head, sizeof(Head));
  std::memcpy(base_ + sizeof(Head), identity_.data(), identity_.size());
  head.head_sum = head_sum();
  std::memcpy(base_, &head, sizeof(Head));
  if (mprotect(base_, static_cast<size_t>(size_), PROT_READ) != 0) fail(errno, temporary_);
  if (rename(temporary_.c_str(), path_.c_str()) != 0) fail(errno, path_);
  temporary_.clear();
  complete_ = true;
}

void KeptFile::map(int file, int protection) {
  void* const found = mmap(nullptr, static_cast<size_t>(size_), protection, MAP_SHARED, file, 0);
  if (found == MAP_FAILED) fail(errno, path_);
  base_ = static_cast<char*>(found);
  residency_.watch(base_, size_);
}

void KeptFile::unmap() {
  if (base_ == nullptr) return;
  residency_.forget(base_);
  munmap(base_, static_cast<size_t>(size_));
  base_ = nullptr;
}

uint64_t KeptFile::head_sum() const {
  Head head;
  std::memcpy(&head, base_, sizeof(Head));
  head.head_sum = 0;
  std::vector<char> pages(static_cast<size_t>(starts_.front()));
  std::memcpy(pages.data(), base_, pages.size());
  std::memcpy(pages.data(), &head, sizeof(Head));
  return checksum(pages.data(), starts_.front(), 0);
}

uint64_t KeptFile::array_sum(const Control& control) const {
  const int64_t start = starts_.front(), pieces = (size_ - start + piece - 1) / piece;
  std::atomic<uint64_t> sum = 0;
  run_parts(control.threads, control, [&](int part, int parts) {
    for (int64_t number = pieces * part / parts; number < pieces * (part + 1) / parts; ++number) {
      if (should_stop()) return;
      const int64_t from = start + number * piece, bytes = std::min(piece, size_ - from);
      sum += checksum(base_ + from, bytes, static_cast<uint64_t>(number));
      residency_.touched(bytes);
    }
  });
  return sum;
}

std::unique_ptr<KeptFile> Shelf::open(const std::string& kind, std::span<const int32_t> views, int64_t parameters,
                                      std::span<const int64_t> arrays, const Control& control) {
  std::string joined;
  for (const int32_t view : views) joined += (joined.empty() ? "" : "+") + names_[view];
  const std::string path = folder_ + "/" + joined + "." + kind + "." + suffix_;
  try {
    auto file = std::make_unique<KeptFile>(path, identity_ + " " + joined + " " + kind, parameters, arrays, residency_,
                                           control);
    if (!file->refused().empty()) {
      const std::lock_guard lock(mutex_);
      troubles_.push_back(file->refused() + "; made anew");
    }
    return file;
  } catch (const std::system_error& error) {
    const std::lock_guard lock(mutex_);
    troubles_.push_back(std::string(error.what()) + "; what is prepared of the bank is kept in memory");
    return nullptr;
  }
}

void Shelf::finish(KeptFile& file, const Control& control) {
  try {
    file.finish(control);
  } catch (const std::system_error& error) {
    const std::lock_guard lock(mutex_);
    troubles_.push_back(std::string(error.what()) + "; what was prepared of the bank is not kept");
  }
}

std::vector<std::string> Shelf::take_troubles() {
  const std::lock_guard lock(mutex_);
  return std::exchange(troubles_, {});
}

}  // namespace cascade::cpu
