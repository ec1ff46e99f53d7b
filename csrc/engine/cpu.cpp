// CPU engine: threads take shares of all elements, equal in cost; a share is walked tile by tile through the stages.
#include "engine/engine.h"

#include <limits>

#include "engine/cpu_threads.h"
#include "engine/plan.h"
#include "engine/stages.h"
#include "formula/storage.h"

namespace steepest::cpu {
namespace {

// Threads take shares as they come free: cores differ (laptops), and are taken away (shared machines).
constexpr int kSharesPerThread = 8;

// Calls of more elements than this write what they do not read past the caches, which could not keep it anyway.
constexpr int64_t kStreams = 4 << 20;

GradientStage gradient_stage(const steepest_step_args &a) {
  const float scale = a.grad_scale ? *a.grad_scale : 1.0f;
  return {a.flags & STEEPEST_MAXIMIZE ? -scale : scale, a.clip_coefficient ? *a.clip_coefficient : 1.0f,
          a.clip_value > 0 ? static_cast<float>(a.clip_value) : std::numeric_limits<float>::infinity()};
}

// What one tile is worked on in.
struct Buffers {
  alignas(64) float param[kTile], grad[kTile], before[kTile], state[STEEPEST_MAX_STATES][kTile];
  alignas(64) uint32_t random[2][kTile];
};

// One row of a call: opens tiles of it as float32, whatever they are stored in, and puts them back.
class Row {
 public:
  Row(const steepest_step_args &args, int64_t row, Buffers &buffers, bool streams)
      : a_(args), row_(row), buffers_(buffers), streams_(streams) {}

  // Where a tile of the parameter is read, and where its result goes: a copy in between would leave the memory waiting
  // for one list at a time (a step from backups, 2000 x 4096, two cores: 7.4 ms, without it 4.8).
  struct Way {
    const float *from;
    float *to;
  };

  // `temporary`: what holds the parameter's value is only read, and a rounded copy of the result will go to params.
  Way open_param(int64_t at, int64_t n, bool temporary) {
    void *const from = a_.sources ? const_cast<void *>(a_.sources[row_]) : a_.params[row_];
    if (a_.masters) {
      float *const master = static_cast<float *>(a_.masters[row_]) + at;
      return {master, temporary ? buffers_.param : master};
    }
    if (a_.residuals) {
      load_residual(static_cast<const bfloat16 *>(from) + at, residual(at), a_.residual_bits, buffers_.param, n);
      return {buffers_.param, buffers_.param};
    }
    float *const opened = open(from, a_.param_dtype, at, n, buffers_.param);
    if (!a_.sources || a_.param_dtype != STEEPEST_FLOAT32) return {opened, opened};
    return {opened, streams_ ? buffers_.param : static_cast<float *>(a_.params[row_]) + at};
  }

  void close_param(int64_t at, int64_t n, const float *p, bool temporary) const {
    if (a_.residuals && !temporary) return store_residual(p, bfloat16_at(a_.params[row_], at), residual(at), a_.residual_bits, n);
    if (!a_.masters && !a_.residuals) return close(a_.params[row_], a_.param_dtype, at, n, p, 0);
    // A master is rounded to nearest: its low bits already dither what the rounded copy loses from step to step.
    store(a_.param_dtype, p, static_cast<char *>(a_.params[row_]) + at * 2, n);
  }

  float *open_state(int k, int64_t at, int64_t n, bool magnitude, bool read) {
    float *const buffer = buffers_.state[k];
    if (!read && (streams_ || a_.state_dtype != STEEPEST_FLOAT32)) return buffer;
    if (a_.state_dtype != STEEPEST_BLOCK8) return open(a_.states[k][row_], a_.state_dtype, at, n, buffer);
    load_block8(codes(k, at), exponents(k, at), magnitude, buffer, n);
    return buffer;
  }

  void close_state(int k, int64_t at, int64_t n, const float *state, bool magnitude) const {
    const int lane = k + 1;
    if (a_.state_dtype != STEEPEST_BLOCK8) return close(a_.states[k][row_], a_.state_dtype, at, n, state, lane);
    store_block8(state, codes(k, at), exponents(k, at), magnitude, n, buffers_.random[lane / 2], lane % 2 * 16);
  }

  float *open_grad(int64_t at, int64_t n) {
    return open(const_cast<void *>(a_.grads[row_]), a_.grad_dtype, at, n, buffers_.grad);
  }

 private:
  // A tile as float32: the tensor's own memory, or a buffer that load() filled.
  static float *open(void *base, int32_t dtype, int64_t at, int64_t n, float *buffer) {
    char *const address = static_cast<char *>(base) + at * dtype_size(dtype);
    if (dtype == STEEPEST_FLOAT32) return reinterpret_cast<float *>(address);
    load(dtype, address, buffer, n);
    return buffer;
  }

  // Of the 64 random bits of an element, the parameter takes the first 16, states the others in their order.
  void close(void *base, int32_t dtype, int64_t at, int64_t n, const float *tile, int lane) const {
    if (dtype == STEEPEST_FLOAT32) {
      float *const home = static_cast<float *>(base) + at;
      if (tile != home) stream(tile, home, n);
      return;
    }
    if (a_.rounding == STEEPEST_STOCHASTIC && dtype == STEEPEST_BFLOAT16)
      return store_stochastic(tile, bfloat16_at(base, at), n, buffers_.random[lane / 2], lane % 2 * 16);
    store(dtype, tile, static_cast<char *>(base) + at * 2, n);
  }

