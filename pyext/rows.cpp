#include "rows.h"

#include <algorithm>

#include "formula/storage.h"
#include "steepest/steepest.h"

namespace steepest_python {
namespace {

int64_t element_size(int32_t dtype) {
  if (dtype == STEEPEST_BLOCK8 || dtype == kResidual8) return 1;
  return dtype == STEEPEST_FLOAT32 ? 4 : 2;
}

int32_t kernel_dtype(DLDataType type) {
  if (type == DLDataType{kDLFloat, 32, 1}) return STEEPEST_FLOAT32;
  if (type == DLDataType{kDLFloat, 16, 1}) return STEEPEST_FLOAT16;
  if (type == DLDataType{kDLBfloat, 16, 1}) return STEEPEST_BFLOAT16;
  if (type == DLDataType{kDLUInt, 8, 1}) return STEEPEST_BLOCK8;
  if (type == DLDataType{kDLInt, 8, 1}) return kResidual8;
  if (type == DLDataType{kDLInt, 16, 1}) return kResidual16;
  return -1;
}

int64_t num_blocks(int64_t numel) { return (numel + steepest::kBlock8 - 1) / steepest::kBlock8; }

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

void Rows::resize(int num_roles, int64_t num_rows, const std::vector<Kind> &kinds) {
  first_exponents_ = num_roles - static_cast<int>(std::count(kinds.begin(), kinds.end(), Kind::kExponents));
  type_.resize(num_roles);
  dtype.assign(num_roles, STEEPEST_FLOAT32);
  address.resize(num_roles);
  for (auto &column : address) column.resize(num_rows);
  numel.resize(num_rows);
}

// The first row says which device and dtypes all rows must have.
const char *Rows::start(int role, const View &view) {
  dtype[role] = kernel_dtype(view.dtype);
  type_[role] = view.dtype;
  if (role == 0) device = view.device;
  return dtype[role] < 0 ? "dtype" : nullptr;
}

const char *Rows::add(const TensorReader &reader, PyObject *tensor, int role, int64_t row) {
  View &view = role == 0 ? first_ : other_;
  if (!reader.read(tensor, view)) return "type";
  PyObject *spec = reader.spec(tensor);
  if (role == 0)
    first_spec_ = spec;
  else if (spec != first_spec_ && !same_placement(spec, row))
    return "placement";
  if (row == 0)
    if (const char *reason = start(role, view)) return reason;
  if (!(view.dtype == type_[role])) return kernel_dtype(view.dtype) < 0 ? "dtype" : "mixed dtype";
  if (!(view.device == device)) return "device";
  address[role][row] = static_cast<char *>(view.data) + view.byte_offset;
  if (role >= first_exponents_) {
    const bool flat = view.ndim == 1 && (view.shape[0] <= 1 || view.strides[0] == 1);
    return flat && view.shape[0] == num_blocks(numel[row]) ? nullptr : "exponents";
  }
  if (role > 0) return compare(first_, view);
  numel[row] = count(view);
  return dense(view) ? nullptr : "layout";
}

bool Rows::take_again(const View &param, const View &grad, int64_t row) {
  if (!(param.dtype == type_[0]) || !(grad.dtype == type_[1])) return false;
  if (!(param.device == device) || !(grad.device == device) || compare(param, grad) != nullptr) return false;
  address[0][row] = static_cast<char *>(param.data) + param.byte_offset;
  address[1][row] = static_cast<char *>(grad.data) + grad.byte_offset;
  return true;
}

int64_t Rows::bytes(int role, int64_t row) const {
  return role >= first_exponents_ ? num_blocks(numel[row]) : numel[row] * element_size(dtype[role]);
}

// Whether a layout that is another object than the parameter's says the same.
bool Rows::same_placement(PyObject *spec, int64_t row) {
  if (spec == nullptr || first_spec_ == nullptr) return false;
  if (same_.size() < numel.size()) same_.resize(numel.size());
  auto &[first, other] = same_[row];
  if (first.ptr() == first_spec_ && other.ptr() == spec) return true;
  const py::handle a = first_spec_, b = spec;
  if (!a.attr("placements").equal(b.attr("placements")) || !a.attr("mesh").equal(b.attr("mesh"))) return false;
  first = py::reinterpret_borrow<py::object>(a);
  other = py::reinterpret_borrow<py::object>(b);
  return true;
}

Mismatch Rows::gather(const TensorReader &reader, const std::vector<py::list> &roles, const std::vector<Kind> &kinds) {
  const int num_roles = static_cast<int>(roles.size());
  const int64_t num_rows = static_cast<int64_t>(roles[0].size());
  for (int role = 1; role < num_roles; ++role)
    if (static_cast<int64_t>(roles[role].size()) != num_rows) return {"length", role, 0};
  resize(num_roles, num_rows, kinds);
  for (int64_t row = 0; row < num_rows; ++row)
    for (int role = 0; role < num_roles; ++role)
      if (const char *reason = add(reader, PyList_GET_ITEM(roles[role].ptr(), row), role, row))
        return {reason, role, row};
  return {};
}

StateRows::StateRows(py::list params, py::list entries, const std::vector<std::string> &names, std::vector<Kind> kinds)
    : params_(std::move(params)), entries_(std::move(entries)), kinds_(std::move(kinds)) {
  if (params_.size() != entries_.size()) throw py::value_error("StateRows: params and entries differ in length");
  std::vector<std::string> watched = {"step"};
  watched.insert(watched.end(), names.begin(), names.end());
  for (const std::string &name : watched) {
    names_.push_back(py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name.c_str())));
    py::list column;
    for (const py::handle entry : entries_)
      column.append(py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(entry.ptr(), names_.back().ptr())));
    columns_.push_back(column);
  }
  const size_t num_rows = params_.size();
  rows_.resize(1 + static_cast<int>(names_.size()), static_cast<int64_t>(num_rows), kinds_);
  hints_.resize(2 * num_rows);
  layout_.resize(num_rows);
  step_address_.resize(num_rows);
}

