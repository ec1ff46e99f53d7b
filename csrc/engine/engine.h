// What the ABI entry points dispatch to, after all arguments have been checked.
#pragma once

#include "engine/rules.h"
#include "formula/survey.h"

namespace steepest {

struct StepCall {
  const steepest_exec *exec;
  const steepest_step_args *args;
  const void *scalars;    // Rule::Scalars [args->num_hyper]
  const Extras *extras;   // [args->num_hyper]

  template <class Rule>
  const typename Rule::Scalars *rows() const {
    return static_cast<const typename Rule::Scalars *>(scalars);
  }
};

// Bytes that a call reads and writes.
uint64_t step_bytes(const steepest_step_args &args);
uint64_t survey_bytes(const steepest_survey_args &args);
// Blocks that all lists of a measure are read in.
int64_t measure_blocks(const steepest_measure_args &args);

namespace cpu {
steepest_status step(const StepCall &call);
// Blocks of at most kSurveyBlock elements; each has a SurveyPart in the workspace.
int64_t survey_blocks(const steepest_survey_args &args);
steepest_survey_result survey(const steepest_exec &exec, const steepest_survey_args &args, SurveyPart *parts);
void measure(const steepest_exec &exec, const steepest_measure_args &args, SurveyPart *parts,
             steepest_measure_result *result);
void weight_norm(const steepest_exec &exec, const steepest_weight_norm_args &args);
void weight_norm_backward(const steepest_exec &exec, const steepest_weight_norm_args &args);
// Name of the SIMD clone that the stage loops resolve to on this machine.
const char *clone_name();
}  // namespace cpu

namespace cuda {
steepest_status step(const StepCall &call);
// Launches that step() makes for these tensors, from the same packing code.
int64_t launches(const steepest_step_args &args);
steepest_status measure(const steepest_exec &exec, const steepest_measure_args &args, SurveyPart *parts,
                        steepest_measure_result *result);
int64_t measure_launches(const steepest_measure_args &args);
}  // namespace cuda

}  // namespace steepest
