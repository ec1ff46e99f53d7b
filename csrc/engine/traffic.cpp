// What a call reads and writes, by its work plan: the bytes that a roofline divides by.
#include "engine/engine.h"

namespace steepest {
namespace {

int64_t size_of(int32_t dtype) { return dtype == STEEPEST_FLOAT32 ? 4 : dtype == STEEPEST_BLOCK8 ? 1 : 2; }

int64_t elements(const int64_t *numel, int64_t num_tensors) {
  int64_t sum = 0;
  for (int64_t i = 0; i < num_tensors; ++i) sum += numel[i];
  return sum;
}

}  // namespace

uint64_t step_bytes(const steepest_step_args &a) {
  const int64_t param = size_of(a.param_dtype), state = size_of(a.state_dtype);
  return with_rule(a.rule, a.flags, [&](auto rule) {
    using Rule = decltype(rule);
    const bool temporary = kTemporary<Rule>, restores = std::is_same_v<Rule, Restore>;
    int64_t bytes = size_of(a.grad_dtype) + param;  // read, written
    if (!a.masters && !restores) bytes += param;    // or its source
    bytes += Rule::kStates * state * (kReadsStates<Rule> ? 2 : 1);
    if (a.masters) bytes += temporary ? 4 : 8;
    if (a.residuals) bytes += a.residual_bits / 8 * (temporary ? 1 : 2);
    if (a.averages) bytes += 8;
    uint64_t total = static_cast<uint64_t>(elements(a.numel, a.num_tensors)) * static_cast<uint64_t>(bytes);
    if (a.state_dtype == STEEPEST_BLOCK8)
      for (int64_t i = 0; i < a.num_tensors; ++i) total += 2 * Rule::kStates * ((a.numel[i] + 127) / 128);
    return total;
  });
}

uint64_t survey_bytes(const steepest_survey_args &a) {
  const int64_t bytes = size_of(a.dtype) + (a.weights ? size_of(a.weight_dtype) : 0);
  return static_cast<uint64_t>(elements(a.numel, a.num_tensors)) * static_cast<uint64_t>(bytes);
}

}  // namespace steepest
