// Calls of the C interface as the driver makes them, and what it says when they do not do as they should.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "steepest/steepest.h"

#define EXPECT(condition, ...)                                 \
  do {                                                         \
    if (!(condition)) {                                        \
      std::fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);     \
      std::fprintf(stderr, __VA_ARGS__);                       \
      std::fprintf(stderr, "\n");                              \
      std::exit(1);                                            \
    }                                                          \
  } while (0)

inline steepest_exec on(steepest_device device, int index = 0) {
  steepest_exec exec{};
  exec.struct_size = sizeof exec;
  exec.device = device;
  exec.device_index = index;
  exec.num_threads = 1;
  return exec;
}

inline steepest_status step(const steepest_exec &exec, const steepest_step_args &args) {
  uint64_t bytes = 0;
  const steepest_status status = steepest_step_workspace_size(&exec, &args, &bytes);
  if (status != STEEPEST_OK) return status;
  std::vector<char> workspace(bytes);
  return steepest_step(&exec, &args, workspace.data(), bytes);
}
