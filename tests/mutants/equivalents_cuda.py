"""Mutants of CUDA sources that nobody can notice where they run on the host (see mutation_equivalents.py)."""

from __future__ import annotations

import re

ASSERTION = "an assertion about the source computes nothing: it holds, or the source does not compile"
ZERO = "0 either way"
UNREAD = "nothing reads it"
ROOM = "room for a state that the rule does not have, whether there is any or not"
ROOMS = ((">= 0", 1), ("> 1", 1), ("> 0", 2))  # what `kStates > 0 ? kStates : 1` becomes
# `make mutants` leaves test_sanitizers_are_silent* out, which takes minutes for each.
SANITIZER = "what it computes is the same: test_sanitizers_are_silent* fails with it, which was tried"

PATTERNS: dict[str, tuple[tuple[str, re.Pattern], ...]] = {
    f"csrc/engine/{file}": (
        (
            ASSERTION,
            re.compile(r"^static_assert\(|<= (kArgumentBytes|STEEPEST_DEVICE_ROW_BYTES)(,$| &&$)|^alignof\(.*<= 16;$"),
        ),
    )
    for file in ("cuda_plan.h", "cuda_live.h", "cuda_survey.h", "cuda.cu", "cuda_general.cu")
}

EQUIVALENT: dict[str, dict[str, tuple[str, ...]]] = {
    "csrc/engine/cuda_plan.h": {
        "any number below 0 says that there is no row": ("return -2;", "row = -2;"),
        "any number that is no shift": ("constexpr int16_t kApart = -2;",),
        "sizes are multiples of 8": (
            "constexpr size_t kArgumentBytes = 32765;              // limit on kernel arguments from CUDA 12.1 and "
            "sm_70 on",
        ),
        ROOM: tuple(
            f"void *{first}, *{second}, *{name}[kStates {bound} ? kStates : {least}];"
            for first, second, name in (("param", "grad", "state"), ("source", "average", "exponents"))
            for bound, least in ROOMS
        ),
        "a tensor without elements adds nothing": ("if (args_.numel[i] >= 0) add(i);",),
        "set by a launch's first tensor before it is read": (
            "int64_t first_ = 1;  // tensor of this launch, where scalars are derived on the device",
        ),
        "the parameter itself is at a boundary: its shift is what it is away from it": (
            "for (int role = 1; role < kRoles; ++role)",
        ),
    },
    "csrc/engine/cuda_live.h": {
        UNREAD: ("item = {args_.counters[i], static_cast<uint32_t>(back_), 1};",),
        "any number that is no row": (
            "hyper_ = -2;",
            "int32_t hyper_ = -2;                  // the row of hyper-parameters of the record written last",
        ),
    },
    "csrc/engine/cuda_survey.h": {
        UNREAD: (
            "sum, 0, 0, 1};",
            "launch.tensors[header.num_tensors++] = {x, weight, numel, header.num_blocks, 1};",
        ),
        "room for one list more than there may be": ("constexpr int kMaxLists = 1025;",),
        "sixteen either way": (
            "constexpr int kSurveyThreads = kBlock <= kSurveyLanes ? static_cast<int>(kSurveyLanes) : kBlock;",
        ),
        "the same number where both are equal": (
            "constexpr int64_t kMaxBlocks = kMaxGrid * kGroups <= UINT32_MAX ? kMaxGrid * kGroups : UINT32_MAX;",
        ),
    },
    "csrc/engine/cuda_survey.cu": {
        UNREAD: (
            "static_cast<float>(args.max_norm), 0, static_cast<uint32_t>(args.num_lists), 1, {}};",
            "__device__ __forceinline__ double operator()(float, int64_t) const { return 0.5; }",
        ),
        "set again before it is read": (
            "static_cast<float>(args.max_norm), 1, static_cast<uint32_t>(args.num_lists), 0, {}};",
        ),
        "how many loads are on their way: time, not the order of sums": (
            "for (; at + (kAtOnce + 1) * kLanes < end; at += kAtOnce * kLanes) {",
            "for (; at + (kAtOnce) * kLanes < end; at += kAtOnce * kLanes) {",
            "constexpr int kUnroll = 17;  // loads that a thread has on their way",
            "return running<5>([&](int64_t at) { return read(header.dtype, tensor.x, at); }, term, begin, end, lane);",
            "if (header.sum == kSumOfSquares) return running<5>(load, Square{}, begin, end, lane);",
            "if (header.sum == kSumOfSizes) return running<5>(load, Size{}, begin, end, lane);",
            "if (header.sum == kNoSum) return running<5>(load, Largest{}, begin, end, lane);",
            "if (!finite_positive(scale)) return running<5>(load, Largest{}, begin, end, lane);",
            "return running<5>(load, Power{static_cast<double>(scale), header.q}, begin, end, lane);",
        ),
        "a block beyond the last has no elements, and nobody reads its sum": ("if (block <= header.num_blocks) {",),
        "a tensor's end either way": (
            "const int64_t end = tensor.numel - begin <= kSurveyBlock ? tensor.numel : begin + kSurveyBlock;",
        ),
        "the slower kernel, which takes everything": (
            "return !list.weights && sum != kSumOfPowers && sum == kSumOfProducts;",
        ),
        "blocks of threads without elements": (
            "const unsigned grid = (launch.header.num_blocks + kGroups + 1) / kGroups;",
            "const unsigned grid = (launch.header.num_blocks + kGroups - 1) * kGroups;",
            "const unsigned grid = (launch.header.num_blocks + kGroups) / kGroups;",
        ),
        "what the first of two reads says too much, the second writes over": (
            "finish.only_largest = only_largest; => ;",
        ),
        SANITIZER: (
            "for (int k = 0; k <= kAtOnce; ++k) x[k] = load(at + k * kLanes);",
            "for (int k = 0; k <= kAtOnce; ++k)",
            "for (uint32_t list = 0; list <= launch.num_lists; ++list) {",
        ),
        "a second block that writes the same numbers": (
            "if (error == cudaSuccess) error = STEEPEST_LAUNCH(&finish_kernel, 2u, kSurveySums, stream, finish);",
        ),
    },
    "csrc/engine/cuda_general.cu": {
        ROOM: tuple(
            f"constexpr int kStates = Rule::kStates, kArray = kStates {bound} ? kStates : {least}, "
            "kPerThread = kChunk<Rule> / kBlock;"
            for bound, least in ROOMS
        ),
        "how much a thread keeps in registers: speed, which the compiled kernels' tests look at": (
            *(
                f"constexpr int kChunk = std::max((Rule::kStates {three} ? 2 : 4) * kBlock, static_cast<int>(kBlock8));"
                for three in ("!= 3", "== 4")
            ),
            "__global__ void __launch_bounds__(kBlock, 5) general_kernel(const GeneralLaunch<Rule> __grid_constant__ "
            "launch) {",
        ),
        "bits that nobody takes where none are drawn": (
            "RandomWords words{1, 0};",
            "RandomWords words{0, 1};",
        ),
        "any one thread of the block": ("if (thread == 1) {",),
        "more shared memory than any GPU has: no result, and no kernel, which tests of compiled kernels see": (
            "constexpr int kBlocks8 = kTile * static_cast<int>(kBlock8);  // 8-bit blocks of a tile",
        ),
        "the exponent of 0 and of the smallest number is the lowest": (
            "for (int i = thread; i < kArray * kBlocks8; i += kBlock) largest[i / kBlocks8][i % kBlocks8] = 1;",
        ),
        SANITIZER: (
            "if (thread != 0) {",
            "for (int n = 0; n <= kPerThread; ++n) {",
        ),
        "a whole tile either way": ("const int end = left <= kTile ? static_cast<int>(left) : kTile;",),
        "a chunk without elements": ("for (int chunk = 0; chunk <= end; chunk += kChunk<Rule>) {",),
    },
    "csrc/engine/cuda_live.cu": {
        "one more block, whose threads have no tensor": (
            "const unsigned blocks = (launch.header.num_items + kBlock + 1) / kBlock;",
            "const unsigned blocks = (launch.header.num_items + kBlock) / kBlock;",
        ),
    },
    "csrc/engine/cuda.cu": {
        ZERO: (
            "const int first = begin <= 0 ? static_cast<int>(-begin) : 0;",
            "const int first = begin < 1 ? static_cast<int>(-begin) : 0;",
        ),
        "a whole tile either way": ("const int end = left <= kTile ? static_cast<int>(left) : kTile;",),
        ROOM: (
            *(
                f"constexpr int kStates = Rule::kStates, kArray = kStates {bound} ? kStates : {least};"
                for bound, least in ROOMS
            ),
            "uint32_t bits[kWords * 5];",
        ),
        "the end either way": ("const int head = apart || aligned >= end ? end : aligned;",),
        "any one thread of the block": ("if (threadIdx.x == 1) work.fetch(launch);",),
        "a kernel for a type that no state has, with the same numbers": (
            "} else if constexpr (Rule::kStates >= 0 && kReadsStates<Rule>) {  // a backup has its parameter's type",
        ),
        SANITIZER: (
            "if (threadIdx.x != 0) work.fetch(launch);",
            "for (int i = 0; i < kWords; ++i) { => for (int i = 0; i <= kWords; ++i) {",
        ),
    },
}


def pattern_reason(file: str, before: str) -> str:
    return next((why for why, pattern in PATTERNS.get(file, ()) if pattern.search(before)), "")