  static bfloat16 *bfloat16_at(void *base, int64_t at) { return static_cast<bfloat16 *>(base) + at; }
  void *residual(int64_t at) const { return static_cast<char *>(a_.residuals[row_]) + at * (a_.residual_bits / 8); }
  uint8_t *codes(int k, int64_t at) const { return static_cast<uint8_t *>(a_.states[k][row_]) + at; }
  uint8_t *exponents(int k, int64_t at) const {
    return static_cast<uint8_t *>(a_.state_exponents[k][row_]) + at / kBlock8;
  }

  const steepest_step_args &a_;
  const int64_t row_;
  Buffers &buffers_;
  const bool streams_;
};

// Whether the row's way is that of rule_bfloat16 or rule_float16.
bool in_registers(const steepest_step_args &a) {
  const bool fits = a.param_dtype == STEEPEST_BFLOAT16 || (a.param_dtype == STEEPEST_FLOAT16 && float16_in_registers());
  return fits && a.grad_dtype == a.param_dtype && a.state_dtype == a.param_dtype && !a.masters && !a.residuals &&
         !a.sources && !a.averages && a.rounding == STEEPEST_NEAREST;
}

template <class Rule>
void step_in_registers(const steepest_step_args &a, int64_t row, int64_t begin, int64_t n,
                       const typename Rule::Scalars &scalars, float factor) {
  const auto step = [&](auto type, auto rule) {
    using T = decltype(type);
    T *states[STEEPEST_MAX_STATES] = {};
    for (int k = 0; k < Rule::kStates; ++k) states[k] = static_cast<T *>(a.states[k][row]) + begin;
    rule(static_cast<T *>(a.params[row]) + begin, static_cast<const T *>(a.grads[row]) + begin, states, n, scalars,
         factor);
  };
  if (a.param_dtype == STEEPEST_BFLOAT16) return step(bfloat16{}, rule_bfloat16<Rule>);
  step(float16{}, rule_float16<Rule>);
}

// Elements [begin, end) of one row, tile by tile through the stages.
template <class Rule>
void step_range(const StepCall &call, GradientStage stage, bool streams, int64_t row, int64_t begin, int64_t end) {
  constexpr int kStates = Rule::kStates;
  const steepest_step_args &a = *call.args;
  const int32_t hyper = a.hyper_index ? a.hyper_index[row] : 0;
  typename Rule::Scalars scalars = call.rows<Rule>()[hyper];
  absorb(scalars, stage);
  const Extras &extras = call.extras[hyper];
  const bool shrinks = shrinks_after(scalars.shrink);
  // Multiplied with the rule; anything else, and what noise is added to, is prepared before.
  const bool multiplies = stage.is_factor() && extras.noise == 0.0f;
  const float factor = multiplies ? stage.factor() : 1.0f;
  if (in_registers(a) && multiplies && !shrinks)
    return step_in_registers<Rule>(a, row, begin, end - begin, scalars, factor);
  const bool rounds_at_random = a.rounding == STEEPEST_STOCHASTIC || a.state_dtype == STEEPEST_BLOCK8;
  const uint64_t first = a.first_index ? static_cast<uint64_t>(a.first_index[row]) : 0;
  Buffers buffers;
  Row tiles(a, row, buffers, streams);
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = std::min(kTile, end - at);
    const auto magnitude = [](int k) { return (Rule::kMagnitudes >> k & 1u) != 0; };
    if (rounds_at_random)
      random_tile(extras.rounding_stream, first + static_cast<uint64_t>(at), n, buffers.random[0], buffers.random[1]);
    const auto [from, p] = tiles.open_param(at, n, kTemporary<Rule>);
    const float *g = tiles.open_grad(at, n);
    float *states[STEEPEST_MAX_STATES] = {};
    for (int k = 0; k < kStates; ++k) states[k] = tiles.open_state(k, at, n, magnitude(k), kReadsStates<Rule>);
    // Every element is read before its own place is written, so the buffer may be what is prepared.
    if (!multiplies && !stage.plain()) prepare_gradient(g, buffers.grad, n, stage), g = buffers.grad;
    if (extras.noise != 0.0f) {
      noise_tile(g, buffers.grad, n, extras.noise_stream, first + static_cast<uint64_t>(at), extras.noise);
      g = buffers.grad;
    }
    const float *before = from;
    if (shrinks && from == p) std::copy_n(from, n, buffers.before), before = buffers.before;
    rule_tile<Rule>(from, p, g, states, n, scalars, factor, end - begin < kFarElements ? kNear : kFar);
    if (shrinks) shrink_tile(p, before, n, scalars.shrink);
    if (a.averages)
      average_tile(static_cast<float *>(a.averages[row]) + at, p, n, extras.average_weight, extras.average_weight_rest);
    tiles.close_param(at, n, p, kTemporary<Rule>);
    for (int k = 0; k < kStates; ++k) tiles.close_state(k, at, n, states[k], magnitude(k));
  }
}

template <class Rule>
void run(const StepCall &call) {
  const steepest_step_args &a = *call.args;
  const GradientStage stage = gradient_stage(a);
  const int64_t cost = total_cost(a.numel, a.num_tensors);
  const int threads = thread_count(*call.exec, cost);
  const int parts = threads == 1 ? 1 : threads * kSharesPerThread;
  const bool streams = cost > kStreams;
  // What a survey of the gradients read last is what the caches still have.
  const bool backwards = a.clip_coefficient != nullptr;
  std::atomic<int> taken{0};
  const auto work = [&] {
    ShareWalk walk(a.numel, a.num_tensors, cost, parts);
    for (int part = taken++; part < parts; part = taken++)
      walk.visit(backwards ? parts - 1 - part : part, [&](int64_t row, int64_t begin, int64_t end) {
        step_range<Rule>(call, stage, streams, row, begin, end);
      });
    if (streams) flush_streams();
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
