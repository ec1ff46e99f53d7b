"""Compiles every kernel variant for GPUs that need not be there, and reads the machine code.

    python -m steepest.kernels.aot sm_90        # table: registers, spills, shared memory, loads, tensor-core class

Triton's own launch path does the compiling, under a driver that names a target instead of asking for one, and the
launch arguments come from the functions that the entries use: what is reported is what would run.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import adamw, blocks, chain, grouped, long, momentum, statistics, symmetric
from .portable import INTERPRETING

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
HALF = [(torch.bfloat16, "ieee"), (torch.float16, "ieee")]
# Global loads into registers, and asynchronous ones into shared memory.
LOADS = ("LDG", "LDGSTS")
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC[A-Z]*MMA|QMMA|IMMA|DMMA)\b")
SPILLS = re.compile(r"\b(STL|LDL)\b")


class Variant(NamedTuple):
    """A kernel with one set of launch arguments."""

    kernel: triton.JITFunction
    name: str
    arguments: tuple
    options: dict


@dataclass(frozen=True)
class Row:
    """What the machine code of one variant uses; sizes in bytes."""

    kernel: str
    variant: str
    arch: str
    registers: int
    stack: int
    spills: int  # load and store instructions to local memory
    shared: int
    widest_load: int
    wide_loads: int  # load instructions of 16 bytes per thread
    tensor_core: str


class AheadOfTimeDriver:
    """Names the architecture of the current thread as the device, so that each has a kernel cache of its own."""

    def __init__(self):
        self.thread = threading.local()

    def get_current_device(self) -> str:
        return self.thread.arch

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.thread.arch.removeprefix("sm_")), 32)

    def compile(self, variant: Variant, arch: str):
        """The compiled kernel, from Triton's caches if it is there."""
        self.thread.arch = arch
        return variant.kernel.warmup(*variant.arguments, grid=(1,), **variant.options)


@contextlib.contextmanager
def ahead_of_time() -> Iterator[AheadOfTimeDriver]:
    """A driver that compiles for any architecture; the machine's own, if it has one, is put back at the end."""
    if INTERPRETING:
        raise RuntimeError("aot: kernels are interpreted in this process; start it without TRITON_INTERPRET")
    compiling = AheadOfTimeDriver()
    driver.set_active(compiling)
    try:
        yield compiling
    finally:
        if torch.cuda.is_available():
            driver.reset_active()


def specializations(kernel: triton.JITFunction, arch: str) -> int:
    """How many compiled forms of `kernel` this process holds for `arch`."""
    return len(kernel.device_caches[arch][0])


def adamw_variants() -> list[Variant]:
    variants = []
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    for dtypes in [(f32,) * 3, (bf16,) * 3, (f16,) * 3, (bf16, bf16, f32), (f16, f16, f32)]:
        for aligned in (True, False):
            for amsgrad in (False, True):
                rows = np.zeros((1, adamw.COLUMNS.value), dtype=np.int64)
                rows[0, adamw.NUMEL.value] = 1
                rows[0, adamw.VMAX.value] = amsgrad
                _, arguments, options = adamw.launch_arguments(rows, torch.empty(8), (0, 0, 0), dtypes, aligned)
                name = " ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                name += (" aligned" if aligned else " unaligned") + (" amsgrad" if amsgrad else "")
                variants.append(Variant(adamw.adamw_kernel, name, arguments, options))
    return variants


def symmetric_variants() -> list[Variant]:
    variants = []
    for dtype, precision in HALF + [(torch.float32, precision) for precision in symmetric.PRECISIONS]:
        kind = precision if dtype == torch.float32 else "half"
        # 64 matrices of 256 rows take the large tile, one the small one; odd sizes cannot take vectors.
        sizes = [(64, 256), (1, 256)] if len(symmetric.TILINGS[kind]) > 1 else [(1, 256)]
        for batch, n in sizes if precision == "bf16x3" else [*sizes, (1, 255)]:
            x = torch.empty(n, n, dtype=dtype).expand(batch, n, n)
            for rows_inner, addend in [(False, None), (True, None), (False, x)]:
                a = x.mT if rows_inner else x
                _, arguments, options = symmetric.launch_arguments(
                    a, a, addend, x, (1.0, 1.0, 0.0), not rows_inner, precision
                )
                name = f"{str(dtype).removeprefix('torch.')} {precision if kind != 'half' else ''}".strip()
                name += f" {options['TILE']}x{options['TILE']}x{options['TILE_K']}"
                name += (" aligned" if options["UNIT"] > 1 else " unaligned") + (" columns" if rows_inner else " rows")
                name += "" if addend is None else " + C"
                variants.append(Variant(symmetric.symmetric_kernel, name, arguments, options))
    return variants


