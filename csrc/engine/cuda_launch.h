// Everything that the CUDA engine asks of the CUDA runtime: a launch and a device guard.
// nvcc includes <cuda_runtime.h> by itself; the tests run the same sources on the host by defining STEEPEST_LAUNCH and
// the few runtime names used here before this file is read.
#pragma once

#if defined(__CUDACC_VER_MAJOR__) && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1201
#error "steepest needs CUDA 12.1 or newer: earlier compilers limit kernel arguments to 4 KiB"
#endif

namespace steepest::cuda {

#ifndef STEEPEST_LAUNCH
// Enqueues one kernel with one argument and returns the cudaError_t of just that.  (`kernel<<<...>>>` has no result,
// and cudaGetLastError() after it would also report, and clear, errors that the caller has yet to see.)
#define STEEPEST_LAUNCH(kernel, grid, block, stream, argument) \
  ::steepest::cuda::launch(kernel, grid, block, stream, argument)

template <class Argument>
cudaError_t launch(void (*kernel)(Argument), unsigned grid, unsigned block, cudaStream_t stream,
                   const Argument &argument) {
  void *arguments[] = {const_cast<Argument *>(&argument)};
  return cudaLaunchKernel(reinterpret_cast<const void *>(kernel), dim3(grid), dim3(block), arguments, 0, stream);
}
#endif

// Makes a device current and puts the caller's back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ != cudaSuccess || before_ == device) return;
    error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard &) = delete;
  DeviceGuard &operator=(const DeviceGuard &) = delete;

  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

}  // namespace steepest::cuda
