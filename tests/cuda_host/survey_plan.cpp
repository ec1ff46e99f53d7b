// Packs random lists to be surveyed into launches (csrc/engine/cuda_survey.h) and checks each launch: every element once,
// in order, its block's part in its place, in as few launches as arguments and grids allow.  Addresses are numbers here.
// Prints one line of JSON, or what is wrong; exit status 1 then.
#include "engine/cuda_survey.h"

#include <vector>

#include "plan_checks.h"

namespace {

using namespace steepest;
using namespace steepest::cuda;

constexpr int64_t kElements = 8192;  // of a block
// Blocks of elements that one grid has room for: sixteen threads each, counted in 32 bits.
constexpr int64_t kThreads = kBlock < 16 ? 16 : kBlock;
constexpr int64_t kMost = std::min<int64_t>(kMaxGrid * (kThreads / 16), int64_t{0xffffffff});

struct {
  long long launches, cut, full, weighed;
} seen;

struct List {
  steepest_survey_args args{};
  std::vector<int64_t> numel;
  std::vector<const void *> tensors, weights;

  List() {
    const int32_t types[] = {STEEPEST_FLOAT32, STEEPEST_BFLOAT16, STEEPEST_FLOAT16};
    args.dtype = types[below(3)], args.weight_dtype = types[below(3)];
    const int64_t count = one_in(10) ? 0 : one_in(3) ? 1 + below(3000) : 1 + below(40);
    const bool huge = one_in(2);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t around = below(3) * kElements * (huge && one_in(3) ? kMost : 1) + below(3) - 1;
      numel.push_back(one_in(6) ? 0 : one_in(3) ? std::max<int64_t>(1, around) : 1 + below(3 * kElements));
      tensors.push_back(place(bytes_of(args.dtype), below(9)));
      weights.push_back(place(bytes_of(args.weight_dtype), below(9)));
    }
    args.num_tensors = count, args.numel = numel.data(), args.tensors = tensors.data();
    if (one_in(2)) args.weights = weights.data();
    args.alpha = static_cast<double>(below(100)), args.eps = static_cast<double>(below(100));
  }
};

void check(const List &list) {
  const steepest_survey_args &a = list.args;
  EXPECT(sizeof(SurveyLaunch) <= 32764 && sizeof(SurveyLaunch) + sizeof(SurveyTensor) > 32764);
  int64_t tensor = 0, done = 0, parts = 0;  // what comes next: the tensor, how much of it is behind, the block
  bool full = true;                         // whether the launch before had no room
  const auto next = [&] {
    while (tensor < a.num_tensors && list.numel[tensor] == 0) ++tensor;
  };
  auto *const to = static_cast<SurveyPart *>(place(sizeof(SurveyPart), 0));
  const auto *const largest = static_cast<const float *>(place(4, 0));
  const SurveySum sum = static_cast<SurveySum>(below(5));
  const double q = static_cast<double>(below(9));
  next();
  for_survey_launches(a, sum, q, to, largest, [&](const SurveyLaunch &launch) {
    const SurveyHeader &header = launch.header;
    EXPECT(full && header.num_tensors >= 1 && header.num_tensors <= SurveyLaunch::kTensors);
    EXPECT(header.parts == to + parts && header.largest == largest && header.sum == sum && header.q == q);
    EXPECT(header.alpha == static_cast<float>(a.alpha) && header.eps == static_cast<float>(a.eps));
    EXPECT(header.dtype == a.dtype && header.weight_dtype == a.weight_dtype && header.num_blocks <= kMost);
    int64_t blocks = 0;
    for (uint32_t k = 0; k < header.num_tensors; ++k) {
      const SurveyTensor &part = launch.tensors[k];
      EXPECT(tensor < a.num_tensors && part.numel >= 1 && part.numel <= list.numel[tensor] - done);
      EXPECT(part.x == after(list.tensors[tensor], done * bytes_of(a.dtype)));
      EXPECT(part.weight == after(a.weights ? a.weights[tensor] : nullptr, done * bytes_of(a.weight_dtype)));
      EXPECT(part.first_block == blocks);
      blocks += (part.numel + kElements - 1) / kElements;
      done += part.numel;
      seen.weighed += part.weight != nullptr;
      if (done < list.numel[tensor]) {  // cut where a grid and a block end
        EXPECT(blocks == kMost && part.numel % kElements == 0 && k + 1 == header.num_tensors);
        ++seen.cut;
      } else {
        done = 0, ++tensor;
        next();
      }
    }
    EXPECT(header.num_blocks == blocks);
    parts += blocks;
    full = blocks == kMost || header.num_tensors == SurveyLaunch::kTensors;
    seen.full += header.num_tensors == SurveyLaunch::kTensors;
    ++seen.launches;
  });
  EXPECT(tensor == a.num_tensors);
  ++lists;
}

}  // namespace

int main(int, char **arguments) {
  generator.seed(std::strtoull(arguments[1], nullptr, 10));
  while (lists < std::atoi(arguments[2])) check(List());
  std::printf("{");
  print("launches", seen.launches), print("cut", seen.cut), print("full", seen.full), print("weighed", seen.weighed);
  std::printf("\"lists\": %d}\n", lists);
}
