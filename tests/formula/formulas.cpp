// The formula headers as plain functions over arrays, for ctypes.
#include "engine/cpu_threads.h"
#include "engine/plan.h"
#include "engine/stages.h"
#include "formula/storage.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

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
// One step of a rule whose roles all have type `dtype`, element by element or through the CPU engine's stage.  `numbers`
// are the fields of steepest_hyper before `step`; gradients are divided by the sign of `factor`, multiplied by the rest.
void rule_step(int32_t rule, uint32_t flags, int32_t stage, int32_t dtype, float factor, void *p, const void *g, void *s0,
               void *s1, void *s2, int64_t n, const double *numbers, int64_t step) {
  steepest_hyper hyper{};
  std::memcpy(&hyper, numbers, 10 * sizeof(double));
  hyper.step = step;
  const GradientStage prepared{factor < 0 ? -1.0f : 1.0f, std::fabs(factor), std::numeric_limits<float>::infinity()};
  with_rule(rule, flags, [&](auto r) {
    using Rule = decltype(r);
    const auto scalars = Rule::scalars(hyper, flags);
    const auto typed = [&](auto type, auto engine) {
      using T = decltype(type);
      T *const param = static_cast<T *>(p), *const states[3] = {static_cast<T *>(s0), static_cast<T *>(s1),
                                                               static_cast<T *>(s2)};
      const T *const grad = static_cast<const T *>(g);
      if (stage) return engine(param, grad, states);
      for (int64_t i = 0; i < n; ++i) {
        float pi = widen(param[i]), gi = prepared(widen(grad[i])), state[3] = {};
        for (int k = 0; k < Rule::kStates; ++k) state[k] = widen(states[k][i]);
        decay(pi, gi, scalars.shrink);
        Rule::step(pi, gi, state, scalars);
        param[i] = narrow<T>(pi);
        for (int k = 0; k < Rule::kStates; ++k) states[k][i] = narrow<T>(state[k]);
      }
    };
    if (dtype == STEEPEST_BFLOAT16)
      return typed(bfloat16{}, [&](auto p, auto g, auto s) { cpu::rule_bfloat16<Rule>(p, g, s, n, scalars, factor); });
    if (dtype == STEEPEST_FLOAT16)
      return typed(float16{}, [&](auto p, auto g, auto s) { cpu::rule_float16<Rule>(p, g, s, n, scalars, factor); });
    typed(0.0f, [&](auto p, auto g, auto s) { cpu::rule_tile<Rule>(p, p, g, s, n, scalars, factor); });
  });
}
void shrink(float *p, const float *before, int64_t n, const float *numbers) {
  cpu::shrink_tile(p, before, n, {numbers[0], numbers[1], numbers[2], numbers[3]});
}
void prepare(const float *g, float *out, int64_t n, const float *numbers) {
  cpu::prepare_gradient(g, out, n, {numbers[0], numbers[1], numbers[2]});
}
// The words of n elements from `index` on, one by one or through the CPU engine's stage.
void random_words(int stage, uint64_t seed, int64_t step, uint64_t index, int64_t n, uint32_t *a, uint32_t *b) {
  const RandomStream stream = random_stream(seed, step, kForRounding);
  if (stage) return cpu::random_tile(stream, index, n, a, b);
  for (int64_t i = 0; i < n; ++i) {
    const RandomWords words = stream(index + static_cast<uint64_t>(i));
    a[i] = words.a, b[i] = words.b;
  }
}
// What is kept in other ways, element by element or through the CPU engine's stages.  kind: 0 bfloat16 rounded at random,
// 8 and 16 correction bits, -1 and 1 blocks of 8 bits with signs and without.
void keep(int kind, int stage, const float *x, int64_t n, void *out, void *rest, const uint32_t *random, int shift) {
  bfloat16 *const high = static_cast<bfloat16 *>(out);
  if (kind == 0) {
    if (stage) return cpu::store_stochastic(x, high, n, random, shift);
    for (int64_t i = 0; i < n; ++i) high[i] = narrow_stochastic(x[i], random[i] >> shift);
  } else if (kind > 1) {
    if (stage) return cpu::store_residual(x, high, rest, kind, n);
    for (int64_t i = 0; i < n; ++i) {
      int32_t residual;
      high[i] = split_residual(x[i], kind, residual);
      if (kind == 8) static_cast<int8_t *>(rest)[i] = static_cast<int8_t>(residual);
      else static_cast<int16_t *>(rest)[i] = static_cast<int16_t>(residual);
    }
  } else {
    uint8_t *const codes = static_cast<uint8_t *>(out), *const exponents = static_cast<uint8_t *>(rest);
    if (stage) return cpu::store_block8(x, codes, exponents, kind == 1, n, random, shift);
    for (int64_t i = 0; i < n; ++i) {
      uint32_t largest = 0;
      for (int64_t j = i / kBlock8 * kBlock8; j < n && j < (i / kBlock8 + 1) * kBlock8; ++j)
        largest = std::max(largest, float_bits(x[j]) & 0x7fffffffu);
      const uint32_t exponent = block8_exponent(largest, kind == -1);
      exponents[i / kBlock8] = static_cast<uint8_t>(exponent);
      codes[i] = kind == 1 ? block8_encode_magnitude(x[i], exponent, random[i] >> shift)
                           : block8_encode_signed(x[i], exponent, random[i] >> shift);
    }
  }
}
void recall(int kind, int stage, const void *in, const void *rest, int64_t n, float *x) {
  const bfloat16 *const high = static_cast<const bfloat16 *>(in);
  const uint8_t *const codes = static_cast<const uint8_t *>(in), *const exponents = static_cast<const uint8_t *>(rest);
  if (stage && kind > 1) return cpu::load_residual(high, rest, kind, x, n);
  if (stage) return cpu::load_block8(codes, exponents, kind == 1, x, n);
  for (int64_t i = 0; i < n; ++i) {
    if (kind == 8) x[i] = join_residual(high[i], static_cast<const int8_t *>(rest)[i], 8);
    if (kind == 16) x[i] = join_residual(high[i], static_cast<const int16_t *>(rest)[i], 16);
    if (kind == 1) x[i] = block8_magnitude(codes[i], exponents[i / kBlock8]);
    if (kind == -1) x[i] = block8_signed(codes[i], exponents[i / kBlock8]);
  }
}
// noise is added to x; the average y follows it.
void wander(int stage, float *x, float *y, int64_t n, uint64_t seed, uint64_t index, float deviation, float weight) {
  const RandomStream stream = random_stream(seed, 7, kForNoise);
  if (stage) {
    cpu::noise_tile(x, x, n, stream, index, deviation);
    return cpu::average_tile(y, x, n, weight, 1.0f - weight);
  }
  for (int64_t i = 0; i < n; ++i) {
    x[i] += deviation * normal(stream(index + static_cast<uint64_t>(i)).a);
    y[i] = lerp(y[i], x[i], weight, 1.0f - weight);
  }
}
// Sum of squares and largest magnitude of `count` blocks, which lie behind each other, one by one or together.
void survey_of_blocks(int together, const float *x, int64_t n, int count, double *sums, uint32_t *largest) {
  const float *from[cpu::kTogether] = {};
  SurveyPart parts[cpu::kTogether] = {};
  for (int k = 0; k < count; ++k) from[k] = x + k * n;
  if (together) cpu::survey_squares(from, n, count, parts);
  for (int k = 0; k < count; ++k) {
    if (!together) parts[k] = cpu::survey_tile(from[k], n, 2.0, 1.0);
    sums[k] = parts[k].power_sum, largest[k] = parts[k].largest;
  }
}
void whole_powers(const double *x, const int64_t *n, double *out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = whole_power(x[i], n[i]);
}

