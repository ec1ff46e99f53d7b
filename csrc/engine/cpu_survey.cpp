// Survey on the CPU: threads take blocks as they come free, the blocks' sums are added in order.
#include <algorithm>

#include "engine/cpu_threads.h"
#include "engine/engine.h"
#include "engine/stages.h"

namespace steepest::cpu {
namespace {

int64_t blocks_of(int64_t numel) { return (numel + kSurveyBlock - 1) / kSurveyBlock; }

const float *open(const void *base, int32_t dtype, int64_t at, int64_t n, float *buffer) {
  const char *address = static_cast<const char *>(base) + at * dtype_size(dtype);
  if (dtype == STEEPEST_FLOAT32) return reinterpret_cast<const float *>(address);
  load(dtype, address, buffer, n);
  return buffer;
}

SurveyPart survey_block(const steepest_survey_args &a, int64_t tensor, int64_t at, int64_t n) {
  alignas(64) float buffer[kSurveyBlock], weights[kTile];
  const float *x = open(a.tensors[tensor], a.dtype, at, n, buffer);
  if (a.inner) {
    alignas(64) float others[kSurveyBlock];
    return inner_tile(x, open(a.weights[tensor], a.weight_dtype, at, n, others), n);
  }
  if (a.weights) {
    for (int64_t i = 0; i < n; i += kTile) {
      const int64_t m = std::min(kTile, n - i);
      weigh(x + i, open(a.weights[tensor], a.weight_dtype, at + i, m, weights), buffer + i, m,
            static_cast<float>(a.alpha), static_cast<float>(a.eps));
    }
    x = buffer;
  }
  return survey_tile(x, n, a.q, a.scale);
}

// Consecutive float32 blocks whose squares are summed together as long as they are equally long.
struct Waiting {
  SurveyPart *const parts;
  const float *x[kTogether];
  int64_t first = 0, length = 0;
  int count = 0;

  void add(int64_t block, const float *from, int64_t n) {
    if (count == kTogether || n != length) flush();
    if (count == 0) first = block, length = n;
    x[count++] = from;
  }
  void flush() {
    survey_squares(x, length, count, parts + first);
    count = 0;
  }
};

}  // namespace

int64_t survey_blocks(const steepest_survey_args &a) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < a.num_tensors; ++i) blocks += blocks_of(a.numel[i]);
  return blocks;
}

steepest_survey_result survey(const steepest_exec &exec, const steepest_survey_args &a, SurveyPart *parts) {
  const int64_t blocks = survey_blocks(a);
  const int threads = thread_count(exec, blocks * kSurveyBlock);
  constexpr int64_t kTurn = 16;  // blocks taken at a time
  constexpr int64_t kAhead = 8;
  const bool together = a.dtype == STEEPEST_FLOAT32 && !a.weights && a.q == 2.0 && a.scale == 1.0;
  std::atomic<int64_t> taken{0};
  const auto work = [&] {
    Waiting waiting{parts, {}};
    int64_t tensor = 0, first = 0;  // the tensor of the block at hand, and the number of its first block
    for (int64_t turn = taken.fetch_add(kTurn); turn < blocks; turn = taken.fetch_add(kTurn)) {
      for (int64_t block = turn; block < std::min(turn + kTurn, blocks); ++block) {
        while (block >= first + blocks_of(a.numel[tensor])) first += blocks_of(a.numel[tensor++]);
        // Small tensors: what comes soon is on its way while this one is read.
        if (tensor + kAhead < a.num_tensors) __builtin_prefetch(a.tensors[tensor + kAhead]);
        const int64_t at = (block - first) * kSurveyBlock, n = std::min(kSurveyBlock, a.numel[tensor] - at);
        if (together)
          waiting.add(block, static_cast<const float *>(a.tensors[tensor]) + at, n);
        else
          parts[block] = survey_block(a, tensor, at, n);
      }
      waiting.flush();
    }
  };
  run_on_threads(threads, work);
  const SurveyPart total = total_part(parts, blocks);
  return {total.power_sum, bits_float(total.largest), total.largest >= 0x7f800000u};
}

}  // namespace steepest::cpu
