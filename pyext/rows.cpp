#include "rows.h"

#include <algorithm>

#include "steepest/steepest.h"

namespace steepest_python {
namespace {

int64_t element_size(int32_t dtype) { return dtype == STEEPEST_FLOAT32 ? 4 : 2; }

// True when the elements fill one block of memory without gaps or overlap, in whatever order of dimensions.
bool dense(const View &v) {
  int64_t expected = 1;
  bool contiguous = true;
  for (int32_t d = v.ndim - 1; d >= 0; --d) {
    if (v.shape[d] == 1) continue;
    contiguous = contiguous && v.strides[d] == expected;
    expected *= v.shape[d];
  }
  if (contiguous || expected == 0) return true;
  int32_t order[64], count = 0;
  if (v.ndim > 64) return false;
  for (int32_t d = 0; d < v.ndim; ++d)
    if (v.shape[d] != 1) order[count++] = d;
  std::sort(order, order + count, [&](int32_t a, int32_t b) { return v.strides[a] < v.strides[b]; });
  expected = 1;
  for (int32_t k = 0; k < count; ++k) {
    if (v.strides[order[k]] != expected) return false;
    expected *= v.shape[order[k]];
  }
  return true;
}

const char *compare(const View &a, const View &b) {
  if (a.ndim != b.ndim) return "shape";
  bool empty = false, strides = true;
  for (int32_t d = 0; d < a.ndim; ++d) {
    if (a.shape[d] != b.shape[d]) return "shape";
    empty = empty || a.shape[d] == 0;
    // The stride of a dimension of size 1 is never used.
    strides = strides && (a.shape[d] == 1 || a.strides[d] == b.strides[d]);
  }
  return strides || empty ? nullptr : "layout";
}

int64_t count(const View &v) {
  int64_t n = 1;
  for (int32_t d = 0; d < v.ndim; ++d) n *= v.shape[d];
  return n;
}

}  // namespace

void Rows::resize(int num_roles, int64_t num_rows) {
  dtype.assign(num_roles, STEEPEST_FLOAT32);
  address.resize(num_roles);
  for (auto &column : address) column.resize(num_rows);
  numel.resize(num_rows);
}

Mismatch Rows::add(const TensorReader &reader, PyObject *tensor, int role, int64_t row) {
  View &view = role == 0 ? first_ : other_;
  if (!reader.read(tensor, view)) return {"type", role, row};
  if (view.dtype < 0) return {"dtype", role, row};
  if (row == 0) dtype[role] = view.dtype;
  if (view.dtype != dtype[role]) return {"mixed dtype", role, row};
  if (row == 0 && role == 0) {
    device_type = view.device_type;
    device_index = view.device_index;
  }
  if (view.device_type != device_type || view.device_index != device_index) return {"device", role, row};
  if (role == 0) {
    if (!dense(view)) return {"layout", role, row};
    numel[row] = count(view);
  } else if (const char *reason = compare(first_, view)) {
    return {reason, role, row};
  }
  address[role][row] = view.data;
  return {};
}

Mismatch Rows::gather(const TensorReader &reader, const std::vector<py::list> &roles) {
  const int num_roles = static_cast<int>(roles.size());
  const int64_t num_rows = static_cast<int64_t>(roles[0].size());
  for (int role = 1; role < num_roles; ++role)
    if (static_cast<int64_t>(roles[role].size()) != num_rows) return {"length", role, 0};
  resize(num_roles, num_rows);
  for (int64_t row = 0; row < num_rows; ++row)
    for (int role = 0; role < num_roles; ++role)
      if (const Mismatch mismatch = add(reader, PyList_GET_ITEM(roles[role].ptr(), row), role, row)) return mismatch;
  return {};
}

StateRows::StateRows(py::list params, py::list entries, const std::vector<std::string> &names)
    : params_(std::move(params)), entries_(std::move(entries)) {
  if (params_.size() != entries_.size()) throw py::value_error("StateRows: params and entries differ in length");
  std::vector<std::string> watched = {"step"};
  watched.insert(watched.end(), names.begin(), names.end());
  for (const std::string &name : watched) {
    names_.push_back(py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name.c_str())));
    py::list column;
    for (const py::handle entry : entries_) column.append(entry[names_.back()]);
    columns_.push_back(column);
  }
}

// Brings the objects of a row that comes soon into the cache, from where they were last time.  A step streams all
// states through the caches in between, so that every object would otherwise cost several trips to memory.  Stale
// addresses are harmless: a prefetch never faults.
void StateRows::prefetch(int64_t row) const {
  constexpr int64_t kAhead = 6;
  if (row + kAhead >= static_cast<int64_t>(params_.size())) return;
  __builtin_prefetch(PyList_GET_ITEM(entries_.ptr(), row + kAhead));
  const size_t roles = 1 + names_.size();
  for (size_t role = 0; role < roles; ++role) {
    const Hint &hint = hints_[(row + kAhead) * roles + role];
    const char *shape = static_cast<const char *>(hint.shape);
    __builtin_prefetch(hint.object);
    for (int line = -1; line <= 2; ++line) __builtin_prefetch(shape + 64 * line);
  }
}

