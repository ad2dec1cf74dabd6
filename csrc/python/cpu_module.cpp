// cascade_engine._cpu: the CPU backend for Python. Arguments were checked in Python; what would crash is checked again.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <future>
#include <optional>
#include <string>
#include <vector>

#include "cpu/backend.hpp"
#include "cpu/contrast.hpp"
#include "cpu/exact.hpp"
#include "cpu/isa.hpp"
#include "cpu/spans.hpp"
#include "python/dlpack.hpp"

namespace py = pybind11;

namespace cascade::python {
namespace {

// Whether a signal's handler raised, Ctrl-C above all. Runs on the calling thread, which holds no GIL then.
bool interrupted() {
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

// A plan with its counts: per stage the views' numbers, the fusion, the count, and whether it ranks the bank.
class Plan {
 public:
  explicit Plan(std::vector<std::tuple<std::vector<int32_t>, int, int64_t, bool>> stages) : given_(std::move(stages)) {
    if (given_.empty()) throw py::value_error("expected at least one stage");
    for (const auto& [views, fusion, keep, over_bank] : given_) {
      if (views.empty() || keep < 0 || fusion < 0 || fusion > static_cast<int>(Fusion::rrf))
        throw py::value_error("expected views, a known fusion and a count");
      for (const int32_t view : views) views_ = std::max(views_, view + 1);
      stages_.push_back({views, static_cast<Fusion>(fusion), keep, over_bank});
    }
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  std::span<const Stage> stages() const { return stages_; }
  int32_t views() const { return views_; }

 private:
  std::vector<std::tuple<std::vector<int32_t>, int, int64_t, bool>> given_;
  std::vector<Stage> stages_;
  int32_t views_ = 0;
};

using Kept = std::tuple<std::string, std::string, std::string, std::vector<std::string>>;

// A bank with the arrays it reads.
class HeldBank {
 public:
  // `kept` is null, or folder, suffix, identity and the views' names of a shelf.
  HeldBank(const std::vector<std::pair<py::object, bool>>& views, const py::object& video_id, int metric,
           const std::string& isa, const std::optional<Kept>& kept)
      : held_(), bank_(make(views, video_id, metric, isa, kept)) {}

  cpu::Bank& bank() { return bank_; }
  void update(int64_t first, int64_t count) {
    if (first < 0 || count < 0 || first + count > bank_.size()) throw py::index_error("rows outside the bank");
    const py::gil_scoped_release release;
    bank_.update(first, count);
  }
  std::vector<std::string> troubles() {
    return bank_.shelf() != nullptr ? bank_.shelf()->take_troubles() : std::vector<std::string>{};
  }

 private:
  cpu::Bank make(const std::vector<std::pair<py::object, bool>>& views, const py::object& video_id, int metric,
                 const std::string& isa, const std::optional<Kept>& kept) {
    std::vector<Matrix> matrices;
    matrices.reserve(views.size());
    for (const auto& [array, bfloat16] : views) matrices.push_back(held_.emplace_back(array).matrix(bfloat16));
    for (const Matrix& matrix : matrices)
      if (matrix.rows != matrices.front().rows || matrix.dtype == DType::float64)
        throw py::value_error("expected views of one length and stored types");
    const int64_t* ids = nullptr;
    if (!video_id.is_none()) {
      ids = held_.emplace_back(video_id).compact<int64_t>(0, 1);
      if (held_.back().tensor().shape[0] != matrices.front().rows) throw py::value_error("expected one id per key");
    }
    const cpu::Kernels& kernels = cpu::choose(isa);
    std::unique_ptr<cpu::Shelf> shelf;
    if (kept) {
      const auto& [folder, suffix, identity, names] = *kept;
      if (names.size() != views.size()) throw py::value_error("expected a name for every view");
      shelf = std::make_unique<cpu::Shelf>(folder, suffix, identity, names);
    }
    const py::gil_scoped_release release;
    return {std::move(matrices), ids, static_cast<Metric>(metric), kernels, std::move(shelf)};
  }

  std::vector<Imported> held_;
  cpu::Bank bank_;
};

// NumPy arrays for an answer, and where they are.
struct Output {
  Output(std::span<const Stage> stages, int64_t batch, bool trace)
      : index({batch, stages.back().keep}), similarity({batch, stages.back().keep}) {
    if (!trace) return;
    for (const Stage& stage : stages) {
      kept.emplace_back(std::vector<py::ssize_t>{batch, stage.keep});
      pointers.push_back(kept.back().mutable_data());
    }
  }
  cpu::Answer answer() { return {index.mutable_data(), similarity.mutable_data(), pointers}; }
  py::tuple result(bool trace) {
    return py::make_tuple(index, similarity, trace ? py::object(py::tuple(py::cast(kept))) : py::object(py::none()));
  }

  py::array_t<int64_t> index;
  py::array_t<float> similarity;
  std::vector<py::array_t<int64_t>> kept;
  std::vector<int64_t*> pointers;
};

thread_local bool at_work = false;

// A signal's handler may come while its thread is at work and call again: what the thread keeps from call to call is
// then in use, so that call gets a thread of its own.
template <class Call>
void run(int threads, const Call& call) {
  const cpu::Control control{.threads = threads, .interrupted = interrupted};
  try {
    const py::gil_scoped_release release;
    if (at_work) {
      const auto on_behalf = [&, caller = cpu::caller()] {
        cpu::caller() = caller;
        call(control);
      };
      return std::async(std::launch::async, on_behalf).get();
    }
    struct Work {
      Work() { at_work = true; }
      ~Work() { at_work = false; }
    } const work;
    call(control);
  } catch (const cpu::Interrupted&) {
    throw py::error_already_set();
  }
}

struct NotFinite : std::runtime_error {
  using std::runtime_error::runtime_error;
};

py::tuple mine(HeldBank& held, const Plan& plan, const std::vector<std::pair<py::object, bool>>& queries,
               const py::object& query_video, const py::object& mask, bool trace, int threads) {
  cpu::Bank& bank = held.bank();
  const auto views = bank.views();
  if (queries.size() != views.size() || plan.views() > static_cast<int32_t>(views.size()))
    throw py::value_error("expected one entry in queries for each view of the bank");
  std::vector<Imported> arrays;
  arrays.reserve(queries.size() + 1);
  std::vector<Matrix> matrices(views.size(), Matrix{});
  int64_t batch = -1;
  for (size_t view = 0; view < views.size(); ++view) {
    if (queries[view].first.is_none()) continue;
    const Matrix matrix = arrays.emplace_back(queries[view].first).matrix(queries[view].second);
    if (matrix.columns != views[view].columns || (batch >= 0 && matrix.rows != batch) || matrix.dtype == DType::float64)
      throw py::value_error("expected queries of the bank's widths and of one length");
    if (!cpu::is_finite(matrix)) throw NotFinite("expected finite queries");
    batch = matrix.rows;
    matrices[view] = matrix;
  }
  for (const Stage& stage : plan.stages()) {
    for (const int32_t view : stage.views)
      if (queries[view].first.is_none()) throw py::value_error("expected queries for every view of the plan");
  }
  Exclusion exclude{};
  if (!query_video.is_none()) {
    exclude.query_video = arrays.emplace_back(query_video).compact<int64_t>(0, 1);
    exclude.key_video = bank.key_video();
    if (arrays.back().tensor().shape[0] != batch || exclude.key_video == nullptr)
      throw py::value_error("expected one video id per query, and per key");
  }
  if (!mask.is_none()) {
    exclude.mask = arrays.emplace_back(mask).compact<uint8_t>(6, 2);
    const int64_t* shape = arrays.back().tensor().shape;
    if (shape[0] != batch || shape[1] != bank.size()) throw py::value_error("expected a (B, K) mask");
  }
  Output output(plan.stages(), batch, trace);
  const cpu::Answer answer = output.answer();
  run(threads,
      [&](const cpu::Control& control) { cpu::mine(bank, plan.stages(), matrices, batch, exclude, control, answer); });
  return output.result(trace);
}

py::tuple select(const Plan& plan, const std::vector<py::object>& similarities, const py::object& mask, bool trace,
                 int threads) {
  std::vector<Imported> arrays;
  arrays.reserve(similarities.size() + 1);
  std::vector<Matrix> matrices;
  matrices.reserve(similarities.size());
  for (const py::object& each : similarities) matrices.push_back(arrays.emplace_back(each).matrix(false));
  if (matrices.empty() || plan.views() > static_cast<int32_t>(matrices.size()))
    throw py::value_error("expected similarities for every view of the plan");
  for (const Matrix& each : matrices)
    if (each.rows != matrices[0].rows || each.columns != matrices[0].columns || each.dtype == DType::float16)
      throw py::value_error("expected similarities of one shape, float32 or float64");
  Exclusion exclude{};
  if (!mask.is_none()) {
    exclude.mask = arrays.emplace_back(mask).compact<uint8_t>(6, 2);
    const int64_t* shape = arrays.back().tensor().shape;
    if (shape[0] != matrices[0].rows || shape[1] != matrices[0].columns)
      throw py::value_error("expected a (B, K) mask");
  }
  Output output(plan.stages(), matrices[0].rows, trace);
  const cpu::Answer answer = output.answer();
  run(threads, [&](const cpu::Control& control) { cpu::select(plan.stages(), matrices, exclude, control, answer); });
  return output.result(trace);
}

py::tuple contrast(const py::object& query, const py::object& own, const std::pair<py::object, bool>& keys,
                   const py::object& mined, const py::object& query_video, const py::object& key_video, int siblings,
                   const py::object& drop, double temperature, bool own_positive, bool mean_log, bool for_query,
                   bool for_own, const std::string& isa, int threads) {
  std::vector<Imported> held;
  held.reserve(7);
  cpu::ContrastCall call{};
  const auto length = [&held](int dimension) { return held.back().tensor().shape[dimension]; };
  call.query = held.emplace_back(query).compact<float>(2, 2);
  call.batch = length(0);
  const int64_t dim = length(1);
  call.own = held.emplace_back(own).compact<float>(2, 2);
  const bool fits = length(0) == call.batch && length(1) == dim;
  call.keys = held.emplace_back(keys.first).matrix(keys.second);
  if (!fits || call.keys.columns != dim || call.keys.dtype == DType::float64)
    throw py::value_error("expected queries and keys of one width, and an own key for each query");
  call.mined = held.emplace_back(mined).compact<int64_t>(0, 2);
  call.width = length(1);
  const int64_t slots = length(0) * call.width;
  if (length(0) != call.batch) throw py::value_error("expected a row of slots for each query");
  if (std::any_of(call.mined, call.mined + slots, [&](int64_t slot) { return slot >= call.keys.rows; }))
    throw py::index_error("expected slots of the bank");
  if (!query_video.is_none()) {
    call.query_video = held.emplace_back(query_video).compact<int64_t>(0, 1);
    const bool for_each = length(0) == call.batch;
    call.key_video = held.emplace_back(key_video).compact<int64_t>(0, 1);
    if (!for_each || length(0) != call.keys.rows) throw py::value_error("expected one video id per query, and per key");
  }
  if (siblings < 0 || siblings > static_cast<int>(cpu::Siblings::positive))
    throw py::value_error("expected a known way with siblings");
  call.siblings = static_cast<cpu::Siblings>(siblings);
  if (!drop.is_none()) {
    call.drop = held.emplace_back(drop).compact<bool>(6, 1);
    if (length(0) != call.batch) throw py::value_error("expected one flag per query");
  }
  call.temperature = temperature;
  call.own_positive = own_positive;
  call.mean_log = mean_log;
  const auto gradient = [&](bool wanted) {
    return wanted ? py::array_t<float>({call.batch, dim}) : py::array_t<float>(py::ssize_t{0});
  };
  py::array_t<float> to_query = gradient(for_query), to_own = gradient(for_own);
  cpu::ContrastAnswer answer{0, 0, for_query ? to_query.mutable_data() : nullptr,
                             for_own ? to_own.mutable_data() : nullptr};
  const cpu::Kernels& kernels = cpu::choose(isa);
  run(threads, [&](const cpu::Control& control) { cpu::contrast(kernels, call, control, answer); });
  const auto scalar = [](double value) {
    py::array_t<float> array(std::vector<py::ssize_t>{});
    *array.mutable_data() = static_cast<float>(value);
    return array;
  };
  return py::make_tuple(scalar(answer.loss), scalar(std::max(1.0, answer.counted)), to_query, to_own);
}

py::list list_isas() {
  py::list found;
  for (const cpu::Isa& isa : cpu::isas()) found.append(py::make_tuple(isa.name, isa.runs_here()));
  return found;
}

py::list take_spans() {
  static constexpr const char* names[] = {"score", "select", "repair"};
  py::list found;
  for (const cpu::NotedSpan& span : cpu::take_spans())
    found.append(py::make_tuple(names[static_cast<int>(span.phase)], span.thread, span.begin, span.end));
  return found;
}

}  // namespace
}  // namespace cascade::python

PYBIND11_MODULE(_cpu, module) {
  using namespace cascade;
  module.doc() = "Exact cascade mining on the CPU.";
  py::register_exception<python::NotFinite>(module, "NotFinite", PyExc_ValueError);
  py::class_<python::Plan>(module, "Plan")
      .def(py::init<std::vector<std::tuple<std::vector<int32_t>, int, int64_t, bool>>>(), py::arg("stages"));
  py::class_<python::HeldBank>(module, "Bank")
      .def(py::init<const std::vector<std::pair<py::object, bool>>&, const py::object&, int, const std::string&,
                    const std::optional<python::Kept>&>(),
           py::arg("views"), py::arg("video_id"), py::arg("metric"), py::arg("isa"), py::arg("kept") = py::none())
      .def("troubles", &python::HeldBank::troubles)
      .def("update", &python::HeldBank::update, py::arg("first"), py::arg("count"));
  module.def("mine", &python::mine, py::arg("bank"), py::arg("plan"), py::arg("queries"), py::arg("query_video"),
             py::arg("mask"), py::arg("trace"), py::arg("threads"));
  module.def("select", &python::select, py::arg("plan"), py::arg("similarities"), py::arg("mask"), py::arg("trace"),
             py::arg("threads"));
  module.def("contrast", &python::contrast, py::arg("query"), py::arg("own"), py::arg("keys"), py::arg("mined"),
             py::arg("query_video"), py::arg("key_video"), py::arg("siblings"), py::arg("drop"), py::arg("temperature"),
             py::arg("own_positive"), py::arg("mean_log"), py::arg("for_query"), py::arg("for_own"), py::arg("isa"),
             py::arg("threads"));
  module.def("note_spans", [](bool on) { cpu::noting_spans.store(on); }, py::arg("on"));
  module.def("take_spans", &python::take_spans, "(phase, thread, begin, end) noted, in nanoseconds of monotonic time.");
  module.def("isas", &python::list_isas, "Instruction sets built in, best first, and whether this machine has each.");
  module.def(
      "chosen_isa", [](const std::string& name) { return std::string(cpu::choose(name).name); }, py::arg("name"));
}
