// Reads a tensor's address, shape and strides through DLPack's C exchange table (torch >= 2.10): 15-30 ns a tensor,
// against about 1 us for data_ptr(), shape and stride() called from Python.  Older torch takes those Python calls.
// Layouts follow the DLPack 1.x specification; only what is used here is declared.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace steepest_python {

namespace py = pybind11;

enum DLDeviceType : int32_t { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3 };
enum DLTypeCode : uint8_t { kDLFloat = 2, kDLBfloat = 4 };

struct DLTensor {
  void *data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
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

// What the kernels need to know of one tensor.  Shape and strides live in the tensor itself, or in `storage`.
struct View {
  char *data = nullptr;
  int32_t device_type = 0, device_index = 0;
  int32_t dtype = -1;  // steepest_dtype, -1 for any other
  int32_t ndim = 0;
  const int64_t *shape = nullptr, *strides = nullptr;
  std::vector<int64_t> storage;
};

class TensorReader {
 public:
  TensorReader();
  // False when the object is no plain strided tensor (a subclass, sparse, fake, not a tensor): Python then says what
  // is wrong.  No Python exception is left set.
  bool read(py::handle object, View &view) const;
  // The framework's current stream, which CUDA work must follow.
  void *stream(int32_t device_index) const;
  bool fast() const { return api_ != nullptr; }
  void use_fast(bool on);

 private:
  bool read_fast(py::handle object, View &view) const;
  bool read_slow(py::handle object, View &view) const;
  const DLPackExchangeAPI *api_ = nullptr;
  const DLPackExchangeAPI *found_ = nullptr;
  // Only exact types: a subclass (DTensor, FakeTensor) may not own the memory that the table reports.
  py::object torch_, tensor_type_, parameter_type_;
};

}  // namespace steepest_python
