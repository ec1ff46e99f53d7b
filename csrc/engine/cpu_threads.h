// How many threads a CPU call uses, and running it on them.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "steepest/steepest.h"

namespace steepest::cpu {

// Below this many elements per thread, waking another thread costs more than it saves (about 5 us).
constexpr int64_t kMinShare = 1 << 14;

inline int thread_count(const steepest_exec &exec, int64_t cost) {
  const int allowed = exec.num_threads > 0 ? exec.num_threads : omp_get_max_threads();
  return static_cast<int>(std::clamp<int64_t>(cost / kMinShare, 1, allowed));
}

template <class Work>
void run_on_threads(int threads, const Work &work) {
  if (threads == 1) {
    work();
  } else {
#pragma omp parallel num_threads(threads)
    work();
  }
}

}  // namespace steepest::cpu
