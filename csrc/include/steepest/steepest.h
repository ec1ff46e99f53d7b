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
#define STEEPEST_ABI_VERSION 3

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
  STEEPEST_FLOAT16 = 2,
  STEEPEST_BLOCK8 = 3 /* states only: 8-bit floating point, 128 elements sharing an exponent (see state_exponents) */
} steepest_dtype;

/* How 16-bit results are rounded. */
typedef enum steepest_rounding {
  STEEPEST_NEAREST = 0,   /* ties to even */
  STEEPEST_STOCHASTIC = 1 /* bfloat16 parameters and states: to a neighbour, the nearer the likelier; see seed */
} steepest_rounding;

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

/* Update rules.  All take, before the rule, the gradient stages
 *   g = grad / *grad_scale * *clip_coefficient      (negated by STEEPEST_MAXIMIZE)
 *   g = clamp(g, -clip_value, clip_value)
 *   g = g + sqrt(noise_eta / (1 + t)^noise_gamma) * normal            (t: this step's number)
 *   g = g + weight_decay * p                        (L2 decay)
 *   p = p * (1 - lr*weight_decay)                   (STEEPEST_DECOUPLED)
 * and after it the parameter stages
 *   p = p - lr*weight_decay * p_old                 (STEEPEST_DECOUPLED | STEEPEST_CAUTIOUS: instead of the above, and
 *                                                    only where the step has moved p towards zero)
 *   p = sign(p) * max(|p| - lr*l1, 0)
 *   average = average + (1 - average_decay) * (p - average)           (with averages)
 * in float32, each result rounded once to its tensor's type.  The order of operations is that of torch's for-loops, but for
 * Adam, whose step size and eps carry the bias correction of v. */
typedef enum steepest_rule {
  /* b = momentum*b + (1 - dampening)*g (b = g in step 1);  g = g + momentum*b (STEEPEST_NESTEROV) or b;  p = p - lr*g
   * states: b with STEEPEST_MOMENTUM, else none */
  STEEPEST_SGD = 0,
  /* s = s + g*g;  p = p - lr / (1 + (t-1)*lr_decay) * g / (sqrt(s) + eps);  states: s (Duchi et al. 2011) */
  STEEPEST_ADAGRAD = 1,
  /* v = alpha*v + (1-alpha)*g*g;  a = a + (1-alpha)*(g - a), d = sqrt(v - a*a) (STEEPEST_CENTERED) or sqrt(v);
   * b = momentum*b + g / (d + eps), p = p - lr*b (STEEPEST_MOMENTUM) or p = p - lr * g / (d + eps)
   * states: v, [a], [b] */
  STEEPEST_RMSPROP = 2,
  /* m = m + (1-beta1)*(g - m);  v = beta2*v + (1-beta2)*g*g (STEEPEST_AMSGRAD: v^ = max(v^, v) stands for v below);
   * p = p + (-lr*c / (1 - beta1^t) * m) / (sqrt(v) + c*eps), c = sqrt(1 - beta2^t);  states: m, v, [v^]
   * AdamW with STEEPEST_DECOUPLED (Loshchilov & Hutter 2019), Adam without (Kingma & Ba 2015) */
  STEEPEST_ADAM = 3,
  /* p = p - lr * sign(beta1*m + (1-beta1)*g);  m = beta2*m + (1-beta2)*g;  states: m (Chen et al. 2023) */
  STEEPEST_LION = 4,
  /* p = p - lr * sign(g);  states: none */
  STEEPEST_SIGN = 5,
  /* Steepest ascent of length rho = lr in the p-norm, 1/p + 1/q = 1, with T = alpha*|p| + eps and x = T*grad:
   * b = p (STEEPEST_BACKUP);  p = p + rho * T * sign(x) * (|x| / norm_q(x))^(q-1)  (minus with STEEPEST_MAXIMIZE)
   * *grad_scale is the largest |x| and *clip_coefficient that divided by the norm, both over all tensors together;
   * q = 1 needs neither; q = inf moves the largest |x| alone, and *clip_coefficient is 1 / how many there are.  What
   * is not finite moves nothing.  T = 1: alpha 0, eps 1.  STEEPEST_POWER for q other than 1, 2 and inf.
   * states: b, or none (Foret et al. 2021; Kwon et al. 2021) */
  STEEPEST_PERTURB = 6,
  /* p = grad: back to a copy, rounded where it is wider;  states: none */
  STEEPEST_RESTORE = 7
} steepest_rule;

