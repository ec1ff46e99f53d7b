// The Python binding of surveys: those that return numbers, on the CPU, and those whose results stay where the tensors live.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <memory>
#include <optional>

#include "bind_common.h"
#include "engine/measure.h"

namespace steepest_python {
namespace {

// T = alpha * |weight| + eps multiplies what is surveyed, or the inner product is taken.
struct Weigh {
  int role;  // of the weights
  double alpha, eps;
  bool inner;
};

// One read of the tensors of one role: (sum of |x / scale|^q, largest |x|, whether anything is not finite).
py::tuple survey_role(const Rows &rows, int role, double q, double scale, int num_threads,
                      const std::optional<Weigh> &weigh = std::nullopt) {
  steepest_exec exec = {};
  exec.struct_size = sizeof exec;
  exec.device = STEEPEST_CPU;
  exec.num_threads = num_threads;
  steepest_survey_args args = {};
  args.struct_size = sizeof args;
  args.num_tensors = static_cast<int64_t>(rows.numel.size());
  args.numel = rows.numel.data();
  args.tensors = rows.address[role].data();
  args.dtype = rows.dtype[role];
  args.q = q;
  args.scale = scale;
  if (weigh) {
    args.weights = rows.address[weigh->role].data();
    args.weight_dtype = rows.dtype[weigh->role];
    args.alpha = weigh->alpha;
    args.eps = weigh->eps;
    args.inner = weigh->inner;
  }
  uint64_t bytes = 0;
  if (traffic.on) {
    if (const steepest_status status = steepest_survey_traffic(&exec, &args, &bytes)) raise(status);
    traffic.bytes += bytes;
  }
  if (const steepest_status status = steepest_survey_workspace_size(&exec, &args, &bytes)) raise(status);
  const std::unique_ptr<char[]> workspace(new char[bytes]);
  steepest_survey_result result;
  steepest_status status;
  {
    py::gil_scoped_release release;
    status = steepest_survey(&exec, &args, workspace.get(), bytes, &result);
  }
  if (status) raise(status);
  return py::make_tuple(result.power_sum, result.largest, result.nonfinite != 0);
}

// Of a list of tensors of one dtype; or the reason why the list is not plain.
py::object survey(const TensorReader &reader, const py::list &tensors, double q, double scale, int num_threads) {
  Rows rows;
  if (const Mismatch mismatch = rows.gather(reader, {tensors}, {})) return reject(mismatch);
  if (rows.device.type != kDLCPU) return reject({"device", 0, 0});
  if (rows.dtype[0] > STEEPEST_FLOAT16) return reject({"dtype", 0, 0});
  return survey_role(rows, 0, q, scale, num_threads);
}

// The same with every element times (alpha * |its weight| + eps).
py::object survey_weighed(const TensorReader &reader, const py::list &tensors, const py::list &weights, double alpha,
                          double eps, double q, double scale, bool inner, int num_threads) {
  Rows rows;
  if (const Mismatch mismatch = rows.gather(reader, {tensors, weights}, {})) return reject(mismatch);
  if (rows.device.type != kDLCPU) return reject({"device", 0, 0});
  for (int role = 0; role < 2; ++role)
    if (rows.dtype[role] > STEEPEST_FLOAT16) return reject({"dtype", role, 0});
  return survey_role(rows, 0, q, scale, num_threads, Weigh{1, alpha, eps, inner});
}

// A joint survey whose results stay where the tensors live: lists are added, then run once.
class Measure {
 public:
  Measure(double q, bool inner, bool count_largest) {
    args_.struct_size = sizeof args_;
    args_.q = q;
    args_.inner = inner;
    args_.count_largest = count_largest;
  }

  // Tensors of one dtype, and the weights that they are multiplied with; or (reason, role, row), nothing added.
  py::object add(const TensorReader &reader, const py::list &tensors, const std::optional<py::list> &weights,
                 double alpha, double eps) {
    auto rows = std::make_unique<Rows>();
    std::vector<py::list> roles = {tensors};
    if (weights) roles.push_back(*weights);
    if (const Mismatch mismatch = rows->gather(reader, roles, {})) return reject(mismatch);
    for (size_t role = 0; role < roles.size(); ++role)
      if (rows->dtype[role] > STEEPEST_FLOAT16) return reject({"dtype", static_cast<int>(role), 0});
    add_rows(*rows, 0, weights ? 1 : -1, alpha, eps);
    owned_.push_back(std::move(rows));
    return py::none();
  }

  // The gradients of gathered rows, weighed by their parameters or not.
  void add_states(const StateRows &states, bool weighed, double alpha, double eps) {
    add_rows(states.rows(), kGrad, weighed ? kParam : -1, alpha, eps);
  }

  uint64_t workspace_bytes() {
    uint64_t bytes = 0;
    const steepest_exec exec = this->exec();
    if (const steepest_status status = steepest_measure_workspace_size(&exec, &list(), &bytes)) raise(status);
    return bytes;
  }

