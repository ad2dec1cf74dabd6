// The CPU kernels without Python, for sanitizers and emulators: every instruction set against a plain reading of the
// contract, on inputs that try the bounds. Usage: kernels_test [rounds]. Prints what ran; exits non-zero on a
// difference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bounds_test.hpp"
#include "covariance_test.hpp"
#include "cpu/backend.hpp"
#include "cpu/contrast.hpp"
#include "cpu/exact.hpp"
#include "cpu/threshold.hpp"
#include "packed_test.hpp"
#include "pool_test.hpp"

namespace {

using namespace cascade;  // a test reads best as its subject does

struct Problem {
  int64_t keys, batch;
  std::vector<int64_t> dims;
  std::vector<std::vector<float>> key, query;  // per view
  std::vector<int64_t> key_video, query_video;
  Metric metric;
  std::vector<std::vector<int32_t>> stage_views;
  std::vector<Stage> stages;
  std::vector<std::vector<double>> weight;  // in `zsum`, per view and query
  std::vector<uint8_t> masked;              // [batch, keys], instead of the videos; or empty
};

double dot(const float* a, const float* b, int64_t n) {
  double s[8] = {};
  for (int64_t d = 0; d < n; ++d) s[d % 8] += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

double similarity(const Problem& p, size_t view, int64_t q, int64_t k) {
  const int64_t n = p.dims[view];
  const float *a = p.query[view].data() + q * n, *b = p.key[view].data() + k * n;
  if (p.metric == Metric::inner_product) return dot(a, b, n);
  if (p.metric == Metric::l2) return -((dot(a, a, n) - 2 * dot(a, b, n)) + dot(b, b, n));
  const double norms = std::sqrt(dot(a, a, n)) * std::sqrt(dot(b, b, n));
  return norms != 0 ? dot(a, b, n) / norms : 0;
}

// A stage's scores of keys in ascending order.
std::vector<double> fused(const Problem& p, const Stage& stage, int64_t q, const std::vector<int64_t>& keys) {
  std::vector<double> total(keys.size());
  for (size_t i = 0; i < stage.views.size(); ++i) {
    const auto view = static_cast<size_t>(stage.views[i]);
    std::vector<double> s(keys.size());
    for (size_t k = 0; k < keys.size(); ++k) s[k] = similarity(p, view, q, keys[k]);
    if (stage.fusion == Fusion::zsum)
      for (double& each : s) each *= p.weight[view][q];
    if (stage.fusion == Fusion::rrf) {
      std::vector<size_t> order(keys.size());
      std::iota(order.begin(), order.end(), size_t{0});
      std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return s[a] > s[b]; });
      for (size_t rank = 0; rank < order.size(); ++rank) s[order[rank]] = 1 / (60.0 + static_cast<double>(rank + 1));
    }
    for (size_t k = 0; k < keys.size(); ++k)
      total[k] = i == 0                        ? s[k]
                 : stage.fusion == Fusion::min ? std::min(total[k], s[k])
                 : stage.fusion == Fusion::max ? std::max(total[k], s[k])
                                               : total[k] + s[k];
  }
  return total;
}

// To be called whenever keys have changed.
void weigh(Problem& p) {
  p.weight.assign(p.dims.size(), std::vector<double>(p.batch));
  std::vector<double> score(p.keys);
  for (size_t view = 0; view < p.dims.size(); ++view)
    for (int64_t q = 0; q < p.batch; ++q) {
      double sum = 0, squares = 0;
      for (int64_t k = 0; k < p.keys; ++k) sum += score[k] = similarity(p, view, q, k);
      for (const double each : score) squares += (each - sum / p.keys) * (each - sum / p.keys);
      const bool equal = std::all_of(score.begin(), score.end(), [&](double each) { return each == score[0]; });
      p.weight[view][q] = equal ? 0 : cpu::zsum_weight(std::sqrt(squares / p.keys));
    }
}

// The last stage's survivors, best first, and their scores; filled up with -1.
std::vector<std::pair<int64_t, double>> expected(const Problem& p, int64_t q) {
  std::vector<int64_t> eligible;
  for (int64_t k = 0; k < p.keys; ++k)
    if (p.masked.empty() ? p.key_video[k] != p.query_video[q] : p.masked[q * p.keys + k] == 0) eligible.push_back(k);
  std::vector<int64_t> alive = eligible;
  std::vector<std::pair<int64_t, double>> found;
  for (const Stage& stage : p.stages) {
    const auto& pool = stage.over_bank ? eligible : alive;
    const auto score = fused(p, stage, q, pool);
    std::vector<std::pair<double, int64_t>> ranked;
    for (size_t i = 0; i < pool.size(); ++i) ranked.emplace_back(-score[i], pool[i]);
    std::sort(ranked.begin(), ranked.end());
    if (static_cast<int64_t>(ranked.size()) > stage.keep) ranked.resize(stage.keep);
    found.clear();
    for (const auto& [negative, k] : ranked)
      if (std::binary_search(alive.begin(), alive.end(), k)) found.emplace_back(k, -negative);
    alive.clear();
    for (const auto& [k, unused] : found) alive.push_back(k);
    std::sort(alive.begin(), alive.end());
  }
  found.resize(p.stages.back().keep, {-1, -std::numeric_limits<double>::infinity()});
  return found;
}

