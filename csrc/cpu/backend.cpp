#include "cpu/backend.hpp"

#include <algorithm>
#include <limits>
#include <numeric>

#include "cpu/exact.hpp"
#include "cpu/fast.hpp"
#include "cpu/float_mode.hpp"
#include "cpu/spans.hpp"

namespace cascade::cpu {
namespace {

constexpr int64_t small_bank = 512;            // keys: below, scoring exactly costs less than bounds do
constexpr int64_t packing_pays_from = 16;      // queries: packing costs about as much as scoring so many exactly
constexpr int64_t turns_before_learning = 16;  // of a queue: features drift in training, and with them their mean
constexpr int64_t most_dims8 = 1 << 16;        // 128 * 127 times as much fits the 32 bits of their sums
// A row that is picked out of a mapped file is taken to map so much: of rows that lie together each one maps less, and
// of rows far apart up to a whole folio.
constexpr int64_t picked_row = 4 * Residency::around;

std::vector<int64_t> rows_between(int64_t begin, int64_t end) {
  std::vector<int64_t> rows(end - begin);
  std::iota(rows.begin(), rows.end(), begin);
  return rows;
}

int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : dtype == DType::float64 ? 8 : 2; }

int64_t bytes_of(const Matrix& matrix) { return matrix.rows * matrix.stride * size_of(matrix.dtype); }

// Scores lie closer together the more dimensions there are, as 1 / sqrt(D), and 8-bit bounds do not: more keys than are
// kept pass, and each costs a product of D values. Where 8 bits are not much faster than 16 that decides.
bool is_worth_8_bits(const Bank& bank, const Stage& stage) {
  constexpr int64_t usual_dims = 128;
  if (bank.size() < bank.kernels().fewest8) return false;
  int64_t dims = 0;
  for (const int32_t view : stage.views) dims += bank.views()[view].columns;
  const int64_t crowding = bank.kernels().sums_runs ? std::max<int64_t>(1, dims / usual_dims) : 1;
  return stage.keep * bank.kernels().few8 * crowding <= bank.size() && dims < most_dims8;
}

// Whether stage `number` is worth 16-bit scores of all keys, though only what the stage before it keeps needs scores:
// if that is many, or the scores are there already.
bool is_worth_all_keys(const Bank& bank, std::span<const Stage> stages, size_t number) {
  constexpr int64_t picked = 32;  // keys that are scored in tiles while the row of one is picked and scored
  if (stages[number - 1].keep * picked >= bank.size()) return true;
  const auto same = [&](const Stage& each) {
    return each.fusion == stages[number].fusion && std::ranges::equal(each.views, stages[number].views);
  };
  return std::any_of(stages.begin(), stages.begin() + static_cast<int64_t>(number), same);
}

}  // namespace

Bank::Bank(std::vector<Matrix> views, const int64_t* key_video, Metric metric, const Kernels& kernels,
           std::unique_ptr<Shelf> shelf)
    : views_(std::move(views)),
      key_video_(key_video),
      metric_(metric),
      kernels_(&kernels),
      shelf_(std::move(shelf)),
      squared_norms_(views_.size()),
      longest_(views_.size(), -1.0),
      spreads_(views_.size()) {
  if (shelf_ != nullptr)
    for (const Matrix& view : views_) shelf_->residency().watch(const_cast<void*>(view.data), bytes_of(view));
  if (metric_ == Metric::inner_product) return;
  const FloatMode mode;
  for (auto& norms : squared_norms_) norms.resize(size());
  update(0, size());
}

template <class Packed>
const Packed& Bank::made(std::map<std::vector<int32_t>, std::unique_ptr<Packed>>& all, std::span<const int32_t> views,
                         const Control& control, const Making& making) {
  const std::vector<int32_t> wanted(views.begin(), views.end());
  if (const auto found = all.find(wanted); found != all.end() && found->second) return *found->second;
  Shelf* const shelf = making.is_nested() ? nullptr : shelf_.get();
  auto packed = std::make_unique<Packed>(views_, metric_, wanted, *kernels_, control, shelf);
  return *(all[wanted] = std::move(packed));
}

