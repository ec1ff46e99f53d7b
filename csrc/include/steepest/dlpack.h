/* steepest_step on tensors as DLPack describes them: addresses, types, layouts and device are read from them.
 *
 * No DLPack header is needed: steepest_dltensor has the layout of its DLTensor, which is the same in all versions since
 * 0.2, and a `const DLTensor *` may be passed after a cast.
 *
 *   const DLTensor *mine = &managed->dl_tensor;
 *   const steepest_dltensor *rows[1] = {(const steepest_dltensor *)mine};
 */
#ifndef STEEPEST_DLPACK_H_
#define STEEPEST_DLPACK_H_

#include <steepest/steepest.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct steepest_dldevice {
  int32_t device_type; /* 1 CPU, 2 CUDA, 3 CUDA's pinned host memory, 13 CUDA managed */
  int32_t device_id;
} steepest_dldevice;

typedef struct steepest_dldatatype {
  uint8_t code; /* 0 signed, 1 unsigned, 2 float, 4 bfloat */
  uint8_t bits;
  uint16_t lanes;
} steepest_dldatatype;

typedef struct steepest_dltensor {
  void *data;
  steepest_dldevice device;
  int32_t ndim;
  steepest_dldatatype dtype;
  int64_t *shape;   /* [ndim] */
  int64_t *strides; /* [ndim] in elements, or NULL for row-major */
  uint64_t byte_offset;
} steepest_dltensor;

typedef const steepest_dltensor *const *steepest_dllist;

/* Row i of a call is tensor i of every list; each list has steepest_step_args.num_tensors of them. */
typedef struct steepest_dlpack_rows {
  uint64_t struct_size;
  steepest_dllist params;
  steepest_dllist grads;
  steepest_dllist states[STEEPEST_MAX_STATES]; /* as many as the rule has; the rest NULL.  uint8: STEEPEST_BLOCK8 */
  steepest_dllist masters;                     /* these may be NULL */
  steepest_dllist residuals;                   /* int16 or int8 */
  steepest_dllist sources;
  steepest_dllist averages;
  steepest_dllist state_exponents[STEEPEST_MAX_STATES]; /* uint8, of as many elements as there are blocks of 128 */
} steepest_dlpack_rows;

/* Bytes of scratch memory that steepest_step_dlpack needs: addresses of all rows, and what steepest_step needs. */
STEEPEST_API steepest_status steepest_step_dlpack_workspace_size(const steepest_exec *exec,
                                                                 const steepest_step_args *args, uint64_t *bytes);

/* steepest_step with num_tensors, rule, flags, hyper-parameters, counters, scalars, rounding, seed and first_index of
 * `args`; its lists of tensors, types and residual_bits are not looked at.
 *
 * Tensors of a row have one shape and layout, dense in any order of dimensions; tensors of a list have one type, states
 * all the same; all are on exec's device.  What is otherwise is STEEPEST_ERROR_INVALID or _UNSUPPORTED, with a message
 * that names list and row, before anything is changed. */
STEEPEST_API steepest_status steepest_step_dlpack(const steepest_exec *exec, const steepest_step_args *args,
                                                  const steepest_dlpack_rows *rows, void *workspace,
                                                  uint64_t workspace_bytes);

#ifdef __cplusplus
}
#endif
#endif /* STEEPEST_DLPACK_H_ */
