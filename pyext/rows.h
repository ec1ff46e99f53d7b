// Rows of tensors that are stepped together (parameter, gradient, states ...): gathered as flat addresses, and
// checked for everything that would make flat addresses wrong.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "tensors.h"

namespace steepest_python {

// Why a list of rows cannot be handed to a kernel as flat addresses.  `role` and `row` say where.
struct Mismatch {
  const char *reason = nullptr;  // nullptr: none
  int role = 0;
  int64_t row = 0;
  explicit operator bool() const { return reason != nullptr; }
};

// Types of residuals, numbered on from steepest_dtype.
enum ResidualType : int32_t { kResidual8 = 4, kResidual16 = 5 };

// What a list besides parameters, gradients and states holds (see steepest_step_args); exponents come last, one list per
// state.
enum class Kind { kMasters, kResiduals, kSources, kAverages, kExponents };

// Flat addresses of all rows, one list per role.
struct Rows {
  DLDevice device = {kDLCPU, 0};
  std::vector<int32_t> dtype;                // steepest_dtype per role
  std::vector<std::vector<void *>> address;  // [role][row]
  std::vector<int64_t> numel;                // [row]

  // Every row: one shape and one dense layout in all roles; every role: one dtype; all: one device.
  Mismatch gather(const TensorReader &reader, const std::vector<py::list> &roles, const std::vector<Kind> &kinds);

  // The last roles are of these kinds.
  void resize(int num_roles, int64_t num_rows, const std::vector<Kind> &kinds);
  // Takes one tensor; roles of a row in order, the parameter first.  nullptr, or the reason why not.  Of a DTensor it
  // takes the local shard; all roles of a row must be laid out alike over the device mesh.
  const char *add(const TensorReader &reader, PyObject *tensor, int role, int64_t row);
  // Takes a parameter that is laid out as when it was last taken, and its gradient; false when these do not go with the
  // first row's, or with each other.  Rows may be taken by several threads.
  bool take_again(const View &param, const View &grad, int64_t row);
  // Memory that a tensor takes.
  int64_t bytes(int role, int64_t row) const;
  // The tensor added last.
  const View &last(int role) const { return role == 0 ? first_ : other_; }

 private:
  const char *start(int role, const View &view);
  bool same_placement(PyObject *spec, int64_t row);
  std::vector<DLDataType> type_;  // per role
  int first_exponents_ = 0;       // role: from here on lists hold a byte per block of the parameter
  View first_, other_;
  PyObject *first_spec_ = nullptr;  // borrowed: how the parameter of the row is laid out over its mesh, if it is
  // Of each row the layouts that were found equal last, kept alive so that their addresses stay theirs.
  std::vector<std::pair<py::object, py::object>> same_;
};

// The step counters of many rows: float32 numbers that torch keeps.  numpy takes 5 us for each of these, and 40 to 80 when
// a step's data have pushed its code out of the caches.
struct Counters {
  float *const first;
  const int64_t size;
  // What all of them say; nothing when they differ.
  std::optional<int64_t> common() const {
    for (int64_t i = 1; i < size; ++i)
      if (first[i] != first[0]) return std::nullopt;
    return static_cast<int64_t>(first[0]);
  }
  void advance() {
    for (int64_t i = 0; i < size; ++i) first[i] += 1.0f;
  }
};

// The rows of an optimizer: parameters, and the dictionaries that hold their states.  One walk per step reads each
// parameter, its gradient and, of the rows that are open, the states: the others are known not to have changed (see
// optim/state.py).  10,000 rows are some 25 MB of Python and tensor objects, more than a step's share of the caches:
// reading the states of all of them as well takes 5.3 ms instead of 2.4.
class StateRows {
 public:
  // `names` are the keys of the states in entries[row], the last ones of them of these kinds; "step" is watched too.
  StateRows(py::list params, py::list entries, const std::vector<std::string> &names, std::vector<Kind> kinds);
  // Fills rows().  "stale": a state or counter was replaced or removed; "no grad": a parameter has no gradient; others as
  // Rows::gather.  Also counts up the parameters' versions, while they are in the cache: kernels write through
  // addresses, and autograd must notice that a tensor which it saved has changed.
  Mismatch gather(const TensorReader &reader, const std::vector<int64_t> &open);
  const Rows &rows() const { return rows_; }
  const std::vector<Kind> &kinds() const { return kinds_; }

 private:
  // Where a tensor's objects were found last time: Python's, the sizes inside torch's, and what torch's points to (its
  // storage, autograd metadata and version counter); of a DTensor its shard's, and its own.
  struct Hint {
    const void *object, *shape, *parts[TensorReader::kParts];
    // True when it was found there already; and so, most likely, were its parts.
    bool found(const void *object_now, const void *shape_now) {
      if (object == object_now && shape == shape_now) return true;
      object = object_now;
      shape = shape_now;
      return false;
    }
  };
  // Where a row's parameter was, and how laid out, when its states were last compared with it.
  struct Layout {
    static constexpr int32_t kDims = 5;
    DLDevice device = {0, 0};
    int32_t ndim = -1;  // -1: unknown, or more than kDims
    int64_t shape[kDims], strides[kDims];
    bool same(const View &view) const;
    void take(const View &view);
  };
  void prefetch(int64_t row) const;
  Mismatch gather_usual(const TensorReader &reader);
  bool gather_again(const TensorReader &reader, int64_t row);
  Mismatch gather_row(const TensorReader &reader, int64_t row);
  const char *add(const TensorReader &reader, PyObject *tensor, int role, int64_t row);
  Mismatch gather_states(const TensorReader &reader, int64_t row);
  Rows rows_;                // kept, so that its memory is allocated once
  std::vector<Hint> hints_;  // [2 * row + role]
  std::vector<Layout> layout_;
  std::vector<uint8_t> open_, gathered_;
  std::vector<const void *> step_address_;
  // columns_[k][row] is what entries_[row][names_[k]] must still be; the first name is "step".
  py::list params_, entries_;
  std::vector<py::str> names_;
  std::vector<py::list> columns_;
  std::vector<Kind> kinds_;
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
