// Rows of tensors that are stepped together (parameter, gradient, states ...): gathered as flat addresses, and
// checked for everything that would make flat addresses wrong.
#pragma once

#include <cstdint>
#include <vector>

#include "dlpack_exchange.h"

namespace steepest_python {

// Why a list of rows cannot be handed to a kernel as flat addresses.  `role` and `row` say where.
struct Mismatch {
  const char *reason = nullptr;  // nullptr: none
  int role = 0;
  int64_t row = 0;
  explicit operator bool() const { return reason != nullptr; }
};

// Flat addresses of all rows, one list per role.
struct Rows {
  int32_t device_type = kDLCPU, device_index = 0;
  std::vector<int32_t> dtype;                // per role
  std::vector<std::vector<void *>> address;  // [role][row]
  std::vector<int64_t> numel;                // [row]

  // Every row: one shape and one dense layout in all roles; every role: one dtype; all: one device.
  Mismatch gather(const TensorReader &reader, const std::vector<py::list> &roles);
};

// Tells whether two written tensors, or a written and a read one, share memory.  Remembers the addresses that it last
// approved, so that the usual step, with the same tensors as before, costs one comparison instead of a sort.
class OverlapGuard {
 public:
  // `read_role`: index of the role that is only read (the gradients).
  Mismatch check(const Rows &rows, int read_role);

 private:
  struct Interval {
    uintptr_t begin, end;
    int32_t role;
    int64_t row;
  };
  Mismatch check_written(const Rows &rows, int read_role);
  Mismatch check_read(const Rows &rows, int read_role) const;
  std::vector<std::vector<void *>> approved_;
  std::vector<int64_t> numel_;
  std::vector<int32_t> dtype_;
  std::vector<Interval> written_;  // sorted by address, disjoint
};

}  // namespace steepest_python
