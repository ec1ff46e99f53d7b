// steepest_step on DLPack's tensors: checks what they say of themselves, and writes their addresses into the workspace.
#include "steepest/dlpack.h"

#include <cstddef>

#include "engine/status.h"
#include "step.h"

namespace steepest {
namespace {

static_assert(sizeof(steepest_dltensor) == 48 && offsetof(steepest_dltensor, dtype) == 20 &&
                  offsetof(steepest_dltensor, byte_offset) == 40,
              "DLPack's layout on 64-bit machines");

constexpr int kLists = 3 + STEEPEST_MAX_STATES * 2 + 4;  // numel, params, grads; states and exponents; four more
constexpr int64_t kBlock = 128;
enum Code { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

bool same_type(const steepest_dldatatype &a, const steepest_dldatatype &b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

bool on_device(const steepest_dldevice &where, const steepest_exec &exec) {
  if (where.device_type == 13) return true;  // managed: either
  if (exec.device == STEEPEST_CPU) return where.device_type == 1 || where.device_type == 3;
  return where.device_type == 2 && where.device_id == exec.device_index;
}

// -1 for a type that no list takes.
int32_t dtype_of(const steepest_dldatatype &type) {
  if (type.lanes != 1) return -1;
  if (type.code == kFloat && type.bits == 32) return STEEPEST_FLOAT32;
  if (type.code == kFloat && type.bits == 16) return STEEPEST_FLOAT16;
  if (type.code == kBfloat && type.bits == 16) return STEEPEST_BFLOAT16;
  if (type.code == kUInt && type.bits == 8) return STEEPEST_BLOCK8;
  return -1;
}

int64_t count(const steepest_dltensor &t) {
  int64_t n = 1;
  for (int32_t d = 0; d < t.ndim; ++d) n *= t.shape[d];
  return n;
}

int64_t stride(const steepest_dltensor &t, int32_t dim) {
  if (t.strides) return t.strides[dim];
  int64_t n = 1;
  for (int32_t d = dim + 1; d < t.ndim; ++d) n *= t.shape[d];
  return n;
}

// Whether the elements fill one piece of memory: strides are 1 and products of the sizes of other dimensions.
bool dense(const steepest_dltensor &t) {
  int64_t expected = 1;
  for (int32_t found = 0, needed = 0;; ++found) {
    needed = 0;
    int32_t next = -1;
    for (int32_t d = 0; d < t.ndim; ++d) {
      if (t.shape[d] == 1) continue;
      ++needed;
      if (stride(t, d) == expected) next = d;
    }
    if (found == needed) return true;
    if (next < 0) return false;
    expected *= t.shape[next];
  }
}

bool same_layout(const steepest_dltensor &a, const steepest_dltensor &b) {
  if (a.ndim != b.ndim) return false;
  for (int32_t d = 0; d < a.ndim; ++d)
    if (a.shape[d] != b.shape[d] || (a.shape[d] != 1 && stride(a, d) != stride(b, d))) return false;
  return true;
}

struct List {
  const char *name;
  steepest_dllist tensors;
  bool blocks;  // a number per block of the parameter instead of one per element
};

steepest_status check_tensor(const char *op, const steepest_exec &exec, const List &list, int64_t i,
                             const steepest_dltensor *param) {
  const steepest_dltensor *t = list.tensors[i];
  const auto row = static_cast<long long>(i);
  if (!t) return fail(STEEPEST_ERROR_INVALID, "%s: %s[%lld] is NULL", op, list.name, row);
  if (t->ndim < 0 || (t->ndim > 0 && !t->shape))
    return fail(STEEPEST_ERROR_INVALID, "%s: %s[%lld] has ndim %d and shape at %p", op, list.name, row, t->ndim,
                static_cast<void *>(t->shape));
  if (!on_device(t->device, exec))
    return fail(STEEPEST_ERROR_INVALID, "%s: %s[%lld] is on DLPack device type %d, id %d, exec on %s %d", op, list.name,
                row, t->device.device_type, t->device.device_id, exec.device == STEEPEST_CPU ? "the CPU" : "CUDA",
                exec.device_index);
  if (!same_type(t->dtype, list.tensors[0]->dtype))
    return fail(STEEPEST_ERROR_UNSUPPORTED, "%s: %s[%lld] has another type than %s[0]: step them in two calls", op,
                list.name, row, list.name);
  const int64_t numel = count(*t);
  if (numel < 0 || (numel && !t->data))
    return fail(STEEPEST_ERROR_INVALID, "%s: %s[%lld] has %lld elements at %p", op, list.name, row,
                static_cast<long long>(numel), t->data);
  if (list.blocks) {
    const int64_t needed = (count(*param) + kBlock - 1) / kBlock;
    if (numel != needed || !dense(*t))
      return fail(STEEPEST_ERROR_INVALID, "%s: %s[%lld] has %lld elements, expected %lld without gaps", op, list.name,
                  row, static_cast<long long>(numel), static_cast<long long>(needed));
    return STEEPEST_OK;
  }
  if (!same_layout(*t, *param))
    return fail(STEEPEST_ERROR_INVALID, "%s: %s[%lld] has another shape or other strides than params[%lld]", op,
                list.name, row, row);
  if (numel && !dense(*t))
    return fail(STEEPEST_ERROR_UNSUPPORTED, "%s: %s[%lld] has gaps or overlaps, expected a dense tensor", op, list.name,
                row);
  return STEEPEST_OK;
}

steepest_status check_rows(const char *op, const steepest_exec *exec, const steepest_step_args *args) {
  clear_error();
  if (!exec) return fail(STEEPEST_ERROR_INVALID, "%s: exec is NULL", op);
  if (!args) return fail(STEEPEST_ERROR_INVALID, "%s: args is NULL", op);
  if (args->struct_size < sizeof(steepest_step_args))
    return fail(STEEPEST_ERROR_INVALID, "%s: args->struct_size is %llu, expected at least %zu", op,
                static_cast<unsigned long long>(args->struct_size), sizeof(steepest_step_args));
  if (args->num_tensors < 0)
    return fail(STEEPEST_ERROR_INVALID, "%s: num_tensors is %lld, expected >= 0", op,
                static_cast<long long>(args->num_tensors));
  return STEEPEST_OK;
}

// The type of a list for steepest_step_args; `dtype` is left alone for a list without tensors.
steepest_status read_type(const char *op, const char *name, steepest_dllist list, int64_t n, int32_t *dtype) {
  if (!list || !n) return STEEPEST_OK;
  *dtype = dtype_of(list[0]->dtype);
  if (*dtype < 0 || (*dtype == STEEPEST_BLOCK8 && name[0] != 's'))
    return fail(STEEPEST_ERROR_UNSUPPORTED, "%s: %s have type code %d, %d bits, %d lanes", op, name,
                list[0]->dtype.code, list[0]->dtype.bits, list[0]->dtype.lanes);
  return STEEPEST_OK;
}

// Types of all lists; float32 where the C interface knows no other.
steepest_status read_types(const char *op, const steepest_dlpack_rows &rows, steepest_step_args *out) {
  const int64_t n = out->num_tensors;
  out->param_dtype = out->grad_dtype = out->state_dtype = STEEPEST_FLOAT32;
  if (const steepest_status status = read_type(op, "params", rows.params, n, &out->param_dtype)) return status;
  if (const steepest_status status = read_type(op, "grads", rows.grads, n, &out->grad_dtype)) return status;
  if (const steepest_status status = read_type(op, "states", rows.states[0], n, &out->state_dtype)) return status;
  const steepest_dldatatype wide = {kFloat, 32, 1}, byte = {kUInt, 8, 1};
  const struct {
    const char *name;
    steepest_dllist list;
    steepest_dldatatype expected;
  } fixed[] = {
      {"masters", rows.masters, wide},
      {"averages", rows.averages, wide},
      {"sources", rows.sources, n ? rows.params[0]->dtype : wide},
      {"states[1]", rows.states[1], n && rows.states[0] ? rows.states[0][0]->dtype : wide},
      {"states[2]", rows.states[2], n && rows.states[0] ? rows.states[0][0]->dtype : wide},
      {"state_exponents[0]", rows.state_exponents[0], byte},
      {"state_exponents[1]", rows.state_exponents[1], byte},
      {"state_exponents[2]", rows.state_exponents[2], byte},
  };
  for (const auto &one : fixed)
    if (one.list && n && !same_type(one.list[0]->dtype, one.expected))
      return fail(STEEPEST_ERROR_UNSUPPORTED, "%s: %s have type code %d, %d bits; expected code %d, %d bits", op,
                  one.name, one.list[0]->dtype.code, one.list[0]->dtype.bits, one.expected.code, one.expected.bits);
  out->residual_bits = 0;
  if (rows.residuals && n) {
    const steepest_dldatatype type = rows.residuals[0]->dtype;
    if (type.code != kInt || type.lanes != 1 || (type.bits != 16 && type.bits != 8))
      return fail(STEEPEST_ERROR_UNSUPPORTED, "%s: residuals have type code %d, %d bits; expected int16 or int8", op,
                  type.code, type.bits);
    out->residual_bits = type.bits;
  }
  return STEEPEST_OK;
}

}  // namespace
}  // namespace steepest

using namespace steepest;

extern "C" {

steepest_status steepest_step_dlpack_workspace_size(const steepest_exec *exec, const steepest_step_args *args,
                                                    uint64_t *bytes) {
  const char *op = "steepest_step_dlpack_workspace_size";
  if (const steepest_status status = check_rows(op, exec, args)) return status;
  steepest_step_args scalars = *args;
  scalars.num_tensors = 0;  // all but the lists is checked
  scalars.param_dtype = scalars.grad_dtype = scalars.state_dtype = STEEPEST_FLOAT32;
  scalars.residual_bits = 0;
  if (const steepest_status status = steepest_step_workspace_size(exec, &scalars, bytes)) return status;
  *bytes = step_workspace_bytes(*exec, *args) + sizeof(int64_t) * kLists * static_cast<uint64_t>(args->num_tensors);
  return STEEPEST_OK;
}

steepest_status steepest_step_dlpack(const steepest_exec *exec, const steepest_step_args *args,
                                     const steepest_dlpack_rows *rows, void *workspace, uint64_t available) {
  const char *op = "steepest_step_dlpack";
  if (const steepest_status status = check_rows(op, exec, args)) return status;
  if (!rows || rows->struct_size < sizeof(steepest_dlpack_rows))
    return fail(STEEPEST_ERROR_INVALID, "%s: rows is NULL, or its struct_size less than %zu", op,
                sizeof(steepest_dlpack_rows));
  const int64_t n = args->num_tensors;
  if (n && (!rows->params || !rows->grads)) return fail(STEEPEST_ERROR_INVALID, "%s: params or grads is NULL", op);
  uint64_t needed = 0;
  if (const steepest_status status = steepest_step_dlpack_workspace_size(exec, args, &needed)) return status;
  if (!workspace || available < needed)
    return fail(STEEPEST_ERROR_WORKSPACE, "%s: workspace of %llu bytes at %p, needed %llu", op,
                static_cast<unsigned long long>(available), workspace, static_cast<unsigned long long>(needed));
  const List lists[kLists - 1] = {
      {"params", rows->params, false},       {"grads", rows->grads, false},
      {"states[0]", rows->states[0], false}, {"states[1]", rows->states[1], false},
      {"states[2]", rows->states[2], false}, {"masters", rows->masters, false},
      {"residuals", rows->residuals, false}, {"sources", rows->sources, false},
      {"averages", rows->averages, false},   {"state_exponents[0]", rows->state_exponents[0], true},
      {"state_exponents[1]", rows->state_exponents[1], true},
      {"state_exponents[2]", rows->state_exponents[2], true},
  };
  auto *numel = static_cast<int64_t *>(workspace);
  void **addresses[kLists - 1] = {};
  auto **free = reinterpret_cast<void **>(numel + n);
  for (int k = 0; k < kLists - 1; ++k) {
    if (!lists[k].tensors) continue;
    for (int64_t i = 0; i < n; ++i) {
      if (const steepest_status status = check_tensor(op, *exec, lists[k], i, rows->params[i])) return status;
      const steepest_dltensor &t = *lists[k].tensors[i];
      if (k == 0) numel[i] = count(t);
      free[i] = t.data ? static_cast<char *>(t.data) + t.byte_offset : nullptr;
    }
    addresses[k] = free;
    free += n;
  }
  steepest_step_args whole = *args;
  if (const steepest_status status = read_types(op, *rows, &whole)) return status;
  whole.numel = numel;
  whole.params = addresses[0];
  whole.grads = addresses[1];
  whole.masters = addresses[5];
  whole.residuals = addresses[6];
  whole.sources = addresses[7];
  whole.averages = addresses[8];
  for (int state = 0; state < STEEPEST_MAX_STATES; ++state) {
    whole.states[state] = addresses[2 + state];
    whole.state_exponents[state] = addresses[9 + state];
  }
  const auto used = static_cast<uint64_t>(reinterpret_cast<char *>(free) - static_cast<char *>(workspace));
  return steepest_step(exec, &whole, free, available - used);
}

}  // extern "C"