constexpr int families = 14;
constexpr int first_for_8_bits = 7;  // the first stages of these families take the 8-bit stream

// A number drawn from a normal distribution for a row, the same each time.
float normal_of(int64_t row) {
  std::mt19937 own(static_cast<unsigned>(row));
  return std::normal_distribution<float>()(own);
}

// Families that are easy, tied, skewed, off centre, of wild lengths, denormal, constant, of near ties in what large
// products leave, of products that floats do not hold, of few large values among small ones, of signs, wide, of widely
// spread lengths, of one giant among dwarfs.
float value(int family, std::mt19937& rng, int64_t row, int64_t d) {
  std::normal_distribution<float> normal;
  switch (family) {
    case 1:
      return static_cast<float>(static_cast<int>(rng() % 5)) - 2;
    case 2:
      return normal(rng) * (d == 0 ? 100.0f : 1.0f);
    case 3:
      return normal(rng) + 7;
    case 4:
      return normal(rng) * std::pow(10.0f, static_cast<float>(row % 30) - 15);
    case 5:
      return row % 3 == 0 ? 0.0f : 1e-42f * static_cast<float>(1 + row % 5);
    case 6:
      return 0.25f;
    case 7:
      return (d < 150 ? 100.0f : -100.0f) + 1e-3f * static_cast<float>(rng() % 64);
    case 8:
      return normal(rng) * (row % 2 == 0 ? 2e19f : 3e17f);
    case 9:
      return rng() % 16 == 0 ? 100.0f : normal(rng);
    case 10:
      return rng() % 2 == 0 ? 1.0f : -1 + 1e-3f * normal(rng);
    case 12:
      return normal(rng) * std::exp(3 * normal_of(row));
    case 13:
      return normal(rng) * (row % 701 == 5 ? 1e7f : 1e-3f * static_cast<float>(1 + row % 3));
    default:
      return normal(rng);
  }
}

Problem make(std::mt19937& rng, int family) {
  Problem p;
  const bool wide = family == 11;
  p.keys =
      family >= first_for_8_bits ? (family == 7 ? 3000 : 700) : std::vector<int64_t>{600, 1023, 2048, 4500}[rng() % 4];
  p.batch = 17 + rng() % 9;
  p.metric = family == 7 ? Metric::inner_product : static_cast<Metric>(rng() % 3);
  for (int view = 0; view < 2; ++view) {
    const int64_t n = wide && view == 0 ? 520 : family == 7 ? 300 : std::vector<int64_t>{1, 3, 16, 37, 64}[rng() % 5];
    p.dims.push_back(n);
    p.key.emplace_back(p.keys * n);
    p.query.emplace_back(p.batch * n);
    for (int64_t i = 0; i < p.keys * n; ++i) p.key[view][i] = value(family, rng, i / n, i % n);
    for (int64_t i = 0; i < p.batch * n; ++i) p.query[view][i] = value(family, rng, i / n, i % n);
    for (float& each : p.query[view]) each = family == 7 ? std::abs(each) : each;  // large products that cancel
  }
  for (int64_t k = 0; k < p.keys; ++k) p.key_video.push_back(static_cast<int64_t>(rng() % 40));
  for (int64_t q = 0; q < p.batch; ++q) p.query_video.push_back(static_cast<int64_t>(rng() % 40));
  const int stages = 1 + static_cast<int>(rng() % 4);
  int64_t keep = p.keys;
  for (int s = 0; s < stages; ++s) {
    const bool streamed = s == 0 && family >= first_for_8_bits;
    const int kind = static_cast<int>(rng() % (family == 7 ? 3 : streamed ? 6 : 8));
    p.stage_views.push_back(kind < 3 ? std::vector<int32_t>{static_cast<int32_t>(rng() % 2)}
                                     : std::vector<int32_t>{1, 0});
    keep = std::max<int64_t>(1, streamed || rng() % 3 == 0 ? keep / 40 : keep / 2);
    constexpr Fusion several[] = {Fusion::sum, Fusion::zsum, Fusion::rrf, Fusion::min, Fusion::max};
    const Fusion fusion = kind < 3 ? Fusion::none : several[kind - 3];
    p.stages.push_back({{}, fusion, keep, !streamed && rng() % 6 == 0});
  }
  for (size_t s = 0; s < p.stages.size(); ++s) p.stages[s].views = p.stage_views[s];
  weigh(p);
  return p;
}

