// TensorReader: see dlpack_exchange.h.
#include "dlpack_exchange.h"
#include "steepest/steepest.h"

namespace steepest_python {

TensorReader::TensorReader() {
  torch_ = py::module_::import("torch");
  tensor_type_ = torch_.attr("Tensor");
  parameter_type_ = torch_.attr("nn").attr("Parameter");
  if (!py::hasattr(tensor_type_, "__dlpack_c_exchange_api__")) return;
  const py::object capsule = tensor_type_.attr("__dlpack_c_exchange_api__");
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return;
  auto *api = static_cast<const DLPackExchangeAPI *>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api->version.major == 1 && api->dltensor_from_py_object != nullptr) found_ = api_ = api;
}

void TensorReader::use_fast(bool on) { api_ = on ? found_ : nullptr; }

bool TensorReader::read(py::handle object, View &view) const {
  const PyTypeObject *type = Py_TYPE(object.ptr());
  if (type != reinterpret_cast<PyTypeObject *>(tensor_type_.ptr()) &&
      type != reinterpret_cast<PyTypeObject *>(parameter_type_.ptr()))
    return false;
  return api_ ? read_fast(object, view) : read_slow(object, view);
}

bool TensorReader::read_fast(py::handle object, View &view) const {
  DLTensor t;
  if (api_->dltensor_from_py_object(object.ptr(), &t) != 0) {
    PyErr_Clear();
    return false;
  }
  view.data = static_cast<char *>(t.data) + t.byte_offset;
  view.device_type = t.device.type;
  view.device_index = t.device.id;
  view.ndim = t.ndim;
  view.shape = t.shape;
  view.strides = t.strides;
  view.dtype = -1;
  if (t.dtype.lanes == 1) {
    if (t.dtype.code == kDLFloat && t.dtype.bits == 32) view.dtype = STEEPEST_FLOAT32;
    if (t.dtype.code == kDLFloat && t.dtype.bits == 16) view.dtype = STEEPEST_FLOAT16;
    if (t.dtype.code == kDLBfloat && t.dtype.bits == 16) view.dtype = STEEPEST_BFLOAT16;
  }
  return true;
}

bool TensorReader::read_slow(py::handle object, View &view) const {
  if (!object.attr("layout").is(torch_.attr("strided"))) return false;
  const py::object device = object.attr("device"), dtype = object.attr("dtype");
  const std::string type = py::cast<std::string>(device.attr("type"));
  if (type != "cpu" && type != "cuda") return false;
  view.device_type = type == "cpu" ? kDLCPU : kDLCUDA;
  view.device_index = type == "cpu" ? 0 : py::cast<int32_t>(device.attr("index"));
  view.dtype = dtype.is(torch_.attr("float32"))    ? STEEPEST_FLOAT32
               : dtype.is(torch_.attr("bfloat16")) ? STEEPEST_BFLOAT16
               : dtype.is(torch_.attr("float16"))  ? STEEPEST_FLOAT16
                                                   : -1;
  const py::tuple shape = object.attr("shape"), strides = object.attr("stride")();
  view.ndim = static_cast<int32_t>(shape.size());
  view.storage.clear();
  for (const auto &size : shape) view.storage.push_back(py::cast<int64_t>(size));
  for (const auto &stride : strides) view.storage.push_back(py::cast<int64_t>(stride));
  view.shape = view.storage.data();
  view.strides = view.storage.data() + view.ndim;
  view.data = reinterpret_cast<char *>(py::cast<uintptr_t>(object.attr("data_ptr")()));
  return true;
}

void *TensorReader::stream(int32_t device_index) const {
  void *stream = nullptr;
  if (api_) {
    if (api_->current_work_stream(kDLCUDA, device_index, &stream) != 0) throw py::error_already_set();
    return stream;
  }
  const py::object current = torch_.attr("cuda").attr("current_stream")(device_index);
  return reinterpret_cast<void *>(py::cast<uintptr_t>(current.attr("cuda_stream")));
}

}  // namespace steepest_python
