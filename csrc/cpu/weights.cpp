#include "cpu/weights.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/backend.hpp"
#include "cpu/covariance.hpp"
#include "cpu/exact.hpp"

namespace cascade::cpu {

std::unique_ptr<const Weights> Weights::find(Bank& bank, std::span<const Stage> stages, std::span<const Matrix> queries,
                                             int64_t batch, const Control& control) {
  std::vector<int32_t> views;
  for (const Stage& stage : stages)
    if (stage.fusion == Fusion::zsum) views.insert(views.end(), stage.views.begin(), stage.views.end());
  std::sort(views.begin(), views.end());
  views.erase(std::unique(views.begin(), views.end()), views.end());
  if (views.empty()) return nullptr;
  std::vector<const Covariance*> covariances;
  for (const int32_t view : views) {
    covariances.push_back(bank.covariance(view, batch, control));
    if (covariances.back() == nullptr) return nullptr;
  }
  auto weights = std::make_unique<Weights>();
  weights->weight_.resize(bank.views().size());
  for (const int32_t view : views) weights->weight_[view].resize(batch);
  constexpr int64_t together = 16;
  run_parts(static_cast<int>((batch + together - 1) / together), control, [&](int part, int) {
    for (int64_t row = part * together; row < std::min(batch, (part + 1) * together); ++row)
      for (size_t each = 0; each < views.size(); ++each) {
        const auto [low, high] = covariances[each]->deviation(queries, row);
        const double weight = zsum_weight(high);
        const bool certain = low > 0 && std::isfinite(high) && weight == zsum_weight(low);
        weights->weight_[views[each]][row] = certain ? weight : std::numeric_limits<double>::quiet_NaN();
      }
  });
  return weights;
}

bool Weights::of(const Stage& stage, int64_t row, std::vector<double>& out) const {
  out.clear();
  if (stage.fusion != Fusion::zsum) return true;
  for (const int32_t view : stage.views) out.push_back(of(view, row));
  return std::none_of(out.begin(), out.end(), [](double weight) { return std::isnan(weight); });
}

bool Weights::known(int64_t row) const {
  return std::none_of(weight_.begin(), weight_.end(),
                      [&](const auto& view) { return !view.empty() && std::isnan(view[row]); });
}

}  // namespace cascade::cpu
