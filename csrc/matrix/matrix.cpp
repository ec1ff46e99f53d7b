// ABI entry points of steepest/matrix.h: check every number, then run.
#include "steepest/matrix.h"

#include "check.h"
#include "matrix/kernels.h"
#include "matrix/program.h"

namespace steepest::matrix {
namespace {

constexpr int64_t kMostSize = int64_t{1} << 31;

steepest_status check_operand(const steepest_matrix_operand &x, long long i) {
  STEEPEST_REQUIRE(x.rows >= 0 && x.cols >= 0 && x.rows < kMostSize && x.cols < kMostSize,
                   "matrix: operands[%lld] is %lld x %lld, expected sizes from 0 to 2^31 - 1", i,
                   static_cast<long long>(x.rows), static_cast<long long>(x.cols));
  STEEPEST_REQUIRE(x.dtype == STEEPEST_MATRIX_FLOAT32 || x.dtype == STEEPEST_MATRIX_FLOAT64,
                   "matrix: operands[%lld].dtype is %d, expected STEEPEST_MATRIX_FLOAT32 (0) or FLOAT64 (1)", i, x.dtype);
  if (!x.data) return STEEPEST_OK;
  STEEPEST_REQUIRE(x.ld >= x.cols, "matrix: operands[%lld].ld is %lld, expected at least its %lld columns", i,
                   static_cast<long long>(x.ld), static_cast<long long>(x.cols));
  STEEPEST_REQUIRE(x.stride >= 0, "matrix: operands[%lld].stride is %lld, expected >= 0", i,
                   static_cast<long long>(x.stride));
  return STEEPEST_OK;
}

struct Shape {
  int64_t rows, cols;
};

Shape shape_of(const steepest_matrix_operand &x, bool transposed) {
  return transposed ? Shape{x.cols, x.rows} : Shape{x.rows, x.cols};
}

bool written_before(const steepest_matrix_program &p, int64_t op, int32_t operand) {
  for (int64_t i = 0; i < op; ++i)
    if (p.ops[i].d == operand || (p.ops[i].kind == STEEPEST_MATRIX_SYMMETRISE && p.ops[i].c == operand)) return true;
  return false;
}

// An operand that an operation reads.
steepest_status check_read(const steepest_matrix_program &p, int64_t op, const char *name, int32_t operand,
                           bool required) {
  const long long i = op;
  if (operand == -1 && !required) return STEEPEST_OK;
  STEEPEST_REQUIRE(operand >= 0 && operand < p.num_operands, "matrix: ops[%lld].%s is %d, expected an operand below %lld",
                   i, name, operand, static_cast<long long>(p.num_operands));
  STEEPEST_REQUIRE(p.operands[operand].data || written_before(p, op, operand),
                   "matrix: ops[%lld].%s is operand %d, which is scratch that nothing has been written to", i, name,
                   operand);
  return STEEPEST_OK;
}

// What SYMMETRISE writes to c and SPECTRAL_BOUND reads from it, what NORM and SPECTRAL_BOUND write to d, and what DIVIDE
// reads from b.
steepest_status check_numbers(const steepest_matrix_program &p, int32_t operand, const char *name, long long i,
                              int64_t count) {
  const steepest_matrix_operand &x = p.operands[operand];
  STEEPEST_REQUIRE(x.rows == 1 && x.cols == count && x.dtype == STEEPEST_MATRIX_FLOAT64,
                   "matrix: ops[%lld].%s is %lld x %lld, expected 1 x %lld of FLOAT64", i, name,
                   static_cast<long long>(x.rows), static_cast<long long>(x.cols), static_cast<long long>(count));
  return STEEPEST_OK;
}

steepest_status check_sizes(const steepest_matrix_program &p, const steepest_matrix_op &op, long long i) {
  STEEPEST_REQUIRE(op.c >= 0 && op.c < p.num_operands && op.c != op.a && op.c != op.d,
                   "matrix: ops[%lld].c is %d, expected an operand of its own for the sizes", i, op.c);
  if (const steepest_status status = check_numbers(p, op.c, "c", i, 2)) return status;
  STEEPEST_REQUIRE(!p.operands[op.c].data || p.operands[op.c].stride > 0 || p.batch <= 1,
                   "matrix: ops[%lld].c is shared by the batch", i);
  return STEEPEST_OK;
}

steepest_status check_spectral_bound(const steepest_matrix_program &p, int64_t number) {
  const steepest_matrix_op &op = p.ops[number];
  if (const steepest_status status = check_read(p, number, "b", op.b, true)) return status;
  if (const steepest_status status = check_read(p, number, "c", op.c, true)) return status;
  if (const steepest_status status = check_numbers(p, op.c, "c", number, 2)) return status;
  const steepest_matrix_operand &a = p.operands[op.a], &b = p.operands[op.b];
  STEEPEST_REQUIRE(a.rows == b.rows && a.cols == b.cols && a.dtype == b.dtype,
                   "matrix: ops[%lld].b is %lld x %lld, expected %lld x %lld and dtype %d, as a",
                   static_cast<long long>(number), static_cast<long long>(b.rows), static_cast<long long>(b.cols),
                   static_cast<long long>(a.rows), static_cast<long long>(a.cols), a.dtype);
  return check_numbers(p, op.d, "d", number, 1);
}

// The operands that an operation reads besides a, and those that it takes for numbers.
steepest_status check_rest(const steepest_matrix_program &p, int64_t number) {
  const steepest_matrix_op &op = p.ops[number];
  switch (op.kind) {
    case STEEPEST_MATRIX_SYMMETRIC:
    case STEEPEST_MATRIX_PRODUCT:
      if (const steepest_status status = check_read(p, number, "b", op.b, true)) return status;
      return check_read(p, number, "c", op.c, false);
    case STEEPEST_MATRIX_COMBINE: return check_read(p, number, "c", op.c, false);
    case STEEPEST_MATRIX_SYMMETRISE: return check_sizes(p, op, number);
    case STEEPEST_MATRIX_NORM: return check_numbers(p, op.d, "d", number, 1);
    case STEEPEST_MATRIX_SPECTRAL_BOUND: return check_spectral_bound(p, number);
    case STEEPEST_MATRIX_DIVIDE:
      if (const steepest_status status = check_read(p, number, "b", op.b, true)) return status;
      return check_numbers(p, op.b, "b", number, 1);
    default: return STEEPEST_OK;
  }
}

steepest_status check_op(const steepest_matrix_program &p, int64_t number) {
  const steepest_matrix_op &op = p.ops[number];
  const long long i = number;
  STEEPEST_REQUIRE(op.kind >= STEEPEST_MATRIX_SYMMETRIC && op.kind <= STEEPEST_MATRIX_SPECTRAL_BOUND,
                   "matrix: ops[%lld].kind is %d, expected 0 to 7", i, op.kind);
  const bool product = op.kind <= STEEPEST_MATRIX_PRODUCT;
  STEEPEST_REQUIRE((op.flags & ~(product ? 3u : 0u)) == 0, "matrix: ops[%lld].flags is %u, unknown for kind %d", i,
                   op.flags, op.kind);
  STEEPEST_REQUIRE(op.d >= 0 && op.d < p.num_operands, "matrix: ops[%lld].d is %d, expected an operand below %lld", i,
                   op.d, static_cast<long long>(p.num_operands));
  if (const steepest_status status = check_read(p, number, "a", op.a, true)) return status;
  if (const steepest_status status = check_rest(p, number)) return status;
  const steepest_matrix_operand &d = p.operands[op.d], &a = p.operands[op.a];
  STEEPEST_REQUIRE(!d.data || d.stride > 0 || p.batch <= 1,
                   "matrix: ops[%lld] writes operand %d, which all matrices of the batch share (stride 0)", i, op.d);
  STEEPEST_REQUIRE(op.d != op.a && (!product || op.d != op.b), "matrix: ops[%lld] writes operand %d, which it multiplies",
                   i, op.d);
  if (op.kind == STEEPEST_MATRIX_NORM || op.kind == STEEPEST_MATRIX_SPECTRAL_BOUND) return STEEPEST_OK;
  const Shape sa = shape_of(a, op.flags & STEEPEST_MATRIX_TRANSPOSE_A);
  const Shape sb = product ? shape_of(p.operands[op.b], op.flags & STEEPEST_MATRIX_TRANSPOSE_B) : sa;
  const bool fits = product ? sa.rows == d.rows && sb.cols == d.cols && sa.cols == sb.rows
                            : sa.rows == d.rows && sa.cols == d.cols;
  STEEPEST_REQUIRE(fits, "matrix: ops[%lld]: %lld x %lld and %lld x %lld do not make %lld x %lld", i,
                   static_cast<long long>(sa.rows), static_cast<long long>(sa.cols), static_cast<long long>(sb.rows),
                   static_cast<long long>(sb.cols), static_cast<long long>(d.rows), static_cast<long long>(d.cols));
  const bool square = d.rows == d.cols;
  const bool adds_identity = op.kind <= STEEPEST_MATRIX_COMBINE && op.gamma != 0;
  STEEPEST_REQUIRE(square || (op.kind != STEEPEST_MATRIX_SYMMETRIC && op.kind != STEEPEST_MATRIX_SYMMETRISE &&
                              !adds_identity),
                   "matrix: ops[%lld] has a %lld x %lld result, expected a square one", i,
                   static_cast<long long>(d.rows), static_cast<long long>(d.cols));
  const bool converts = op.kind == STEEPEST_MATRIX_COMBINE && a.dtype != d.dtype;
  const bool same = a.dtype == d.dtype && (!product || p.operands[op.b].dtype == d.dtype);
  STEEPEST_REQUIRE(same || converts, "matrix: ops[%lld] mixes dtypes; STEEPEST_MATRIX_COMBINE converts", i);
  if (op.kind >= STEEPEST_MATRIX_NORMALISE || op.c < 0) return STEEPEST_OK;
  const steepest_matrix_operand &c = p.operands[op.c];
  STEEPEST_REQUIRE(!converts && c.dtype == d.dtype, "matrix: ops[%lld].c has another dtype than d or a", i);
  STEEPEST_REQUIRE(c.rows == d.rows && c.cols == d.cols, "matrix: ops[%lld].c is %lld x %lld, expected %lld x %lld", i,
                   static_cast<long long>(c.rows), static_cast<long long>(c.cols), static_cast<long long>(d.rows),
                   static_cast<long long>(d.cols));
  return STEEPEST_OK;
}

steepest_status check(const steepest_exec *exec, const steepest_matrix_program *p) {
  STEEPEST_REQUIRE(exec, "matrix: exec is NULL");
  STEEPEST_REQUIRE(exec->struct_size >= sizeof(steepest_exec), "matrix: exec->struct_size is %llu, expected at least %zu",
                   static_cast<unsigned long long>(exec->struct_size), sizeof(steepest_exec));
  if (exec->device != STEEPEST_CPU)
    return fail(STEEPEST_ERROR_UNSUPPORTED, "matrix: exec->device is %d, programs run on the CPU (0)", exec->device);
  STEEPEST_REQUIRE(exec->num_threads >= 0, "matrix: exec->num_threads is %d, expected >= 0", exec->num_threads);
  STEEPEST_REQUIRE(p, "matrix: program is NULL");
  STEEPEST_REQUIRE(p->struct_size >= sizeof(steepest_matrix_program),
                   "matrix: program->struct_size is %llu, expected at least %zu",
                   static_cast<unsigned long long>(p->struct_size), sizeof(steepest_matrix_program));
  STEEPEST_REQUIRE(p->batch >= 0 && p->num_operands >= 0 && p->num_ops >= 0, "matrix: a count is negative");
  STEEPEST_REQUIRE((p->operands || !p->num_operands) && (p->ops || !p->num_ops), "matrix: operands or ops is NULL");
  for (int64_t i = 0; i < p->num_operands; ++i)
    if (const steepest_status status = check_operand(p->operands[i], i)) return status;
  for (int64_t i = 0; i < p->num_ops; ++i)
    if (const steepest_status status = check_op(*p, i)) return status;
  return STEEPEST_OK;
}

}  // namespace
}  // namespace steepest::matrix

