/* Calls that are wrong in every way that a C program can be wrong: each gives a code and a message, and changes nothing.
 * Prints one line per call: the status's name and the message. */
#include <steepest/steepest.h>
#include <stdio.h>
#include <string.h>

static float p[4] = {1, 2, 3, 4}, g[4] = {1, 1, 1, 1}, m[4], v[4];
static void *params[1] = {p};
static const void *grads[1] = {g};
static void *exp_avgs[1] = {m}, *exp_avg_sqs[1] = {v};
static const int64_t numel[1] = {4};
static const steepest_hyper good = {.lr = 0.1, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .step = 1};

static steepest_step_args right(void) {
  steepest_step_args args;
  memset(&args, 0, sizeof args);
  args.struct_size = sizeof args;
  args.rule = STEEPEST_ADAM;
  args.num_tensors = 1;
  args.numel = numel;
  args.params = params;
  args.grads = grads;
  args.states[0] = exp_avgs;
  args.states[1] = exp_avg_sqs;
  args.num_hyper = 1;
  args.hyper = &good;
  return args;
}

static int wrong(const char *what, const steepest_exec *exec, const steepest_step_args *args, uint64_t bytes) {
  static uint64_t workspace[64];
  const steepest_status status = steepest_step(exec, args, bytes ? workspace : NULL, bytes);
  printf("%s|%s|%s\n", what, steepest_status_name(status), steepest_last_error());
  return status == STEEPEST_OK || p[0] != 1 || m[0] != 0;
}

int main(void) {
  const steepest_exec exec = {sizeof exec, STEEPEST_CPU, 0, NULL, 0, 0};
  steepest_exec older = exec, nowhere = exec;
  steepest_step_args args = right();
  steepest_hyper hyper = good;
  int failures = 0;
  if (steepest_abi_version() != STEEPEST_ABI_VERSION || steepest_check_abi(STEEPEST_ABI_VERSION)) return 99;
  printf("abi|%s|%s\n", steepest_status_name(steepest_check_abi(STEEPEST_ABI_VERSION + 1)), steepest_last_error());
  older.struct_size = 8;
  nowhere.device = 7;
  failures += wrong("exec NULL", NULL, &args, sizeof(uint64_t[64]));
  failures += wrong("exec older", &older, &args, sizeof(uint64_t[64]));
  failures += wrong("device", &nowhere, &args, sizeof(uint64_t[64]));
  failures += wrong("args NULL", &exec, NULL, sizeof(uint64_t[64]));
  failures += wrong("workspace", &exec, &args, 0);
  args.struct_size = 16;
  failures += wrong("args older", &exec, &args, sizeof(uint64_t[64]));
  args = right();
  args.rule = 99;
  failures += wrong("rule", &exec, &args, sizeof(uint64_t[64]));
  args = right();
  args.states[1] = NULL;
  failures += wrong("states", &exec, &args, sizeof(uint64_t[64]));
  args = right();
  args.param_dtype = 42;
  failures += wrong("dtype", &exec, &args, sizeof(uint64_t[64]));
  args = right();
  hyper.beta2 = 1.5;
  args.hyper = &hyper;
  failures += wrong("beta2", &exec, &args, sizeof(uint64_t[64]));
  return failures;
}
