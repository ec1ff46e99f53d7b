/* A C99 program that links libsteepest: takes AdamW steps on data that the caller passes in, and prints the bits.
 *   usage: adamw_steps N STEPS < 4*N floats (p, g, m, v)   ->  3*N lines of hexadecimal float32 bits (p, m, v) */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <steepest/matrix.h>
#include <steepest/steepest.h>

static int check(steepest_status status) {
  if (status != STEEPEST_OK) fprintf(stderr, "%s: %s\n", steepest_status_name(status), steepest_last_error());
  return status != STEEPEST_OK;
}

/* A program of one operation on small integers, whose products are exact: G = X X^T for X = (1 2; 3 4; 5 6). */
static int gram_is_right(void) {
  float x[6] = {1, 2, 3, 4, 5, 6}, g[9];
  const float expected[9] = {5, 11, 17, 11, 25, 39, 17, 39, 61};
  steepest_matrix_operand operands[2] = {{3, 2, STEEPEST_MATRIX_FLOAT32, 0, NULL, 2, 6},
                                         {3, 3, STEEPEST_MATRIX_FLOAT32, 0, NULL, 3, 9}};
  const steepest_matrix_op op = {STEEPEST_MATRIX_SYMMETRIC, STEEPEST_MATRIX_TRANSPOSE_B, 1, 0, 0, -1, 1.0, 0.0, 0.0};
  steepest_matrix_program program = {sizeof program, 1, 2, NULL, 1, &op};
  steepest_exec exec;
  memset(&exec, 0, sizeof exec);
  exec.struct_size = sizeof exec;
  operands[0].data = x, operands[1].data = g;
  program.operands = operands;
  uint64_t bytes = 0, flops = 0;
  if (check(steepest_matrix_workspace_size(&exec, &program, &bytes))) return 0;
  void *workspace = malloc((size_t)bytes);
  const int failed = check(steepest_matrix_run(&exec, &program, workspace, bytes, &flops));
  free(workspace);
  return !failed && !memcmp(g, expected, sizeof g) && flops == 2 * 8 * 16 * 2;
}

int main(int argc, char **argv) {
  if (argc != 3 || steepest_abi_version() != STEEPEST_ABI_VERSION) return 2;
  if (!gram_is_right()) return 10;
  const int64_t n = atoll(argv[1]);
  const int64_t steps = atoll(argv[2]);
  float *data = malloc((size_t)(4 * n) * sizeof *data);
  if (!data || fread(data, sizeof *data, (size_t)(4 * n), stdin) != (size_t)(4 * n)) return 3;
  float *p = data, *g = data + n, *m = data + 2 * n, *v = data + 3 * n;

  void *params[1], *exp_avgs[1], *exp_avg_sqs[1];
  const void *grads[1];
  params[0] = p, grads[0] = g, exp_avgs[0] = m, exp_avg_sqs[0] = v;

  steepest_exec exec;
  memset(&exec, 0, sizeof exec);
  exec.struct_size = sizeof exec;
  exec.device = STEEPEST_CPU;
  steepest_hyper hyper;
  memset(&hyper, 0, sizeof hyper);
  hyper.lr = 1e-2, hyper.beta1 = 0.9, hyper.beta2 = 0.999, hyper.eps = 1e-8, hyper.weight_decay = 0.1;
  steepest_step_args args;
  memset(&args, 0, sizeof args);
  args.struct_size = sizeof args;
  args.num_tensors = 1;
  args.numel = &n;
  args.params = params;
  args.grads = grads;
  args.rule = STEEPEST_ADAM;
  args.flags = STEEPEST_DECOUPLED;
  args.states[0] = exp_avgs;
  args.states[1] = exp_avg_sqs;
  args.param_dtype = args.grad_dtype = args.state_dtype = STEEPEST_FLOAT32;
  args.num_hyper = 1;
  args.hyper = &hyper;

  hyper.step = 1;
  /* Mistakes come back as codes with a message, and change nothing. */
  args.param_dtype = 7;
  if (steepest_step(&exec, &args, NULL, 0) != STEEPEST_ERROR_INVALID) return 4;
  if (!strstr(steepest_last_error(), "param_dtype is 7")) return 5;
  args.param_dtype = STEEPEST_FLOAT32;
  if (steepest_step(&exec, &args, NULL, 0) != STEEPEST_ERROR_WORKSPACE) return 6;
  exec.struct_size = 4;
  if (steepest_step(&exec, &args, NULL, 0) != STEEPEST_ERROR_INVALID) return 7;
  exec.struct_size = sizeof exec;

  uint64_t bytes = 0;
  if (check(steepest_step_workspace_size(&exec, &args, &bytes))) return 8;
  void *workspace = malloc((size_t)bytes);
  for (hyper.step = 1; hyper.step <= steps; ++hyper.step)
    if (check(steepest_step(&exec, &args, workspace, bytes))) return 9;

  const float *const out[3] = {p, m, v};
  for (int k = 0; k < 3; ++k)
    for (int64_t i = 0; i < n; ++i) {
      uint32_t bits;
      memcpy(&bits, &out[k][i], sizeof bits);
      printf("%08" PRIx32 "\n", bits);
    }
  free(workspace);
  free(data);
  return 0;
}