  void run(const TensorReader &reader, double max_norm, uintptr_t grad_scale, uintptr_t workspace,
           uint64_t workspace_bytes, uintptr_t result, int num_threads) {
    steepest_exec exec = this->exec();
    exec.stream = exec.device == STEEPEST_CUDA ? reader.stream(device_.id) : nullptr;
    exec.num_threads = num_threads;
    list();
    args_.max_norm = max_norm;
    args_.grad_scale = reinterpret_cast<const float *>(grad_scale);
    if (traffic.on) count_traffic(exec);
    steepest_status status;
    {
      py::gil_scoped_release release;
      status = steepest_measure(&exec, &args_, reinterpret_cast<void *>(workspace), workspace_bytes,
                                reinterpret_cast<steepest_measure_result *>(result));
    }
    if (status) raise(status);
  }

 private:
  void add_rows(const Rows &rows, int role, int weight_role, double alpha, double eps) {
    if (!lists_.empty() && (rows.device.type != device_.type || rows.device.id != device_.id))
      throw py::value_error("Measure: lists on several devices");
    device_ = rows.device;
    steepest_survey_args list = {};
    list.struct_size = sizeof list;
    list.num_tensors = static_cast<int64_t>(rows.numel.size());
    list.numel = rows.numel.data();
    list.tensors = rows.address[role].data();
    list.dtype = rows.dtype[role];
    list.q = args_.q;
    list.scale = 1;
    list.inner = args_.inner;
    if (weight_role >= 0) {
      list.weights = rows.address[weight_role].data();
      list.weight_dtype = rows.dtype[weight_role];
      list.alpha = alpha;
      list.eps = eps;
    }
    lists_.push_back(list);
  }

  steepest_exec exec() const {
    steepest_exec exec = {};
    exec.struct_size = sizeof exec;
    exec.device = device_.type == kDLCUDA ? STEEPEST_CUDA : STEEPEST_CPU;
    exec.device_index = device_.id;
    return exec;
  }

  const steepest_measure_args &list() {
    args_.num_lists = static_cast<int64_t>(lists_.size());
    args_.lists = lists_.data();
    return args_;
  }

  // Powers other than 1, 2 and inf, and counting, take two reads.
  void count_traffic(steepest_exec exec) const {
    exec.device = STEEPEST_CPU;  // the same bytes on both
    const bool direct = args_.q == 1 || args_.q == 2 || (std::isinf(args_.q) && !args_.count_largest);
    for (const steepest_survey_args &list : lists_) {
      uint64_t bytes = 0;
      if (const steepest_status status = steepest_survey_traffic(&exec, &list, &bytes)) raise(status);
      traffic.bytes += direct ? bytes : 2 * bytes;
    }
  }

  steepest_measure_args args_ = {};
  DLDevice device_ = {kDLCPU, 0};
  std::vector<steepest_survey_args> lists_;
  std::vector<std::unique_ptr<Rows>> owned_;
};

}  // namespace
}  // namespace steepest_python

void bind_survey(pybind11::module_ &m) {
  using namespace steepest_python;
  py::class_<Measure>(m, "Measure")
      .def(py::init<double, bool, bool>(), py::kw_only(), py::arg("q"), py::arg("inner"), py::arg("count_largest"))
      .def("add", &Measure::add, py::arg("reader"), py::arg("tensors"), py::arg("weights"), py::arg("alpha"),
           py::arg("eps"), py::keep_alive<1, 3>(), py::keep_alive<1, 4>())
      .def("add_states", &Measure::add_states, py::arg("states"), py::arg("weighed"), py::arg("alpha"), py::arg("eps"),
           py::keep_alive<1, 2>())
      .def_property_readonly("workspace_bytes", &Measure::workspace_bytes)
      .def("run", &Measure::run, py::kw_only(), py::arg("reader"), py::arg("max_norm"), py::arg("grad_scale"),
           py::arg("workspace"), py::arg("workspace_bytes"), py::arg("result"), py::arg("num_threads"));
  m.def("survey", &survey, py::arg("reader"), py::arg("tensors"), py::arg("q"), py::arg("scale"),
        py::arg("num_threads"));
  m.def("survey_weighed", &survey_weighed, py::arg("reader"), py::arg("tensors"), py::arg("weights"),
        py::arg("alpha"), py::arg("eps"), py::arg("q"), py::arg("scale"), py::arg("inner"), py::arg("num_threads"));
  m.def(
      "clip",  // (the norm of unscaled gradients, what they are multiplied with), as a measure has them
      [](double norm, float max_norm, float grad_scale) {
        const float unscaled = static_cast<float>(norm) / grad_scale;
        return py::make_tuple(unscaled, steepest::clip_coefficient(unscaled, max_norm));
      },
      py::arg("norm"), py::arg("max_norm"), py::arg("grad_scale"));
  m.def(
      "survey_states",
      [](const StateRows &states, double q, double scale, int num_threads) {
        return survey_role(states.rows(), kGrad, q, scale, num_threads);
      },
      py::arg("states"), py::arg("q"), py::arg("scale"), py::arg("num_threads"));
  m.def(
      "survey_states_weighed",
      [](const StateRows &states, double alpha, double eps, double q, double scale, int num_threads) {
        return survey_role(states.rows(), kGrad, q, scale, num_threads, Weigh{kParam, alpha, eps, false});
      },
      py::arg("states"), py::arg("alpha"), py::arg("eps"), py::arg("q"), py::arg("scale"), py::arg("num_threads"));
}