bool StateRows::Layout::same(const View &view) const {
  return ndim == view.ndim && device == view.device && std::equal(shape, shape + ndim, view.shape) &&
         std::equal(strides, strides + ndim, view.strides);
}

void StateRows::Layout::take(const View &view) {
  device = view.device;
  ndim = view.ndim <= kDims ? view.ndim : -1;
  for (int32_t d = 0; d < ndim; ++d) {
    shape[d] = view.shape[d];
    strides[d] = view.strides[d];
  }
}

// Brings the objects of a row that comes soon into the cache, from where they were last time.  A step streams all
// states through the caches in between, so that every object would otherwise cost several trips to memory.  Stale
// addresses are harmless: a prefetch never faults.
void StateRows::prefetch(int64_t row) const {
  constexpr int64_t kAhead = 6;
  if (row + kAhead >= static_cast<int64_t>(layout_.size())) return;
  for (int role = 0; role < 2; ++role) {
    const Hint &hint = hints_[2 * (row + kAhead) + role];
    const char *shape = static_cast<const char *>(hint.shape);
    __builtin_prefetch(hint.object);
    for (int line = -1; line <= 2; ++line) __builtin_prefetch(shape + 64 * line);
    for (const void *part : hint.parts)
      if (part != nullptr) __builtin_prefetch(part);
  }
}

// Takes the parameter or the gradient of a row, and notes where it was.
const char *StateRows::add(const TensorReader &reader, PyObject *tensor, int role, int64_t row) {
  if (const char *reason = rows_.add(reader, tensor, role, row)) return reason;
  Hint &hint = hints_[2 * row + role];
  if (!hint.found(tensor, rows_.last(role).shape)) reader.parts(tensor, hint.parts);
  return nullptr;
}

Mismatch StateRows::gather_states(const TensorReader &reader, int64_t row) {
  PyObject *entry = PyList_GET_ITEM(entries_.ptr(), row);
  for (size_t k = 0; k < names_.size(); ++k)
    if (PyDict_GetItemWithError(entry, names_[k].ptr()) != PyList_GET_ITEM(columns_[k].ptr(), row))
      return {"stale", 0, row};
  View step;
  if (!reader.read(PyList_GET_ITEM(columns_[0].ptr(), row), step)) return {"stale", 0, row};
  if (step_address_[row] != nullptr && step_address_[row] != step.data) return {"stale", 0, row};
  step_address_[row] = step.data;
  for (int k = 1; k < static_cast<int>(names_.size()); ++k)
    if (const char *reason = rows_.add(reader, PyList_GET_ITEM(columns_[k].ptr(), row), k + 1, row))
      return {reason, k + 1, row};
  return {};
}