std::vector<Matrix> matrices(const Problem& p, const std::vector<std::vector<float>>& data, int64_t rows) {
  std::vector<Matrix> out;
  for (size_t view = 0; view < p.dims.size(); ++view)
    out.push_back({data[view].data(), rows, p.dims[view], p.dims[view], DType::float32});
  return out;
}

bool answers_right(const Problem& p, cpu::Bank& bank, const char* isa, int threads, const char* when) {
  const int64_t k = p.stages.back().keep;
  std::vector<int64_t> index(p.batch * k);
  std::vector<float> score(p.batch * k);
  const cpu::Answer answer{index.data(), score.data(), {}};
  const uint8_t* const mask = p.masked.empty() ? nullptr : p.masked.data();
  const Exclusion exclude{p.key_video.data(), mask == nullptr ? p.query_video.data() : nullptr, mask};
  const auto queries = matrices(p, p.query, p.batch);
  cpu::mine(bank, p.stages, queries, p.batch, exclude, {.threads = threads}, answer);
  for (int64_t q = 0; q < p.batch; ++q) {
    const auto want = expected(p, q);
    for (int64_t i = 0; i < k; ++i) {
      const auto [key, value] = want[i];
      const int64_t found = index[q * k + i];
      if (found == key && static_cast<float>(value) == score[q * k + i]) continue;
      std::printf("%s, %d threads, %s: query %ld rank %ld: expected key %ld, got %ld\n", isa, threads, when,
                  static_cast<long>(q), static_cast<long>(i), static_cast<long>(key), static_cast<long>(found));
      return false;
    }
  }
  return true;
}

