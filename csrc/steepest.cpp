// The C interface's steps: check every argument, compute derived scalars, dispatch to an engine.
#include "steepest/steepest.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include "check.h"
#include "engine/engine.h"
#include "engine/live.h"
#include "engine/status.h"
#include "step.h"

namespace steepest {
namespace {

const char *dtype_name(int32_t dtype) {
  switch (dtype) {
    case STEEPEST_FLOAT32: return "float32";
    case STEEPEST_BFLOAT16: return "bfloat16";
    case STEEPEST_FLOAT16: return "float16";
    case STEEPEST_BLOCK8: return "8-bit block";
  }
  return "unknown";
}

// The rule's flags and the names of its states, in the order of steepest_step_args.states.
struct RuleFacts {
  const char *name;
  uint32_t flags;  // that it knows, besides those of all rules
  std::array<const char *, STEEPEST_MAX_STATES> states;
};

RuleFacts rule_facts(int32_t rule, uint32_t flags) {
  const char *const momentum = flags & STEEPEST_MOMENTUM ? "momentum_buffers" : nullptr;
  switch (rule) {
    case STEEPEST_SGD: return {"SGD", STEEPEST_NESTEROV | STEEPEST_MOMENTUM, {momentum}};
    case STEEPEST_ADAGRAD: return {"Adagrad", 0, {"sums"}};
    case STEEPEST_RMSPROP:
      if (flags & STEEPEST_CENTERED)
        return {"RMSprop", STEEPEST_CENTERED | STEEPEST_MOMENTUM, {"square_avgs", "grad_avgs", momentum}};
      return {"RMSprop", STEEPEST_CENTERED | STEEPEST_MOMENTUM, {"square_avgs", momentum}};
    case STEEPEST_ADAM:
      return {"Adam", STEEPEST_AMSGRAD, {"exp_avgs", "exp_avg_sqs", flags & STEEPEST_AMSGRAD ? "max_exp_avg_sqs" : nullptr}};
    case STEEPEST_LION: return {"Lion", 0, {"exp_avgs"}};
    case STEEPEST_PERTURB:
      return {"Perturb", STEEPEST_BACKUP | STEEPEST_POWER, {flags & STEEPEST_BACKUP ? "backups" : nullptr}};
    case STEEPEST_RESTORE: return {"Restore", 0, {}};
    default: return {"Sign", 0, {}};
  }
}

steepest_status check_hyper(const char *op, const steepest_hyper &h, int64_t row, bool counted) {
  const long long k = row;
  // Negated comparisons, so that NaN fails too.
  const struct {
    const char *name;
    double value;
  } positive[] = {{"lr", h.lr},   {"weight_decay", h.weight_decay}, {"l1", h.l1},
                  {"eps", h.eps}, {"momentum", h.momentum},         {"lr_decay", h.lr_decay},
                  {"noise_eta", h.noise_eta}, {"noise_gamma", h.noise_gamma}},
    below_one[] = {{"beta1", h.beta1}, {"beta2", h.beta2}};
  for (const auto &[name, value] : positive)
    STEEPEST_REQUIRE(value >= 0, "%s: hyper[%lld].%s is %g, expected >= 0", op, k, name, value);
  for (const auto &[name, value] : below_one)
    STEEPEST_REQUIRE(value >= 0 && value < 1, "%s: hyper[%lld].%s is %g, expected in [0, 1)", op, k, name, value);
  STEEPEST_REQUIRE(h.alpha >= 0 && h.alpha <= 1, "%s: hyper[%lld].alpha is %g, expected in [0, 1]", op, k, h.alpha);
  STEEPEST_REQUIRE(h.average_decay >= 0 && h.average_decay <= 1,
                   "%s: hyper[%lld].average_decay is %g, expected in [0, 1]", op, k, h.average_decay);
  STEEPEST_REQUIRE(h.dampening == h.dampening, "%s: hyper[%lld].dampening is NaN", op, k);
  STEEPEST_REQUIRE(counted || h.step >= 1, "%s: hyper[%lld].step is %lld, expected >= 1 (the first step is 1)", op, k,
                   static_cast<long long>(h.step));
  return STEEPEST_OK;
}

// A list of addresses that a call has, and how large its elements are.
struct Role {
  const char *name;
  const void *const *addresses;
  int size;
};

// The lists of a call.
struct Roles {
  std::array<Role, 2 + 2 * STEEPEST_MAX_STATES + 4> list;
  int count = 0;
  void add(const char *name, const void *const *addresses, int size) { list[count++] = {name, addresses, size}; }
};

Roles roles_of(const steepest_step_args &a, const RuleFacts &rule) {
  Roles roles;
  roles.add("params", a.params, size_of(a.param_dtype));
  roles.add("grads", a.grads, size_of(a.grad_dtype));
  for (int k = 0; k < STEEPEST_MAX_STATES && rule.states[k]; ++k) {
    roles.add(rule.states[k], a.states[k], size_of(a.state_dtype));
    if (a.state_dtype == STEEPEST_BLOCK8) roles.add("state_exponents", a.state_exponents[k], 1);
  }
  if (a.masters) roles.add("masters", a.masters, 4);
  if (a.residuals) roles.add("residuals", a.residuals, a.residual_bits / 8);
  if (a.sources) roles.add("sources", a.sources, size_of(a.param_dtype));
  if (a.averages) roles.add("averages", a.averages, 4);
  return roles;
}

steepest_status check_tensors(const char *op, const steepest_step_args &a, const RuleFacts &rule) {
  const Roles roles = roles_of(a, rule);
  for (int64_t i = 0; i < a.num_tensors; ++i) {
    const long long k = i;
    STEEPEST_REQUIRE(a.numel[i] >= 0, "%s: numel[%lld] is %lld, expected >= 0", op, k,
                     static_cast<long long>(a.numel[i]));
    if (a.hyper_index)
      STEEPEST_REQUIRE(a.hyper_index[i] >= 0 && a.hyper_index[i] < a.num_hyper,
                       "%s: hyper_index[%lld] is %d, expected in [0, %lld)", op, k, a.hyper_index[i],
                       static_cast<long long>(a.num_hyper));
    if (a.numel[i] == 0) continue;
    for (int r = 0; r < roles.count; ++r) {
      const auto &[name, addresses, size] = roles.list[r];
      if (const steepest_status status = check_address(op, name, k, addresses[i], size)) return status;
    }
  }
  return STEEPEST_OK;
}

// How parameters and states are kept.
steepest_status check_storage(const char *op, const steepest_step_args &a) {
  STEEPEST_REQUIRE(!a.masters || a.param_dtype != STEEPEST_FLOAT32, "%s: masters are for 16-bit params, not float32", op);
  STEEPEST_REQUIRE(!a.masters || (!a.residuals && !a.sources),
                   "%s: masters hold the parameters by themselves, expected no residuals and no sources with them", op);
  STEEPEST_REQUIRE(!a.residuals || a.param_dtype == STEEPEST_BFLOAT16, "%s: residuals are for bfloat16 params, not %s", op,
                   dtype_name(a.param_dtype));
  STEEPEST_REQUIRE(!a.residuals || a.residual_bits == 8 || a.residual_bits == 16,
                   "%s: residual_bits is %d, expected 8 or 16", op, a.residual_bits);
  STEEPEST_REQUIRE(a.rounding == STEEPEST_NEAREST || a.rounding == STEEPEST_STOCHASTIC,
                   "%s: rounding is %d, expected STEEPEST_NEAREST (0) or STEEPEST_STOCHASTIC (1)", op, a.rounding);
  STEEPEST_REQUIRE(a.rounding == STEEPEST_NEAREST ||
                       (a.param_dtype != STEEPEST_FLOAT16 && a.state_dtype != STEEPEST_FLOAT16),
                   "%s: stochastic rounding is to bfloat16, found float16 tensors", op);
  bool draws = a.rounding == STEEPEST_STOCHASTIC || a.state_dtype == STEEPEST_BLOCK8;
  for (int64_t i = 0; i < a.num_hyper; ++i) draws = draws || a.hyper[i].noise_eta > 0;
  STEEPEST_REQUIRE(a.num_tensors == 0 || !draws || a.first_index,
                   "%s: first_index is NULL, but noise, stochastic rounding or 8-bit states need it", op);
  return STEEPEST_OK;
}

// Counters and numbers that live where the tensors do.
steepest_status check_live(const char *op, const steepest_exec &exec, const steepest_step_args &a) {
  STEEPEST_REQUIRE(a.num_live >= 0 && (a.num_live == 0 || (a.live && a.counters)),
                   "%s: num_live is %lld, live %p, counters %p; live values need counters", op,
                   static_cast<long long>(a.num_live), static_cast<const void *>(a.live),
                   static_cast<const void *>(a.counters));
  for (int64_t i = 0; i < a.num_live; ++i) {
    const steepest_live &live = a.live[i];
    const long long k = i;
    STEEPEST_REQUIRE(live.row >= (i > 0 ? a.live[i - 1].row : 0) && live.row < a.num_hyper,
                     "%s: live[%lld].row is %d, expected rows in order and below %lld", op, k, live.row,
                     static_cast<long long>(a.num_hyper));
    STEEPEST_REQUIRE(live.field >= 0 && live.field < kLiveFields, "%s: live[%lld].field is %d, expected 0 (lr) to %d (lr_decay)",
                     op, k, live.field, kLiveFields - 1);
    if (const steepest_status status = check_address(op, "live", k, live.value, live.is_float64 ? 8 : 4)) return status;
  }
  if (!a.counters) return STEEPEST_OK;
  for (int64_t i = 0; i < a.num_tensors; ++i)
    if (const steepest_status status = check_address(op, "counters", i, a.counters[i], 4)) return status;
  const bool scratch = a.device_rows && reinterpret_cast<uintptr_t>(a.device_rows) % 16 == 0;
  STEEPEST_REQUIRE(exec.device == STEEPEST_CPU || a.num_tensors == 0 || scratch,
                   "%s: device_rows is %p, expected device memory aligned to 16 bytes", op, a.device_rows);
  return STEEPEST_OK;
}

steepest_status check_args(const char *op, const steepest_step_args *args) {
  STEEPEST_REQUIRE(args, "%s: args is NULL", op);
  const steepest_step_args &a = *args;
  STEEPEST_REQUIRE(a.struct_size >= sizeof(steepest_step_args),
                   "%s: args->struct_size is %llu, expected at least %zu (set it with sizeof; ABI version %d)", op,
                   static_cast<unsigned long long>(a.struct_size), sizeof(steepest_step_args), STEEPEST_ABI_VERSION);
  STEEPEST_REQUIRE(a.num_tensors >= 0, "%s: num_tensors is %lld, expected >= 0", op,
                   static_cast<long long>(a.num_tensors));
  STEEPEST_REQUIRE(a.rule >= STEEPEST_SGD && a.rule <= STEEPEST_RESTORE,
                   "%s: rule is %d, expected 0 to %d (steepest_rule)", op, a.rule, STEEPEST_RESTORE);
  const RuleFacts rule = rule_facts(a.rule, a.flags);
  const uint32_t known = STEEPEST_MAXIMIZE | STEEPEST_DECOUPLED | STEEPEST_CAUTIOUS | rule.flags;
  STEEPEST_REQUIRE((a.flags & ~known) == 0, "%s: flags is 0x%x, known to %s: 0x%x", op, a.flags, rule.name, known);
  STEEPEST_REQUIRE(a.num_tensors == 0 || (a.numel && a.params && a.grads),
                   "%s: numel, params and grads must not be NULL", op);
  for (int state = 0; state < STEEPEST_MAX_STATES && rule.states[state]; ++state)
    STEEPEST_REQUIRE(a.num_tensors == 0 || (a.states[state] &&
                                            (a.state_dtype != STEEPEST_BLOCK8 || a.state_exponents[state])),
                     "%s: states[%d], the %s of %s, or its exponents are NULL", op, state, rule.states[state], rule.name);
  STEEPEST_REQUIRE(a.clip_value >= 0, "%s: clip_value is %g, expected >= 0 (0: none)", op, a.clip_value);
  STEEPEST_REQUIRE(a.num_hyper >= 1 && a.num_hyper <= INT32_MAX && a.hyper,
                   "%s: hyper has %lld rows at %p, expected at least 1", op, static_cast<long long>(a.num_hyper),
                   static_cast<const void *>(a.hyper));
  const int32_t dtypes[3] = {a.param_dtype, a.grad_dtype, a.state_dtype};
  const char *const roles[3] = {"param_dtype", "grad_dtype", "state_dtype"};
  for (int i = 0; i < 3; ++i)
    STEEPEST_REQUIRE(dtypes[i] >= STEEPEST_FLOAT32 && dtypes[i] <= (i == 2 ? STEEPEST_BLOCK8 : STEEPEST_FLOAT16),
                     "%s: %s is %d, expected STEEPEST_FLOAT32 (0), STEEPEST_BFLOAT16 (1), STEEPEST_FLOAT16 (2)%s", op,
                     roles[i], dtypes[i], i == 2 ? " or STEEPEST_BLOCK8 (3)" : "");
  for (int64_t i = 0; i < a.num_hyper; ++i) {
    if (const steepest_status status = check_hyper(op, a.hyper[i], i, a.counters)) return status;
    const double q = a.hyper[i].q;
    const bool power = a.flags & STEEPEST_POWER;
    if (a.rule == STEEPEST_PERTURB)
      STEEPEST_REQUIRE(power ? q > 1 : q == 1 || q == 2 || std::isinf(q),
                       "%s: hyper[%lld].q is %g, expected %s", op, static_cast<long long>(i), q,
                       power ? "a number > 1 with STEEPEST_POWER" : "1, 2 or inf without STEEPEST_POWER");
  }
  if (const steepest_status status = check_storage(op, a)) return status;
  return check_tensors(op, a, rule);
}

steepest_status check_step(const char *op, const steepest_exec *exec, const steepest_step_args *args) {
  clear_error();
  if (const steepest_status status = check_exec(op, exec)) return status;
  if (const steepest_status status = check_args(op, args)) return status;
  return check_live(op, *exec, *args);
}

// Rows of scalars that are derived on the host: one per row of hyper-parameters, or per tensor where each counts for
// itself; none where a device derives them.
int64_t host_rows(const steepest_exec &exec, const steepest_step_args &args) {
  if (!args.counters) return args.num_hyper;
  return exec.device == STEEPEST_CPU ? args.num_tensors : 0;
}

uint64_t workspace_bytes(const steepest_exec &exec, const steepest_step_args &args) {
  return with_rule(args.rule, args.flags, [&](auto rule) {
    const uint64_t index = args.counters ? sizeof(int32_t) : 0;
    const uint64_t row = sizeof(typename decltype(rule)::Scalars) + sizeof(Extras) + index;
    return static_cast<uint64_t>(host_rows(exec, args)) * row;
  });
}

// Row `i` of the user's numbers, or of tensor i where each counts for itself.
steepest_hyper host_row(const steepest_step_args &a, int64_t i) {
  if (!a.counters) return a.hyper[i];
  const int32_t row = a.hyper_index ? a.hyper_index[i] : 0;
  steepest_hyper hyper = a.hyper[row];
  const auto before = [](const steepest_live &live, int32_t row) { return live.row < row; };
  for (const steepest_live *live = std::lower_bound(a.live, a.live + a.num_live, row, before);
       live != a.live + a.num_live && live->row == row; ++live)
    set_field(hyper, live->field, live_value(live->value, live->is_float64));
  hyper.step = next_step(*a.counters[i]);
  return hyper;
}

// On the CPU, where a call with counters is one with a row of hyper-parameters per tensor.
steepest_status step_counted(const StepCall &call, int32_t *index) {
  const steepest_step_args &a = *call.args;
  steepest_step_args expanded = a;
  for (int64_t i = 0; i < a.num_tensors; ++i) index[i] = static_cast<int32_t>(i);
  expanded.hyper_index = index;
  expanded.num_hyper = a.num_tensors;
  if (const steepest_status status = cpu::step({call.exec, &expanded, call.scalars, call.extras})) return status;
  if (!a.found_inf || *a.found_inf == 0.0f)
    for (int64_t i = 0; i < a.num_tensors; ++i) *a.counters[i] += 1.0f;
  return STEEPEST_OK;
}

}  // namespace

uint64_t step_workspace_bytes(const steepest_exec &exec, const steepest_step_args &args) {
  return workspace_bytes(exec, args);
}

}  // namespace steepest