/* steepest_step_args.flags */
enum {
  STEEPEST_MAXIMIZE = 1,  /* ascend instead of descend */
  STEEPEST_DECOUPLED = 2, /* weight decay is decoupled from the gradient */
  STEEPEST_CAUTIOUS = 4,  /* decoupled decay only where the step points the same way (Chen et al. 2025) */
  STEEPEST_AMSGRAD = 8,
  STEEPEST_NESTEROV = 16,
  STEEPEST_CENTERED = 32,
  STEEPEST_MOMENTUM = 64,
  STEEPEST_BACKUP = 4096,
  STEEPEST_POWER = 8192
};

#define STEEPEST_MAX_STATES 3

/* Hyper-parameters of one group, as the user states them; derived scalars are computed inside, in double.  Fields that
 * a rule does not use are ignored. */
typedef struct steepest_hyper {
  double lr;           /* >= 0 */
  double weight_decay; /* >= 0 */
  double l1;           /* >= 0 */
  double beta1;        /* [0, 1) Adam, Lion */
  double beta2;        /* [0, 1) Adam, Lion */
  double eps;          /* >= 0   Adam, Adagrad, RMSprop */
  double momentum;     /* >= 0   SGD, RMSprop */
  double dampening;    /*        SGD */
  double alpha;        /* [0, 1] RMSprop; Perturb: T = alpha*|p| + eps */
  double lr_decay;     /* >= 0   Adagrad */
  double noise_eta;    /* >= 0   variance of the gradient noise before annealing (Neelakantan et al. 2015) */
  double noise_gamma;  /* >= 0   its annealing */
  double average_decay; /* [0, 1] of averages */
  double q;            /* >= 1   Perturb */
  int64_t step;        /* number t of this step, the first being 1 */
} steepest_hyper;

/* A number of a row of hyper-parameters that the step reads where the tensors live, when it runs there. */
typedef struct steepest_live {
  int32_t row;        /* of `hyper`, whose own number is then ignored */
  int32_t field;      /* which one: 0 lr, 1 weight_decay, 2 l1, 3 beta1, 4 beta2, 5 eps, 6 momentum, 7 dampening, 8 alpha,
                         9 lr_decay.  Its range is not checked */
  int32_t is_float64; /* what `value` points to: 0 a float, 1 a double */
  int32_t reserved;
  const void *value;
} steepest_live;

/* Bytes of steepest_step_args.device_rows per tensor. */
#define STEEPEST_DEVICE_ROW_BYTES 128

/* Row i of a call is tensor i of every list. */
typedef struct steepest_step_args {
  uint64_t struct_size;
  int32_t rule;   /* steepest_rule */
  uint32_t flags;
  int64_t num_tensors;
  const int64_t *numel;                       /* [num_tensors], each >= 0 */
  void *const *params;                        /* [num_tensors] addresses, likewise below */
  const void *const *grads;
  void *const *states[STEEPEST_MAX_STATES];   /* as many lists as the rule has states, in its order; the rest NULL */
  int32_t param_dtype;                        /* steepest_dtype */
  int32_t grad_dtype;
  int32_t state_dtype;
  int32_t reserved;
  int64_t num_hyper;                          /* >= 1 */
  const steepest_hyper *hyper;                /* [num_hyper], host memory */
  const int32_t *hyper_index;                 /* [num_tensors] row of `hyper`; NULL: row 0 for all */
  const float *grad_scale;       /* NULL, or where the tensors live: gradients are divided by it */
  const float *clip_coefficient; /* NULL, or where the tensors live: gradients are multiplied by it */
  const float *found_inf;        /* NULL, or where the tensors live: nothing is changed when it is not 0 */
  double clip_value;             /* > 0: gradients are clamped to [-clip_value, clip_value]; 0: they are not */

  /* How parameters and states are kept, and what else is done in the same pass.  Lists may be NULL; all zero is plain. */
  void *const *masters;           /* [num_tensors] float32: the parameters themselves, read and written.  `params`, of a
                                     16-bit type, only receives their rounded copy */
  void *const *residuals;         /* [num_tensors] signed integers of residual_bits: what bfloat16 `params` lack */
  const void *const *sources;     /* [num_tensors] like params, which are read from here and written to params: a step from
                                     where a perturbation has left.  Not with masters, which it does not touch */
  void *const *averages;          /* [num_tensors] float32: exponential moving averages of the parameters */
  void *const *state_exponents[STEEPEST_MAX_STATES]; /* STEEPEST_BLOCK8: a byte per 128 elements of each row */
  int32_t residual_bits;          /* 16: params and residuals make up a float32.  8: its upper 24 bits */
  int32_t rounding;               /* steepest_rounding */
  uint64_t seed;                  /* of noise, stochastic rounding and 8-bit states: numbers depend on seed, step and the
                                     number of the element only */
  const int64_t *first_index;     /* [num_tensors] number of each row's element 0 there; needed with any of the three */

  /* Steps that only the device can count, because it decides whether they are skipped or because a CUDA graph replays
   * them.  All NULL and zero: `hyper` has the numbers. */
  float *const *counters;         /* [num_tensors] where the tensors live, no two of them the same: how many steps tensor i
                                     has behind it.  This one is *counters[i] + 1 in the place of hyper's, and is counted
                                     there unless found_inf is not 0 */
  const steepest_live *live;      /* [num_live], in the order of their rows; needs counters */
  int64_t num_live;
  void *device_rows;              /* CUDA, with counters: [num_tensors * STEEPEST_DEVICE_ROW_BYTES] bytes on the device,
                                     aligned to 16, which must stay until the step has run */
} steepest_step_args;