// How often each element is visited, over all shares.
void visits(const int64_t *numel, int64_t count, int parts, int backwards, int32_t *hits, int64_t *largest_share) {
  const int64_t cost = total_cost(numel, count);
  *largest_share = 0;
  // Two walks take turns unevenly, as two threads would.
  ShareWalk walks[2] = {{numel, count, cost, parts}, {numel, count, cost, parts}};
  for (int part = 0; part < parts; ++part) {
    int64_t share = 0;
    walks[part % 3 == 1].visit(backwards ? parts - 1 - part : part, [&](int64_t tensor, int64_t begin, int64_t end) {
      int64_t base = 0;
      for (int64_t i = 0; i < tensor; ++i) base += numel[i];
      for (int64_t i = begin; i < end; ++i) ++hits[base + i];
      share += end - begin;
    });
    if (share > *largest_share) *largest_share = share;
  }
}
// The ranges (tensor, begin, end) of one share, into `out`; returns how many.
int64_t share(const int64_t *numel, int64_t count, int parts, int part, int64_t *out) {
  ShareWalk walk(numel, count, total_cost(numel, count), parts);
  int64_t ranges = 0;
  walk.visit(part, [&](int64_t tensor, int64_t begin, int64_t end) {
    out[3 * ranges] = tensor, out[3 * ranges + 1] = begin, out[3 * ranges + 2] = end;
    ++ranges;
  });
  return ranges;
}
int thread_count(int num_threads, int64_t cost) {
  steepest_exec exec{};
  exec.num_threads = num_threads;
  return cpu::thread_count(exec, cost);
}
// How often work is called, and the largest thread number that calls it.
int run_on_threads(int threads, int *largest) {
  std::atomic<int> calls{0}, most{0};
  cpu::run_on_threads(threads, [&] {
    ++calls;
    int seen = most.load();
    while (seen < omp_get_thread_num() && !most.compare_exchange_weak(seen, omp_get_thread_num())) {
    }
  });
  *largest = most;
  return calls;
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
