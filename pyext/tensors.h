// Reads a tensor's address, shape and strides, in one of three ways:
//   direct  by the function of torch's that fills DLPack's description, 10 ns a tensor; gradients by torch's own, which
//           makes no Python object of one that nobody has looked at
//   dlpack  through DLPack's C exchange table (torch >= 2.10), which calls it by way of pybind11 and the GIL: 60 ns
//   python  by data_ptr(), shape and stride() called from Python: about 1 us
// Layouts follow the DLPack 1.x specification; only what is used here is declared.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace steepest_python {

namespace py = pybind11;

enum DLDeviceType : int32_t { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3 };
enum DLTypeCode : uint8_t { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4 };

struct DLDevice {
  int32_t type, id;
};
inline bool operator==(DLDevice a, DLDevice b) { return a.type == b.type && a.id == b.id; }

struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
inline bool operator==(DLDataType a, DLDataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

struct DLTensor {
  void *data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape;
  int64_t *strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  struct {
    uint32_t major, minor;
  } version;
  void *previous;
  void *managed_tensor_allocator;
  void *managed_tensor_from_py_object;
  void *managed_tensor_to_py_object;
  int (*dltensor_from_py_object)(void *py_object, DLTensor *out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void **out);
};

// A tensor as DLPack describes it.  Shape and strides live in the tensor itself, or in `storage`.
struct View : DLTensor {
  std::vector<int64_t> storage;
};

class TensorReader {
 public:
  TensorReader();
  // False when the object is no plain strided tensor (a subclass, sparse, fake, not a tensor): Python then says what
  // is wrong.  Of a DTensor the local shard is read.  No Python exception is left set.
  bool read(PyObject *object, View &view) const {
    if (!plain(object) && ((object = slot(object, kLocal)) == nullptr || !plain(object))) return false;
    if (way_ == Way::kDirect) return describe(tensor_of(object), view);
    if (way_ == Way::kPython) return read_slow(object, view);
    if (api_->dltensor_from_py_object(object, &view) == 0) return true;
    PyErr_Clear();
    return false;
  }
  // Notes that tensors begin <= i < end of the list were written, so that autograd notices when it has saved one.
  void bump_versions(PyObject *list, Py_ssize_t begin, Py_ssize_t end) const;
  // A parameter and its gradient, where `way` is direct, without touching anything of Python's: several threads may do
  // it while one has the GIL.  False for all that is not usual: no gradient, another kind of tensor.
  bool read_both(PyObject *param, View &view, View &grad, const void *const *&grad_head) const;
  // Notes that it was written, likewise; false when it cannot be noted.
  bool bump_version(PyObject *param) const;
  bool reads_both() const { return way_ == Way::kDirect && grad_of_ != nullptr; }
  // The gradient, a new reference; Py_None when there is none, nullptr with a Python exception set.
  PyObject *grad(PyObject *object) const {
    return plain(object) || sharded(object) ? get_grad_(grad_.ptr(), object, nullptr)
                                            : PyObject_GetAttrString(object, "grad");
  }
  // How a DTensor is laid out over its device mesh, a borrowed reference; nullptr for all other objects.
  PyObject *spec(PyObject *object) const { return plain(object) ? nullptr : slot(object, kSpec); }
  // Addresses worth prefetching before the tensor is read again: what the head of torch's tensor points to, and of a
  // DTensor besides its shard and its own head, which has its gradient and version.
  static constexpr int kParts = 8;
  void parts(PyObject *object, const void *(&out)[kParts]) const {
    if (!head_known_) return;
    if (!plain(object)) {
      const void *const *head = head_of(object);
      out[3] = head;
      out[4] = head[3];
      out[5] = head[5];
      out[6] = reinterpret_cast<const char *>(object) + offset_[kLocal];
      out[7] = object = slot(object, kLocal);
    }
    parts_of(head_of(object), out);
  }
  static void parts_of(const void *const *head, const void *(&out)[kParts]) {
    out[0] = head[2];
    out[1] = head[3];
    out[2] = head[5];
  }
  static const void *const *head_of(PyObject *object) {
    return reinterpret_cast<const void *const *const *>(object)[2];
  }
  // The framework's current stream, which CUDA work must follow.
  void *stream(int32_t device_index) const;
  enum class Way { kPython, kDLPack, kDirect };
  Way way() const { return way_; }
  // The fastest that this torch has, or a slower one; ValueError for one that it has not.
  void use(Way way);

 private:
  // Only exact types: a subclass (FakeTensor) may not own the memory that the table reports.
  bool plain(PyObject *object) const {
    const PyTypeObject *type = Py_TYPE(object);
    return type == reinterpret_cast<PyTypeObject *>(tensor_type_.ptr()) ||
           type == reinterpret_cast<PyTypeObject *>(parameter_type_.ptr());
  }
  // DTensor keeps its shard and its layout in slots, which are read at their offsets: 2 ns, against 40 for getattr.
  enum Slot { kLocal, kSpec };
  bool sharded(PyObject *object) const {
    const PyTypeObject *type = Py_TYPE(object);
    return shard_type_ == type || (shard_type_ == nullptr && std::strcmp(type->tp_name, "DTensor") == 0 && adopt(type));
  }
  PyObject *slot(PyObject *object, Slot which) const {
    if (!sharded(object)) return nullptr;
    return *reinterpret_cast<PyObject **>(reinterpret_cast<char *>(object) + offset_[which]);
  }
  // Finds the offsets when the first DTensor is met; false when it has no such slots (another version of torch).
  bool adopt(const PyTypeObject *type) const;
  bool describe(const void *tensor, View &view) const;
  bool read_slow(py::handle object, View &view) const;
  void find_api();
  void find_direct();
  void find_grad();
  // What torch's Python object holds is an at::Tensor, which its C++ functions take by reference.
  static const void *tensor_of(PyObject *object) { return reinterpret_cast<const void *const *>(object) + 2; }
  Way way_ = Way::kPython, fastest_ = Way::kPython;
  const DLPackExchangeAPI *api_ = nullptr;
  void (*describe_)(const void *tensor, DLTensor *out) = nullptr;  // at::toDLPackNonOwning
  void (*bump_version_)(const void *tensor) = nullptr;             // torch::autograd::impl::bump_version
  const void *(*grad_of_)(const void *head) = nullptr;             // c10::TensorImpl::grad, by reference
  const void *const *no_head_ = nullptr;                           // of the tensor that stands for no gradient
  int object_at_ = 0;                                              // where a head has its Python object
  PyObject *object_of(const void *const *head) const {             // the lowest bit says who owns whom
    return reinterpret_cast<PyObject *>(reinterpret_cast<uintptr_t>(head[object_at_]) & ~uintptr_t{1});
  }
  py::object torch_, tensor_type_, parameter_type_, increment_version_;
  // Tensor.grad's descriptor, called without looking "grad" up again for each tensor.
  py::object grad_;
  descrgetfunc get_grad_;
  mutable const PyTypeObject *shard_type_ = nullptr;  // DTensor, once one has been met
  mutable Py_ssize_t offset_[2];
  bool head_known_ = false;  // whether a tensor's head lies where `parts` and `tensor_of` look for it
};

}  // namespace steepest_python