Mismatch StateRows::add(const TensorReader &reader, PyObject *tensor, int role, int64_t row) {
  if (const Mismatch mismatch = rows_.add(reader, tensor, role, row)) return mismatch;
  hints_[row * (1 + names_.size()) + role] = {tensor, rows_.last(role).shape};
  return {};
}

Mismatch StateRows::gather(const TensorReader &reader) {
  static const py::handle grad_name = PyUnicode_InternFromString("grad");
  const int64_t num_rows = static_cast<int64_t>(params_.size());
  rows_.resize(1 + static_cast<int>(names_.size()), num_rows);
  hints_.resize(num_rows * (1 + names_.size()), Hint{nullptr, nullptr});
  for (int64_t row = 0; row < num_rows; ++row) {
    prefetch(row);
    PyObject *param = PyList_GET_ITEM(params_.ptr(), row), *entry = PyList_GET_ITEM(entries_.ptr(), row);
    const py::object grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, grad_name.ptr()));
    if (!grad) throw py::error_already_set();
    if (grad.is_none()) return {"no grad", 1, row};
    for (size_t k = 0; k < names_.size(); ++k)
      if (PyDict_GetItem(entry, names_[k].ptr()) != PyList_GET_ITEM(columns_[k].ptr(), row)) return {"stale", 0, row};
    if (const Mismatch mismatch = add(reader, param, 0, row)) return mismatch;
    if (const Mismatch mismatch = add(reader, grad.ptr(), 1, row)) return mismatch;
    for (size_t k = 1; k < names_.size(); ++k)
      if (const Mismatch mismatch =
              add(reader, PyList_GET_ITEM(columns_[k].ptr(), row), static_cast<int>(k) + 1, row))
        return mismatch;
  }
  return {};
}

Mismatch OverlapGuard::check(const Rows &rows, int read_role) {
  const bool known = rows.numel == numel_ && rows.dtype == dtype_ && approved_.size() == rows.address.size();
  bool written_known = known;
  for (size_t role = 0; written_known && role < rows.address.size(); ++role)
    if (static_cast<int>(role) != read_role) written_known = rows.address[role] == approved_[role];
  if (!written_known) {
    approved_.clear();
    if (const Mismatch mismatch = check_written(rows, read_role)) return mismatch;
  } else if (rows.address[read_role] == approved_[read_role]) {
    return {};
  }
  if (const Mismatch mismatch = check_read(rows, read_role)) {
    approved_.clear();
    return mismatch;
  }
  numel_ = rows.numel;
  dtype_ = rows.dtype;
  approved_ = rows.address;
  return {};
}

Mismatch OverlapGuard::check_written(const Rows &rows, int read_role) {
  written_.clear();
  for (int role = 0; role < static_cast<int>(rows.address.size()); ++role) {
    if (role == read_role) continue;
    const int64_t size = element_size(rows.dtype[role]);
    for (size_t row = 0; row < rows.numel.size(); ++row) {
      if (rows.numel[row] == 0) continue;
      const uintptr_t begin = reinterpret_cast<uintptr_t>(rows.address[role][row]);
      written_.push_back({begin, begin + static_cast<uintptr_t>(rows.numel[row] * size), role,
                          static_cast<int64_t>(row)});
    }
  }
  std::sort(written_.begin(), written_.end(), [](const Interval &a, const Interval &b) { return a.begin < b.begin; });
  for (size_t i = 1; i < written_.size(); ++i)
    if (written_[i].begin < written_[i - 1].end) return {"aliased", written_[i].role, written_[i].row};
  return {};
}

Mismatch OverlapGuard::check_read(const Rows &rows, int read_role) const {
  const int64_t size = element_size(rows.dtype[read_role]);
  for (size_t row = 0; row < rows.numel.size(); ++row) {
    if (rows.numel[row] == 0) continue;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(rows.address[read_role][row]);
    const uintptr_t end = begin + static_cast<uintptr_t>(rows.numel[row] * size);
    // The written intervals are disjoint, so the last one that begins before `end` is the only candidate.
    auto after = std::lower_bound(written_.begin(), written_.end(), end,
                                  [](const Interval &a, uintptr_t value) { return a.begin < value; });
    if (after != written_.begin() && std::prev(after)->end > begin)
      return {"aliased", read_role, static_cast<int64_t>(row)};
  }
  return {};
}

}  // namespace steepest_python
