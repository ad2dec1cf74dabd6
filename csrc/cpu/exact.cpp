#include "cpu/exact.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/ranking.hpp"
#include "cpu/sums.hpp"
#include "cpu/widen.hpp"

namespace cascade::cpu {
namespace {

template <class T>
void widen_as(const Matrix& matrix, int64_t row, double* out) {
  const auto* from = static_cast<const T*>(matrix.data) + row * matrix.stride;
  for (int64_t d = 0; d < matrix.columns; ++d) out[d] = static_cast<double>(widen(from[d]));
}

template <class T>
void given_scores(const Matrix& given, int64_t row, const int64_t* keys, int64_t first, int64_t count, double* out) {
  const auto* from = static_cast<const T*>(given.data) + row * given.stride;
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<double>(from[keys != nullptr ? keys[i] : first + i]);
}

// Rounds to nearest even in one step; a detour over float could round twice.
double to_bfloat16(double value) {
  const auto bits = std::bit_cast<uint64_t>(value);
  constexpr int dropped = 52 - 7;
  const uint64_t half = (uint64_t{1} << (dropped - 1)) - 1 + (bits >> dropped & 1);
  return std::bit_cast<double>((bits + half) >> dropped << dropped);
}

// Whether no value has all bits of its exponent set.
template <class Bits>
bool has_no(Bits exponent, const Matrix& matrix) {
  constexpr int64_t size = sizeof(Bits);
  for (int64_t row = 0; row < matrix.rows; ++row) {
    const char* const from = static_cast<const char*>(matrix.data) + row * matrix.stride * size;
    Bits found = 0;
    for (int64_t d = 0; d < matrix.columns; ++d) {
      Bits bits;
      std::memcpy(&bits, from + d * size, size);
      found |= static_cast<Bits>((bits & exponent) == exponent);
    }
    if (found != 0) return false;
  }
  return true;
}

// 1 / (60 + rank) of each key by its value among the others.
void reciprocal_ranks(std::span<const int64_t> keys, std::span<const double> value, double* out) {
  std::vector<std::pair<Ranked, int64_t>> order(keys.size());
  for (size_t i = 0; i < keys.size(); ++i) order[i] = {{value[i], keys[i]}, static_cast<int64_t>(i)};
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return before(a.first, b.first); });
  for (size_t i = 0; i < order.size(); ++i) out[order[i].second] = 1 / (rrf_offset + static_cast<double>(i + 1));
}

}  // namespace

void widen_row(const Matrix& matrix, int64_t row, std::vector<double>& out) {
  out.resize((matrix.columns + 7) / 8 * 8);
  std::fill(out.begin() + matrix.columns, out.end(), 0.0);
  if (matrix.dtype == DType::float32) widen_as<float>(matrix, row, out.data());
  if (matrix.dtype == DType::float16) widen_as<Float16>(matrix, row, out.data());
  if (matrix.dtype == DType::bfloat16) widen_as<BFloat16>(matrix, row, out.data());
}

double longest_row(const Matrix& matrix, int64_t first, int64_t count) {
  std::vector<double> row;
  double most = 0;
  for (int64_t i = first; i < first + count; ++i) {
    widen_row(matrix, i, row);
    most = std::max(most, sum_of(matrix.columns, [&](int64_t d) { return row[d] * row[d]; }));
  }
  constexpr double round_up = 1 + 1e-9;
  return std::sqrt(most) * round_up;
}

bool is_finite(const Matrix& matrix) {
  switch (matrix.dtype) {  // infinity and NaN are the values whose exponent has all bits set
    case DType::float32:
      return has_no<uint32_t>(0x7f800000, matrix);
    case DType::float16:
      return has_no<uint16_t>(0x7c00, matrix);
    case DType::bfloat16:
      return has_no<uint16_t>(0x7f80, matrix);
    case DType::float64:
      return has_no<uint64_t>(uint64_t{0x7ff} << 52, matrix);
  }
  return false;
}

