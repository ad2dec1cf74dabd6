#include "cpu/backend.hpp"

#include <algorithm>

#include "cpu/exact.hpp"

namespace cascade::cpu {
namespace {

// Each part takes a run of consecutive queries.
template <class Work>
void share_queries(int64_t batch, const Control& control, const Work& work) {
  const int parts = static_cast<int>(std::clamp<int64_t>(batch, 0, std::max(1, control.threads)));
  run_parts(parts, control, [&](int part, int of) { work(batch * part / of, batch * (part + 1) / of); });
}

template <class Bind>
void run_exact(std::span<const Stage> stages, int64_t views, int64_t keys, int64_t begin, int64_t end,
               const Exclusion& exclude, const Answer& answer, const Bind& bind) {
  ExactCascade cascade(stages, views, keys);
  std::vector<uint8_t> excluded(keys);
  std::vector<int64_t> alive;
  for (int64_t row = begin; row < end && !should_stop(); ++row) {
    bind(cascade.views(), row);
    mark_excluded(exclude, row, excluded);
    cascade.run(excluded, alive, 0, row, answer);
  }
}

}  // namespace

Bank::Bank(std::vector<Matrix> views, const int64_t* key_video, Metric metric, const Kernels& kernels)
    : views_(std::move(views)),
      key_video_(key_video),
      metric_(metric),
      kernels_(&kernels),
      squared_norms_(views_.size()) {
  if (metric_ == Metric::inner_product) return;
  for (auto& norms : squared_norms_) norms.resize(size());
  update(0, size());
}

void Bank::update(int64_t first, int64_t count) {
  if (metric_ == Metric::inner_product) return;
  std::vector<double> key;
  for (size_t view = 0; view < views_.size(); ++view)
    for (int64_t row = first; row < first + count; ++row) {
      widen_row(views_[view], row, key);
      kernels_->dots(key.data(), views_[view], nullptr, row, 1, &squared_norms_[view][row]);
    }
}

void mine(const Bank& bank, std::span<const Stage> stages, std::span<const Matrix> queries, int64_t batch,
          const Exclusion& exclude, const Control& control, const Answer& answer) {
  share_queries(batch, control, [&](int64_t begin, int64_t end) {
    run_exact(stages, static_cast<int64_t>(queries.size()), bank.size(), begin, end, exclude, answer,
              [&](std::span<ExactView> views, int64_t row) {
                for (size_t view = 0; view < views.size(); ++view)
                  if (queries[view].data != nullptr)
                    views[view].bind(bank, static_cast<int32_t>(view), queries[view], row);
              });
  });
}

void select(std::span<const Stage> stages, std::span<const Matrix> similarities, const Exclusion& exclude,
            const Control& control, const Answer& answer) {
  const int64_t batch = similarities.front().rows, keys = similarities.front().columns;
  share_queries(batch, control, [&](int64_t begin, int64_t end) {
    run_exact(stages, static_cast<int64_t>(similarities.size()), keys, begin, end, exclude, answer,
              [&](std::span<ExactView> views, int64_t row) {
                for (size_t view = 0; view < views.size(); ++view) views[view].bind(similarities[view], row);
              });
  });
}

}  // namespace cascade::cpu