using namespace steepest;

extern "C" {

uint32_t steepest_abi_version(void) { return STEEPEST_ABI_VERSION; }

steepest_status steepest_check_abi(uint32_t compiled_with) {
  clear_error();
  if (compiled_with == STEEPEST_ABI_VERSION) return STEEPEST_OK;
  return fail(STEEPEST_ERROR_UNSUPPORTED, "steepest_check_abi: compiled for ABI version %u, libsteepest %s has %d",
              compiled_with, STEEPEST_VERSION, STEEPEST_ABI_VERSION);
}

const char *steepest_version(void) { return STEEPEST_VERSION; }

const char *steepest_build_info(void) {
  static thread_local char json[512];
  std::snprintf(json, sizeof json,
                "{\"version\": \"%s\", \"abi\": %d, \"compiler\": \"%s\", \"build_type\": \"%s\", \"cuda\": %s, "
                "\"cuda_architectures\": \"%s\", \"cuda_compiler\": \"%s\", \"simd\": \"%s\"}",
                STEEPEST_VERSION, STEEPEST_ABI_VERSION, STEEPEST_COMPILER, STEEPEST_BUILD_TYPE,
                STEEPEST_WITH_CUDA ? "true" : "false", STEEPEST_CUDA_ARCHITECTURES, STEEPEST_CUDA_COMPILER,
                cpu::clone_name());
  return json;
}

steepest_status steepest_step_workspace_size(const steepest_exec *exec, const steepest_step_args *args,
                                             uint64_t *bytes) {
  if (const steepest_status status = check_step("steepest_step_workspace_size", exec, args)) return status;
  if (!bytes) return fail(STEEPEST_ERROR_INVALID, "steepest_step_workspace_size: bytes is NULL");
  *bytes = workspace_bytes(*exec, *args);
  return STEEPEST_OK;
}

steepest_status steepest_step(const steepest_exec *exec, const steepest_step_args *args, void *workspace,
                              uint64_t available) {
  const char *op = "steepest_step";
  if (const steepest_status status = check_step(op, exec, args)) return status;
  const uint64_t needed = workspace_bytes(*exec, *args);
  if (const steepest_status status = check_workspace(op, workspace, available, needed)) return status;
  const int64_t rows = host_rows(*exec, *args);
  Extras *extras = nullptr;
  with_rule(args->rule, args->flags, [&](auto rule) {
    auto *scalars = static_cast<typename decltype(rule)::Scalars *>(workspace);
    for (int64_t i = 0; i < rows; ++i) scalars[i] = rule.scalars(host_row(*args, i), args->flags);
    extras = reinterpret_cast<Extras *>(scalars + rows);
  });
  for (int64_t i = 0; i < rows; ++i) extras[i] = extras_of(host_row(*args, i), args->seed);
  const StepCall call{exec, args, workspace, extras};
#if STEEPEST_WITH_CUDA
  if (exec->device == STEEPEST_CUDA) return cuda::step(call);
#endif
  return args->counters ? step_counted(call, reinterpret_cast<int32_t *>(extras + rows)) : cpu::step(call);
}

steepest_status steepest_step_launches(const steepest_exec *exec, const steepest_step_args *args, int64_t *launches) {
  if (const steepest_status status = check_step("steepest_step_launches", exec, args)) return status;
  if (!launches) return fail(STEEPEST_ERROR_INVALID, "steepest_step_launches: launches is NULL");
  *launches = 0;
#if STEEPEST_WITH_CUDA
  if (exec->device == STEEPEST_CUDA) *launches = cuda::launches(*args);
#endif
  return STEEPEST_OK;
}

steepest_status steepest_step_traffic(const steepest_exec *exec, const steepest_step_args *args, uint64_t *bytes) {
  if (const steepest_status status = check_step("steepest_step_traffic", exec, args)) return status;
  if (!bytes) return fail(STEEPEST_ERROR_INVALID, "steepest_step_traffic: bytes is NULL");
  *bytes = step_bytes(*args);
  return STEEPEST_OK;
}

}  // extern "C"