const Packed16& Bank::packed16(std::span<const int32_t> views, const Control& control) {
  const Making making(*this);
  return made(packed16_, views, control, making);
}

const Packed8& Bank::packed8(std::span<const int32_t> views, const Control& control) {
  const Making making(*this);
  return made(packed8_, views, control, making);
}

// Calls `use(done, some)` for all rows; where files are mapped, some at a time, each of which touches `reach` bytes.
template <class Use>
void Bank::in_reach(int64_t count, int64_t reach, const Use& use) const {
  if (shelf_ == nullptr) return use(int64_t{0}, count);
  constexpr int64_t together = 256;
  for (int64_t done = 0; done < count; done += together) {
    const int64_t some = std::min(together, count - done);
    use(done, some);
    shelf_->residency().touched(some * reach);
  }
}

void Bank::dots(const double* query, int32_t view, const int64_t* keys, int64_t first, int64_t count,
                double* out) const {
  const Matrix& matrix = views_[view];
  const int64_t reach = keys != nullptr ? picked_row : matrix.stride * size_of(matrix.dtype);
  in_reach(count, reach, [&](int64_t done, int64_t some) {
    kernels_->dots(query, matrix, keys != nullptr ? keys + done : nullptr, first + done, some, out + done);
  });
}

void Bank::dots_float(const float* query, int32_t view, const int64_t* keys, int64_t count, float* out) const {
  in_reach(count, picked_row, [&](int64_t done, int64_t some) {
    kernels_->dots_float(query, views_[view], keys + done, some, out + done);
  });
}

const VideoIndex& Bank::videos() {
  const Making making(*this);
  if (!videos_) videos_ = std::make_unique<VideoIndex>(key_video_, size());
  return *videos_;
}

double Bank::longest(int32_t view) {
  constexpr double round_up = 1 + 1e-9;
  const Making making(*this);
  for (const auto& [views, packed] : packed8_)
    if (packed && packed->longest(view) >= 0) return packed->longest(view) * round_up;
  if (shelf_ != nullptr) return std::numeric_limits<double>::infinity();
  if (longest_[view] < 0) longest_[view] = longest_row(views_[view], 0, size());
  return longest_[view];
}

const Covariance* Bank::covariance(int32_t view, int64_t batch, const Control& control) {
  const Making making(*this);
  if (views_[view].columns >= Covariance::most_dims || making.is_nested()) return nullptr;
  Spread& spread = spreads_[view];
  if (!spread.covariance) spread.covariance = std::make_unique<Covariance>(views_, metric_, view, *kernels_);
  spread.asked += batch;
  if (const int64_t cost = spread.covariance->cost(); cost > 0) {
    if (spread.asked < cost) return nullptr;
    spread.covariance->refresh(control, shelf_ != nullptr ? &shelf_->residency() : nullptr);
    spread.asked = 0;
  }
  return spread.covariance.get();
}

bool Bank::worth_packing(int64_t batch) {
  if (shelf_ != nullptr) return true;  // what one process packs serves all that come later
  const Making making(*this);
  asked_ += batch;
  return asked_ >= packing_pays_from;
}

void Bank::update(int64_t first, int64_t count) {
  const FloatMode mode;
  const Making making(*this);
  if (metric_ != Metric::inner_product) {
    std::vector<double> key;
    for (size_t view = 0; view < views_.size(); ++view)
      for (int64_t row = first; row < first + count; ++row) {
        widen_row(views_[view], row, key);
        dots(key.data(), static_cast<int32_t>(view), nullptr, row, 1, &squared_norms_[view][row]);
      }
  }
  for (size_t view = 0; view < views_.size(); ++view)
    if (longest_[view] >= 0) longest_[view] = std::max(longest_[view], longest_row(views_[view], first, count));
  for (Spread& spread : spreads_)
    if (spread.covariance) spread.covariance->update(first, count);
  overwritten_ += count;
  if (overwritten_ > turns_before_learning * size()) {
    overwritten_ = 0;
    packed16_.clear();
    packed8_.clear();
  }
  for (auto& [views, packed] : packed16_)
    if (packed && !packed->update(first, count)) packed.reset();  // made anew when next needed
  for (auto& [views, packed] : packed8_)
    if (packed && !packed->update(first, count)) packed.reset();
  if (videos_) videos_->update(first, count);
}