/* Bytes of scratch memory that steepest_step needs (host memory, any alignment of 8). */
STEEPEST_API steepest_status steepest_step_workspace_size(const steepest_exec *exec, const steepest_step_args *args,
                                                          uint64_t *bytes);

/* One step over all tensors.  Reads parameter, gradient and s states and writes all but the gradient: 12 + 8 s bytes
 * per element in float32 (AdamW: 28; with a float32 master of a bfloat16 parameter and a bfloat16 gradient 28 too). */
STEEPEST_API steepest_status steepest_step(const steepest_exec *exec, const steepest_step_args *args, void *workspace,
                                           uint64_t workspace_bytes);

/* Number of CUDA launches that the same call makes; 0 on the CPU. */
STEEPEST_API steepest_status steepest_step_launches(const steepest_exec *exec, const steepest_step_args *args,
                                                    int64_t *launches);

/* Bytes that the same call reads and writes, by its plan; what CPU caches fetch beyond that is not counted. */
STEEPEST_API steepest_status steepest_step_traffic(const steepest_exec *exec, const steepest_step_args *args,
                                                   uint64_t *bytes);

/* One read of many tensors: sum of |x|^q, largest |x|, and with it whether anything is not finite.  The order of the sum
 * depends on the sizes alone, not on threads or vector widths; it is taken in float64. */
typedef struct steepest_survey_args {
  uint64_t struct_size;
  int64_t num_tensors;
  const int64_t *numel;       /* [num_tensors], each >= 0 */
  const void *const *tensors; /* [num_tensors] */
  int32_t dtype;              /* steepest_dtype */
  int32_t reserved;
  double q;                   /* >= 1, or inf: the sum is then 0 */
  double scale;               /* > 0: |x / scale|^q is summed; 1 for q = 1 and 2 */
  const void *const *weights; /* [num_tensors], or NULL: x times (alpha*|weight| + eps), in float32, stands for x */
  int32_t weight_dtype;
  int32_t inner;              /* 1: power_sum is the inner product, the sum of x * weight; q 1, scale 1 */
  double alpha;               /* >= 0 */
  double eps;                 /* >= 0 */
} steepest_survey_args;

typedef struct steepest_survey_result {
  double power_sum;
  float largest; /* max |x|; NaN if any element is NaN; 0 without elements */
  int32_t nonfinite;
} steepest_survey_result;

/* CPU only.  `workspace` as steepest_survey_workspace_size says: 16 bytes per 8192 elements and tensor. */
STEEPEST_API steepest_status steepest_survey_workspace_size(const steepest_exec *exec, const steepest_survey_args *args,
                                                            uint64_t *bytes);
