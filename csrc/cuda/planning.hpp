// Grids, blocks, shared memory and workspace of every launch. A launcher does the launching: <<<>>> on a GPU, fibers
// in the emulation, nothing at all to measure a workspace. So what is tested is the very arithmetic that launches. A
// launch says which phase it is, for the timeline.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "cuda/backend.hpp"
#include "cuda/cascade_bounded.cuh"
#include "cuda/cascade_exact.cuh"
#include "cuda/contrast.cuh"
#include "cuda/push.cuh"

namespace cascade::cuda {

// Hands out aligned pieces of one piece of memory, or only counts them.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    const size_t at = used_;
    used_ = (used_ + static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

struct NoLaunch {
  template <class... Ignored>
  void launch(const Ignored&...) const {}
  void clear(void* /*at*/, size_t /*bytes*/) const {}
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t power_of_two(int64_t n) {
  int64_t power = 1;
  while (power < n) {
    power *= 2;
  }
  return power;
}

inline bool fuses(const PlanArguments& plan) {
  return std::any_of(plan.stages, plan.stages + plan.stage_count,
                     [](const StageArguments& stage) { return stage.fusion != Fusion::none; });
}

inline bool ranks_bank_later(const PlanArguments& plan) {
  return std::any_of(plan.stages + 1, plan.stages + plan.stage_count,
                     [](const StageArguments& stage) { return stage.over_bank; });
}

// Entries that must be sorted at once: the answer's, a traced stage's, all keys where ranks are fused.
inline int64_t sorted_entries(const PlanArguments& plan, const Answer& answer, int64_t keys) {
  int64_t most = std::min(plan.stages[plan.stage_count - 1].keep, keys);
  for (int s = 0; s < plan.stage_count; ++s) {
    if (plan.stages[s].fusion == Fusion::rrf) {
      return power_of_two(keys);
    }
    if (answer.kept[s] != nullptr) {
      most = std::max(most, std::min(plan.stages[s].keep, keys));
    }
  }
  return power_of_two(most);
}

inline ExactSpace take_exact_space(Arena& arena, const PlanArguments& plan, const Answer& answer, int64_t rows,
                                   int64_t keys) {
  ExactSpace space{};
  space.pair_stride = sorted_entries(plan, answer, keys);
  space.alive = arena.take<uint32_t>(rows * keys);
  if (ranks_bank_later(plan)) {
    space.eligible = arena.take<uint32_t>(rows * keys);
    space.chosen = arena.take<uint32_t>(rows * keys);
  }
  if (fuses(plan)) {
    space.fused = arena.take<double>(rows * keys);
  }
  space.pairs.key = arena.take<uint64_t>(rows * space.pair_stride);
  space.pairs.id = arena.take<uint32_t>(rows * space.pair_stride);
  return space;
}

// How many queries fit into the workspace at once, given what `measure(rows)` would take.
template <class Measure>
int64_t wave_rows(int64_t queries, int64_t limit, Measure measure) {
  const auto one = static_cast<int64_t>(measure(1));
  return std::clamp<int64_t>(limit / std::max<int64_t>(one, 1), 1, std::min<int64_t>(queries, 65536));
}

template <class Launcher>
size_t select_over(Launcher& launcher, const SelectProblem& p, void* workspace) {
  const auto measure = [&](int64_t rows) {
    Arena arena(nullptr);
    take_exact_space(arena, p.plan, p.answer, rows, p.keys);
    return arena.used();
  };
  const int64_t wave = wave_rows(p.queries, p.workspace_limit, measure);
  Arena arena(workspace);
  const ExactSpace space = take_exact_space(arena, p.plan, p.answer, wave, p.keys);
  ScoreViews scores{};
  for (int v = 0; v < p.plan.view_count; ++v) {
    scores.view[v] = {p.scores[v].data, p.scores[v].stride, p.scores[v].dtype == DType::float64};
  }
  for (int64_t first = 0; first < p.queries; first += wave) {
    const auto rows = static_cast<unsigned>(std::min(wave, p.queries - first));
    launcher.launch("select", cascade_over_scores, dim3(rows), kThreads, sizeof(CascadeShared), p.plan, scores, p.keys,
                    p.exclude, first, int64_t{0}, space, p.answer);
  }
  return arena.used();
}

// Every plan, any width: float64 scores of a wave of queries in the workspace, then all stages.
template <class Launcher>
size_t mine_exactly(Launcher& launcher, const MineProblem& p, void* workspace) {
  const auto take = [&](Arena& arena, int64_t rows) {
    auto* scores = arena.take<double>(p.plan.view_count * rows * p.keys);
    return std::pair(scores, take_exact_space(arena, p.plan, p.answer, rows, p.keys));
  };
  const int64_t wave = wave_rows(p.queries, p.workspace_limit, [&](int64_t rows) {
    Arena arena(nullptr);
    take(arena, rows);
    return arena.used();
  });
  Arena arena(workspace);
  const auto [scores, space] = take(arena, wave);
  for (int64_t first = 0; first < p.queries; first += wave) {
    const int64_t rows = std::min(wave, p.queries - first);
    const dim3 grid(static_cast<unsigned>(ceil_div(p.keys, kExactKeys)),
                    static_cast<unsigned>(ceil_div(rows, kExactQueries)), static_cast<unsigned>(p.plan.view_count));
    launcher.launch("score", exact_scores, grid, kExactThreads, sizeof(ExactShared), p.views, p.metric, first, rows,
                    scores);
    ScoreViews views{};
    for (int v = 0; v < p.plan.view_count; ++v) {
      views.view[v] = {scores == nullptr ? nullptr : scores + v * rows * p.keys, p.keys, true};
    }
    launcher.launch("select", cascade_over_scores, dim3(static_cast<unsigned>(rows)), kThreads, sizeof(CascadeShared),
                    p.plan, views, p.keys, p.exclude, first, first, space, p.answer);
  }
  return arena.used();
}

template <class Launcher>
void pack_over(Launcher& launcher, const PackProblem& p) {
  PackArguments arguments{};
  for (int v = 0; v < p.view_count; ++v) {
    arguments.keys[v] = p.keys[v];
    arguments.packed[v] = p.packed[v];
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(p.rows, kPackThreads / 32)), static_cast<unsigned>(p.view_count));
  if (p.measure && p.metric != Metric::cosine) {
    launcher.launch("pack", measure_rows, grid, kPackThreads, 0, arguments, p.first, p.rows);
  }
  launcher.launch("pack", pack_rows, grid, kPackThreads, 0, arguments, p.metric, p.first, p.rows);
}

template <class Launcher>
void push_over(Launcher& launcher, const PushProblem& p) {
  const int64_t rows = p.views[0].batch.rows, taken = std::min(rows, p.views[0].ring.rows);
  const dim3 grid(static_cast<unsigned>(ceil_div(taken, kPushThreads / 32)), static_cast<unsigned>(p.view_count));
  launcher.launch("push", push_rows, grid, kPushThreads, 0, p, rows - taken);
}

constexpr int64_t kWidePitch = 512;     // halves: a tile of 64 such queries takes 64 KiB of shared memory
constexpr int64_t kNarrowPitch = 2048;  // and a tile of 16 of these the same
static_assert(bound_shared_bytes<WideShape>(kWidePitch) <= 99 * 1024, "fits every GPU from sm_80 on");
static_assert(bound_shared_bytes<NarrowShape>(kNarrowPitch) <= 99 * 1024);

// Whether a block that may ask for `limit` bytes has room for tiles of such rows. Of sm_75's 64 KiB there is for rows
// of up to 224 and 992 halves.
inline bool wide_fits(int64_t pitch, size_t limit) {
  return pitch <= kWidePitch && bound_shared_bytes<WideShape>(pitch) <= limit;
}
inline bool bounds_fit(int64_t pitch, size_t limit) {
  return wide_fits(pitch, limit) || (pitch <= kNarrowPitch && bound_shared_bytes<NarrowShape>(pitch) <= limit);
}
static_assert(sizeof(CascadeShared) <= 8 * 1024 && sizeof(ExactShared) <= 8 * 1024);

inline int64_t widest(const MineProblem& p) {
  int64_t pitch = 0;
  for (int v = 0; v < p.plan.view_count; ++v) {
    pitch = std::max(pitch, p.packed[v].pitch);
  }
  return pitch;
}

// Whether bounds decide this plan: every view prepared and not too wide, no ranks or deviations to know, no trace.
inline bool boundable(const MineProblem& p, size_t limit) {
  for (int v = 0; v < p.plan.view_count; ++v) {
    if (p.packed[v].rows == nullptr) {
      return false;
    }
  }
  for (int s = 0; s < p.plan.stage_count; ++s) {
    const Fusion fusion = p.plan.stages[s].fusion;
    if (fusion == Fusion::zsum || fusion == Fusion::rrf || p.answer.kept[s] != nullptr) {
      return false;
    }
  }
  return bounds_fit(widest(p), limit);
}

// Keys of a split; more than asked for where a grid could not number the splits.
inline int64_t split_size(const MineProblem& p) { return std::max(p.split_keys, ceil_div(p.keys, 65535)); }

// Splits of the keys that are preselected apart; 0 where the whole cascade sees all keys at once.
inline int64_t preselected_splits(const MineProblem& p) {
  const bool worth = p.keys > 2 * split_size(p) && p.plan.stages[0].keep <= split_size(p) / 2;
  return worth && !ranks_bank_later(p.plan) ? ceil_div(p.keys, split_size(p)) : 0;
}

struct BoundMemory {
  BoundSpace bounds;
  BoundedSpace lists;
};

inline BoundMemory take_bound_memory(Arena& arena, const MineProblem& p, int64_t rows) {
  BoundMemory m{};
  m.bounds.stride = ceil_div(p.keys, 8) * 8;
  m.bounds.bounds = arena.take<uint16_t>(p.plan.view_count * rows * m.bounds.stride);
  m.bounds.meaning = arena.take<BoundMeaning>(p.plan.view_count * rows);
  m.lists.alive = arena.take<uint32_t>(rows * p.keys);
  if (ranks_bank_later(p.plan)) {
    m.lists.eligible = arena.take<uint32_t>(rows * p.keys);
    m.lists.chosen = arena.take<uint32_t>(rows * p.keys);
  }
  const int64_t sorted = power_of_two(std::min(p.plan.stages[p.plan.stage_count - 1].keep, p.keys));
  if (sorted > kBand) {
    m.lists.pair_stride = sorted;
    m.lists.pairs.key = arena.take<uint64_t>(rows * sorted);
    m.lists.pairs.id = arena.take<uint32_t>(rows * sorted);
  }
  if (const int64_t splits = preselected_splits(p); splits > 0) {
    m.lists.split_counts = arena.take<int64_t>(rows * splits);
    m.lists.split_keys = split_size(p);
  }
  return m;
}

// Bounds on tensor cores, then all stages; float64 for the undecided band only.
template <class S, class Launcher>
size_t mine_by_bounds(Launcher& launcher, const MineProblem& p, void* workspace) {
  const int64_t wave = wave_rows(p.queries, p.workspace_limit, [&](int64_t rows) {
    Arena arena(nullptr);
    take_bound_memory(arena, p, rows);
    return arena.used();
  });
  Arena arena(workspace);
  const BoundMemory m = take_bound_memory(arena, p, wave);
  BoundViews views{};
  for (int v = 0; v < p.plan.view_count; ++v) {
    views.queries[v] = p.views.view[v].queries;
    views.keys[v] = p.packed[v];
  }
  const auto view_count = static_cast<unsigned>(p.plan.view_count);
  for (int64_t first = 0; first < p.queries; first += wave) {
    const int64_t rows = std::min(wave, p.queries - first);
    const int64_t query_tiles = ceil_div(rows, S::queries);
    const int64_t sharing = std::clamp<int64_t>(p.blocks / (query_tiles * view_count), 1, ceil_div(p.keys, kBoundKeys));
    const dim3 grid(static_cast<unsigned>(sharing), static_cast<unsigned>(query_tiles), view_count);
    launcher.launch("score", bound_scores<S>, grid, kBoundThreads, bound_shared_bytes<S>(widest(p)), views, p.metric,
                    p.keys, first, rows, m.bounds);
    if (const int64_t splits = preselected_splits(p); splits > 0) {
      launcher.launch("select", preselect, dim3(static_cast<unsigned>(rows), static_cast<unsigned>(splits)), kThreads,
                      sizeof(BoundedShared), p.plan, p.views, p.metric, p.keys, p.exclude, first, m.bounds, m.lists);
    }
    launcher.launch("select", cascade_over_bounds, dim3(static_cast<unsigned>(rows)), kThreads, sizeof(BoundedShared),
                    p.plan, p.views, p.metric, p.keys, p.exclude, first, m.bounds, m.lists, p.answer);
  }
  return arena.used();
}

// `limit`: the shared memory that a block may ask for, in bytes.
template <class Launcher>
size_t mine_over(Launcher& launcher, const MineProblem& p, size_t limit, void* workspace) {
  if (!boundable(p, limit)) {
    return mine_exactly(launcher, p, workspace);
  }
  return wide_fits(widest(p), limit) ? mine_by_bounds<WideShape>(launcher, p, workspace)
                                     : mine_by_bounds<NarrowShape>(launcher, p, workspace);
}

// One launch, after zeros for what its blocks count.
template <class Launcher>
size_t contrast_over(Launcher& launcher, const NceProblem& p, void* workspace) {
  const int64_t query_tiles = ceil_div(p.queries.rows, kNceQueries), key_tiles = ceil_div(p.keys.rows, kNceKeys);
  const int64_t most = std::clamp<int64_t>(key_tiles, 1, kNceSplits);
  const int64_t runs = std::clamp<int64_t>(p.blocks / std::max<int64_t>(query_tiles, 1), 1, most);
  Arena arena(workspace);
  NceSpace space{};
  space.rows = query_tiles * kNceQueries;
  space.counts = arena.take<uint32_t>(query_tiles + space.rows);
  space.siblings = arena.take<uint32_t>(space.rows * kNceSiblings);
  space.top = arena.take<float>(runs * space.rows);
  space.sum = arena.take<double>(runs * space.rows);
  if (p.to_query != nullptr) {
    space.direction = arena.take<float>(runs * space.rows * p.keys.columns);
  }
  launcher.clear(space.counts, static_cast<size_t>(query_tiles + space.rows) * sizeof(uint32_t));
  launcher.launch("contrast", contrast_keys, dim3(static_cast<unsigned>(query_tiles), static_cast<unsigned>(runs)),
                  kNceThreads, sizeof(NceShared), p, space);
  return arena.used();
}

}  // namespace cascade::cuda