def chain_variants() -> list[Variant]:
    variants = []
    for dtype, precision in HALF + [(torch.float32, precision) for precision in symmetric.PRECISIONS]:
        step, numbers = np.zeros((1, chain.STEP_COLUMNS.value)), np.zeros((1, 4))
        tables, _ = chain.device_tables(step, numbers, ((16, 16),) * 2, 1, dtype, torch.device("cpu"))
        x = torch.empty(1, 16, 16, dtype=dtype)
        _, arguments, options = chain.launch_arguments(tables, x, x, x, precision)
        name = f"{str(dtype).removeprefix('torch.')} {precision if dtype == torch.float32 else ''}".strip()
        variants.append(
            Variant(chain.chain_kernel, f"{name} {options['TILE']}x{options['TILE_K']}", arguments, options)
        )
    return variants


def grouped_variants() -> list[Variant]:
    """Those of `symmetric_variants`, through the table."""
    variants = []
    for dtype, precision in HALF + [(torch.float32, precision) for precision in symmetric.PRECISIONS]:
        kind = precision if dtype == torch.float32 else "half"
        sizes = [(64, 256), (1, 256)] if len(symmetric.TILINGS[kind]) > 1 else [(1, 256)]
        for count, n in [*sizes, (1, 255)]:
            for columns in (False, True):
                x = torch.empty(n, n, dtype=dtype)
                x = x.mT if columns else x
                group = grouped.group_of_grams([x] * count, input_precision=precision)
                ((_, arguments, options),) = group.parts
                name = f"{str(dtype).removeprefix('torch.')} {precision if kind != 'half' else ''}".strip()
                name += f" {options['TILE']}x{options['TILE']}x{options['TILE_K']}"
                name += (" aligned" if options["UNIT"] > 1 else " unaligned") + (" columns" if columns else " rows")
                variants.append(Variant(grouped.grouped_kernel, name, arguments, options))
    return variants


def momentum_variants() -> list[Variant]:
    """Roles: gradient, buffer, what is orthogonalised."""
    variants = []
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    for dtypes in [(f32, f32, f16), (f32, f32, f32), (bf16, bf16, f16), (bf16, f32, f16), (f32, bf16, f16)]:
        for aligned in (True, False):
            roles = [[torch.empty(2 if aligned else 3, 1024, dtype=d)[:2] for d in dtypes]]
            laid = momentum.Momentum(*([x] for x in roles[0]), torch.ones(1), 0.0)
            for again in (False, True):
                options = {**laid.options, "ALIGNED": aligned, "AGAIN": again}
                name = " ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                name += (" aligned" if aligned else " unaligned") + (" again" if again else "")
                variants.append(Variant(momentum.momentum_kernel, name, laid.arguments(0.9, True), options))
    for final in (False, True):
        options = {"FINAL": final, "CHUNK": momentum.NORM_CHUNK, "num_warps": momentum.WARPS, "enable_fp_fusion": False}
        variants.append(Variant(momentum.norm_kernel, "final" if final else "check", laid.norm_arguments(), options))
    return variants


def long_variants() -> list[Variant]:
    variants, hyper = [], torch.empty(2)
    for dtype, precision in HALF + [(torch.float32, precision) for precision in symmetric.PRECISIONS]:
        kind = precision if dtype == torch.float32 else "half"
        sizes = [(64, 256, 512), (1, 256, 512)] if len(symmetric.TILINGS[kind]) > 1 else [(1, 256, 512)]
        for batch, n, m in [*sizes, (1, 255, 511)]:
            for tall in (False, True):
                x = torch.empty(1, *((m, n) if tall else (n, m)), dtype=dtype).expand(batch, -1, -1)
                q = torch.empty(1, n, n, dtype=dtype).expand(batch, -1, -1)
                table = torch.empty(batch, dtype=torch.int64)
                # Stored, applied to float32, and, where it would be used, to bfloat16 parameters.
                outs = [(None, None), (torch.float32, None)] + [(torch.bfloat16, 1)] * (kind == "half" and not tall)
                for out, seed in outs:
                    _, arguments, options = long.launch_arguments(
                        q, x, x if out is None else table, hyper, (1.0, 1.0), None, out, True, precision, seed=seed
                    )
                    name = f"{str(dtype).removeprefix('torch.')} {precision if kind != 'half' else ''}".strip()
                    name += f" {options['TILE']}x{options['TILE']}x{options['TILE_K']}"
                    name += (" aligned" if options["UNIT"] > 1 else " unaligned") + (" tall" if tall else " wide")
                    name += "" if out is None else f" to {str(out).removeprefix('torch.')}"
                    variants.append(Variant(long.long_kernel, name, arguments, options))
    return variants