// The loss and its gradients against float64, and against themselves with other threads.
bool contrasts_right(const cpu::Isa& isa, std::mt19937& rng) {
  const auto dim = static_cast<int64_t>(1 + rng() % 150), batch = static_cast<int64_t>(1 + rng() % 70);
  const auto keys = static_cast<int64_t>(rng() % 3000), width = static_cast<int64_t>(rng() % 9);
  const bool has_videos = rng() % 4 != 0, drops = rng() % 2 == 0;
  std::normal_distribution<float> normal(0, 1 / std::sqrt(static_cast<float>(dim)));
  std::vector<float> query(batch * dim), own(batch * dim), key(keys * dim);
  for (auto* values : {&query, &own, &key})
    for (float& each : *values) each = normal(rng);
  std::vector<int64_t> mined(batch * width), query_video(batch), key_video(keys);
  for (int64_t& each : mined) each = static_cast<int64_t>(rng() % (keys + 1)) - 1;
  for (auto* ids : {&query_video, &key_video})
    for (int64_t& each : *ids) each = static_cast<int64_t>(rng() % 100) - 50;
  std::unique_ptr<bool[]> drop(new bool[batch]);
  for (int64_t q = 0; q < batch; ++q) drop[q] = rng() % 2 == 0;
  const cpu::ContrastCall call{.query = query.data(),
                               .own = own.data(),
                               .batch = batch,
                               .keys = {key.data(), keys, dim, dim, DType::float32},
                               .mined = mined.data(),
                               .width = width,
                               .query_video = has_videos ? query_video.data() : nullptr,
                               .key_video = key_video.data(),
                               .siblings = static_cast<cpu::Siblings>(rng() % 3),
                               .drop = drops ? drop.get() : nullptr,
                               .temperature = 0.07,
                               .own_positive = rng() % 3 != 0,
                               .mean_log = rng() % 2 == 0};
  std::vector<float> to_query(batch * dim), to_own(batch * dim), again(batch * dim), own_again(batch * dim);
  cpu::ContrastAnswer answer{0, 0, to_query.data(), to_own.data()}, other{0, 0, again.data(), own_again.data()};
  cpu::contrast(isa.kernels(), call, {.threads = 1}, answer);
  cpu::contrast(isa.kernels(), call, {.threads = 3}, other);
  bool right = answer.loss == other.loss && to_query == again && to_own == own_again;

  double total = 0, counted = 0;
  std::vector<double> want(batch * dim, 0.0), want_own(batch * dim, 0.0);
  for (int64_t q = 0; q < batch; ++q) {
    enum Kind { negative, member, left_out };
    std::vector<Kind> kind(keys + 1, negative);
    for (int64_t i = 0; i < width; ++i)
      if (mined[q * width + i] >= 0) kind[mined[q * width + i]] = member;
    for (int64_t k = 0; k < keys; ++k)
      if (has_videos && key_video[k] == query_video[q])
        kind[k] = call.siblings == cpu::Siblings::positive  ? member
                  : call.siblings == cpu::Siblings::ignored ? left_out
                                                            : negative;
    const bool has_others = std::count(kind.begin(), kind.end(), member) > 0;
    if (call.own_positive && !(drops && drop[q] && has_others)) kind[keys] = member;
    const auto size = static_cast<double>(std::count(kind.begin(), kind.end(), member));
    if (size == 0) continue;
    ++counted;
    std::vector<double> score(keys + 1);
    double all = 0, inside = 0, sum = 0;
    const auto row = [&](int64_t k) { return k < keys ? key.data() + k * dim : own.data() + q * dim; };
    for (int64_t k = 0; k <= keys; ++k) {
      score[k] = dot(query.data() + q * dim, row(k), dim) / call.temperature;
      if (kind[k] != left_out) all += std::exp(score[k]);
      if (kind[k] == member) inside += std::exp(score[k]), sum += score[k];
    }
    total += std::log(all) - (call.mean_log ? sum / size : std::log(inside));
    for (int64_t k = 0; k <= keys; ++k) {
      if (kind[k] == left_out) continue;
      double weight = std::exp(score[k]) / all;
      if (kind[k] == member) weight -= call.mean_log ? 1 / size : std::exp(score[k]) / inside;
      weight /= call.temperature;
      for (int64_t d = 0; d < dim; ++d) want[q * dim + d] += weight * static_cast<double>(row(k)[d]);
      for (int64_t d = 0; d < dim && k == keys; ++d)
        want_own[q * dim + d] = weight * static_cast<double>(query[q * dim + d]);
    }
  }
  right = right && answer.counted == counted && std::abs(answer.loss - total / std::max(1.0, counted)) < 1e-5;
  for (int64_t i = 0; i < batch * dim; ++i)
    right = right && std::abs(static_cast<double>(to_query[i]) - want[i]) < 1e-4 &&
            std::abs(static_cast<double>(to_own[i]) - want_own[i]) < 1e-4;
  if (!right)
    std::printf("%s: contrast of %ld queries, %ld keys, %ld dimensions is wrong\n", isa.name, static_cast<long>(batch),
                static_cast<long>(keys), static_cast<long>(dim));
  return right;
}

// The bracket holds the m-th largest score and is narrow, also where the vectors that the search samples mislead it.
bool thresholds_right(const cpu::Isa& isa, std::mt19937& rng) {
  const auto vectors = static_cast<int64_t>(1 + rng() % 300), n = vectors * cpu::lanes16;
  const int spread = 1 << rng() % 15, slack = static_cast<int>(rng() % 20);
  const int lifted = rng() % 2 == 0 ? 0 : rng() % 2 == 0 ? 16000 : -16000;
  std::vector<int16_t> score(n), middle(n + 64);
  for (int16_t& each : score) each = static_cast<int16_t>(static_cast<int>(rng() % (2 * spread)) - spread);
  for (int64_t j = 0; j < 16; ++j)
    for (int64_t lane = 0; lane < cpu::lanes16; ++lane) {
      int16_t& each = score[j * (vectors - 1) / 16 * cpu::lanes16 + lane];
      each = static_cast<int16_t>(std::clamp(each + lifted, -32767, 32767));
    }
  for (int64_t i = 0; i < n; ++i)
    if (rng() % 9 == 0) score[i] = cpu::no_score;
  std::vector<int16_t> sorted(score);
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const auto valid = static_cast<int64_t>(std::find(sorted.begin(), sorted.end(), cpu::no_score) - sorted.begin());
  if (valid == 0) return true;
  const auto m = static_cast<int64_t>(1 + rng() % valid);
  const cpu::Threshold found = cpu::find_threshold(isa.kernels(), score.data(), n, valid, m, slack, middle.data());
  const int wanted = sorted[m - 1];
  // A bracket of one number may also be any that exactly m scores reach.
  const bool exactly = found.low == found.high &&
                       std::count_if(score.begin(), score.end(), [&](int16_t each) { return each >= found.low; }) == m;
  if (exactly || (found.low <= wanted && wanted <= found.high && found.high - found.low <= slack)) return true;
  std::printf("%s: the %ld-th of %ld scores is %d, the bracket [%d, %d]\n", isa.name, static_cast<long>(m),
              static_cast<long>(n), wanted, found.low, found.high);
  return false;
}

}  // namespace

