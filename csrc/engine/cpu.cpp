// CPU engine: threads take shares of all elements, equal in cost; a share is walked tile by tile through the stages.
#include "engine/engine.h"

#include <omp.h>

#include <algorithm>
#include <atomic>

#include "engine/plan.h"
#include "engine/stages.h"

namespace steepest::cpu {
namespace {

// Below this many elements per thread, waking another thread costs more than it saves (about 5 us).
constexpr int64_t kMinShare = 1 << 14;

// Threads take shares as they come free: cores differ (laptops), and are taken away (shared machines).
constexpr int kSharesPerThread = 8;

int thread_count(const steepest_exec &exec, int64_t cost) {
  const int allowed = exec.num_threads > 0 ? exec.num_threads : omp_get_max_threads();
  return static_cast<int>(std::clamp<int64_t>(cost / kMinShare, 1, allowed));
}

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

struct Gradient {
  float scale;
  bool negate;
  bool plain() const { return scale == 1.0f && !negate; }
};

bool all_bfloat16(const steepest_adamw_args &a) {
  return a.param_dtype == STEEPEST_BFLOAT16 && a.grad_dtype == STEEPEST_BFLOAT16 && a.state_dtype == STEEPEST_BFLOAT16;
}

void adamw_range(const AdamWCall &call, const Gradient &gradient, int64_t tensor, int64_t begin, int64_t end) {
  const steepest_adamw_args &a = *call.args;
  const AdamWScalars &scalars = call.scalars[a.hyper_index ? a.hyper_index[tensor] : 0];
  void *const vmax = a.max_exp_avg_sqs ? a.max_exp_avg_sqs[tensor] : nullptr;
  if (all_bfloat16(a) && gradient.plain() && !vmax) {
    const auto from = [begin](void *base) { return static_cast<bfloat16 *>(base) + begin; };
    adamw_bfloat16(from(a.params[tensor]), from(const_cast<void *>(a.grads[tensor])), from(a.exp_avgs[tensor]),
                   from(a.exp_avg_sqs[tensor]), end - begin, scalars);
    return;
  }
  alignas(64) float buffer[5][kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = std::min(kTile, end - at);
    float *p = open(a.params[tensor], a.param_dtype, at, n, buffer[0]);
    const float *g = open(const_cast<void *>(a.grads[tensor]), a.grad_dtype, at, n, buffer[1]);
    float *m = open(a.exp_avgs[tensor], a.state_dtype, at, n, buffer[2]);
    float *v = open(a.exp_avg_sqs[tensor], a.state_dtype, at, n, buffer[3]);
    float *x = vmax ? open(vmax, a.state_dtype, at, n, buffer[4]) : nullptr;
    if (!gradient.plain()) {
      // Every operand of the division is read before its own place is written, so buffer[1] may be both.
      scale_gradient(g, buffer[1], n, gradient.scale, gradient.negate);
      g = buffer[1];
    }
    adamw_tile(p, g, m, v, x, n, scalars);
    close(a.params[tensor], a.param_dtype, at, n, p);
    close(a.exp_avgs[tensor], a.state_dtype, at, n, m);
    close(a.exp_avg_sqs[tensor], a.state_dtype, at, n, v);
    if (vmax) close(vmax, a.state_dtype, at, n, x);
  }
}

}  // namespace

steepest_status adamw(const AdamWCall &call) {
  const steepest_adamw_args &a = *call.args;
  if (a.found_inf && *a.found_inf != 0.0f) return STEEPEST_OK;
  const Gradient gradient{a.grad_scale ? *a.grad_scale : 1.0f, (a.flags & STEEPEST_MAXIMIZE) != 0};
  const int64_t cost = total_cost(a.numel, a.num_tensors);
  const int threads = thread_count(*call.exec, cost);
  const int parts = threads == 1 ? 1 : threads * kSharesPerThread;
  std::atomic<int> taken{0};
  const auto work = [&] {
    ShareWalk walk(a.numel, a.num_tensors, cost, parts);
    for (int part = taken++; part < parts; part = taken++)
      walk.visit(part, [&](int64_t tensor, int64_t begin, int64_t end) {
        adamw_range(call, gradient, tensor, begin, end);
      });
  };
  if (threads == 1) {
    work();
  } else {
#pragma omp parallel num_threads(threads)
    work();
  }
  return STEEPEST_OK;
}

}  // namespace steepest::cpu
