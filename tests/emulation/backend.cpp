// csrc/cuda/backend.cu with fibers instead of a GPU: the same planning, the same kernels, another launcher.
#include "cuda/backend.hpp"

#include "cuda/planning.hpp"

namespace cascade::cuda {
namespace {

struct FiberLauncher {
  template <class... Parameters, class... Arguments>
  void launch(const char* phase, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
              const Arguments&... arguments) const {
    emulation::phases() += std::string(phase) + " ";
    emulation::launch(grid, dim3(static_cast<unsigned>(threads)), shared_bytes, [=] { kernel(arguments...); });
  }
  void clear(void* at, size_t bytes) const { std::memset(at, 0, bytes); }
};

}  // namespace

int64_t packed_pitch(int64_t columns) { return ceil_div(columns, kPackedChunk) * kPackedChunk; }
bool bounds_fit(int64_t columns) { return bounds_fit(packed_pitch(columns), emulation::settings().shared_limit); }
void pack(const PackProblem& problem, void* /*stream*/) {
  FiberLauncher launcher;
  pack_over(launcher, problem);
}
void push(const PushProblem& problem, void* /*stream*/) {
  FiberLauncher launcher;
  push_over(launcher, problem);
}
size_t mine_workspace(const MineProblem& problem) {
  NoLaunch none;
  return mine_over(none, problem, emulation::settings().shared_limit, nullptr);
}
void mine(const MineProblem& problem, void* workspace, void* /*stream*/) {
  FiberLauncher launcher;
  std::memset(workspace, 0xFF, mine_workspace(problem));
  mine_over(launcher, problem, emulation::settings().shared_limit, workspace);
}
size_t select_workspace(const SelectProblem& problem) {
  NoLaunch none;
  return select_over(none, problem, nullptr);
}
void select(const SelectProblem& problem, void* workspace, void* /*stream*/) {
  FiberLauncher launcher;
  std::memset(workspace, 0xFF, select_workspace(problem));
  select_over(launcher, problem, workspace);
}
size_t contrast_workspace(const NceProblem& problem) {
  NoLaunch none;
  return contrast_over(none, problem, nullptr);
}
void contrast(const NceProblem& problem, void* workspace, void* /*stream*/) {
  FiberLauncher launcher;
  std::memset(workspace, 0xFF, contrast_workspace(problem));
  contrast_over(launcher, problem, workspace);
}

std::string unavailable() { return {}; }
std::vector<std::string> devices() { return {"emulation"}; }

}  // namespace cascade::cuda
