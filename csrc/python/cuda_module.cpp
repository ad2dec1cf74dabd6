// cascade_engine._cuda: the CUDA backend for Python. Tensors come as (address, rows, columns, stride, dtype): only
// torch's own reach this backend, whose lifetime and stream kernels/cuda.py looks after. No CUDA header is needed here,
// so the same file binds the emulation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "cuda/backend.hpp"

#ifndef CASCADE_CUDA_MODULE
#define CASCADE_CUDA_MODULE _cuda
#endif

namespace py = pybind11;

namespace cascade::python {
namespace {

using Address = uintptr_t;
using Tensor = std::tuple<Address, int64_t, int64_t, int64_t, int>;
using Packed = std::tuple<Address, Address, Address>;  // rows, squares, range; zeros where not prepared
using StageTuple = std::tuple<std::vector<int>, int, int64_t, bool>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Matrix matrix(const Tensor& tensor) {
  const auto& [address, rows, columns, stride, dtype] = tensor;
  return {pointer<const void>(address), rows, columns, stride, static_cast<DType>(dtype)};
}

cuda::PackedKeys packed_keys(const Packed& packed, int64_t columns) {
  const auto& [rows, squares, range] = packed;
  return {pointer<uint16_t>(rows), pointer<float>(squares), pointer<cuda::PackedRange>(range),
          cuda::packed_pitch(columns)};
}

void pack(const Tensor& keys, const Packed& packed, int metric, int64_t first, int64_t rows, bool measure,
          Address stream) {
  cuda::PackProblem problem{};
  problem.keys[0] = matrix(keys);
  problem.packed[0] = packed_keys(packed, problem.keys[0].columns);
  problem.view_count = 1;
  problem.metric = static_cast<Metric>(metric);
  problem.first = first;
  problem.rows = rows;
  problem.measure = measure;
  if (first < 0 || rows < 1 || first + rows > problem.keys[0].rows) {
    throw py::value_error("expected rows of the keys");
  }
  cuda::pack(problem, pointer<void>(stream));
}

using PushedView = std::tuple<Tensor, Tensor, Packed>;  // batch, ring, the ring's packed form
using PushedColumn = std::tuple<Address, Address>;      // batch, ring

void push(const std::vector<PushedView>& views, const std::vector<PushedColumn>& columns, int metric, int64_t cursor,
          bool normalise, Address stream) {
  if (views.empty() || views.size() > cuda::kMaxViews || columns.size() > cuda::kMaxColumns) {
    throw py::value_error("expected 1 to " + std::to_string(cuda::kMaxViews) + " views and at most " +
                          std::to_string(cuda::kMaxColumns) + " columns");
  }
  cuda::PushProblem problem{};
  problem.view_count = static_cast<int>(views.size());
  for (size_t v = 0; v < views.size(); ++v) {
    const auto& [batch, ring, packed] = views[v];
    const Matrix from = matrix(batch), to = matrix(ring);
    problem.views[v] = {from, to, pointer<void>(std::get<0>(ring)), packed_keys(packed, to.columns)};
    const Matrix& first_from = problem.views[0].batch;
    const Matrix& first_to = problem.views[0].ring;
    if (from.columns != to.columns || from.rows != first_from.rows || to.rows != first_to.rows || from.rows < 1 ||
        to.rows < 1 || from.dtype == DType::float64 || to.dtype == DType::float64) {
      throw py::value_error("expected batches and rings of the same widths and lengths, none of them float64");
    }
  }
  problem.column_count = static_cast<int>(columns.size());
  for (size_t c = 0; c < columns.size(); ++c) {
    problem.columns[c] = {pointer<const int64_t>(std::get<0>(columns[c])), pointer<int64_t>(std::get<1>(columns[c]))};
  }
  problem.metric = static_cast<Metric>(metric);
  problem.cursor = cursor;
  problem.normalise = normalise;
  cuda::push(problem, pointer<void>(stream));
}

cuda::PlanArguments plan_arguments(const std::vector<StageTuple>& stages, size_t views) {
  if (stages.empty() || stages.size() > cuda::kMaxStages || views == 0 || views > cuda::kMaxViews) {
    throw py::value_error("expected 1 to " + std::to_string(cuda::kMaxStages) + " stages and 1 to " +
                          std::to_string(cuda::kMaxViews) + " views");
  }
  cuda::PlanArguments plan{};
  plan.view_count = static_cast<int>(views);
  plan.stage_count = static_cast<int>(stages.size());
  for (size_t s = 0; s < stages.size(); ++s) {
    const auto& [used, fusion, keep, over_bank] = stages[s];
    cuda::StageArguments& stage = plan.stages[s];
    if (used.empty() || used.size() > views || keep < 1 || fusion < 0 || fusion > static_cast<int>(Fusion::rrf)) {
      throw py::value_error("expected views, a known fusion and a count of at least 1");
    }
    stage.keep = keep;
    stage.fusion = static_cast<Fusion>(fusion);
    stage.view_count = static_cast<int>(used.size());
    stage.over_bank = over_bank;
    for (size_t v = 0; v < used.size(); ++v) {
      if (used[v] < 0 || static_cast<size_t>(used[v]) >= views) {
        throw py::value_error("expected views of the plan");
      }
      stage.views[v] = static_cast<uint8_t>(used[v]);
    }
  }
  return plan;
}

cuda::Answer answer(Address index, Address similarity, const std::vector<Address>& kept) {
  cuda::Answer result{};
  result.index = pointer<int64_t>(index);
  result.similarity = pointer<float>(similarity);
  for (size_t s = 0; s < kept.size() && s < cuda::kMaxStages; ++s) {
    result.kept[s] = pointer<int64_t>(kept[s]);
  }
  return result;
}

cuda::MineProblem mine_problem(const std::vector<StageTuple>& stages, const std::vector<Tensor>& queries,
                               const std::vector<Tensor>& keys, const std::vector<Packed>& packed, int metric,
                               Address key_video, Address query_video, Address mask, Address index, Address similarity,
                               const std::vector<Address>& kept, int64_t workspace_limit, int64_t split_keys,
                               int64_t blocks) {
  cuda::MineProblem problem{};
  problem.plan = plan_arguments(stages, queries.size());
  if (keys.size() != queries.size() || packed.size() != queries.size()) {
    throw py::value_error("expected keys for every view");
  }
  for (size_t v = 0; v < queries.size(); ++v) {
    problem.views.view[v] = {matrix(queries[v]), matrix(keys[v])};
    problem.packed[v] = packed_keys(packed[v], problem.views.view[v].keys.columns);
    if (problem.views.view[v].queries.columns != problem.views.view[v].keys.columns ||
        std::get<1>(queries[v]) != std::get<1>(queries[0]) || std::get<1>(keys[v]) != std::get<1>(keys[0])) {
      throw py::value_error("expected queries and keys of the same widths and lengths");
    }
  }
  problem.metric = static_cast<Metric>(metric);
  problem.exclude = {pointer<const int64_t>(key_video), pointer<const int64_t>(query_video),
                     pointer<const uint8_t>(mask)};
  problem.queries = std::get<1>(queries[0]);
  problem.keys = std::get<1>(keys[0]);
  problem.answer = answer(index, similarity, kept);
  problem.workspace_limit = workspace_limit;
  problem.split_keys = split_keys;
  problem.blocks = blocks;
  return problem;
}

cuda::SelectProblem select_problem(const std::vector<StageTuple>& stages, const std::vector<Tensor>& scores,
                                   Address mask, Address index, Address similarity, const std::vector<Address>& kept,
                                   int64_t workspace_limit) {
  cuda::SelectProblem problem{};
  problem.plan = plan_arguments(stages, scores.size());
  for (size_t v = 0; v < scores.size(); ++v) {
    problem.scores[v] = matrix(scores[v]);
  }
  problem.exclude = {nullptr, nullptr, pointer<const uint8_t>(mask)};
  problem.queries = std::get<1>(scores[0]);
  problem.keys = std::get<2>(scores[0]);
  problem.answer = answer(index, similarity, kept);
  problem.workspace_limit = workspace_limit;
  return problem;
}

cuda::NceProblem nce_problem(const Tensor& queries, const Tensor& keys, Address own, Address members, int64_t width,
                             Address query_video, Address key_video, int siblings, Address drop, double temperature,
                             bool own_positive, bool mean_log, Address loss, Address counted, Address to_query,
                             Address to_own, int64_t blocks) {
  cuda::NceProblem problem{};
  problem.queries = matrix(queries);
  problem.keys = matrix(keys);
  if (problem.queries.rows < 1 || problem.queries.columns != problem.keys.columns ||
      problem.queries.dtype != DType::float32 || siblings < 0 ||
      siblings > static_cast<int>(cuda::Siblings::positive)) {
    throw py::value_error("expected float32 queries, at least one, as wide as the keys, and siblings of a known kind");
  }
  problem.own = pointer<const float>(own);
  problem.members = pointer<const int64_t>(members);
  problem.width = width;
  problem.query_video = pointer<const int64_t>(query_video);
  problem.key_video = pointer<const int64_t>(key_video);
  problem.siblings = static_cast<cuda::Siblings>(siblings);
  problem.drop = pointer<const bool>(drop);
  problem.temperature = temperature;
  problem.own_positive = own_positive;
  problem.blocks = blocks;
  problem.mean_log = mean_log;
  problem.loss = pointer<double>(loss);
  problem.counted = pointer<bool>(counted);
  problem.to_query = pointer<float>(to_query);
  problem.to_own = pointer<float>(to_own);
  return problem;
}

}  // namespace
}  // namespace cascade::python

