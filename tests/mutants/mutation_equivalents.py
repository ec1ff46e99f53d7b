"""Mutants that nobody can notice, and why: file -> reason -> lines as they are after the change."""

from __future__ import annotations

SAME_MAXIMUM = "of equal numbers either is the maximum, and v is never -0"
PAYLOAD = "still a NaN, and nobody promises its sign or payload (memory.differing)"
BOTH_FORMULAS = "where this moves the border, both formulas give the same number"
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
            "const uint32_t nan = (u >> 16) | 0x41u;",
            "const uint32_t special = rest > 0x7f800000u ? (0x7e00u | ((rest << 13) & 0x03ffu)) : 0x7c00u;",
            "const uint32_t special = rest > 0x7f800000u ? (0x7e00u | ((rest >> 13) | 0x03ffu)) : 0x7c00u;",
            "const uint32_t special = rest > 0x7f800000u ? (0x7e01u | ((rest >> 13) & 0x03ffu)) : 0x7c00u;",
            "const uint32_t special = rest > 0x7f800000u ? (0x7e00u | ((rest >> 14) & 0x03ffu)) : 0x7c00u;",
            "const uint32_t special = rest > 0x7f800000u ? (0x7e00u | ((rest >> 13) & 0x400u)) : 0x7c00u;",
        ),
    },
    "csrc/engine/stages.cpp": {
        ONE_TOO_MANY: ("for (int64_t i = 0; i <= n; ++i) to[i] = widen(from[i]);",),
    },
    "csrc/engine/plan.h": {
        CUT_AT_A_TENSORS_END: (
            "if (next >= first && begin < end) visit(tensor_, begin, end);",
            "if (next >= last) return;  // the rest of this tensor belongs to the next share",
            "while (tensor_ <= num_tensors_ && start_ < last) {",
        ),
        "cuts move by less than an element, and the last is where the tensors end": ("int64_t cost = 1;",),
    },
    "kernels/adamw.py": {
        SAME_MAXIMUM: ("second = tl.where((v >= vmax) | (v != v), v, vmax)",),
        "what the compiler may assume, not what is computed; tests/aot looks at vector widths": (
            "base = tl.multiple_of(base, 17)",
            "base = tl.multiple_of(base, 16) => pass",
        ),
        "the masked form of a full tile does the same": ("if rest > TILE:",),
    },
    "kernels/portable.py": {
        PAYLOAD: ("narrowed = tl.where(is_nan, (bits >> 16) | 0x41, rounded)",),
    },
    "pyext/reference/polar.py": {
        "the same polynomial of the longer side's Gram matrix: slower, and as accurate": (
            "if x.shape[-2] > x.shape[-2]:",
        ),
    },
}


def reason(file: str, before: str, after: str) -> str:
    """Why nobody can notice this mutant; "" when somebody must."""
    for why, lines in EQUIVALENT.get(file, {}).items():
        if after in lines or f"{before} => {after}" in lines:
            return why
    return ""
