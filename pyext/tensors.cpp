// TensorReader: see tensors.h.
#include "tensors.h"

#include <structmember.h>

#ifdef __linux__
#include <dlfcn.h>
#endif

namespace steepest_python {

TensorReader::TensorReader() {
  torch_ = py::module_::import("torch");
  tensor_type_ = torch_.attr("Tensor");
  parameter_type_ = torch_.attr("nn").attr("Parameter");
  grad_ = py::module_::import("inspect").attr("getattr_static")(tensor_type_, "grad");
  get_grad_ = Py_TYPE(grad_.ptr())->tp_descr_get;
  const py::object probe = torch_.attr("empty")(1);
  const auto head = py::cast<uintptr_t>(probe.attr("_cdata"));
  const auto storage = py::cast<uintptr_t>(probe.attr("untyped_storage")().attr("_cdata"));
  head_known_ = reinterpret_cast<const uintptr_t *>(probe.ptr())[2] == head &&
                reinterpret_cast<const uintptr_t *>(head)[2] == storage;
  increment_version_ = torch_.attr("autograd").attr("graph").attr("increment_version");
  find_api();
  if (api_ != nullptr && head_known_) find_direct();
  fastest_ = way_ = describe_ != nullptr ? Way::kDirect : api_ != nullptr ? Way::kDLPack : Way::kPython;
}

void TensorReader::find_api() {
  if (!py::hasattr(tensor_type_, "__dlpack_c_exchange_api__")) return;
  const py::object capsule = tensor_type_.attr("__dlpack_c_exchange_api__");
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return;
  auto *api = static_cast<const DLPackExchangeAPI *>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api->version.major == 1 && api->dltensor_from_py_object != nullptr) api_ = api;
}

namespace {

bool same(const DLTensor &a, const DLTensor &b) {
  return a.data == b.data && a.device == b.device && a.ndim == b.ndim && a.dtype == b.dtype && a.shape == b.shape &&
         a.strides == b.strides && a.byte_offset == b.byte_offset;
}

}  // namespace