void exact_queries(const MineCall& call, std::span<const int64_t> rows) {
  ExactCascade cascade(call.stages, static_cast<int64_t>(call.queries.size()), call.bank->size(), call.weights);
  for (const int64_t row : rows) {
    if (should_stop()) return;
    const Span span(Phase::repair);
    for (size_t view = 0; view < call.queries.size(); ++view)
      if (call.queries[view].data != nullptr)
        cascade.view(static_cast<int64_t>(view)).bind(*call.bank, static_cast<int32_t>(view), call.queries[view], row);
    cascade.start(*call.exclude, row);
    cascade.run(cascade.eligible(), 0, *call.answer);
  }
}

void mine(Bank& bank, std::span<const Stage> stages, std::span<const Matrix> queries, int64_t batch,
          const Exclusion& exclude, const Control& control, const Answer& answer) {
  const FloatMode mode;
  const bool bounded = bank.size() >= small_bank && answer.kept.empty();
  const auto weights = bounded ? Weights::find(bank, stages, queries, batch, control) : nullptr;
  const MineCall call{&bank, stages, queries, &exclude, &answer, weights.get()};
  const Stage& first = stages.front();
  const bool by_rank =
      first.fusion == Fusion::rrf && !first.over_bank && first.keep <= std::min(most_by_rank, bank.size() / 4);
  const bool fast = bounded && (by_rank || call.is_boundable(first)) && bank.worth_packing(batch);
  const bool ranks_bank = std::any_of(stages.begin(), stages.end(),
                                      [&](const Stage& each) { return each.over_bank && call.is_boundable(each); });
  if (fast && exclude.query_video != nullptr) bank.videos();
  if (fast && bank.kernels().tiles8 != nullptr && call.is_packable(first) && !ranks_bank &&
      is_worth_8_bits(bank, first)) {
    const Packed8& packed = bank.packed8(first.views, control);
    // Survivors of many queries share a pass over their rows: smaller runs took up to 1.5 times as long.
    return share_queries(batch, batch, control, [&](int64_t begin, int64_t end) {
      exact_queries(call, stream_queries(call, packed, begin, end));
    });
  }
  std::vector<StagePacks> packed;
  if (fast && by_rank) {
    for (const int32_t view : first.views) packed.push_back({&bank.packed16({&view, 1}, control)});
    return rank_queries(call, packed, batch, control);
  }
  if (fast) {
    for (const Stage& stage : stages) {
      if (!call.is_boundable(stage) || packed.size() == max_rows16) break;
      if (!ranks_bank && !packed.empty() && !is_worth_all_keys(bank, stages, packed.size())) break;
      StagePacks& packs = packed.emplace_back();
      if (call.is_packable(stage)) {
        packs.push_back(&bank.packed16(stage.views, control));
      } else {
        for (const int32_t view : stage.views) packs.push_back(&bank.packed16({&view, 1}, control));
      }
    }
    return dense_queries(call, packed, batch, control);
  }
  share_queries(batch, 1, control, [&](int64_t begin, int64_t end) { exact_queries(call, rows_between(begin, end)); });
}

void select(std::span<const Stage> stages, std::span<const Matrix> similarities, const Exclusion& exclude,
            const Control& control, const Answer& answer) {
  const FloatMode mode;
  const int64_t batch = similarities.front().rows, keys = similarities.front().columns;
  share_queries(batch, 1, control, [&](int64_t begin, int64_t end) {
    ExactCascade cascade(stages, static_cast<int64_t>(similarities.size()), keys);
    for (int64_t row = begin; row < end && !should_stop(); ++row) {
      for (size_t view = 0; view < similarities.size(); ++view)
        cascade.view(static_cast<int64_t>(view)).bind(similarities[view], row);
      cascade.start(exclude, row);
      cascade.run(cascade.eligible(), 0, answer);
    }
  });
}

}  // namespace cascade::cpu
