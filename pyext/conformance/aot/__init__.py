"""python -m steepest validate --aot sm_80,sm_90: what the compilers make of every kernel, with no GPU.

Registers, spills, shared memory, widths of loads and the class of tensor-core instructions, read from the machine code;
FAIL where a kernel spills or has lost vector accesses or tensor cores.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steepest.conformance.aot import cuda
from steepest.conformance.backends import interpreting, triton_installed
from steepest.conformance.runner import FAIL, OK

SCHEMA = 1
KIND = "steepest-aot"
CHUNK = 8  # Triton variants compiled between two movements of the progress bar


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one architecture.  Sizes in bytes; `loads`, `stores`: instructions of 16 bytes."""

    source: str  # "triton" or "cuda"
    kernel: str
    variant: str
    arch: str
    status: str
    reason: str
    registers: int
    spills: int  # Triton: instructions; CUDA: bytes
    shared: int
    loads: int
    stores: int | None
    tensor_core: str


def triton_missing() -> str:
    if not triton_installed():
        return "Triton is not installed (pip install triton)"
    return "TRITON_INTERPRET=1 is set: nothing is compiled" if interpreting() else ""


def compile_triton(archs: list[str]) -> Iterator[Compiled]:
    from steepest.conformance.aot.triton import faults
    from steepest.kernels import aot

    variants = aot.all_variants()
    for arch in archs:
        for start in range(0, len(variants), CHUNK):
            for row in aot.report([arch], variants[start : start + CHUNK]):
                found = faults(row)
                yield Compiled(
                    "triton", row.kernel, row.variant, arch, FAIL if found else OK, "; ".join(found),
                    row.registers, row.spills, row.shared, row.wide_loads, None, row.tensor_core,
                )  # fmt: skip


def compile_cuda(archs: list[str]) -> Iterator[Compiled]:
    with tempfile.TemporaryDirectory() as folder:
        build = cuda.compile_engine(Path(folder), [arch.removeprefix("sm_") for arch in archs])
        cuda.disassemble(build)
    for arch, kernels in build.kernels.items():
        for name, kernel in kernels.items():
            found = cuda.resource_faults(name, kernel) + cuda.access_faults(name, kernel)
            types, rule = name
            kernel_and_variant = (rule, "") if rule in cuda.OTHERS else ("step_kernel", f"{rule} {' '.join(types)}")
            yield Compiled(
                "cuda", *kernel_and_variant, f"sm_{arch}", FAIL if found else OK,
                "; ".join(found), kernel.registers, kernel.spills, kernel.shared, len(kernel.accesses("LDG")),
                len(kernel.accesses("STG")), "",
            )  # fmt: skip


def main(archs: str, json_file: str | None = None) -> int:
    """1 when a kernel FAILs, 2 for wrong arguments or when nothing here can compile, else 0."""
    names = [name.strip() for name in archs.split(",") if name.strip()]
    skipped = {name: why for name, why in (("triton", triton_missing()), ("cuda", cuda.missing())) if why}
    if len(skipped) == 2:
        print("validate --aot: nothing to compile with.", *skipped.values(), sep="\n  ", file=sys.stderr)
        return 2
    if not names or any(name not in cuda.SHARED_KIB for name in names):
        print(f"validate --aot: {archs!r}: expected names among {', '.join(cuda.SHARED_KIB)}", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    rows: list[Compiled] = []
    try:
        rows += watched(compile_cuda(names), "nvcc") if "cuda" not in skipped else []
        rows += watched(compile_triton(names), "triton") if "triton" not in skipped else []
    except RuntimeError as error:  # a compiler's own words
        print(f"validate --aot: {error}", file=sys.stderr)
        return 2
    written = to_json(rows, names, skipped, time.perf_counter() - begin)
    if json_file == "-":
        print(json_text(written), end="")
    else:
        print_table(rows, names, skipped)
        if json_file:
            Path(json_file).write_text(json_text(written))
    return int(any(row.status == FAIL for row in rows))


def watched(rows: Iterable[Compiled], title: str) -> list[Compiled]:
    """All rows; the number so far on stderr when a person is watching."""
    found = []
    for row in rows:
        found.append(row)
        if sys.stderr.isatty():
            print(f"\r{title}: {len(found)} kernels", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return found


def to_json(rows: list[Compiled], archs: list[str], skipped: dict[str, str], seconds: float) -> dict[str, Any]:
    from steepest.info import info

    return {
        "schema": SCHEMA,
        "kind": KIND,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "info": info(),
        "archs": archs,
        "seconds": round(seconds, 2),
        "skipped": skipped,
        "totals": dict(Counter(row.status for row in rows)),
        "kernels": [asdict(row) for row in rows],
    }


def json_text(written: dict[str, Any]) -> str:
    """One line per kernel."""

    def text(name, value) -> str:
        if name != "kernels":
            return json.dumps(value, ensure_ascii=False)
        return "[\n" + ",\n".join(json.dumps(row, separators=(",", ":"), ensure_ascii=False) for row in value) + "]"

    return "{\n" + ",\n".join(f"{json.dumps(k)}: {text(k, v)}" for k, v in written.items()) + "}\n"


def cell_text(row: Compiled | None) -> str:
    """212 registers, 24 loads of 16 bytes, 64 KiB of shared memory, HMMA."""
    if row is None:
        return ""
    parts = [FAIL] if row.status == FAIL else []
    parts += [f"{row.registers} r", f"{row.loads} x 16 B" if row.loads else "narrow"]
    parts += [f"{row.spills} spills"] if row.spills else []
    parts += [f"{row.shared / 1024:.0f} K"] if row.shared >= 1024 else []
    return ", ".join([*parts, *filter(None, [row.tensor_core])])


def print_table(rows: list[Compiled], archs: list[str], skipped: dict[str, str]) -> None:
    """One line per kernel variant and one column per architecture, then every FAIL in full, then what was skipped."""
    found = {(row.source, row.kernel, row.variant, row.arch): row for row in rows}
    keys = list(dict.fromkeys((row.source, row.kernel, row.variant) for row in rows))
    print("registers (r), loads of 16 bytes per thread, shared memory (K, KiB), class of tensor-core instructions")
    lines = [("", "kernel", "variant", *archs)]
    lines += [(*key, *(cell_text(found.get((*key, arch))) for arch in archs)) for key in keys]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
    for row in rows:
        if row.status == FAIL:
            print(f"FAIL  {row.source} · {row.kernel} · {row.variant} · {row.arch}: {row.reason}")
    for name, reason in skipped.items():
        print(f"skipped  {name}: {reason}")
    count = Counter(row.status for row in rows)
    print(f"{count[OK]} ok, {count[FAIL]} FAIL")