// Takes the two functions only if they do on a few tensors what torch's Python interface says they do.
void TensorReader::find_direct() {
#ifdef __linux__
  void *const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) return;
  const auto describe = reinterpret_cast<decltype(describe_)>(
      dlsym(torch, "_ZN2at17toDLPackNonOwningERKNS_6TensorEP8DLTensor"));
  const auto bump = reinterpret_cast<decltype(bump_version_)>(
      dlsym(torch, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"));
  dlclose(torch);  // one reference less: it stays loaded
  if (describe == nullptr || bump == nullptr) return;
  const py::object rows = torch_.attr("empty")(3, 4);
  for (const py::object &probe : {rows, rows.attr("t")(), rows.attr("view")(-1).attr("__getitem__")(5),
                                  rows.attr("bfloat16")(), parameter_type_(rows)}) {
    DLTensor expected = {}, found = {};
    if (api_->dltensor_from_py_object(probe.ptr(), &expected) != 0) return PyErr_Clear();
    describe(tensor_of(probe.ptr()), &found);
    if (!same(expected, found)) return;
    const auto before = py::cast<int64_t>(probe.attr("_version"));
    bump(tensor_of(probe.ptr()));
    if (py::cast<int64_t>(probe.attr("_version")) != before + 1) return;
  }
  describe_ = describe;
  bump_version_ = bump;
  find_grad();
#endif
}

// The same for the gradient, and for where a tensor's head says which Python object it has: a gradient that nobody has
// looked at has none.
void TensorReader::find_grad() {
#ifdef __linux__
  void *const core = dlopen("libc10.so", RTLD_LAZY | RTLD_NOLOAD);
  if (core == nullptr) return;
  const auto grad_of = reinterpret_cast<decltype(grad_of_)>(dlsym(core, "_ZNK3c1010TensorImpl4gradEv"));
  dlclose(core);
  if (grad_of == nullptr) return;
  const py::object none = parameter_type_(torch_.attr("empty")(3)), probe = parameter_type_(torch_.attr("empty")(3));
  const auto head_of_grad = [&](const py::object &x) {
    return *static_cast<const void *const *const *>(grad_of(head_of(x.ptr())));
  };
  no_head_ = head_of_grad(none);
  if (no_head_ == nullptr || head_of_grad(probe) != no_head_) return;
  // Not by a backward pass: that would start autograd's threads, and CUDA, where steepest is imported.
  const py::object grad = torch_.attr("empty")(3);
  probe.attr("grad") = grad;
  if (head_of_grad(probe) != head_of(grad.ptr()) || head_of_grad(none) != no_head_) return;
  for (object_at_ = 6; object_at_ < 10; ++object_at_) {
    const bool found = object_of(no_head_) == nullptr && object_of(head_of(probe.ptr())) == probe.ptr() &&
                       object_of(head_of(grad.ptr())) == grad.ptr();
    if (!found) continue;
    grad_of_ = grad_of;
    return;
  }
#endif
}

void TensorReader::use(Way way) {
  if (way > fastest_) throw py::value_error("TensorReader: this torch does not have that way");
  way_ = way;
}

bool TensorReader::describe(const void *tensor, View &view) const {
  try {
    describe_(tensor, &view);
    return true;
  } catch (...) {  // a dtype that DLPack does not know, no storage ...
    return false;
  }
}

bool TensorReader::read_both(PyObject *param, View &view, View &grad, const void *const *&grad_head) const {
  if (!plain(param)) return false;
  const void *const tensor = grad_of_(head_of(param));
  grad_head = *static_cast<const void *const *const *>(tensor);
  if (grad_head == no_head_ || !describe(tensor_of(param), view) || !describe(tensor, grad)) return false;
  PyObject *const object = object_of(grad_head);
  return object == nullptr || plain(object);
}

bool TensorReader::bump_version(PyObject *param) const {
  try {
    bump_version_(tensor_of(param));
    return true;
  } catch (...) {  // a tensor of inference mode, on a thread that is not in it
    return false;
  }
}

void TensorReader::bump_versions(PyObject *list, Py_ssize_t begin, Py_ssize_t end) const {
  if (way_ != Way::kDirect) {
    increment_version_(py::reinterpret_steal<py::list>(PyList_GetSlice(list, begin, end)));
    return;
  }
  for (Py_ssize_t i = begin; i < end; ++i) bump_version_(tensor_of(PyList_GET_ITEM(list, i)));
}

bool TensorReader::adopt(const PyTypeObject *type) const {
  const py::handle object = reinterpret_cast<PyObject *>(const_cast<PyTypeObject *>(type));
  const std::string module = py::cast<std::string>(object.attr("__module__"));
  if (module.rfind("torch.distributed", 0) != 0) return false;
  const char *names[] = {"_local_tensor", "_spec"};
  for (int i = 0; i < 2; ++i) {
    const py::object member = py::getattr(object, names[i], py::none());
    if (!Py_IS_TYPE(member.ptr(), &PyMemberDescr_Type)) return false;
    const PyMemberDef *def = reinterpret_cast<PyMemberDescrObject *>(member.ptr())->d_member;
    if (def->type != T_OBJECT_EX) return false;
    offset_[i] = def->offset;
  }
  shard_type_ = type;
  return true;
}

bool TensorReader::read_slow(py::handle object, View &view) const {
  if (!object.attr("layout").is(torch_.attr("strided"))) return false;
  const py::object device = object.attr("device"), dtype = object.attr("dtype");
  const std::string type = py::cast<std::string>(device.attr("type"));
  if (type != "cpu" && type != "cuda") return false;
  view.device = {type == "cpu" ? kDLCPU : kDLCUDA, type == "cpu" ? 0 : py::cast<int32_t>(device.attr("index"))};
  view.dtype = dtype.is(torch_.attr("float32"))    ? DLDataType{kDLFloat, 32, 1}
               : dtype.is(torch_.attr("bfloat16")) ? DLDataType{kDLBfloat, 16, 1}
               : dtype.is(torch_.attr("float16"))  ? DLDataType{kDLFloat, 16, 1}
               : dtype.is(torch_.attr("uint8"))    ? DLDataType{kDLUInt, 8, 1}
               : dtype.is(torch_.attr("int8"))     ? DLDataType{kDLInt, 8, 1}
               : dtype.is(torch_.attr("int16"))    ? DLDataType{kDLInt, 16, 1}
                                                   : DLDataType{};
  const py::tuple shape = object.attr("shape"), strides = object.attr("stride")();
  view.ndim = static_cast<int32_t>(shape.size());
  view.storage.clear();
  for (const auto &size : shape) view.storage.push_back(py::cast<int64_t>(size));
  for (const auto &stride : strides) view.storage.push_back(py::cast<int64_t>(stride));
  view.shape = view.storage.data();
  view.strides = view.storage.data() + view.ndim;
  view.data = reinterpret_cast<void *>(py::cast<uintptr_t>(object.attr("data_ptr")()));
  view.byte_offset = 0;
  return true;
}

void *TensorReader::stream(int32_t device_index) const {
  void *stream = nullptr;
  if (way_ != Way::kPython) {
    if (api_->current_work_stream(kDLCUDA, device_index, &stream) != 0) throw py::error_already_set();
    return stream;
  }
  const py::object current = torch_.attr("cuda").attr("current_stream")(device_index);
  return reinterpret_cast<void *>(py::cast<uintptr_t>(current.attr("cuda_stream")));
}

}  // namespace steepest_python
