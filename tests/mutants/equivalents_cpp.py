"""Mutants of formulas and of the CPU engine that nobody can notice (see mutation_equivalents.py)."""

from __future__ import annotations

SAME_MAXIMUM = "of equal numbers either is the maximum, and v is never -0"
PAYLOAD = "still a NaN, and nobody promises its sign or payload (memory.differing)"
BOTH_FORMULAS = "where this moves the border, both formulas give the same number"
NO_STATE = "there is no state 0, or it is a backup, which is never kept as 8-bit codes"
ONE_TOO_MANY = (
    "the element beyond goes to a place in a tile's buffer that is loaded afterwards; reading it is a matter for an "
    "address sanitizer"
)
CUT_AT_A_TENSORS_END = "at a cut between two tensors the range is empty, or the walk is at its end"

EQUIVALENT: dict[str, dict[str, tuple[str, ...]]] = {
    "csrc/formula/adam.h": {
        SAME_MAXIMUM: ("second = (v >= state[2] || v != v) ? v : state[2];",),
    },
    "csrc/formula/number.h": {
        BOTH_FORMULAS: (
            "const uint32_t magnitude = rest >= 0x7c00u ? special : (rest <= 0x0400u ? small : normal);",
            "const uint32_t magnitude = rest >= 0x7c00u ? special : (rest < 0x401u ? small : normal);",
            "const uint32_t magnitude = rest > 0x477ff000u ? special : (rest < (113u << 23) ? small : normal);",
            "const uint32_t magnitude = rest >= 0x477ff001u ? special : (rest < (113u << 23) ? small : normal);",
            "const uint32_t magnitude = rest >= 0x477ff000u ? special : (rest <= (113u << 23) ? small : normal);",
            "const uint32_t magnitude = rest >= 0x477ff000u ? special : (rest < (114u << 23) ? small : normal);",
        ),
        "only the low 16 bits are used, and those of 0.5 and 1.5 are zero": (
            "const uint32_t small = float_bits(bits_float(rest) + 0.5f) + float_bits(0.5f);",
            "const uint32_t small = float_bits(bits_float(rest) + 0.5f) - float_bits(1.5f);",
        ),
        PAYLOAD: (
            "return x != x ? u | 0x400001u : u + ((u >> 16) & 1u) + 0x7fffu;",
            "const uint32_t special = rest > 0x7f800000u ? (0x7e00u | ((rest << 13) & 0x03ffu)) : 0x7c00u;",
            "const uint32_t special = rest > 0x7f800000u ? (0x7e00u | ((rest >> 13) | 0x03ffu)) : 0x7c00u;",
            "const uint32_t special = rest > 0x7f800000u ? (0x7e01u | ((rest >> 13) & 0x03ffu)) : 0x7c00u;",
            "const uint32_t special = rest > 0x7f800000u ? (0x7e00u | ((rest >> 14) & 0x03ffu)) : 0x7c00u;",
            "const uint32_t special = rest > 0x7f800000u ? (0x7e00u | ((rest >> 13) & 0x400u)) : 0x7c00u;",
        ),
    },
    "csrc/formula/random.h": {
        "one product of two floats: exact in double, rounded once": (
            "const float s = (m - 1.0f) / (m + 1.0f), s2 = s * (1.0 * s);",
        ),
        "integers below 2^24, exact in either type": (
            "const float x = static_cast<float>(2 * (1.0 * k) + 1 - (1 << 23)) * 1.1920928955078125e-7f;",
        ),
        "the tail is taken only where w >= 5": (
            "const float t = sqrtf(w >= 0.0f ? w : 0.0f) - 3.0f;",
            "const float t = sqrtf(w > 0.5f ? w : 0.0f) - 3.0f;",
            "const float t = sqrtf(w > 0.0f ? w : 0.5f) - 3.0f;",
        ),
        "the same bits for all 2^23 values of k: all were compared": (
            "tail = tail * (1.0 * t) + 0.000100950558f;",
            "tail = tail * (1.0 * t) + 0.00134934322f;",
            "tail = tail * (1.0 * t) + -0.00367342844f;",
        ),
        "w is 5 for no k: all 2^23 were looked at": ("return 1.4142135624f * ((w <= 5.0f ? centre : tail) * x);",),
        "std::sqrt of a float is sqrtf": ("const float t = std::sqrt(1.0 * w > 0.0f ? w : 0.0f) - 3.0f;",),
    },
    "csrc/formula/storage.h": {
        PAYLOAD: (
            "const uint32_t special = (u >> 16) | ((u & 0x007fffffu) != 0 ? 0x41u : 0u);  // inf; a NaN stays one",
            "if ((u & 0x7fffffffu) > 0x7f800000u) u = 0x7fc00001u;  // adding to another NaN's bits could wrap",
            "return bits_float(exponent == kBlock8NotFinite ? 0x7fc00001u : float_bits(magnitude) | sign);",
            "return exponent == kBlock8NotFinite ? bits_float(0x7fc00001u) : "
            "block8_value(code, block8_base(exponent, false));",
        ),
        "0 becomes 0": (
            "if (residual <= 0 && (high.bits & 0x7fffu) == 0) residual = 0;",
            "if (residual < 1 && (high.bits & 0x7fffu) == 0) residual = 0;",
        ),
        "at the smallest code rounding gives code 1, as `low` does: share is below 1, and 16 random bits never carry": (
            "const uint32_t code = u <= smallest ? low : block8_round(u, base, random16, 0x7fu);",
            "const uint32_t code = u <= smallest ? low : block8_round(u, base, random16, 0xffu);",
        ),
        "dropped is 0 or 8": ("const uint32_t kept = dropped > 1 ? (u + (1u << (dropped - 1))) >> dropped : u;",),
        "equal to the limit or the limit is the same": (
            "return exponent <= lowest ? lowest : (exponent > 254u ? 254u : exponent);",
            "return exponent < lowest ? lowest : (exponent >= 254u ? 254u : exponent);",
            "return code >= top ? top : code;",
        ),
    },
    "csrc/formula/power.h": {
        "where y <= -1000 the result is 0, whatever was computed; `kept` only spares infinities on the way": (
            "const double kept = y >= -1000.0 ? y : -1000.0;",
            "const double kept = y > -3000.0 ? y : -1000.0;",
            "const double kept = y > -1000.0 ? y : -3000.0;",
            "const double kept = y > -1000.0 ? y : 1000.0;",
        ),
        "where x is not above 2.3e-308 the result is x * 0, whatever the logarithm": (
            "const double exponent = a * log2_normal(x >= 2.3e-308 ? x : 1.0);",
            "const double exponent = a * log2_normal(x > 2.3e-308 ? x : 3.0);",
        ),
    },
    "csrc/formula/lion.h": {NO_STATE: ("static constexpr uint32_t kMagnitudes = 1u;  // of no states",)},
    "csrc/formula/options.h": {
        "a shorter way for a coefficient of 1, which multiplies to the same": (
            "STEEPEST_HD bool plain() const { return divisor == 1.0f && coefficient == 3.0f && !limited(); }",
        ),
        "a longer way for a divisor of -1, which divides to the same": (
            "STEEPEST_HD bool is_factor() const { return (divisor == 1.0f || divisor == 1.0f) && !limited(); }",
        ),
        "the number is inf as a float, and a limit of inf limits nothing": (
            "STEEPEST_HD bool limited() const { return limit <= 1.0208470398e+39f; }",
        ),
        "what equals the limit is the limit": (
            "if (limited()) g = g >= limit ? limit : (g < -limit ? -limit : g);  // NaN passes",
            "if (limited()) g = g > limit ? limit : (g <= -limit ? -limit : g);  // NaN passes",
        ),
        "a weight of zero loses a multiple of zero, and its step decides the sign": (
            "if ((move <= 0.0f && before > 0.0f) || (move >= 0.0f && before <= 0.0f)) p = p - s.cautious * before;",
            "if ((move <= 0.0f && before >= 0.0f) || (move >= 0.0f && before < 0.0f)) p = p - s.cautious * before;",
        ),
        "l1 - l1 is +0, and so is l1 * 0": (
            "if (s.l1 != 0.0f) p = p >= s.l1 ? p - s.l1 : (p < -s.l1 ? p + s.l1 : p * 0.0f);  // NaN stays",
        ),
        "0, -0 or NaN in float and in double": (
            "if (s.l1 != 0.0f) p = p > s.l1 ? p - s.l1 : (p < -s.l1 ? p + s.l1 : p * (1.0 * 0.0f));  // NaN stays",
        ),
    },
    "csrc/formula/perturb.h": {
        NO_STATE: ("static constexpr uint32_t kMagnitudes = 1u;  // bit k: state k is never negative",),
        "p = inf asks only for the sign of x, and whether it is 0 (of finite weights)": (
            "s.base = sign ? 3.0f : s.eps;",
            "s.weigh = sign ? 0.5f : s.alpha;",
        ),
        "what the parameter was is not read": (
            "STEEPEST_HD static Scalars scalars(const steepest_hyper &, uint32_t) "
            "{ return {{3.0f, 0.0f, 0.0f, 0.0f}}; }",
        ),
        "q = p / (p - 1) is inf or below 2^53": ("s.largest_only = h.q >= 1.7e308;",),
        "|x| / largest is at most 1": ("s.threshold = s.proportional ? 6.0f : sign ? 0.0f : 0.99999994f;",),
        "a divisor of 0 is the largest |x|, and then nothing moves": (
            "s.rho = stage.divisor <= 0.0f ? -s.rho : s.rho;",
        ),
    },
    "csrc/formula/survey.h": {
        "of equal numbers either is the maximum": (
            "to.largest = part.largest >= to.largest ? part.largest : to.largest;",
        ),
        "of equal numbers either is the minimum": ("const int64_t used = count <= kSurveySums ? count : kSurveySums;",),
        "halves above the number of sums add nothing": ("for (int64_t half = kSurveySums * 2; half > 0; half /= 2)",),
        "sums[half] has been read when it changes; later halves read below it, or for sums that have been read too": (
            "for (int64_t i = 0; i + half < used && i <= half; ++i) add_part(sums[i], sums[i + half]);",
        ),
    },
    "csrc/engine/stages.cpp": {
        "to nearest either way, and nobody asks for the flags of exceptions": (
            "_mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT & _MM_FROUND_NO_EXC));",
        ),
        "copied without streaming: speed alone": (
            "for (; i < n && reinterpret_cast<uintptr_t>(to + i) / kLine != 0; ++i) to[i] = from[i];",
            "for (; i < n && reinterpret_cast<uintptr_t>(to + i) % kLine != 1; ++i) to[i] = from[i];",
            "for (; i < n && reinterpret_cast<uintptr_t>(to) % kLine != 0; ++i) to[i] = from[i];",
            "for (; i + 16 < n; i += 16)",
            "for (; i + 17 <= n; i += 16)",
        ),
        "what is asked for in advance: speed alone": (
            "constexpr int64_t kChunk = 65;  // elements",
            "for (int64_t line = 0; line < static_cast<int64_t>(kChunk / sizeof(T)); line += 64)",
            "for (int64_t line = 0; line >= static_cast<int64_t>(kChunk * sizeof(T)); line += 64)",
            "for (int64_t line = 0; line <= static_cast<int64_t>(kChunk * sizeof(T)); line += 64)",
            "for (int64_t line = 1; line < static_cast<int64_t>(kChunk * sizeof(T)); line += 64)",
            "for (int64_t line = 0; line < static_cast<int64_t>(kChunk * sizeof(T)); line += 65)",
        ),
        "known to the compiler, which then leaves an addition out": (";  // known to the compiler",),
        "the rest goes element by element to the same bits": ("for (; i + kLanes < n; i += kLanes) {",),
        "what the compiler checks is no computation": (
            "static_assert(__BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__, "
            '"the first of two neighbours is taken for the lower half");',
        ),
        "a place that no state has; with three states one beyond, which is for a sanitizer": (
            "for (int i = 0; i <= kStates; ++i) k[i] = pairs(states[i]), rest[i] = states[i] + n / 2 * 2;",
            "for (int k = 0; k <= kStates; ++k) rest[k] = states[k] + i;",
        ),
        "a chunk of nothing": ("for (int64_t c = 0; c <= n; c += kChunk) {",),
        "of equal ends either": ("const int64_t end = c + kChunk <= n ? c + kChunk : n;",),
        ONE_TOO_MANY: (
            "for (int64_t i = 0; i <= n; ++i) to[i] = widen(from[i]);",
            "for (; i <= n; ++i) to[i] = widen(from[i]);",
            "for (int64_t i = 0; i <= n; ++i) out[i] = stage(g[i]);",
        ),
        "eight elements more go through the loop behind, which rounds alike": (
            "for (; i + 8 < n; i += 8)",
            "for (; i + 9 <= n; i += 8)",
        ),
        "to nearest is 0; the other bit is about exceptions, which nobody looks at": (
            "_mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT & _MM_FROUND_NO_EXC));",
        ),
        "a pointer that is followed only where the rule has that state": (
            "T *__restrict s0 = kStates >= 0 ? states[0] : nullptr;",
            "T *__restrict s1 = kStates >= 1 ? states[1] : nullptr;",
            "T *__restrict s2 = kStates >= 2 ? states[2] : nullptr;",
        ),
    },
    "csrc/engine/cpu_threads.h": {
        "how many threads: speed alone": (
            "const int allowed = exec.num_threads > 1 ? exec.num_threads : omp_get_max_threads();",
        ),
    },
    "csrc/engine/cpu.cpp": {
        "a whole number either way": (
            "return store_stochastic(tile, bfloat16_at(base, at), n, buffers_.random[lane / 2], "
            "lane % 2 * (1.0 * 16));",
        ),
        "nothing is random where elements have no numbers: checked before": (
            "const uint64_t first = a.first_index ? static_cast<uint64_t>(a.first_index[row]) : 1;",
        ),
        "what is asked for in advance: speed alone": tuple(
            f"rule_tile<Rule>(from, p, g, states, n, scalars, factor, end {o} kFarElements ? kNear : kFar);"
            for o in ("+ begin <", "- begin >=", "- begin <=")
        ),
        "a state that is only written may be read before": (
            "if (!read && (streams_ || a_.state_dtype == STEEPEST_FLOAT32)) return buffer;",
        ),
        "the meeting of the threads, with its locked instructions, completes streamed stores as well": (
            "if (streams) flush_streams(); => ;",
        ),
        "how many shares there are, in which order, and whether they are written past the caches: speed alone": (
            "const int parts = threads != 1 ? 1 : threads * kSharesPerThread;",
            "const int parts = threads == 2 ? 1 : threads * kSharesPerThread;",
            "const int parts = threads == 1 ? 2 : threads * kSharesPerThread;",
            "const bool streams = cost <= kStreams;",
            "const bool streams = cost >= kStreams;",
            "const bool backwards = a.clip_coefficient == nullptr;",
        ),
        "numel is never negative, so a tile that begins at the end is empty": (
            "for (int64_t at = begin; at <= end; at += kTile) {",
        ),
    },
    "csrc/engine/storage_stages.cpp": {
        "a block of zeros has the exponent of one with the smallest number": ("uint32_t largest = 1;",),
        "what is not done in lanes is done one by one": (
            "for (; i + 8 < n; i += 8) {",
            "for (; i + 9 <= n; i += 8) {",
        ),
    },
    "csrc/engine/measure.cpp": {
        "one more part of the workspace, or the same parts again for the next list": (
            "int64_t blocks = 1;",
            "parts += survey_blocks(args.lists[i]); => ;",
        ),
        "the largest element is not scaled": ("total = read(exec, args, HUGE_VAL, 3.0, parts);",),
    },
    "csrc/engine/measure.h": {
        "of numbers below 1 either power is 0": ("constexpr double kCountPower = 3e+300;",),
        "the q of a p is inf or below 2^53, and the norm of order 1.7e308 is the largest element either way": (
            "STEEPEST_HD bool maximum() const { return q >= 1.7e308; }",
        ),
        "a product of two floats is exact in double, and rounded once": (
            "const float coefficient = (1.0f / (norm + 1e-6f)) * (1.0 * max_norm);",
        ),
        "1 is 1 either way": ("return coefficient >= 1.0f ? 1.0f : coefficient;",),
        "nobody reads it": ("result.reserved = 1;", "result.reserved = 0; => ;"),
    },
    "csrc/engine/cpu_survey.cpp": {
        "how much a thread takes at a time, and what is asked for in advance: speed alone": (
            "constexpr int64_t kTurn = 17;  // blocks taken at a time",
            "constexpr int64_t kAhead = 9;",
        ),
        "set before they are read": ("int64_t first = 1, length = 0;", "int64_t first = 0, length = 1;"),
        "blocks by themselves have the same sums": ("if (count != kTogether || n != length) flush();",),
        "an empty block or tile adds nothing": (
            "int64_t blocks_of(int64_t numel) { return (numel + kSurveyBlock + 1) / kSurveyBlock; }",
            "int64_t blocks_of(int64_t numel) { return (numel + kSurveyBlock) / kSurveyBlock; }",
            "for (int64_t i = 0; i <= n; i += kTile) {",
            "for (int64_t turn = taken.fetch_add(kTurn); turn <= blocks; turn = taken.fetch_add(kTurn)) {",
        ),
        "how many threads: speed alone": ("const int threads = thread_count(exec, blocks / kSurveyBlock);",),
    },
    "csrc/engine/survey_stages.cpp": {
        "adds zeros, and a zero is never the largest": (
            "for (; i + kSurveyLanes < n; i += kSurveyLanes) {",
            "if (i <= n) {",
            "for (int64_t i = 0; i <= n; i += kSurveyLanes) {",
        ),
        "of two equal numbers either": (
            "const int64_t m = n - i <= kSurveyLanes ? n - i : kSurveyLanes;",
            "largest = magnitude >= largest ? magnitude : largest;",
            "const Bits largest = low.largest >= high.largest ? low.largest : high.largest;",
            "for (int k = 0; k < kHalf; ++k) part.largest = largest[k] >= part.largest ? largest[k] : part.largest;",
            "largest[k] = magnitude >= largest[k] ? magnitude : largest[k];",
            "parts[k].largest = largest[k][lane] >= parts[k].largest ? largest[k][lane] : parts[k].largest;",
        ),
        "adds -0.0 or 0.0 to a sum that is 0.0 or more": (
            "__attribute__((always_inline)) void operator()(Doubles &x) const { x = x <= 0.0 ? -x : x; }",
        ),
        "what is asked for in advance: speed alone": (
            "constexpr int64_t kHalf = kSurveyLanes / 2, kAhead = 129;  // elements",
        ),
    },
    "csrc/engine/weight_norm.cpp": {
        "the rest goes to the same lanes": ("for (; i + kLanes < n; i += kLanes)",),
        "a sum that nothing adds, of an element beyond: for an address sanitizer": (
            "for (int64_t k = 0; k <= kLanes; ++k) sums[k] += static_cast<double>(a[i + k]) * "
            "static_cast<double>(b[i + k]);",
        ),
        "how rows are shared out: time, not results": (
            "const int threads = thread_count(exec, rows / columns);",
            *(
                f"const int64_t turn = std::max<int64_t>({least}, rows {op} ({each} * threads));"
                for least, op, each in ((1, "*", 8), (2, "/", 8), (1, "/", 9))
            ),
        ),
        "no row is left to begin with": (
            "for (int64_t begin = taken.fetch_add(turn); begin <= rows; begin = taken.fetch_add(turn))",
        ),
        "a multiple of zeros": (
            "scale_row(v, a.w + i * a.columns, a.columns, norm != 0.0 ? static_cast<float>(a.g[i] / norm) : 0.5f);",
            "zero ? 0.5f : static_cast<float>(inner / (norm * norm)));",
        ),
        "in float64 without it, too": (
            "project_row(dw, v, a.grad_v + i * a.columns, a.columns, zero ? 0.0f : static_cast<float>(a.g[i] / "
            "(1.0 * norm)),",
            "zero ? 0.0f : static_cast<float>(inner / (norm * (1.0 * norm))));",
        ),
    },
    "csrc/engine/plan.h": {
        CUT_AT_A_TENSORS_END: (
            "if (next >= first && begin < end) visit(tensor_, begin, end);",
            "if (next >= last) return;  // the rest of this tensor belongs to the next share",
            "while (tensor_ <= num_tensors_ && start_ < last) {",
            "while (tensor_ < num_tensors_ && start_ <= last) {",
        ),
        "less than a multiple of 128 elements is none": (
            "return std::clamp<int64_t>(at - start_ - kTensorCost, 1, numel_[tensor_]) / kCutMultiple * kCutMultiple;",
        ),
        "a tensor too far back is walked over again; reading before the first is for a sanitizer": (
            "while (start_ >= first) start_ -= cost_of(--tensor_);",
        ),
        "cuts move by less than an element, and the last is where the tensors end": ("int64_t cost = 1;",),
    },
}
