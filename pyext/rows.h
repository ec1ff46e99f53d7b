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

  void resize(int num_roles, int64_t num_rows);
  // The tensor added last.
  const View &last(int role) const { return role == 0 ? first_ : other_; }
  // Takes one tensor; roles of a row in order, the parameter first.
  Mismatch add(const TensorReader &reader, PyObject *tensor, int role, int64_t row);

 private:
  View first_, other_;
};

// The rows of an optimizer: parameters, and the dictionaries that hold their states.  One walk per step reads each
// parameter's gradient, looks its states up and takes all addresses: 10,000 rows are some 20 MB of Python and tensor
// objects, so every further walk over them would cost another trip to memory (measured: 26 ms for separate walks).
class StateRows {
 public:
  // `names` are the keys of the states in entries[row]; "step" is watched beside them.
  StateRows(py::list params, py::list entries, const std::vector<std::string> &names);
  // Fills rows().  "stale": a state or counter was replaced or removed; "no grad": a parameter has no gradient; others as
  // Rows::gather.
  Mismatch gather(const TensorReader &reader);
  const Rows &rows() const { return rows_; }

 private:
  Rows rows_;  // kept, so that its memory is allocated once
  // Where the tensors of a row were found last time: the objects, and their shapes, which lie inside torch's tensors.
  struct Hint {
    const void *object, *shape;
  };
  void prefetch(int64_t row) const;
  Mismatch add(const TensorReader &reader, PyObject *tensor, int role, int64_t row);
  std::vector<Hint> hints_;  // [row * roles + role]
  // columns_[k][row] is what entries_[row][names_[k]] must still be; the first name is "step".
  py::list params_, entries_;
  std::vector<py::str> names_;
  std::vector<py::list> columns_;
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