double zsum_weight(double sigma) {
  constexpr double largest = 0x1.fep127;
  constexpr double smallest_normal = 0x1p-126;  // below it bfloat16 has fixed steps
  if (sigma == 0) return 0;
  const double weight = std::min(1 / sigma, largest);
  return weight < smallest_normal ? std::nearbyint(weight * 0x1p133) * 0x1p-133
                                  : std::min(to_bfloat16(weight), largest);
}

void ExactView::bind(const Bank& bank, int32_t view, const Matrix& queries, int64_t row) {
  bank_ = &bank;
  view_ = view;
  widen_row(queries, row, query_);
  if (bank.metric() != Metric::inner_product) {
    bank.kernels().dots(query_.data(), queries, nullptr, row, 1, &squared_norm_);
  }
}

void ExactView::bind(const Matrix& similarities, int64_t row) {
  given_ = &similarities;
  row_ = row;
}

void ExactView::scores(const int64_t* keys, int64_t first, int64_t count, double* out) const {
  if (given_ != nullptr) {
    if (given_->dtype == DType::float32) given_scores<float>(*given_, row_, keys, first, count, out);
    if (given_->dtype == DType::float64) given_scores<double>(*given_, row_, keys, first, count, out);
    return;
  }
  bank_->dots(query_.data(), view_, keys, first, count, out);
  if (bank_->metric() == Metric::inner_product) return;
  const double norm = std::sqrt(squared_norm_);
  const auto squared = bank_->squared_norms(view_);
  for (int64_t i = 0; i < count; ++i) {
    const double other = squared[keys != nullptr ? keys[i] : first + i];
    if (bank_->metric() == Metric::l2) {
      out[i] = -((squared_norm_ - 2 * out[i]) + other);
    } else {
      const double norms = norm * std::sqrt(other);
      out[i] = norms != 0 ? out[i] / norms : 0;
    }
  }
}

ExactCascade::ExactCascade(std::span<const Stage> stages, int64_t views, int64_t keys, const Weights* weights)
    : stages_(stages), keys_(keys), weights_(weights), views_(views), all_(views), have_all_(views) {}

void ExactCascade::start(const Exclusion& exclude, int64_t row) {
  exclude_ = &exclude;
  row_ = row;
  have_eligible_ = false;
  std::fill(have_all_.begin(), have_all_.end(), false);
}

std::span<const int64_t> ExactCascade::eligible() {
  if (have_eligible_) return eligible_;
  have_eligible_ = true;
  eligible_.resize(keys_);
  int64_t count = 0;
  const uint8_t* mask = exclude_->mask != nullptr ? exclude_->mask + row_ * keys_ : nullptr;
  for (int64_t key = 0; key < keys_; ++key) {
    const bool out = mask != nullptr                    ? mask[key] != 0
                     : exclude_->query_video != nullptr ? exclude_->key_video[key] == exclude_->query_video[row_]
                                                        : false;
    eligible_[count] = key;
    count += out ? 0 : 1;
  }
  eligible_.resize(count);
  return eligible_;
}

void ExactCascade::score_all(int32_t view) {
  if (have_all_[view]) return;
  all_[view].resize(keys_);
  views_[view].scores(nullptr, 0, keys_, all_[view].data());
  have_all_[view] = true;
}

void ExactCascade::column(int32_t view, std::span<const int64_t> keys, double* out) {
  const auto count = static_cast<int64_t>(keys.size());
  const bool nearly_all = count >= keys_ - keys_ / 4;
  if (!have_all_[view] && !nearly_all) return views_[view].scores(keys.data(), 0, count, out);
  score_all(view);
  for (int64_t i = 0; i < count; ++i) out[i] = all_[view][keys[i]];
}

double ExactCascade::deviation(int32_t view) {
  if (keys_ == 0) return 0;
  score_all(view);
  const auto& value = all_[view];
  const auto [low, high] = std::minmax_element(value.begin(), value.end());
  if (*low == *high) return 0;  // whatever their mean rounds to
  // Several running sums: enough that the last bits of sigma stay far below bfloat16's.
  const double mean = sum_of(keys_, [&](int64_t k) { return value[k]; }) / static_cast<double>(keys_);
  const double squares = sum_of(keys_, [&](int64_t k) { return (value[k] - mean) * (value[k] - mean); });
  const double off = sum_of(keys_, [&](int64_t k) { return value[k] - mean; });  // 0 but for the mean's rounding
  const auto count = static_cast<double>(keys_);
  return std::sqrt(std::max(0.0, squares - off * off / count) / count);
}

