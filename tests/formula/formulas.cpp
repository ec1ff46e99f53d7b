// The formula headers as plain functions over arrays, for ctypes.
#include "engine/plan.h"
#include "engine/stages.h"
#include "formula/adamw.h"

using namespace steepest;

extern "C" {

void widen_bfloat16(const uint16_t *in, float *out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = widen(bfloat16{in[i]});
}
void widen_float16(const uint16_t *in, float *out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = widen(float16{in[i]});
}
void narrow_bfloat16(const float *in, uint16_t *out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = narrow<bfloat16>(in[i]).bits;
}
void narrow_float16(const float *in, uint16_t *out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = narrow<float16>(in[i]).bits;
}
// The stages that the CPU engine really runs: SIMD clones, F16C.
void stage_load(int32_t dtype, const void *in, float *out, int64_t n) { cpu::load(dtype, in, out, n); }
void stage_store(int32_t dtype, const float *in, void *out, int64_t n) { cpu::store(dtype, in, out, n); }
void stage_adamw(float *p, const float *g, float *m, float *v, float *vmax, int64_t n, const double *hyper,
                 int64_t step) {
  cpu::adamw_tile(p, g, m, v, vmax, n, adamw_scalars({hyper[0], hyper[1], hyper[2], hyper[3], hyper[4], step}));
}
void scalar_adamw(float *p, const float *g, float *m, float *v, float *vmax, int64_t n, const double *hyper,
                  int64_t step) {
  const AdamWScalars s = adamw_scalars({hyper[0], hyper[1], hyper[2], hyper[3], hyper[4], step});
  for (int64_t i = 0; i < n; ++i) adamw(p[i], g[i], m[i], v[i], vmax ? vmax + i : nullptr, s);
}
// How often each element is visited, over all shares.
void visits(const int64_t *numel, int64_t count, int parts, int32_t *hits, int64_t *largest_share) {
  const int64_t cost = total_cost(numel, count);
  *largest_share = 0;
  // Two walks take turns unevenly, as two threads would.
  ShareWalk walks[2] = {{numel, count, cost, parts}, {numel, count, cost, parts}};
  for (int part = 0; part < parts; ++part) {
    int64_t share = 0;
    walks[part % 3 == 1].visit(part, [&](int64_t tensor, int64_t begin, int64_t end) {
      int64_t base = 0;
      for (int64_t i = 0; i < tensor; ++i) base += numel[i];
      for (int64_t i = begin; i < end; ++i) ++hits[base + i];
      share += end - begin;
    });
    if (share > *largest_share) *largest_share = share;
  }
}
// Index arithmetic beyond 2^31 elements, without touching memory: elements seen and the last end.
void huge(int64_t numel, int parts, int64_t *seen, int64_t *last) {
  const int64_t cost = total_cost(&numel, 1);
  *seen = *last = 0;
  ShareWalk walk(&numel, 1, cost, parts);
  for (int part = 0; part < parts; ++part)
    walk.visit(part, [&](int64_t, int64_t begin, int64_t end) {
      if (begin != *last) *seen = -1;
      *seen += end - begin;
      *last = end;
    });
}
}