PYBIND11_MODULE(CASCADE_CUDA_MODULE, module) {
  using namespace cascade;
  module.doc() = "Exact cascade mining on NVIDIA GPUs.";
  module.attr("MAX_VIEWS") = cuda::kMaxViews;
  module.attr("MAX_STAGES") = cuda::kMaxStages;
  module.def("unavailable", &cuda::unavailable);
  module.def("devices", &cuda::devices);
  module.attr("PACKED_RANGE_BYTES") = cuda::kPackedRangeBytes;
  module.def("packed_pitch", &cuda::packed_pitch, py::arg("columns"));
  module.def("bounds_fit", &cuda::bounds_fit, py::arg("columns"));
  module.def("pack", &python::pack, py::kw_only(), py::arg("keys"), py::arg("packed"), py::arg("metric"),
             py::arg("first"), py::arg("rows"), py::arg("measure"), py::arg("stream"));
  module.def("push", &python::push, py::kw_only(), py::arg("views"), py::arg("columns"), py::arg("metric"),
             py::arg("cursor"), py::arg("normalise"), py::arg("stream"));
  const auto release = py::call_guard<py::gil_scoped_release>();
  py::class_<cuda::MineProblem>(module, "Mine", py::module_local())
      .def(py::init(&python::mine_problem), py::kw_only(), py::arg("stages"), py::arg("queries"), py::arg("keys"),
           py::arg("packed"), py::arg("metric"), py::arg("key_video"), py::arg("query_video"), py::arg("mask"),
           py::arg("index"), py::arg("similarity"), py::arg("kept"), py::arg("workspace_limit"), py::arg("split_keys"),
           py::arg("blocks"))
      .def("workspace", &cuda::mine_workspace)
      .def(
          "run",
          [](const cuda::MineProblem& problem, python::Address workspace, python::Address stream) {
            cuda::mine(problem, python::pointer<void>(workspace), python::pointer<void>(stream));
          },
          py::arg("workspace"), py::arg("stream"), release);
  py::class_<cuda::SelectProblem>(module, "Select", py::module_local())
      .def(py::init(&python::select_problem), py::kw_only(), py::arg("stages"), py::arg("scores"), py::arg("mask"),
           py::arg("index"), py::arg("similarity"), py::arg("kept"), py::arg("workspace_limit"))
      .def("workspace", &cuda::select_workspace)
      .def(
          "run",
          [](const cuda::SelectProblem& problem, python::Address workspace, python::Address stream) {
            cuda::select(problem, python::pointer<void>(workspace), python::pointer<void>(stream));
          },
          py::arg("workspace"), py::arg("stream"), release);
  py::class_<cuda::NceProblem>(module, "Contrast", py::module_local())
      .def(py::init(&python::nce_problem), py::kw_only(), py::arg("queries"), py::arg("keys"), py::arg("own"),
           py::arg("members"), py::arg("width"), py::arg("query_video"), py::arg("key_video"), py::arg("siblings"),
           py::arg("drop"), py::arg("temperature"), py::arg("own_positive"), py::arg("mean_log"), py::arg("loss"),
           py::arg("counted"), py::arg("to_query"), py::arg("to_own"), py::arg("blocks"))
      .def("workspace", &cuda::contrast_workspace)
      .def(
          "run",
          [](const cuda::NceProblem& problem, python::Address workspace, python::Address stream) {
            cuda::contrast(problem, python::pointer<void>(workspace), python::pointer<void>(stream));
          },
          py::arg("workspace"), py::arg("stream"), release);
}