Mismatch StateRows::gather_row(const TensorReader &reader, int64_t row) {
  PyObject *param = PyList_GET_ITEM(params_.ptr(), row);
  const py::object grad = py::reinterpret_steal<py::object>(reader.grad(param));
  if (!grad) throw py::error_already_set();
  if (grad.is_none()) return {"no grad", 1, row};
  if (const char *reason = add(reader, param, 0, row)) return {reason, 0, row};
  if (const char *reason = add(reader, grad.ptr(), 1, row)) return {reason, 1, row};
  // The states were compared with the layout that the parameter had then.
  if (open_[row] || !layout_[row].same(rows_.last(0))) {
    if (const Mismatch mismatch = gather_states(reader, row)) return mismatch;
    layout_[row].take(rows_.last(0));
  }
  return {};
}

// A row of which nothing but addresses can have changed, without Python; false when it has to be looked at closely.
bool StateRows::gather_again(const TensorReader &reader, int64_t row) {
  PyObject *param = PyList_GET_ITEM(params_.ptr(), row);
  View view, grad;
  const void *const *grad_head;
  if (open_[row] || !reader.read_both(param, view, grad, grad_head)) return false;
  if (!layout_[row].same(view) || !rows_.take_again(view, grad, row) || !reader.bump_version(param)) return false;
  Hint *const hints = &hints_[2 * row];
  if (!hints[0].found(param, view.shape)) reader.parts(param, hints[0].parts);
  if (!hints[1].found(grad_head, grad.shape)) TensorReader::parts_of(grad_head, hints[1].parts);
  return true;
}

// All threads together: what takes the time is that every object is some trips to memory, of which one core cannot have
// enough under way.
Mismatch StateRows::gather_usual(const TensorReader &reader) {
  constexpr int64_t kFew = 256;
  const int64_t num_rows = static_cast<int64_t>(gathered_.size());
  if (!reader.reads_both() || num_rows < 2) return {};
  if (const Mismatch mismatch = gather_row(reader, 0)) return mismatch;  // what all others have to agree with
#pragma omp parallel for schedule(static) if (num_rows >= kFew)
  for (int64_t row = 1; row < num_rows; ++row) {
    prefetch(row);
    gathered_[row] = gather_again(reader, row);
  }
  return {};
}

Mismatch StateRows::gather(const TensorReader &reader, const std::vector<int64_t> &open) {
  constexpr int64_t kBlock = 128;  // rows whose objects fit in a core's cache
  const int64_t num_rows = static_cast<int64_t>(params_.size());
  open_.assign(num_rows, 0);
  for (const int64_t row : open) open_.at(row) = 1;
  gathered_.assign(num_rows, 0);
  if (const Mismatch mismatch = gather_usual(reader)) return mismatch;
  for (int64_t begin = 0, end; begin < num_rows; begin = std::max(begin + 1, end)) {
    for (end = begin; end < num_rows && end - begin < kBlock && !gathered_[end]; ++end) {
      prefetch(end);
      if (const Mismatch mismatch = gather_row(reader, end)) return mismatch;
    }
    reader.bump_versions(params_.ptr(), begin, end);
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
    for (size_t row = 0; row < rows.numel.size(); ++row) {
      if (rows.numel[row] == 0) continue;
      const uintptr_t begin = reinterpret_cast<uintptr_t>(rows.address[role][row]);
      written_.push_back({begin, begin + static_cast<uintptr_t>(rows.bytes(role, row)), role,
                          static_cast<int64_t>(row)});
    }
  }
  std::sort(written_.begin(), written_.end(), [](const Interval &a, const Interval &b) { return a.begin < b.begin; });
  for (size_t i = 1; i < written_.size(); ++i)
    if (written_[i].begin < written_[i - 1].end) return {"aliased", written_[i].role, written_[i].row};
  return {};
}

Mismatch OverlapGuard::check_read(const Rows &rows, int read_role) const {
  for (size_t row = 0; row < rows.numel.size(); ++row) {
    if (rows.numel[row] == 0) continue;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(rows.address[read_role][row]);
    const uintptr_t end = begin + static_cast<uintptr_t>(rows.bytes(read_role, row));
    // The written intervals are disjoint, so the last one that begins before `end` is the only candidate.
    auto after = std::lower_bound(written_.begin(), written_.end(), end,
                                  [](const Interval &a, uintptr_t value) { return a.begin < value; });
    if (after != written_.begin() && std::prev(after)->end > begin)
      return {"aliased", read_role, static_cast<int64_t>(row)};
  }
  return {};
}

}  // namespace steepest_python