double ExactCascade::weight(int32_t view) {
  const double known = weights_ != nullptr ? weights_->of(view, row_) : std::numeric_limits<double>::quiet_NaN();
  return std::isnan(known) ? zsum_weight(deviation(view)) : known;
}

void ExactCascade::scores(const Stage& stage, std::span<const int64_t> keys, double* out) {
  if (stage.fusion == Fusion::none) return column(stage.views[0], keys, out);
  column_.resize(keys.size());
  for (size_t number = 0; number < stage.views.size(); ++number) {
    const int32_t view = stage.views[number];
    column(view, keys, column_.data());
    if (stage.fusion == Fusion::zsum) {
      const double factor = weight(view);
      for (double& value : column_) value *= factor;
    }
    if (stage.fusion == Fusion::rrf) {
      ranking_.resize(keys.size());
      reciprocal_ranks(keys, column_, ranking_.data());
      column_.swap(ranking_);
    }
    for (size_t i = 0; i < keys.size(); ++i) {
      if (number == 0)
        out[i] = column_[i];
      else if (stage.fusion == Fusion::min)
        out[i] = std::min(out[i], column_[i]);
      else if (stage.fusion == Fusion::max)
        out[i] = std::max(out[i], column_[i]);
      else
        out[i] += column_[i];
    }
  }
}

void ExactCascade::keep_best(const Stage& stage, std::vector<int64_t>& keys, int64_t keep) {
  fused_.resize(keys.size());
  scores(stage, keys, fused_.data());
  ranked_.resize(keys.size());
  for (size_t i = 0; i < keys.size(); ++i) ranked_[i] = {fused_[i], keys[i]};
  cpu::keep_best(ranked_, keep);
  for (size_t i = 0; i < ranked_.size(); ++i) keys[i] = ranked_[i].key;
  keys.resize(ranked_.size());
}

void ExactCascade::run(std::span<const int64_t> alive, size_t from, const Answer& answer,
                       std::span<const double> known) {
  for (size_t number = from; number < stages_.size(); ++number) {
    const Stage& stage = stages_[number];
    const auto pool = stage.over_bank ? eligible() : alive;
    const bool are_known = number == from && !known.empty();
    fused_.resize(pool.size());
    if (!are_known) scores(stage, pool, fused_.data());
    const double* score = are_known ? known.data() : fused_.data();
    ranked_.resize(pool.size());
    for (size_t i = 0; i < pool.size(); ++i) ranked_[i] = {score[i], pool[i]};
    cpu::keep_best(ranked_, stage.keep);
    const bool last = number + 1 == stages_.size();
    if (stage.over_bank) {
      member_.assign(keys_, 0);
      for (const int64_t key : alive) member_[key] = 1;
      std::erase_if(ranked_, [this](const Ranked& each) { return member_[each.key] == 0; });
    }
    if (last || !answer.kept.empty()) sort_best_first(ranked_);
    alive_.resize(ranked_.size());
    std::transform(ranked_.begin(), ranked_.end(), alive_.begin(), [](const Ranked& each) { return each.key; });
    alive = alive_;
    if (!answer.kept.empty()) {
      int64_t* kept = answer.kept[number] + row_ * stage.keep;
      std::fill(std::copy(alive.begin(), alive.end(), kept), kept + stage.keep, int64_t{-1});
    }
  }
  const int64_t k = stages_.back().keep;
  for (int64_t i = 0; i < k; ++i) {
    const bool there = i < static_cast<int64_t>(alive.size());
    answer.index[row_ * k + i] = there ? alive[i] : -1;
    answer.similarity[row_ * k + i] =
        there ? static_cast<float>(ranked_[i].score) : -std::numeric_limits<float>::infinity();
  }
}

}  // namespace cascade::cpu
