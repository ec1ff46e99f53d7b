// CPU stages: plain loops over at most kTile elements that the compiler vectorises, one clone per x86-64 level.
// Storage types meet only in load and store, so a rule is compiled once whatever its tensors are stored in.
#pragma once

#include <cstdint>

#include "engine/rules.h"
#include "formula/survey.h"

namespace steepest::cpu {

// Elements staged at a time.  512 x 6 float32 buffers = 12 KiB: well inside a 32 KiB L1 cache.
constexpr int64_t kTile = 512;

// Of a number: 8-bit codes are found by functions of their own.
inline int64_t dtype_size(int32_t dtype) { return dtype == STEEPEST_FLOAT32 ? 4 : 2; }

// Both take 16-bit types only: float32 tiles are worked on in place.
void load(int32_t dtype, const void *from, float *to, int64_t n);
void store(int32_t dtype, const float *from, void *to, int64_t n);

// g <- the prepared gradient; out of place, because gradients are never written.
void prepare_gradient(const float *g, float *out, int64_t n, const GradientStage &stage);

// How many bytes before it is read memory is asked for.  Rules read three to five streams at once, and what processors
// fetch by themselves comes too late, and stops where a page ends.  (Two cores of a Xeon, 32M float32: AdamW 20.4 ms
// without, 18.3 near; SGD with momentum, Lion, Adagrad and RMSprop take 2 to 3 % less far than near.)  In a row of a few
// pages far would ask for what belongs to somebody else: 10,000 x 256 would take 14 % longer.
constexpr int64_t kNear = 512, kFar = 4096, kFarElements = 2048;

// p <- `from` (which may be p) after decay and rule, float32 tiles; `states` are Rule::kStates tiles.  The gradient is
// g * factor; a factor of 1 leaves Restore's bits alone.
template <class Rule>
void rule_tile(const float *from, float *p, const float *g, float *const *states, int64_t n,
               const typename Rule::Scalars &s, float factor, int64_t ahead = kNear);

// The same with all roles in 16 bits, converted in registers: AdamW is compute-bound then.  (One thread of a Zen 4, in
// cache: 0.48 ns per bfloat16 element, 0.50 per float16 element; by way of float32 tiles 0.7 to 1.0.)
template <class Rule>
void rule_bfloat16(bfloat16 *p, const bfloat16 *g, bfloat16 *const *states, int64_t n,
                   const typename Rule::Scalars &s, float factor);
template <class Rule>
void rule_float16(float16 *p, const float16 *g, float16 *const *states, int64_t n, const typename Rule::Scalars &s,
                  float factor);

// Whether this machine has the instructions that rule_float16 is worth it with: AVX2 and F16C.
bool float16_in_registers();
bool has_v4();  // x86-64-v4, and clones for it

// p, moved by the rule from `before`, takes the decay that comes after.
void shrink_tile(float *p, const float *before, int64_t n, const Shrink &s);

// Two random words for each of the elements index, index + 1, ...
void random_tile(const RandomStream &stream, uint64_t index, int64_t n, uint32_t *a, uint32_t *b);

// out <- g + deviation * normal; `out` may be `g`.
void noise_tile(const float *g, float *out, int64_t n, const RandomStream &stream, uint64_t index, float deviation);

// average <- average + weight * (p - average).
void average_tile(float *average, const float *p, int64_t n, float weight, float rest);

// Copies past the caches: lines that are only written need not be fetched first, which is a third of the traffic of a
// copy.  flush_streams() makes a thread's copies visible to others.
void stream(const float *from, float *to, int64_t n);
void flush_streams();

// What is stored in other ways than as one number of a type (formula/storage.h).  `random` + `shift`: which 16 bits of
// each word are used.
void store_stochastic(const float *from, bfloat16 *to, int64_t n, const uint32_t *random, int shift);
void load_residual(const bfloat16 *high, const void *residual, int bits, float *to, int64_t n);
void store_residual(const float *from, bfloat16 *high, void *residual, int bits, int64_t n);
void load_block8(const uint8_t *codes, const uint8_t *exponents, bool magnitude, float *to, int64_t n);
void store_block8(const float *from, uint8_t *codes, uint8_t *exponents, bool magnitude, int64_t n,
                  const uint32_t *random, int shift);
// x, times T = alpha * |w| + eps.
void weigh(const float *x, const float *w, float *out, int64_t n, float alpha, float eps);

// The inner product in the place of the sum of powers; its largest is that of |x|.
SurveyPart inner_tile(const float *x, const float *w, int64_t n);

// parts[k] is what survey_tile(x[k], n, 2, 1) gives, for `count` <= kTogether blocks of the same length.
constexpr int kTogether = 8;
void survey_squares(const float *const *x, int64_t n, int count, SurveyPart *parts);

// q = inf needs no power; scale is for q other than 1 and 2.
SurveyPart survey_tile(const float *x, int64_t n, double q, double scale);

}  // namespace steepest::cpu
