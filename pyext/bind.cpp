// The Python binding: lists of tensors in, addresses to the C library, its status out as an exception.  Nothing is
// decided here: a list that is not plain (see rows.h) goes back to Python, which says what is wrong or prepares it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "formula/adamw.h"
#include "rows.h"
#include "steepest/steepest.h"

namespace steepest_python {
namespace {

[[noreturn]] void raise(steepest_status status) {
  const std::string message = steepest_last_error();
  switch (status) {
    case STEEPEST_ERROR_INVALID: throw py::value_error(message);
    case STEEPEST_ERROR_UNSUPPORTED: PyErr_SetString(PyExc_NotImplementedError, message.c_str()); break;
    default: PyErr_SetString(PyExc_RuntimeError, message.c_str());
  }
  throw py::error_already_set();
}

// (lr, beta1, beta2, eps, weight_decay, step)
using Hyper = std::tuple<double, double, double, double, double, int64_t>;

struct AdamWInput {
  std::vector<steepest_adamw_hyper> hyper;
  std::vector<int32_t> index;
};

AdamWInput unpack(const std::vector<Hyper> &rows, const std::optional<std::vector<int32_t>> &index) {
  AdamWInput input;
  for (const auto &[lr, beta1, beta2, eps, weight_decay, step] : rows)
    input.hyper.push_back({lr, beta1, beta2, eps, weight_decay, step});
  if (index) input.index = *index;
  return input;
}

py::object reject(const Mismatch &mismatch) { return py::make_tuple(mismatch.reason, mismatch.role, mismatch.row); }

enum Role { kParam, kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq };

Mismatch check_adamw(const Rows &rows) {
  const bool amsgrad = rows.address.size() == 5;
  if (rows.dtype[kExpAvgSq] != rows.dtype[kExpAvg]) return {"state dtype", kExpAvgSq, 0};
  if (amsgrad && rows.dtype[kMaxExpAvgSq] != rows.dtype[kExpAvg]) return {"state dtype", kMaxExpAvgSq, 0};
  if (rows.device.type != kDLCPU && rows.device.type != kDLCUDA) return {"device", kParam, 0};
  return {};
}

// Steps over rows that check_adamw and an OverlapGuard have approved.
void adamw(const TensorReader &reader, const Rows &rows, const std::vector<Hyper> &hyper,
           const std::optional<std::vector<int32_t>> &hyper_index, bool maximize, uintptr_t grad_scale,
           uintptr_t found_inf, int num_threads) {
  if (hyper_index && hyper_index->size() != rows.numel.size())
    throw py::value_error("adamw: hyper_index and the lists of tensors differ in length");
  const bool amsgrad = rows.address.size() == 5;
  const AdamWInput input = unpack(hyper, hyper_index);
  steepest_exec exec = {};
  exec.struct_size = sizeof exec;
  exec.device = rows.device.type == kDLCUDA ? STEEPEST_CUDA : STEEPEST_CPU;
  exec.device_index = rows.device.id;
  exec.stream = exec.device == STEEPEST_CUDA ? reader.stream(rows.device.id) : nullptr;
  exec.num_threads = num_threads;
  steepest_adamw_args args = {};
  args.struct_size = sizeof args;
  args.num_tensors = static_cast<int64_t>(rows.numel.size());
  args.numel = rows.numel.data();
  args.params = rows.address[kParam].data();
  args.grads = rows.address[kGrad].data();
  args.exp_avgs = rows.address[kExpAvg].data();
  args.exp_avg_sqs = rows.address[kExpAvgSq].data();
  args.max_exp_avg_sqs = amsgrad ? rows.address[kMaxExpAvgSq].data() : nullptr;
  args.param_dtype = rows.dtype[kParam];
  args.grad_dtype = rows.dtype[kGrad];
  args.state_dtype = rows.dtype[kExpAvg];
  args.flags = maximize ? STEEPEST_MAXIMIZE : 0;
  args.num_hyper = static_cast<int64_t>(input.hyper.size());
  args.hyper = input.hyper.data();
  args.hyper_index = hyper_index ? input.index.data() : nullptr;
  args.grad_scale = reinterpret_cast<const float *>(grad_scale);
  args.found_inf = reinterpret_cast<const float *>(found_inf);

  uint64_t bytes = 0;
  if (const steepest_status status = steepest_adamw_workspace_size(&exec, &args, &bytes)) raise(status);
  std::vector<char> workspace(bytes);
  steepest_status status;
  {
    py::gil_scoped_release release;
    status = steepest_adamw_step(&exec, &args, workspace.data(), bytes);
  }
  // The message is thread-local and this is still the same thread.
  if (status) raise(status);
}

// Checks that no memory is shared, then steps and returns None; or returns (reason, role, row), nothing changed.
py::object adamw_lists(const TensorReader &reader, const std::vector<py::list> &roles,
                       const std::vector<Hyper> &hyper, const std::optional<std::vector<int32_t>> &hyper_index,
                       bool maximize, uintptr_t grad_scale, uintptr_t found_inf, int num_threads) {
  if (roles.size() != 4 && roles.size() != 5) throw py::value_error("adamw: expected 4 or 5 lists of tensors");
  Rows rows;
  OverlapGuard guard;
  if (const Mismatch mismatch = rows.gather(reader, roles)) return reject(mismatch);
  if (const Mismatch mismatch = check_adamw(rows)) return reject(mismatch);
  if (const Mismatch mismatch = guard.check(rows, kGrad)) return reject(mismatch);
  adamw(reader, rows, hyper, hyper_index, maximize, grad_scale, found_inf, num_threads);
  return py::none();
}

// First half of an optimizer's step: None when the rows are ready for adamw_states.
py::object adamw_gather(const TensorReader &reader, OverlapGuard &guard, StateRows &states,
                        const std::vector<int64_t> &open) {
  if (const Mismatch mismatch = states.gather(reader, open)) return reject(mismatch);
  if (const Mismatch mismatch = check_adamw(states.rows())) return reject(mismatch);
  if (const Mismatch mismatch = guard.check(states.rows(), kGrad)) return reject(mismatch);
  return py::none();
}

// Second half: steps over the rows gathered last.
void adamw_states(const TensorReader &reader, const StateRows &states, const std::vector<Hyper> &hyper,
                  const std::optional<std::vector<int32_t>> &hyper_index, bool maximize, int num_threads) {
  adamw(reader, states.rows(), hyper, hyper_index, maximize, 0, 0, num_threads);
}

// The derived scalars of each row as float32 values, for kernels that live outside the C library (Triton).
std::vector<std::vector<float>> adamw_scalar_rows(const std::vector<Hyper> &hyper) {
  std::vector<std::vector<float>> rows;
  for (const steepest_adamw_hyper &h : unpack(hyper, std::nullopt).hyper) {
    const steepest::AdamWScalars s = steepest::adamw_scalars(h);
    rows.push_back({s.decay, s.lerp, s.lerp_rest, s.beta2, s.beta2_rest, s.bias2_sqrt, s.negative_step_size, s.eps});
  }
  return rows;
}

// How many CUDA launches an AdamW step over tensors of these sizes takes.
int64_t adamw_launches(const std::vector<int64_t> &numel, const std::vector<int32_t> &hyper_index, int64_t num_hyper,
                       bool amsgrad) {
  std::vector<void *> address(numel.size(), reinterpret_cast<void *>(uintptr_t{16}));
  std::vector<steepest_adamw_hyper> hyper(num_hyper, {0.0, 0.0, 0.0, 0.0, 0.0, 1});
  steepest_exec exec = {};
  exec.struct_size = sizeof exec;
  exec.device = STEEPEST_CUDA;
  steepest_adamw_args args = {};
  args.struct_size = sizeof args;
  args.num_tensors = static_cast<int64_t>(numel.size());
  args.numel = numel.data();
  args.params = args.exp_avgs = args.exp_avg_sqs = address.data();
  args.grads = const_cast<const void *const *>(address.data());
  args.max_exp_avg_sqs = amsgrad ? address.data() : nullptr;
  args.num_hyper = num_hyper;
  args.hyper = hyper.data();
  args.hyper_index = hyper_index.empty() ? nullptr : hyper_index.data();
  int64_t launches = 0;
  if (const steepest_status status = steepest_adamw_launches(&exec, &args, &launches)) raise(status);
  return launches;
}

// The gradients of a list of parameters, None where there is none.
py::list gradients(const py::list &params) {
  static const py::handle name = py::str("grad").release();
  const Py_ssize_t n = PyList_GET_SIZE(params.ptr());
  py::list out(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject *grad = PyObject_GetAttr(PyList_GET_ITEM(params.ptr(), i), name.ptr());
    if (grad == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(out.ptr(), i, grad);
  }
  return out;
}

// True when both lists hold the very same objects: cheap proof that a cached list is still right.
bool same_objects(const py::list &a, const py::list &b) {
  const Py_ssize_t n = PyList_GET_SIZE(a.ptr());
  if (n != PyList_GET_SIZE(b.ptr())) return false;
  for (Py_ssize_t i = 0; i < n; ++i)
    if (PyList_GET_ITEM(a.ptr(), i) != PyList_GET_ITEM(b.ptr(), i)) return false;
  return true;
}

// True when the values of the dictionary are these very objects, in this order.  Like same_objects, this touches no
// object: counting references to 2,000 cold ones takes 0.2 ms.
bool same_values(const py::list &objects, const py::dict &dict) {
  Py_ssize_t position = 0, i = 0;
  PyObject *key, *value;
  if (PyList_GET_SIZE(objects.ptr()) != PyDict_GET_SIZE(dict.ptr())) return false;
  while (PyDict_Next(dict.ptr(), &position, &key, &value))
    if (PyList_GET_ITEM(objects.ptr(), i++) != value) return false;
  return true;
}

}  // namespace
}  // namespace steepest_python

PYBIND11_MODULE(_C, m) {
  using namespace steepest_python;
  m.attr("ABI_VERSION") = steepest_abi_version();
  py::class_<TensorReader>(m, "TensorReader")
      .def(py::init<>())
      .def_property("fast", &TensorReader::fast, &TensorReader::use_fast);
  py::class_<OverlapGuard>(m, "OverlapGuard").def(py::init<>());
  m.def("build_info", [] { return std::string(steepest_build_info()); });
  py::class_<StateRows>(m, "StateRows").def(py::init<py::list, py::list, const std::vector<std::string> &>());
  m.def("adamw", &adamw_lists, py::arg("reader"), py::arg("roles"), py::arg("hyper"), py::arg("hyper_index"),
        py::arg("maximize"), py::arg("grad_scale"), py::arg("found_inf"), py::arg("num_threads"));
  m.def("adamw_gather", &adamw_gather, py::arg("reader"), py::arg("guard"), py::arg("states"), py::arg("open"));
  m.def("adamw_states", &adamw_states, py::arg("reader"), py::arg("states"), py::arg("hyper"),
        py::arg("hyper_index"), py::arg("maximize"), py::arg("num_threads"));
  m.def("adamw_launches", &adamw_launches, py::arg("numel"), py::arg("hyper_index"), py::arg("num_hyper"),
        py::arg("amsgrad"));
  m.def("adamw_scalars", &adamw_scalar_rows);
  m.def("gradients", &gradients);
  m.def("same_objects", &same_objects);
  m.def("same_values", &same_values);
}
