// CPU engine: threads take shares of all elements, equal in cost; a share is walked tile by tile through the stages.
#include "engine/engine.h"

#include <limits>

#include "engine/cpu_threads.h"
#include "engine/plan.h"
#include "engine/stages.h"

namespace steepest::cpu {
namespace {

// Threads take shares as they come free: cores differ (laptops), and are taken away (shared machines).
constexpr int kSharesPerThread = 8;

// A tile of one tensor as float32: the tensor's own memory, or a buffer that load() filled.
float *open(void *base, int32_t dtype, int64_t at, int64_t n, float *buffer) {
  char *address = static_cast<char *>(base) + at * dtype_size(dtype);
  if (dtype == STEEPEST_FLOAT32) return reinterpret_cast<float *>(address);
  load(dtype, address, buffer, n);
  return buffer;
}

void close(void *base, int32_t dtype, int64_t at, int64_t n, const float *tile) {
  if (dtype != STEEPEST_FLOAT32) store(dtype, tile, static_cast<char *>(base) + at * 2, n);
}

bool all_bfloat16(const steepest_step_args &a) {
  return a.param_dtype == STEEPEST_BFLOAT16 && a.grad_dtype == STEEPEST_BFLOAT16 && a.state_dtype == STEEPEST_BFLOAT16;
}

GradientStage gradient_stage(const steepest_step_args &a) {
  const float scale = a.grad_scale ? *a.grad_scale : 1.0f;
  return {a.flags & STEEPEST_MAXIMIZE ? -scale : scale, a.clip_coefficient ? *a.clip_coefficient : 1.0f,
          a.clip_value > 0 ? static_cast<float>(a.clip_value) : std::numeric_limits<float>::infinity()};
}

// Elements [begin, end) of one row, tile by tile through the stages.
template <class Rule>
void step_range(const steepest_step_args &a, const typename Rule::Scalars *rows, const GradientStage &stage, int64_t row,
                int64_t begin, int64_t end) {
  constexpr int kStates = Rule::kStates;
  const typename Rule::Scalars &scalars = rows[a.hyper_index ? a.hyper_index[row] : 0];
  const bool shrinks = shrinks_after(scalars.shrink);
  if (all_bfloat16(a) && stage.plain() && !shrinks) {
    bfloat16 *states[STEEPEST_MAX_STATES] = {};
    for (int k = 0; k < kStates; ++k) states[k] = static_cast<bfloat16 *>(a.states[k][row]) + begin;
    rule_bfloat16<Rule>(static_cast<bfloat16 *>(a.params[row]) + begin,
                        static_cast<const bfloat16 *>(a.grads[row]) + begin, states, end - begin, scalars);
    return;
  }
  alignas(64) float buffer[3 + STEEPEST_MAX_STATES][kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = std::min(kTile, end - at);
    float *p = open(a.params[row], a.param_dtype, at, n, buffer[0]);
    const float *g = open(const_cast<void *>(a.grads[row]), a.grad_dtype, at, n, buffer[1]);
    float *states[STEEPEST_MAX_STATES] = {};
    for (int k = 0; k < kStates; ++k) states[k] = open(a.states[k][row], a.state_dtype, at, n, buffer[3 + k]);
    if (!stage.plain()) {
      // Every element is read before its own place is written, so buffer[1] may be both.
      prepare_gradient(g, buffer[1], n, stage);
      g = buffer[1];
    }
    if (shrinks) std::copy_n(p, n, buffer[2]);
    rule_tile<Rule>(p, g, states, n, scalars);
    if (shrinks) shrink_tile(p, buffer[2], n, scalars.shrink);
    close(a.params[row], a.param_dtype, at, n, p);
    for (int k = 0; k < kStates; ++k) close(a.states[k][row], a.state_dtype, at, n, states[k]);
  }
}

template <class Rule>
void run(const StepCall &call) {
  const steepest_step_args &a = *call.args;
  const GradientStage stage = gradient_stage(a);
  const int64_t cost = total_cost(a.numel, a.num_tensors);
  const int threads = thread_count(*call.exec, cost);
  const int parts = threads == 1 ? 1 : threads * kSharesPerThread;
  std::atomic<int> taken{0};
  const auto work = [&] {
    ShareWalk walk(a.numel, a.num_tensors, cost, parts);
    for (int part = taken++; part < parts; part = taken++)
      walk.visit(part, [&](int64_t row, int64_t begin, int64_t end) {
        step_range<Rule>(a, call.rows<Rule>(), stage, row, begin, end);
      });
  };
  run_on_threads(threads, work);
}

}  // namespace

steepest_status step(const StepCall &call) {
  const steepest_step_args &a = *call.args;
  if (a.found_inf && *a.found_inf != 0.0f) return STEEPEST_OK;
  with_rule(a.rule, a.flags, [&](auto rule) { run<decltype(rule)>(call); });
  return STEEPEST_OK;
}

}  // namespace steepest::cpu