int main(int count, char** words) {
  const int rounds = count > 1 ? std::atoi(words[1]) : 1;
  int failures = !pool_test::stops_when_interrupted();
  std::mt19937 calls(5);
  for (int round = 0; round < 500 * rounds; ++round) failures += !pool_test::runs_each_part_once(calls);
  for (int round = 0; round < 50 * rounds; ++round) failures += !pool_test::passes_on_what_a_part_throws(calls);
  for (const cpu::Isa& isa : cpu::isas()) {
    if (!isa.runs_here()) {
      std::printf("%s: not on this machine (%s)\n", isa.name, isa.needs);
      continue;
    }
    int problems = 0;
    for (int round = 0; round < rounds; ++round)
      for (int family = 0; family < families; ++family, ++problems) {
        std::mt19937 rng(static_cast<unsigned>(1000 * round + family));
        Problem p = make(rng, family);
        cpu::Kernels kernels = isa.kernels();
        if (family >= first_for_8_bits) kernels.fewest8 = 0;  // in a bank small enough to be checked
        cpu::Bank bank(matrices(p, p.key, p.keys), p.key_video.data(), p.metric, kernels);
        failures += !answers_right(p, bank, isa.name, 1, "fresh");
        failures += !answers_right(p, bank, isa.name, 3, "fresh");
        cpu::Kernels pieces = isa.kernels();
        pieces.tiles8 = nullptr;
        pieces.piece16 = cpu::lanes16 * (1 + family % 3);
        pieces.rows16 = 1;
        cpu::Bank in_pieces(matrices(p, p.key, p.keys), p.key_video.data(), p.metric, pieces);
        Problem few = p;  // of which the second stage's scores are there for even families
        few.stages[0].keep = p.keys / (family % 2 == 0 ? 20 : 40);
        for (size_t s = 1; s < few.stages.size(); ++s) {
          few.stages[s].keep = std::min(few.stages[s].keep, few.stages[0].keep);
          few.stages[s].over_bank = false;
        }
        failures += !answers_right(p, in_pieces, isa.name, 3, "few at once");
        failures += !answers_right(few, in_pieces, isa.name, 2, "in pieces");
        few.masked.resize(p.batch * p.keys);
        for (uint8_t& each : few.masked)
          each = rng() % (family % 3 == 0 ? 1000 : 2) == 0 ? 0 : static_cast<uint8_t>(1 + rng() % 255);
        failures += !answers_right(few, in_pieces, isa.name, 1, "masked, in pieces");
        if (family == 7) {  // alone, the first stage is the last: what is surely out is dropped, the rest ranked
          Problem one = p;
          one.stages.resize(1);
          failures += !answers_right(one, bank, isa.name, 1, "one stage");
        }
        if (family % 2 == 0) {  // a wrong rank anywhere shows in the fused scores
          Problem ranks = p;
          ranks.stage_views = {{1, 0}};
          ranks.stages = {{ranks.stage_views[0], Fusion::rrf, 100, false}};
          failures += !answers_right(ranks, bank, isa.name, 2, "ranks");
        }
        const int64_t first = p.keys / 3, written = p.keys / 5;  // as a queue overwrites a run of slots
        for (size_t view = 0; view < p.dims.size(); ++view)
          for (int64_t i = first * p.dims[view]; i < (first + written) * p.dims[view]; ++i)
            p.key[view][i] = value(family == 0 ? 4 : family, rng, i / p.dims[view], i % p.dims[view]);
        for (int64_t slot = first; slot < first + written; ++slot) p.key_video[slot] = static_cast<int64_t>(rng() % 40);
        bank.update(first, written);
        weigh(p);
        failures += !answers_right(p, bank, isa.name, 2, "after an update");
      }
    std::mt19937 rng(7);
    for (int round = 0; round < 4 * rounds; ++round) failures += !contrasts_right(isa, rng);
    for (int round = 0; round < 500 * rounds; ++round) failures += !thresholds_right(isa, rng);
    for (int round = 0; round < 150 * rounds; ++round) {
      failures += !bounds_test::tiles8_right(isa, rng);
      failures += !bounds_test::tiles16_right(isa, rng);
      failures += !bounds_test::float_products_right(isa, rng);
      failures += !bounds_test::brackets_right(isa, rng);
      failures += !packed_test::bounds8_hold(isa, rng);
      failures += !covariance_test::deviations_hold(isa, rng);
    }
    std::printf("%s: %d problems\n", isa.name, problems);
  }
  std::printf(failures == 0 ? "all equal\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
