// Survey on the CPU: threads take blocks as they come free, the blocks' sums are added in order.
#include <algorithm>

#include "engine/cpu_threads.h"
#include "engine/engine.h"
#include "engine/stages.h"

namespace steepest::cpu {
namespace {

int64_t blocks_of(int64_t numel) { return (numel + kSurveyBlock - 1) / kSurveyBlock; }

SurveyPart survey_block(const void *base, int32_t dtype, int64_t at, int64_t n, double q, double scale) {
  const char *address = static_cast<const char *>(base) + at * dtype_size(dtype);
  if (dtype == STEEPEST_FLOAT32) return survey_tile(reinterpret_cast<const float *>(address), n, q, scale);
  alignas(64) float buffer[kSurveyBlock];
  load(dtype, address, buffer, n);
  return survey_tile(buffer, n, q, scale);
}

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
  std::atomic<int64_t> taken{0};
  const auto work = [&] {
    int64_t tensor = 0, first = 0;  // the tensor of the block at hand, and the number of its first block
    for (int64_t turn = taken.fetch_add(kTurn); turn < blocks; turn = taken.fetch_add(kTurn))
      for (int64_t block = turn; block < std::min(turn + kTurn, blocks); ++block) {
        while (block >= first + blocks_of(a.numel[tensor])) first += blocks_of(a.numel[tensor++]);
        // Small tensors: what comes soon is on its way while this one is read.
        if (tensor + kAhead < a.num_tensors) __builtin_prefetch(a.tensors[tensor + kAhead]);
        const int64_t at = (block - first) * kSurveyBlock;
        parts[block] = survey_block(a.tensors[tensor], a.dtype, at, std::min(kSurveyBlock, a.numel[tensor] - at), a.q,
                                    a.scale);
      }
  };
  run_on_threads(threads, work);
  SurveyPart total{0.0, 0};
  for (int64_t block = 0; block < blocks; ++block) {
    total.power_sum += parts[block].power_sum;
    total.largest = std::max(total.largest, parts[block].largest);
  }
  return {total.power_sum, bits_float(total.largest), total.largest >= 0x7f800000u};
}

}  // namespace steepest::cpu