STEEPEST_API steepest_status steepest_survey(const steepest_exec *exec, const steepest_survey_args *args,
                                             void *workspace, uint64_t workspace_bytes,
                                             steepest_survey_result *result);
STEEPEST_API steepest_status steepest_survey_traffic(const steepest_exec *exec, const steepest_survey_args *args,
                                                     uint64_t *bytes);

/* The joint survey of several lists, whose results stay where the tensors live: nothing waits for them. */
typedef struct steepest_measure_args {
  uint64_t struct_size;
  int64_t num_lists;                 /* in [0, 1024] */
  const steepest_survey_args *lists; /* [num_lists], all with the same q and inner, and scale 1 */
  double q;                          /* that of the lists */
  double max_norm;                   /* >= 0, of clip_coefficient */
  const float *grad_scale;           /* NULL, or where the tensors live: what norm32 is divided by */
  int32_t inner;                     /* that of the lists */
  int32_t count_largest;             /* q = inf: count the largest elements, for steepness */
} steepest_measure_args;

typedef struct steepest_measure_result {
  double norm;            /* (sum |x|^q)^(1/q); the inner product; inf or NaN if an element is */
  float norm32;           /* norm / *grad_scale */
  float largest;          /* max |x| */
  float clip_coefficient; /* min(max_norm / (norm32 + 1e-6), 1), rounded as torch rounds it */
  float steepness;        /* largest / norm; q = inf: 1 / how many elements are the largest (1 if not counted) */
  uint32_t nonfinite;     /* 0 or 1 */
  uint32_t reserved;
} steepest_measure_result;

/* Scratch memory where the tensors live, aligned to 16: 16 bytes per 8192 elements and tensor. */
STEEPEST_API steepest_status steepest_measure_workspace_size(const steepest_exec *exec, const steepest_measure_args *args,
                                                             uint64_t *bytes);
/* Reads every tensor once, and twice for q other than 1, 2 and inf, or to count; powers are then relative to the largest
 * element, so that none overflows.  Workspace and result, where the tensors live, must stay until the device has come so
 * far.  On CUDA and on the CPU the results are the same bits. */
STEEPEST_API steepest_status steepest_measure(const steepest_exec *exec, const steepest_measure_args *args,
                                              void *workspace, uint64_t workspace_bytes, steepest_measure_result *result);
/* Number of CUDA launches that the same call makes; 0 on the CPU. */
STEEPEST_API steepest_status steepest_measure_launches(const steepest_exec *exec, const steepest_measure_args *args,
                                                       int64_t *launches);

/* Weight normalisation (Salimans & Kingma 2016) of float32 rows, CPU only:
 *   norms[i] = |v_i|,  w_i = g[i] v_i / norms[i]
 *   grad_g[i] = <grad_w_i, v_i> / norms[i],  grad_v_i = g[i] / norms[i] (grad_w_i - <grad_w_i, v_i> / norms[i]^2 v_i)
 * Sums are float64, in an order that depends on the number of columns alone.  A row of zeros gives zeros. */
typedef struct steepest_weight_norm_args {
  uint64_t struct_size;
  int64_t rows, columns; /* >= 0 */
  const float *v;        /* [rows * columns] */
  const float *g;        /* [rows] */
  float *norms;          /* [rows]: written by steepest_weight_norm, read by steepest_weight_norm_backward */
  float *w;              /* [rows * columns] forward only, likewise not v */
  const float *grad_w;   /* [rows * columns] the rest: backward only */
  float *grad_v;         /* [rows * columns] */
  float *grad_g;         /* [rows] */
} steepest_weight_norm_args;

/* Reads v and writes w: 8 bytes per element where a row fits in a core's cache. */
STEEPEST_API steepest_status steepest_weight_norm(const steepest_exec *exec, const steepest_weight_norm_args *args);
/* Reads v and grad_w and writes grad_v: 12 bytes per element, likewise. */
STEEPEST_API steepest_status steepest_weight_norm_backward(const steepest_exec *exec,
                                                           const steepest_weight_norm_args *args);

STEEPEST_API uint32_t steepest_abi_version(void);
/* steepest_check_abi(STEEPEST_ABI_VERSION): STEEPEST_ERROR_UNSUPPORTED, with a message that names both versions, when the
 * caller was compiled with the header of another one. */
STEEPEST_API steepest_status steepest_check_abi(uint32_t compiled_with);
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
