// CPU stages: plain loops over at most kTile elements that the compiler vectorises, one clone per x86-64 level.
// Storage types meet only in load and store, so a rule is compiled once whatever its tensors are stored in.
#pragma once

#include <cstdint>

#include "engine/rules.h"
#include "formula/survey.h"

namespace steepest::cpu {

// Elements staged at a time.  512 x 6 float32 buffers = 12 KiB: well inside a 32 KiB L1 cache.
constexpr int64_t kTile = 512;

inline int64_t dtype_size(int32_t dtype) { return dtype == STEEPEST_FLOAT32 ? 4 : 2; }

// Both take 16-bit types only: float32 tiles are worked on in place.
void load(int32_t dtype, const void *from, float *to, int64_t n);
void store(int32_t dtype, const float *from, void *to, int64_t n);

// g <- the prepared gradient; out of place, because gradients are never written.
void prepare_gradient(const float *g, float *out, int64_t n, const GradientStage &stage);

// Decay and rule over float32 tiles; `states` are Rule::kStates tiles.
template <class Rule>
void rule_tile(float *p, const float *g, float *const *states, int64_t n, const typename Rule::Scalars &s);

// The same with all roles in bfloat16, converted in registers: 16-bit AdamW is compute-bound, and staging costs a third
// (measured: 0.72 against 1.00 ns per element, one thread of a Zen 4).
template <class Rule>
void rule_bfloat16(bfloat16 *p, const bfloat16 *g, bfloat16 *const *states, int64_t n,
                   const typename Rule::Scalars &s);

// p, moved by the rule from `before`, takes the decay that comes after.
void shrink_tile(float *p, const float *before, int64_t n, const Shrink &s);

// q = inf needs no power; scale is for q other than 1 and 2.
SurveyPart survey_tile(const float *x, int64_t n, double q, double scale);

}  // namespace steepest::cpu