extern "C" steepest_status steepest_matrix_workspace_size(const steepest_exec *exec,
                                                          const steepest_matrix_program *program, uint64_t *bytes) {
  using namespace steepest;
  clear_error();
  if (!bytes) return fail(STEEPEST_ERROR_INVALID, "matrix: bytes is NULL");
  if (const steepest_status status = matrix::check(exec, program)) return status;
  *bytes = matrix::workspace_bytes(*exec, *program);
  return STEEPEST_OK;
}

extern "C" steepest_status steepest_matrix_run(const steepest_exec *exec, const steepest_matrix_program *program,
                                               void *workspace, uint64_t workspace_bytes, uint64_t *flops) {
  using namespace steepest;
  clear_error();
  if (const steepest_status status = matrix::check(exec, program)) return status;
  const uint64_t needed = matrix::workspace_bytes(*exec, *program);
  if (!workspace || workspace_bytes < needed)
    return fail(STEEPEST_ERROR_WORKSPACE, "matrix: workspace has %llu bytes at %p, expected %llu",
                static_cast<unsigned long long>(workspace_bytes), workspace, static_cast<unsigned long long>(needed));
  const uint64_t executed = matrix::run(*exec, *program, workspace);
  if (flops) *flops = executed;
  return STEEPEST_OK;
}

extern "C" const char *steepest_matrix_clone(void) { return steepest::matrix::clone_name(); }
