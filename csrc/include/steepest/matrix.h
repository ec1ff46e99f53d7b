/* steepest/matrix.h: chains of dense products over batches of matrices, on the CPU.  C99, conventions of steepest.h.
 *
 * A chain (a polar factor, an inverse root) is a program: a list of operations on operands, run for every matrix of a
 * batch.  Operands with data are the caller's arrays; those without are scratch, which a matrix's chain keeps in cache.
 * Row i, column j of matrix k is data[k*stride + i*ld + j].
 *
 * A result depends on the shapes, the program and the values of its own matrix alone: not on the number of threads, the
 * batch around it, alignment, leading dimensions or what memory held before.  Symmetric results are symmetric bit for
 * bit.  Products are accumulated with fused multiply-add where the machine has it, so machines of different instruction
 * sets may round differently.
 */
#ifndef STEEPEST_MATRIX_H_
#define STEEPEST_MATRIX_H_

#include "steepest/steepest.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum steepest_matrix_dtype {
  STEEPEST_MATRIX_FLOAT32 = 0,
  STEEPEST_MATRIX_FLOAT64 = 1
} steepest_matrix_dtype;

/* op(A) is A, or its transpose with STEEPEST_MATRIX_TRANSPOSE_A; likewise B.  An absent C counts as zero. */
typedef enum steepest_matrix_kind {
  /* D = alpha op(A) op(B) + beta C + gamma I, where the caller knows that op(A) op(B) and C are symmetric: what is on
   * and below the diagonal is computed (in strips of 8 rows, up to the next multiple of 16 columns) and mirrored */
  STEEPEST_MATRIX_SYMMETRIC = 0,
  /* D = alpha op(A) op(B) + beta C */
  STEEPEST_MATRIX_PRODUCT = 1,
  /* D = alpha A + beta C + gamma I; A of another dtype is converted, and C is then absent */
  STEEPEST_MATRIX_COMBINE = 2,
  /* D = alpha A / ||A||_F, the norm in double; zeros for zeros, all NaN where A is not finite */
  STEEPEST_MATRIX_NORMALISE = 3,
  /* D = alpha (A + A^T) / (2 r), r the largest row sum of |A + A^T| / 2; zeros for zeros, all NaN where A is not finite.
   * C, 1 x 2 doubles, is written: r and ||D||_F */
  STEEPEST_MATRIX_SYMMETRISE = 4,
  /* D, 1 x 1 doubles, = ||A||_F, the sum in double; NaN where A is not finite */
  STEEPEST_MATRIX_NORM = 5,
  /* D = alpha A / B^gamma, B 1 x 1 doubles, 0 counting as 1 */
  STEEPEST_MATRIX_DIVIDE = 6,
  /* D, 1 x 1 doubles, = min(1, C[1], 2 max_i ||A_i|| / ||B_i||) (1 + 2^-12) over the rows of A = V Y^(k+1) and B = V Y^k,
   * C as SYMMETRISE gives it with Y: an upper bound of |lambda|max of Y where k is large enough.  0 for zero, NaN where
   * any of them is NaN */
  STEEPEST_MATRIX_SPECTRAL_BOUND = 7
} steepest_matrix_kind;

enum { STEEPEST_MATRIX_TRANSPOSE_A = 1, STEEPEST_MATRIX_TRANSPOSE_B = 2 };

typedef struct steepest_matrix_op {
  int32_t kind; /* steepest_matrix_kind */
  uint32_t flags;
  int32_t d, a, b, c; /* numbers of operands, -1 for none.  d differs from a and b; it may be c */
  double alpha, beta, gamma;
} steepest_matrix_op;

typedef struct steepest_matrix_operand {
  int64_t rows, cols;
  int32_t dtype; /* steepest_matrix_dtype */
  int32_t reserved;
  void *data;     /* NULL: scratch */
  int64_t ld;     /* >= cols; elements between rows; ignored for scratch */
  int64_t stride; /* elements between matrices; 0: one matrix for the whole batch, only to be read */
} steepest_matrix_operand;

typedef struct steepest_matrix_program {
  uint64_t struct_size;
  int64_t batch;
  int64_t num_operands;
  const steepest_matrix_operand *operands;
  int64_t num_ops;
  const steepest_matrix_op *ops;
} steepest_matrix_program;

/* Bytes of scratch memory that steepest_matrix_run needs (any alignment of 8): every thread has a set of scratch
 * operands where threads take a matrix each, otherwise there is one set. */
STEEPEST_API steepest_status steepest_matrix_workspace_size(const steepest_exec *exec,
                                                            const steepest_matrix_program *program, uint64_t *bytes);

/* Runs the program for every matrix.  Arrays that are written must not overlap any other.  *flops, unless NULL, becomes
 * the floating-point operations of all products that were executed, tiles counted whole. */
STEEPEST_API steepest_status steepest_matrix_run(const steepest_exec *exec, const steepest_matrix_program *program,
                                                 void *workspace, uint64_t workspace_bytes, uint64_t *flops);

/* The instruction set that the products use on this machine: "x86-64-v4", "x86-64-v3" or "default". */
STEEPEST_API const char *steepest_matrix_clone(void);

#ifdef __cplusplus
}
#endif
#endif /* STEEPEST_MATRIX_H_ */
