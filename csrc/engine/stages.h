// CPU stages: plain loops over at most kTile elements that the compiler vectorises, one clone per x86-64 level.
// Storage types meet only in load and store, so a rule is compiled once whatever its tensors are stored in.
#pragma once

#include <cstdint>

#include "formula/adamw.h"

namespace steepest::cpu {

// Elements staged at a time.  512 x 5 float32 buffers = 10 KiB: well inside a 32 KiB L1 cache.
constexpr int64_t kTile = 512;

inline int64_t dtype_size(int32_t dtype) { return dtype == STEEPEST_FLOAT32 ? 4 : 2; }

// Both take 16-bit types only: float32 tiles are worked on in place.
void load(int32_t dtype, const void *from, float *to, int64_t n);
void store(int32_t dtype, const float *from, void *to, int64_t n);

// g <- g / scale, then negated if `negate`; out of place, because gradients are never written.
void scale_gradient(const float *g, float *out, int64_t n, float scale, bool negate);

// All roles in bfloat16, converted in registers: 16-bit AdamW is compute-bound, and staging costs a third (measured:
// 0.72 against 1.00 ns per element, one thread of a Zen 4).
void adamw_bfloat16(void *p, const void *g, void *m, void *v, int64_t n, const AdamWScalars &s);

// vmax may be null.
void adamw_tile(float *p, const float *g, float *m, float *v, float *vmax, int64_t n, const AdamWScalars &s);

}  // namespace steepest::cpu
