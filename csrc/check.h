// What the entry points of the C interface check alike.
#pragma once

#include <cstdint>

#include "engine/status.h"
#include "steepest/steepest.h"

// Returns STEEPEST_ERROR_INVALID with a message, from the function that it stands in.
#define STEEPEST_REQUIRE(condition, ...)                                              \
  do {                                                                                \
    if (!(condition)) return fail(STEEPEST_ERROR_INVALID, __VA_ARGS__);               \
  } while (0)

namespace steepest {

steepest_status check_exec(const char *op, const steepest_exec *exec);

// Refuses NULL, and an address that no element of that size can have (a GPU would fault on it).
steepest_status check_address(const char *op, const char *role, long long row, const void *address, int size);

// Refuses too little workspace.
steepest_status check_workspace(const char *op, const void *workspace, uint64_t available, uint64_t needed);

// Bytes of an element.
int size_of(int32_t dtype);

}  // namespace steepest
