/* steepest: fused kernels for the optimizer step.  C99 interface of libsteepest.
 *
 * Conventions, for every function:
 *   - Structs are plain data and begin with `struct_size`; set it with sizeof so that a newer library can tell
 *     which fields an older caller knows.
 *   - Sizes and counts are int64_t.  Tensors are flat arrays: `numel[i]` elements at `params[i]`; any dense layout
 *     will do as long as all tensors of one row share it.
 *   - The caller owns all memory.  Nothing is allocated: where scratch memory is needed, ask `*_workspace_size`.
 *   - CUDA work is enqueued on the stream given and never waited for.
 *   - No C++ exception leaves the library.  A status other than STEEPEST_OK leaves every tensor unchanged, unless it
 *     is STEEPEST_ERROR_CUDA, and `steepest_last_error()` then says what was asked, found and expected.
 */
#ifndef STEEPEST_STEEPEST_H_
#define STEEPEST_STEEPEST_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define STEEPEST_API
#else
#define STEEPEST_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a struct or a function changes incompatibly. */
#define STEEPEST_ABI_VERSION 1

typedef enum steepest_status {
  STEEPEST_OK = 0,
  STEEPEST_ERROR_INVALID = 1,     /* an argument is wrong: the message names it */
  STEEPEST_ERROR_UNSUPPORTED = 2, /* valid, but not in this build or not for this type */
  STEEPEST_ERROR_WORKSPACE = 3,   /* workspace is NULL or smaller than the query said */
  STEEPEST_ERROR_CUDA = 4,        /* the CUDA runtime refused a launch */
  STEEPEST_ERROR_INTERNAL = 5
} steepest_status;

typedef enum steepest_dtype {
  STEEPEST_FLOAT32 = 0,
  STEEPEST_BFLOAT16 = 1,
  STEEPEST_FLOAT16 = 2
} steepest_dtype;

typedef enum steepest_device { STEEPEST_CPU = 0, STEEPEST_CUDA = 1 } steepest_device;

/* Where a call runs. */
typedef struct steepest_exec {
  uint64_t struct_size;
  int32_t device;       /* steepest_device */
  int32_t device_index; /* CUDA ordinal; 0 for the CPU */
  void *stream;         /* cudaStream_t; NULL is CUDA's default stream.  Ignored on the CPU */
  int32_t num_threads;  /* CPU: upper limit on OpenMP threads; 0 takes OpenMP's own setting.  Never changes a result */
  int32_t reserved;
} steepest_exec;

/* Hyper-parameters of one group, as the user states them; derived scalars are computed inside, in double. */
typedef struct steepest_adamw_hyper {
  double lr;           /* >= 0 */
  double beta1;        /* [0, 1) */
  double beta2;        /* [0, 1) */
  double eps;          /* >= 0 */
  double weight_decay; /* >= 0, decoupled */
  int64_t step;        /* number of this step, the first being 1 */
} steepest_adamw_hyper;

enum { STEEPEST_MAXIMIZE = 1 }; /* steepest_adamw_args.flags: ascend instead of descend */

/* AdamW (Loshchilov & Hutter 2019, in the rounding order of torch.optim.AdamW), for row i:
 *   g = grad / *grad_scale                        (negated by STEEPEST_MAXIMIZE)
 *   p = p * (1 - lr*weight_decay)
 *   m = m + (1 - beta1) * (g - m)
 *   v = v * beta2 + ((1 - beta2) * g) * g         (AMSGrad: v^ = max(v^, v) replaces v below)
 *   p = p + (-lr / (1 - beta1^t) * m) / (sqrt(v) / sqrt(1 - beta2^t) + eps)
 * in float32, each result rounded once to its tensor's type. */
typedef struct steepest_adamw_args {
  uint64_t struct_size;
  int64_t num_tensors;
  const int64_t *numel;          /* [num_tensors], each >= 0 */
  void *const *params;           /* [num_tensors] addresses, likewise below */
  const void *const *grads;
  void *const *exp_avgs;
  void *const *exp_avg_sqs;
  void *const *max_exp_avg_sqs;  /* NULL: no AMSGrad */
  int32_t param_dtype;           /* steepest_dtype */
  int32_t grad_dtype;
  int32_t state_dtype;
  uint32_t flags;
  int64_t num_hyper;                  /* >= 1 */
  const steepest_adamw_hyper *hyper;  /* [num_hyper], host memory */
  const int32_t *hyper_index;         /* [num_tensors] row of `hyper`; NULL: row 0 for all */
  const float *grad_scale;            /* NULL, or where the tensors live: gradients are divided by it */
  const float *found_inf;             /* NULL, or where the tensors live: nothing is changed when it is not 0 */
} steepest_adamw_args;

/* Bytes of scratch memory that steepest_adamw_step needs (host memory, any alignment of 8). */
STEEPEST_API steepest_status steepest_adamw_workspace_size(const steepest_exec *exec,
                                                           const steepest_adamw_args *args, uint64_t *bytes);

/* One step over all tensors.  Reads 4 and writes 3 values per element: 28 bytes in float32, 36 with AMSGrad. */
STEEPEST_API steepest_status steepest_adamw_step(const steepest_exec *exec, const steepest_adamw_args *args,
                                                 void *workspace, uint64_t workspace_bytes);

/* Number of CUDA launches that the same call makes; 0 on the CPU. */
STEEPEST_API steepest_status steepest_adamw_launches(const steepest_exec *exec, const steepest_adamw_args *args,
                                                     int64_t *launches);

STEEPEST_API uint32_t steepest_abi_version(void);
STEEPEST_API const char *steepest_version(void);
/* One line of JSON: compiler, flags, CUDA on/off, architectures, SIMD clone chosen on this machine. */
STEEPEST_API const char *steepest_build_info(void);
/* Message of the last failure in this thread; "" when there was none.  Valid until the next call in the thread. */
STEEPEST_API const char *steepest_last_error(void);
STEEPEST_API const char *steepest_status_name(steepest_status status);

#ifdef __cplusplus
}
#endif
#endif /* STEEPEST_STEEPEST_H_ */
