// The Python binding: lists of tensors in, addresses to the C library, its status out as an exception.  Nothing is
// decided here: a list that is not plain (see rows.h) goes back to Python, which says what is wrong or prepares it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "bind_common.h"
#include "formula/adam.h"

namespace steepest_python {
namespace {

// The fields of steepest_hyper in their order, and the step.
using Hyper = std::pair<std::array<double, 14>, int64_t>;

// Addresses that calls take again and again, kept as the C library wants them.
struct Addresses {
  std::vector<uintptr_t> list;
  Addresses take(const std::vector<int64_t> &rows) const {
    Addresses out;
    for (const int64_t row : rows) out.list.push_back(list.at(row));
    return out;
  }
};

// Row, field, whether it is a double, address (steepest_live).
using Live = std::tuple<int32_t, int32_t, bool, uintptr_t>;

// What a call states besides its tensors.
struct Step {
  int32_t rule;
  uint32_t flags;
  std::vector<steepest_hyper> hyper;
  std::optional<std::vector<int32_t>> index;
  double clip_value;
  uintptr_t grad_scale, clip_coefficient, found_inf;  // addresses, 0 for none
  std::vector<Kind> kinds;                            // of the lists after the states
  bool stochastic;
  uint64_t seed;
  std::optional<std::vector<int64_t>> first_index;
  int num_threads;
  std::optional<Addresses> counters;
  std::vector<steepest_live> live;
  uintptr_t device_rows;
};

std::vector<steepest_live> live_values(const std::vector<Live> &values) {
  std::vector<steepest_live> out;
  for (const auto &[row, field, is_float64, address] : values)
    out.push_back({row, field, is_float64, 0, reinterpret_cast<const void *>(address)});
  return out;
}

std::vector<steepest_hyper> hyper_rows(const std::vector<Hyper> &rows) {
  std::vector<steepest_hyper> out;
  out.reserve(rows.size());
  for (const auto &[fields, step] : rows)
    out.push_back(std::apply([step = step](auto... field) { return steepest_hyper{field..., step}; }, fields));
  return out;
}

// The types that lists of a call may have; what the C library asks beyond that, it says itself.
Mismatch check_types(const Rows &rows, const std::vector<Kind> &kinds) {
  const int num_roles = static_cast<int>(rows.address.size()), first_kind = num_roles - static_cast<int>(kinds.size());
  const bool block8 = !kinds.empty() && kinds.back() == Kind::kExponents;
  if (rows.dtype[kParam] > STEEPEST_FLOAT16) return {"dtype", kParam, 0};
  if (rows.dtype[kGrad] > STEEPEST_FLOAT16) return {"dtype", kGrad, 0};
  for (int role = kFirstState; role < first_kind; ++role) {
    if (rows.dtype[role] != rows.dtype[kFirstState]) return {"state dtype", role, 0};
    if ((rows.dtype[role] == STEEPEST_BLOCK8) != block8 || rows.dtype[role] > STEEPEST_BLOCK8) return {"dtype", role, 0};
  }
  for (int role = first_kind; role < num_roles; ++role) {
    const int32_t dtype = rows.dtype[role];
    bool right = false;
    switch (kinds[role - first_kind]) {
      case Kind::kMasters:
      case Kind::kAverages: right = dtype == STEEPEST_FLOAT32; break;
      case Kind::kResiduals: right = dtype == kResidual8 || dtype == kResidual16; break;
      case Kind::kSources: right = dtype == rows.dtype[kParam]; break;
      case Kind::kExponents: right = dtype == STEEPEST_BLOCK8; break;
    }
    if (!right) return {"dtype", role, 0};
  }
  if (rows.device.type != kDLCPU && rows.device.type != kDLCUDA) return {"device", kParam, 0};
  return {};
}

// The lists after the states, where the C library wants them.
void set_kinds(steepest_step_args &args, const Rows &rows, const std::vector<Kind> &kinds, int first) {
  int exponents = 0;
  for (size_t i = 0; i < kinds.size(); ++i) {
    const int role = first + static_cast<int>(i);
    void *const *addresses = rows.address[role].data();
    switch (kinds[i]) {
      case Kind::kMasters: args.masters = addresses; break;
      case Kind::kResiduals:
        args.residuals = addresses;
        args.residual_bits = rows.dtype[role] == kResidual8 ? 8 : 16;
        break;
      case Kind::kSources: args.sources = addresses; break;
      case Kind::kAverages: args.averages = addresses; break;
      case Kind::kExponents: args.state_exponents[exponents++] = addresses; break;
    }
  }
}

// Steps over rows that check_types and an OverlapGuard have approved.
void step(const TensorReader &reader, const Rows &rows, const Step &call, void *const *sources = nullptr) {
  if (call.index && call.index->size() != rows.numel.size())
    throw py::value_error("step: hyper_index and the lists of tensors differ in length");
  if (call.first_index && call.first_index->size() != rows.numel.size())
    throw py::value_error("step: first_index and the lists of tensors differ in length");
  if (call.counters && call.counters->list.size() != rows.numel.size())
    throw py::value_error("step: counters and the lists of tensors differ in length");
  const int num_states = static_cast<int>(rows.address.size() - call.kinds.size()) - kFirstState;
  steepest_exec exec = {};
  exec.struct_size = sizeof exec;
  exec.device = rows.device.type == kDLCUDA ? STEEPEST_CUDA : STEEPEST_CPU;
  exec.device_index = rows.device.id;
  exec.stream = exec.device == STEEPEST_CUDA ? reader.stream(rows.device.id) : nullptr;
  exec.num_threads = call.num_threads;
  steepest_step_args args = {};
  args.struct_size = sizeof args;
  args.rule = call.rule;
  args.flags = call.flags;
  args.num_tensors = static_cast<int64_t>(rows.numel.size());
  args.numel = rows.numel.data();
  args.params = rows.address[kParam].data();
  args.grads = rows.address[kGrad].data();
  for (int k = 0; k < num_states; ++k) args.states[k] = rows.address[kFirstState + k].data();
  args.param_dtype = rows.dtype[kParam];
  args.grad_dtype = rows.dtype[kGrad];
  args.state_dtype = num_states > 0 ? rows.dtype[kFirstState] : rows.dtype[kParam];
  args.num_hyper = static_cast<int64_t>(call.hyper.size());
  args.hyper = call.hyper.data();
  args.hyper_index = call.index ? call.index->data() : nullptr;
  args.grad_scale = reinterpret_cast<const float *>(call.grad_scale);
  args.clip_coefficient = reinterpret_cast<const float *>(call.clip_coefficient);
  args.found_inf = reinterpret_cast<const float *>(call.found_inf);
  args.clip_value = call.clip_value;
  if (sources != nullptr) args.sources = sources;
  set_kinds(args, rows, call.kinds, kFirstState + num_states);
  args.rounding = call.stochastic ? STEEPEST_STOCHASTIC : STEEPEST_NEAREST;
  args.seed = call.seed;
  args.first_index = call.first_index ? call.first_index->data() : nullptr;
  args.counters = call.counters ? reinterpret_cast<float *const *>(call.counters->list.data()) : nullptr;
  args.num_live = static_cast<int64_t>(call.live.size());
  args.live = call.live.data();
  args.device_rows = reinterpret_cast<void *>(call.device_rows);

  uint64_t bytes = 0;
  if (traffic.on) {
    if (const steepest_status status = steepest_step_traffic(&exec, &args, &bytes)) raise(status);
    traffic.bytes += bytes;
  }
  if (const steepest_status status = steepest_step_workspace_size(&exec, &args, &bytes)) raise(status);
  std::vector<char> workspace(bytes);
  steepest_status status;
  {
    py::gil_scoped_release release;
    status = steepest_step(&exec, &args, workspace.data(), bytes);
  }
  // The message is thread-local and this is still the same thread.
  if (status) raise(status);
}

// A step of parameters that are read from where `away`, rows of the same parameters, has its first state.
void step_states_from(const TensorReader &reader, const StateRows &states, const StateRows &away, const Step &call) {
  const Rows &rows = states.rows(), &from = away.rows();
  if (from.address.size() <= kFirstState || from.address[kParam] != rows.address[kParam] || from.numel != rows.numel ||
      from.dtype[kFirstState] != rows.dtype[kParam])
    throw py::value_error("step_states_from: the two lists of rows are not of the same parameters");
  step(reader, rows, call, from.address[kFirstState].data());
}

// Checks that no memory is shared, then steps and returns None; or returns (reason, role, row), nothing changed.
py::object step_lists(const TensorReader &reader, const std::vector<py::list> &roles, const Step &call) {
  const size_t most = kFirstState + STEEPEST_MAX_STATES + call.kinds.size();
  if (roles.size() < kFirstState + call.kinds.size() || roles.size() > most)
    throw py::value_error("step: expected parameters, gradients and at most 3 lists of states");
  Rows rows;
  OverlapGuard guard;
  if (const Mismatch mismatch = rows.gather(reader, roles, call.kinds)) return reject(mismatch);
  if (const Mismatch mismatch = check_types(rows, call.kinds)) return reject(mismatch);
  if (const Mismatch mismatch = guard.check(rows, kGrad)) return reject(mismatch);
  step(reader, rows, call);
  return py::none();
}

// First half of an optimizer's step: None when the rows are ready for step_states.
py::object gather(const TensorReader &reader, OverlapGuard &guard, StateRows &states,
                  const std::vector<int64_t> &open) {
  if (const Mismatch mismatch = states.gather(reader, open)) return reject(mismatch);
  if (const Mismatch mismatch = check_types(states.rows(), states.kinds())) return reject(mismatch);
  if (const Mismatch mismatch = guard.check(states.rows(), kGrad)) return reject(mismatch);
  return py::none();
}

// The derived scalars of Adam rows as float32 values, for kernels that live outside the C library (Triton).
std::vector<std::vector<float>> adam_scalar_rows(const std::vector<Hyper> &rows) {
  std::vector<std::vector<float>> out;
  for (const steepest_hyper &h : hyper_rows(rows)) {
    const steepest::AdamScalars s = steepest::Adam<false>::scalars(h, STEEPEST_DECOUPLED);
    out.push_back({s.shrink.decay, s.lerp, s.lerp_rest, s.beta2, s.beta2_rest, s.negative_step_size, s.eps});
  }
  return out;
}

// Weight normalisation of contiguous float32 tensors, by address: forward without grad_w, backward with it.
void weight_norm(int64_t rows, int64_t columns, uintptr_t v, uintptr_t g, uintptr_t norms, uintptr_t w, uintptr_t grad_w,
                 uintptr_t grad_v, uintptr_t grad_g, int num_threads) {
  steepest_exec exec = {};
  exec.struct_size = sizeof exec;
  exec.device = STEEPEST_CPU;
  exec.num_threads = num_threads;
  steepest_weight_norm_args args = {};
  args.struct_size = sizeof args;
  args.rows = rows;
  args.columns = columns;
  args.v = reinterpret_cast<const float *>(v);
  args.g = reinterpret_cast<const float *>(g);
  args.norms = reinterpret_cast<float *>(norms);
  args.w = reinterpret_cast<float *>(w);
  args.grad_w = reinterpret_cast<const float *>(grad_w);
  args.grad_v = reinterpret_cast<float *>(grad_v);
  args.grad_g = reinterpret_cast<float *>(grad_g);
  steepest_status status;
  {
    py::gil_scoped_release release;
    status = grad_w ? steepest_weight_norm_backward(&exec, &args) : steepest_weight_norm(&exec, &args);
  }
  if (status) raise(status);
}

// How many CUDA launches a step over tensors of these sizes takes.
int64_t launches(int32_t rule, uint32_t flags, int num_states, const std::vector<int64_t> &numel,
                 const std::vector<int32_t> &hyper_index, int64_t num_hyper) {
  std::vector<void *> address(numel.size(), reinterpret_cast<void *>(uintptr_t{16}));
  steepest_hyper row = {};
  row.step = 1;
  std::vector<steepest_hyper> hyper(num_hyper, row);
  steepest_exec exec = {};
  exec.struct_size = sizeof exec;
  exec.device = STEEPEST_CUDA;
  steepest_step_args args = {};
  args.struct_size = sizeof args;
  args.rule = rule;
  args.flags = flags;
  args.num_tensors = static_cast<int64_t>(numel.size());
  args.numel = numel.data();
  args.params = address.data();
  args.grads = address.data();
  for (int k = 0; k < num_states; ++k) args.states[k] = address.data();
  args.num_hyper = num_hyper;
  args.hyper = hyper.data();
  args.hyper_index = hyper_index.empty() ? nullptr : hyper_index.data();
  int64_t count = 0;
  if (const steepest_status status = steepest_step_launches(&exec, &args, &count)) raise(status);
  return count;
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

void bind_matrix(pybind11::module_ &m);  // bind_matrix.cpp
void bind_survey(pybind11::module_ &m);  // bind_survey.cpp

PYBIND11_MODULE(_C, m) {
  using namespace steepest_python;
  bind_matrix(m);
  m.attr("ABI_VERSION") = steepest_abi_version();
  py::enum_<TensorReader::Way>(m, "Way")
      .value("PYTHON", TensorReader::Way::kPython)
      .value("DLPACK", TensorReader::Way::kDLPack)
      .value("DIRECT", TensorReader::Way::kDirect);
  py::class_<TensorReader>(m, "TensorReader")
      .def(py::init<>())
      .def_property("way", &TensorReader::way, &TensorReader::use)
      .def_property_readonly("reads_both", &TensorReader::reads_both);
  py::class_<OverlapGuard>(m, "OverlapGuard").def(py::init<>());
  m.def("build_info", [] { return std::string(steepest_build_info()); });
  py::enum_<Kind>(m, "Kind")
      .value("MASTERS", Kind::kMasters)
      .value("RESIDUALS", Kind::kResiduals)
      .value("SOURCES", Kind::kSources)
      .value("AVERAGES", Kind::kAverages)
      .value("EXPONENTS", Kind::kExponents);
  py::class_<StateRows>(m, "StateRows")
      .def(py::init<py::list, py::list, const std::vector<std::string> &, std::vector<Kind>>());
  py::class_<Counters>(m, "Counters")
      .def(py::init([](uintptr_t address, int64_t size) {
             return Counters{reinterpret_cast<float *>(address), size};
           }),
           py::arg("address"), py::arg("size"))
      .def("common", &Counters::common)
      .def("advance", &Counters::advance);
  py::class_<Addresses>(m, "Addresses")
      .def(py::init([](std::vector<uintptr_t> list) { return Addresses{std::move(list)}; }))
      .def("take", &Addresses::take);
  bind_survey(m);
  m.attr("DEVICE_ROW_BYTES") = STEEPEST_DEVICE_ROW_BYTES;
  py::class_<Step>(m, "Step")
      .def(py::init([](int32_t rule, uint32_t flags, const std::vector<Hyper> &hyper,
                       std::optional<std::vector<int32_t>> index, double clip_value, uintptr_t grad_scale,
                       uintptr_t clip_coefficient, uintptr_t found_inf, std::vector<Kind> kinds, bool stochastic,
                       uint64_t seed, std::optional<std::vector<int64_t>> first_index, int num_threads,
                       std::optional<Addresses> counters, const std::vector<Live> &live, uintptr_t device_rows) {
             return Step{rule,       flags,            hyper_rows(hyper), std::move(index), clip_value,
                         grad_scale, clip_coefficient, found_inf,         std::move(kinds), stochastic,
                         seed,       std::move(first_index), num_threads, std::move(counters),
                         live_values(live), device_rows};
           }),
           py::kw_only(), py::arg("rule"), py::arg("flags"), py::arg("hyper"), py::arg("index"), py::arg("clip_value"),
           py::arg("grad_scale"), py::arg("clip_coefficient"), py::arg("found_inf"), py::arg("kinds"),
           py::arg("stochastic"), py::arg("seed"), py::arg("first_index"), py::arg("num_threads"),
           py::arg("counters") = std::nullopt, py::arg("live") = std::vector<Live>(), py::arg("device_rows") = 0);
  m.def("step", &step_lists, py::arg("reader"), py::arg("roles"), py::arg("call"));
  m.def("gather", &gather, py::arg("reader"), py::arg("guard"), py::arg("states"), py::arg("open"));
  m.def(
      "step_states",
      [](const TensorReader &reader, const StateRows &states, const Step &call) { step(reader, states.rows(), call); },
      py::arg("reader"), py::arg("states"), py::arg("call"));
  m.def("launches", &launches, py::arg("rule"), py::arg("flags"), py::arg("num_states"), py::arg("numel"),
        py::arg("hyper_index"), py::arg("num_hyper"));
  m.def("weight_norm", &weight_norm, py::arg("rows"), py::arg("columns"), py::arg("v"), py::arg("g"), py::arg("norms"),
        py::arg("w"), py::arg("grad_w"), py::arg("grad_v"), py::arg("grad_g"), py::arg("num_threads"));
  m.def("step_states_from", &step_states_from, py::arg("reader"), py::arg("states"), py::arg("away"), py::arg("call"));
  m.def("count_traffic", [](bool on) {
    const uint64_t bytes = traffic.bytes;
    traffic = {on, 0};
    return bytes;
  });
  m.def("adam_scalars", &adam_scalar_rows);
  m.def("gradients", &gradients);
  m.def("same_objects", &same_objects);
  m.def("same_values", &same_values);
  // The C interface's names, so that Python does not repeat their numbers.
#define STEEPEST_EXPORT(name) m.attr(#name) = static_cast<int>(STEEPEST_##name)
  STEEPEST_EXPORT(SGD), STEEPEST_EXPORT(ADAGRAD), STEEPEST_EXPORT(RMSPROP), STEEPEST_EXPORT(ADAM);
  STEEPEST_EXPORT(LION), STEEPEST_EXPORT(SIGN), STEEPEST_EXPORT(PERTURB), STEEPEST_EXPORT(RESTORE);
  STEEPEST_EXPORT(MAXIMIZE), STEEPEST_EXPORT(DECOUPLED), STEEPEST_EXPORT(CAUTIOUS), STEEPEST_EXPORT(AMSGRAD);
  STEEPEST_EXPORT(NESTEROV), STEEPEST_EXPORT(CENTERED), STEEPEST_EXPORT(MOMENTUM);
  STEEPEST_EXPORT(BACKUP), STEEPEST_EXPORT(POWER);
}
