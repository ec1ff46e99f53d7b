// The joint survey of several lists on the CPU: what cuda_survey.cu does, by the CPU's survey.
#include "engine/measure.h"

#include "engine/engine.h"

namespace steepest {

int64_t measure_blocks(const steepest_measure_args &args) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < args.num_lists; ++i) blocks += cpu::survey_blocks(args.lists[i]);
  return blocks;
}

namespace cpu {
namespace {

SurveyPart read(const steepest_exec &exec, const steepest_measure_args &args, double q, double scale, SurveyPart *parts) {
  SurveyPart total{0.0, 0};
  for (int64_t i = 0; i < args.num_lists; ++i) {
    steepest_survey_args list = args.lists[i];
    list.q = q, list.scale = scale;
    const steepest_survey_result found = survey(exec, list, parts);
    add_part(total, {found.power_sum, float_bits(found.largest)});
    parts += survey_blocks(args.lists[i]);
  }
  return total;
}

}  // namespace

void measure(const steepest_exec &exec, const steepest_measure_args &args, SurveyPart *parts,
             steepest_measure_result *result) {
  const SurveyKind kind{args.q, args.inner != 0, args.count_largest != 0};
  SurveyPart total;
  if (kind.relative()) {
    total = read(exec, args, HUGE_VAL, 1.0, parts);
    const float largest = bits_float(total.largest);
    if (finite_positive(largest)) total = read(exec, args, kind.maximum() ? kCountPower : kind.q, largest, parts);
  } else {
    total = read(exec, args, kind.q, 1.0, parts);
  }
  finish(kind, total, static_cast<float>(args.max_norm), args.grad_scale ? *args.grad_scale : 1.0f, *result);
}

}  // namespace cpu
}  // namespace steepest
