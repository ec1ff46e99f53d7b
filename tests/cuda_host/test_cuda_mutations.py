"""Negative controls of test_cuda_host.py: a mistake in the CUDA source makes its checks fail, for the right reason."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from cuda_build import ADDRESS, CSRC, CUT, SMALL, THREAD, need, needs_compiler, run

pytestmark = needs_compiler


@dataclass
class Mutation:
    name: str
    file: str
    old: str
    new: str
    sanitizer: str
    evidence: str  # in what the driver or the sanitizer writes
    defines: tuple = SMALL
    command: str = "lists"
    size: tuple = (30, 5000)  # how many, elements of the largest tensor


MUTATIONS = [
    Mutation("no-barrier", "cuda.cu", "  __syncthreads();\n", "", THREAD, "data race"),
    Mutation("no-barrier-before-codes", "cuda_general.cu", "    __syncthreads();\n", "", THREAD, "data race"),
    Mutation(
        "no-general-tail",
        "cuda_general.cu",
        "left < kTile ? static_cast<int>(left) : kTile",
        "kTile",
        ADDRESS,
        "heap-buffer-overflow",
    ),
    Mutation(
        "no-tail-mask",
        "cuda.cu",
        "head + (end - head) / kVector * kVector",
        "head + (end - head + kVector - 1) / kVector * kVector",
        ADDRESS,
        "heap-buffer-overflow",
    ),
    Mutation(
        "no-numel-mask",
        "cuda.cu",
        "left < kTile ? static_cast<int>(left) : kTile",
        "left < 0 ? static_cast<int>(left) : kTile",
        ADDRESS,
        "heap-buffer-overflow",
    ),
    Mutation(
        "no-peel",
        "cuda.cu",
        "(first + kVector - 1) / kVector * kVector",
        "first / kVector * kVector",
        "",
        "memory around it was written to",
    ),
    Mutation("phases-not-compared", "cuda_plan.h", "tensor.shift = kApart;", "", ADDRESS, "misaligned address"),
    Mutation(
        "shift-kept-after-a-cut",
        "cuda_plan.h",
        "if (tensor.shift != kApart) tensor.shift = 0;",
        "",
        ADDRESS,
        "misaligned address",
        CUT,
    ),
    Mutation("found_inf-ignored", "cuda_block.h", "*header.found_inf != 0.0f", "false", "", "differs at element"),
    Mutation("not-counted", "cuda_live.cu", "*item.counter = behind + 1.0f;", ";", "", "counter"),
    Mutation(
        "skip-counted",
        "cuda_live.cu",
        "*launch.header.found_inf != 0.0f) return;",
        "false) return;",
        "",
        "counter",
        size=(30, 300),
    ),
    Mutation("one-row-for-all", "cuda_plan.h", "static_cast<uint16_t>(i - first_)", "0", "", "differs at element"),
    Mutation(
        "rows-of-each-launch", "cuda_plan.h", "(args_.device_rows) + i;", "(args_.device_rows);", "", "differs at", CUT
    ),
    Mutation("live-shrinks", "cuda_plan.h", "args_.counters && may_shrink_after(args_)", "0", "", "differs at element"),
    Mutation(
        "live-rows-of-each-launch",
        "cuda_live.h",
        "num_items * row_bytes_",
        "num_items * 0",
        "",
        "differs at",
        size=(200, 100),
    ),
    Mutation(
        "no-barrier-before-sums",
        "cuda_survey.cu",
        "  __syncthreads();\n  if (lane != 0",
        "  if (lane != 0",
        THREAD,
        "data race",
        command="measures",
        size=(20, 30000),
    ),
    Mutation(
        "no-barrier-in-the-tree",
        "cuda_survey.cu",
        "      __syncthreads();\n      if (thread < half)",
        "      if (thread < half)",
        THREAD,
        "data race",
        command="measures",
        size=(20, 30000),
    ),
    Mutation(
        "survey-beyond-the-end",
        "cuda_survey.cu",
        "tensor.numel - begin < kSurveyBlock ? tensor.numel : begin + kSurveyBlock",
        "begin + kSurveyBlock",
        ADDRESS,
        "heap-buffer-overflow",
        command="measures",
        size=(20, 30000),
    ),
    Mutation(
        "lanes-backwards",
        "cuda_survey.cu",
        "sums[thread + k])",
        "sums[thread + 15 - k])",
        "",
        "measure",
        command="measures",
        size=(20, 30000),
    ),
    Mutation(
        "part-left-out",
        "cuda_survey.cu",
        "+ begin, end - begin, thread)",
        "+ begin, (end - begin) / 2 * 2, thread)",
        "",
        "measure",
        command="measures",
        size=(20, 30000),
    ),
    Mutation(
        "survey-parts-of-each-launch",
        "cuda_survey.h",
        "header.parts += header.num_blocks;",
        "",
        "",
        "measure",
        CUT,
        command="measures",
        size=(20, 30000),
    ),
    Mutation(
        "not-relative",
        "cuda_survey.cu",
        "Power{static_cast<double>(scale), header.q}",
        "Power{1.0, header.q}",
        "",
        "measure",
        command="measures",
        size=(60, 30000),
    ),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutations_are_caught(builder, tmp_path, mutation):
    """Negative controls: the checks above can fail, and for the right reason."""
    need(mutation.sanitizer)
    engine = tmp_path / "engine"
    engine.mkdir()
    for source in (CSRC / "engine").glob("cuda*"):
        text = source.read_text()
        if source.name == mutation.file:
            assert text.count(mutation.old) == 1, f"{mutation.file} no longer has {mutation.old!r} once"
            text = text.replace(mutation.old, mutation.new)
        (engine / source.name).write_text(text)
    program = builder.program(mutation.defines, mutation.sanitizer, tmp_path)
    done = run(program, mutation.command, 4, *mutation.size, sanitizer=mutation.sanitizer)
    assert done.returncode != 0
    assert mutation.evidence in done.stderr, done.stderr
