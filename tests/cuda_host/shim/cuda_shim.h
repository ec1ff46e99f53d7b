// Runs CUDA C++ on the host, for tests: each thread of a block is a host thread, so that AddressSanitizer sees every
// access out of bounds and ThreadSanitizer every missing __syncthreads().  Include it before the CUDA source:
//   g++ -x c++ -include cuda_shim.h cuda.cu
// It covers what csrc/engine uses and no more: thread and block indices in one dimension, shared memory, block
// barriers, 16-byte streaming accesses, atomicMax, and launches through STEEPEST_LAUNCH.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// The argument is one object for the whole grid; without this each thread would copy its 32 KiB for each block.
#define __grid_constant__ &
// One block runs at a time, so its shared memory may be static.
#define __shared__ static

struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));

inline unsigned atomicMax(unsigned *address, unsigned value) {
  unsigned old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101, cudaErrorLaunchFailure = 719 };
using cudaStream_t = struct CUstream_st *;

namespace shim {

struct Index {
  unsigned x;
};

// What the tests set.
inline int device_count = 2;
inline unsigned blocks_at_end = ~0u;             // only so many of a grid's last blocks run
inline cudaError_t launch_result = cudaSuccess;  // anything else: launches do nothing and return it

// What the tests read.
inline int launches = 0;
inline int device = 0;
inline int launch_device = -1;
inline cudaStream_t launch_stream = nullptr;
inline cudaError_t last_error = cudaSuccess;

inline std::atomic<long long> wide_loads{0}, wide_stores{0};  // of 16 bytes

inline thread_local pthread_barrier_t *block_barrier = nullptr;

}  // namespace shim

inline uint4 __ldcs(const uint4 *from) {
  shim::wide_loads.fetch_add(1, std::memory_order_relaxed);
  return *from;
}
inline void __stcs(uint4 *to, uint4 value) {
  shim::wide_stores.fetch_add(1, std::memory_order_relaxed);
  *to = value;
}

inline thread_local shim::Index threadIdx{0}, blockIdx{0};

inline void __syncthreads() { pthread_barrier_wait(shim::block_barrier); }

inline cudaError_t cudaGetDevice(int *device) {
  *device = shim::device;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= shim::device_count) return shim::last_error = cudaErrorInvalidDevice;
  shim::device = device;
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = shim::last_error;
  shim::last_error = cudaSuccess;
  return error;
}

inline const char *cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "launch failure";
}

#define STEEPEST_LAUNCH(kernel, grid, block, stream, argument) ::shim::launch(kernel, grid, block, stream, argument)

// A team of `block` threads walks the grid.  The barrier at a block's end is another than __syncthreads()'s: a thread
// that leaves a kernel before a barrier that others wait at is a deadlock here, not a pass by luck.
namespace shim {

template <class Argument>
cudaError_t launch(void (*kernel)(const Argument &), unsigned grid, unsigned block, cudaStream_t stream,
                   const Argument &argument) {
  if (launch_result != cudaSuccess) return last_error = launch_result;
  ++launches;
  launch_device = device;
  launch_stream = stream;
  pthread_barrier_t inside, between;
  pthread_barrier_init(&inside, nullptr, block);
  pthread_barrier_init(&between, nullptr, block);
  const auto member = [&](unsigned thread) {
    block_barrier = &inside;
    threadIdx.x = thread;
    for (blockIdx.x = grid > blocks_at_end ? grid - blocks_at_end : 0; blockIdx.x < grid; ++blockIdx.x) {
      kernel(argument);
      pthread_barrier_wait(&between);
    }
  };
  std::vector<std::thread> team;
  for (unsigned thread = 0; thread < block; ++thread) team.emplace_back(member, thread);
  for (std::thread &thread : team) thread.join();
  pthread_barrier_destroy(&inside);
  pthread_barrier_destroy(&between);
  return cudaSuccess;
}

}  // namespace shim
