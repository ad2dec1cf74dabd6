// Launches on the caller's stream: no hidden wait, no hidden allocation, an error check after each launch.
#include <cuda_runtime.h>

#include <source_location>

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define CASCADE_NVTX
#endif

#include "cuda/backend.hpp"
#include "cuda/planning.hpp"

namespace cascade::cuda {
namespace {

void check(cudaError_t error, const std::source_location& where) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(cudaGetErrorString(error)) + " (" + where.function_name() + ", line " +
                             std::to_string(where.line()) + ")");
  }
}

// A named range of NVIDIA's profilers while a launch is queued; costs next to nothing where none is attached.
class Range {
 public:
  explicit Range([[maybe_unused]] const char* phase) {
#if defined(CASCADE_NVTX)
    nvtxRangePushA((std::string("cascade::") + phase).c_str());
#endif
  }
  ~Range() {
#if defined(CASCADE_NVTX)
    nvtxRangePop();
#endif
  }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
};

struct StreamLauncher {
  cudaStream_t stream;

  template <class... Parameters, class... Arguments>
  void launch(const char* phase, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
              const Arguments&... arguments) const {
    const Range range(phase);
    constexpr size_t kWithoutAsking = 48 * 1024;
    if (shared_bytes > kWithoutAsking) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
            std::source_location::current());
    }
    kernel<<<grid, static_cast<unsigned>(threads), shared_bytes, stream>>>(arguments...);
    check(cudaGetLastError(), std::source_location::current());
  }
  void clear(void* at, size_t bytes) const {
    check(cudaMemsetAsync(at, 0, bytes, stream), std::source_location::current());
  }
};

size_t shared_limit() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), std::source_location::current());
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        std::source_location::current());
  return static_cast<size_t>(bytes);
}

StreamLauncher on(void* stream) { return {static_cast<cudaStream_t>(stream)}; }

}  // namespace

int64_t packed_pitch(int64_t columns) { return ceil_div(columns, kPackedChunk) * kPackedChunk; }
bool bounds_fit(int64_t columns) { return bounds_fit(packed_pitch(columns), shared_limit()); }
void pack(const PackProblem& problem, void* stream) {
  auto launcher = on(stream);
  pack_over(launcher, problem);
}
void push(const PushProblem& problem, void* stream) {
  auto launcher = on(stream);
  push_over(launcher, problem);
}
size_t mine_workspace(const MineProblem& problem) {
  NoLaunch none;
  return mine_over(none, problem, shared_limit(), nullptr);
}
void mine(const MineProblem& problem, void* workspace, void* stream) {
  auto launcher = on(stream);
  mine_over(launcher, problem, shared_limit(), workspace);
}
size_t select_workspace(const SelectProblem& problem) {
  NoLaunch none;
  return select_over(none, problem, nullptr);
}
void select(const SelectProblem& problem, void* workspace, void* stream) {
  auto launcher = on(stream);
  select_over(launcher, problem, workspace);
}
size_t contrast_workspace(const NceProblem& problem) {
  NoLaunch none;
  return contrast_over(none, problem, nullptr);
}
void contrast(const NceProblem& problem, void* workspace, void* stream) {
  auto launcher = on(stream);
  contrast_over(launcher, problem, workspace);
}

std::string unavailable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {
    return "no CUDA driver, or one older than this installation needs";
  }
  if (error != cudaSuccess || count == 0) {
    return error != cudaSuccess ? cudaGetErrorString(error) : "no CUDA device";
  }
  return {};
}

std::vector<std::string> devices() {
  std::vector<std::string> found;
  int count = 0;
  check(cudaGetDeviceCount(&count), std::source_location::current());
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, device), std::source_location::current());
    found.push_back(std::string(properties.name) + " (sm_" + std::to_string(properties.major) +
                    std::to_string(properties.minor) + ")");
  }
  return found;
}

}  // namespace cascade::cuda
