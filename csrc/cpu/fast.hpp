// The certified fast paths. Each settles the first stages of a cascade and hands over to the exact path what is left.
// Both answer exactly as the exact path does; they differ in what they are fast at.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu/backend.hpp"
#include "cpu/exact.hpp"
#include "cpu/weights.hpp"

namespace cascade::cpu {

struct MineCall {
  Bank* bank;
  std::span<const Stage> stages;
  std::span<const Matrix> queries;  // per view of the bank
  const Exclusion* exclude;
  const Answer* answer;
  const Weights* weights;  // or null: then `zsum` takes the exact path

  // Whether a stage's score is one inner product of packed views.
  bool is_packable(const Stage& stage) const {
    return stage.fusion == Fusion::none || stage.fusion == Fusion::sum ||
           (stage.fusion == Fusion::zsum && weights != nullptr);
  }

  // Whether it is that, among the stage's own candidates.
  bool is_plain(const Stage& stage) const { return is_packable(stage) && !stage.over_bank; }

  // Whether 16-bit scores bound a stage's.
  bool is_boundable(const Stage& stage) const {
    return is_packable(stage) || stage.fusion == Fusion::min || stage.fusion == Fusion::max;
  }

  // The weights that a stage's packed views have for a query, none for ones. False where they are not known.
  bool weigh(const Stage& stage, int64_t row, std::vector<double>& out) const {
    out.clear();
    return weights == nullptr || weights->of(stage, row, out);
  }
  bool knows_weights(int64_t row) const { return weights == nullptr || weights->known(row); }
};

// The packed views that a stage's 16-bit scores come from: one, or one for each view of a `min` or `max`.
using StagePacks = std::vector<const Packed16*>;

// 8-bit scores of all keys against a running threshold: for a first stage that keeps few of many.
// [begin, end) are the queries; rows that the bound cannot help are returned, unanswered.
std::vector<int64_t> stream_queries(const MineCall& call, const Packed8& packed, int64_t begin, int64_t end);

// 16-bit scores of all keys: side by side for stages that keep a large share and those over the bank, or a piece of the
// bank after the other for a first stage that keeps few. `packed` has one entry for each of the first stages that are
// boundable. All of the call's queries, on its threads.
void dense_queries(const MineCall& call, std::span<const StagePacks> packed, int64_t batch, const Control& control);

// 16-bit scores of all keys bound their ranks: for a first stage by `rrf` that keeps few of many. `packed` has one
// entry for each of its views. All of the call's queries, on its threads.
void rank_queries(const MineCall& call, std::span<const StagePacks> packed, int64_t batch, const Control& control);
constexpr int64_t most_by_rank = 512;  // what such a stage may keep

// The exact path for the given rows.
void exact_queries(const MineCall& call, std::span<const int64_t> rows);

}  // namespace cascade::cpu