def statistics_variants() -> list[Variant]:
    variants = []
    for precision in symmetric.PRECISIONS:
        for n, m in ((256, 512), (255, 511)):
            g, left, right = (torch.empty(1, *shape) for shape in ((n, m), (n, n), (m, m)))
            keep = torch.empty(1)
            _, arguments, options, _ = statistics.statistics_arguments(g, left, right, keep, keep, precision)
            name = f"float32 {precision} {options['TILE']}x{options['TILE']}x{options['TILE_K']}"
            name += " aligned" if options["UNIT"] > 1 else " unaligned"
            variants.append(Variant(statistics.statistics_kernel, name, arguments, options))
            for out in (None, torch.float32, torch.bfloat16):
                d = g if out is None else blocks.Targets([torch.empty(n, m, dtype=out)])
                numbers = torch.empty(1, blocks.COLUMNS.value)
                _, arguments, options = statistics.product_arguments(left, g, d, precision, numbers)
                applied = "" if out is None else f" to {str(out).removeprefix('torch.')}"
                variants.append(Variant(statistics.product_kernel, name + applied, arguments, options))
    return variants


def move_variants() -> list[Variant]:
    """The parameters' dtype, and what momentum there is."""
    variants = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for m in (512, 511):
            d, numbers = torch.empty(1, 256, m), torch.empty(1, blocks.COLUMNS.value)
            targets = blocks.Targets([torch.empty(256, m, dtype=dtype)])
            for beta, nesterov in ((0.0, False), (0.9, False), (0.9, True)):
                _, arguments, options = blocks.move_arguments(d, d, d, targets, numbers, beta, nesterov)
                name = f"{str(dtype).removeprefix('torch.')} {'aligned' if m == 512 else 'unaligned'}"
                name += " nesterov" if nesterov else " momentum" if beta else ""
                variants.append(Variant(blocks.move_kernel, name, arguments, options))
    return variants


def all_variants() -> list[Variant]:
    tiled = symmetric_variants() + grouped_variants() + long_variants()
    return adamw_variants() + momentum_variants() + move_variants() + tiled + chain_variants() + statistics_variants()


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage (cuobjdump) and instructions (nvdisasm) of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        usage = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path]
        # -ndf: without the analysis of branches, which only names labels; 472 kernels take 65 s instead of 83.
        code = [triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", path]
        return tuple(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout for command in (usage, code)
        )


def load_widths(code: str) -> Counter[int]:
    """Number of global load instructions by bytes per thread.  Widths are parts of the name: LDG.E.U16, LDG.E.64."""
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    found = Counter()
    for name in re.findall(rf"\b(?:{'|'.join(LOADS)})(?:\.\w+)+", code):
        found[next((widths[part] for part in name.split(".") if part in widths), 4)] += 1
    return found


def measure(variant: Variant, arch: str, compiled) -> Row:
    usage, code = disassemble(compiled.asm["cubin"])
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loads = load_widths(code)
    return Row(
        kernel=variant.kernel.fn.__name__,
        variant=variant.name,
        arch=arch,
        registers=counts["REG"],
        stack=counts["STACK"] + counts["LOCAL"],
        spills=len(SPILLS.findall(code)),
        shared=compiled.metadata.shared,
        widest_load=max(loads, default=0),
        wide_loads=loads[16],
        tensor_core=" ".join(sorted(set(TENSOR_CORE.findall(code)))),
    )


def report(archs: Sequence[str] = ARCHS, variants: Sequence[Variant] | None = None) -> list[Row]:
    """Compiles `variants` (all of them by default) for `archs` and returns what the machine code uses."""
    chosen = all_variants() if variants is None else variants
    work = [(variant, arch) for arch in archs for variant in chosen]
    with ahead_of_time() as compiling, ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda item: measure(*item, compiling.compile(*item)), work))


def main() -> None:
    names = [field.name for field in fields(Row)]
    table = [names] + [[str(getattr(row, name)) for name in names] for row in report(sys.argv[1:] or ARCHS)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


if __name__ == "__main__":
    main()
