"""`python -m steepest explain --plan`: a table of predictions for meshes and optimizers."""

from __future__ import annotations

import argparse
import math
import sys

import torch

from steepest.planning.inventories import MODELS, Shapes, inventory
from steepest.planning.mesh import Mesh
from steepest.planning.predict import OPTIMIZERS, Machine, Prediction, predict

NODE = 8  # ranks of one machine: what tensor parallelism and HSDP's shards stay within by default


def standard_meshes(gpus: int) -> list[Mesh]:
    """What users of so many GPUs choose from: DDP on one machine; FSDP2; copies per machine; tensor parallel in one."""
    if gpus <= NODE:
        return [Mesh(replicas=gpus), Mesh(shards=gpus)] if gpus > 1 else [Mesh()]
    if gpus % NODE:
        return [Mesh(shards=gpus)]
    return [Mesh(shards=gpus), Mesh(replicas=gpus // NODE, shards=NODE), Mesh(shards=gpus // NODE, tensor=NODE)]


def parse_mesh(text: str) -> Mesh:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return Mesh(**{name: int(value) for name, value in pairs})
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a mesh like shards=8 or replicas=2,shards=4,tensor=8 ({error})"
        ) from None


def parse_shapes(text: str) -> Shapes:
    """layers.0.q_proj.weight=4096x4096,..."""
    try:
        pairs = [part.rsplit("=", 1) for part in text.split(",")]
        return {name: tuple(int(n) for n in shape.lower().split("x")) for name, shape in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like a.weight=64x32,a.bias=64") from None


def number(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def row(found: Prediction) -> str:
    ms = {
        name: f"{1e3 * seconds:,.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"
        for name, seconds in found.seconds.items()
    }
    busiest = int(found.sent.max())
    cells = [f"{found.mesh}", found.optimizer, ms["step"], ms["elementwise"], ms["products"], ms["messages"]]
    cells += [number(found.traffic / 1e9), f"{busiest / 1e9:,.3g}", f"{found.peak() / 1e9:,.3g}"]
    cells.append(f"{1 + found.imbalance:.2f}" if found.seconds["products"] else "–")
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| mesh | optimizer | step, ms | elementwise | products | messages | sent by all, GB | by one, GB | memory, GB |"
    " work / mean |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def describe(title: str, shapes: Shapes, dtype: str, machine: Machine) -> str:
    elements = sum(map(math.prod, shapes.values()))
    rates = (
        f"link {machine.bandwidth / 1e9:g} GB/s and {machine.latency * 1e6:g} µs, copy {machine.copy / 1e9:g} GB/s, "
        f"matmul {machine.matmul / 1e12:g} TFLOP/s on elements of {machine.matrix_bytes} bytes"
    )
    return f"{title}, {elements:,} parameters, {dtype}; assumed per rank: {rates}."


def table(
    title: str, shapes: Shapes, meshes: list[Mesh], names: list[str], machine: Machine, dtype: str, device: str
) -> str:
    """Markdown.  "by one" and "memory": of the ranks that send and hold most; work / mean: products of the busiest."""
    lines = [describe(title, shapes, dtype, machine), "", HEAD]
    for mesh in meshes:
        for name in names:
            lines.append(row(predict(shapes, mesh, name, machine, dtype=getattr(torch, dtype), device=device)))
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    standard = Machine()
    out = argparse.ArgumentParser(
        "python -m steepest explain --plan",
        description="Predicts time, traffic and memory of an optimizer's step over ranks that need not be there, at "
        "rates that you state; without launch overhead, norms, and the stack's own messages.",
    )
    what = out.add_mutually_exclusive_group()
    what.add_argument("--model", choices=sorted(MODELS), default="llama-3-8b")
    what.add_argument("--shapes", type=parse_shapes, help="such as a.weight=64x32,a.bias=64")
    out.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 1024, 10000], help="their usual meshes")
    out.add_argument(
        "--mesh", type=parse_mesh, nargs="+", help="instead: such as shards=8 replicas=2,shards=4,tensor=8"
    )
    out.add_argument("--optimizer", choices=OPTIMIZERS, nargs="+", default=["adamw", "muon", "shampoo"])
    out.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of parameters and gradients")
    out.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="for which the optimizers plan")
    out.add_argument("--bandwidth", type=float, default=standard.bandwidth / 1e9, help="GB/s each way, slowest link")
    out.add_argument("--latency", type=float, default=standard.latency * 1e6, help="microseconds per message")
    out.add_argument("--copy", type=float, default=standard.copy / 1e9, help="GB/s read and written")
    out.add_argument("--matmul", type=float, default=standard.matmul / 1e12, help="TFLOP/s")
    out.add_argument(
        "--matrix-bytes", type=int, default=standard.matrix_bytes, help="per element of products' operands"
    )
    return out


def report(argv: list[str]) -> str:
    """What the command prints; raises what predict raises."""
    given = parser().parse_args(argv)
    shapes = given.shapes or inventory(given.model).shapes
    if min(given.gpus) < 1:
        raise ValueError(f"--gpus is {min(given.gpus)}, expected numbers >= 1")
    rates = given.bandwidth * 1e9, given.latency * 1e-6, given.copy * 1e9, given.matmul * 1e12, given.matrix_bytes
    meshes = given.mesh or [mesh for gpus in given.gpus for mesh in standard_meshes(gpus)]
    title = "the shapes given" if given.shapes else given.model
    return table(title, shapes, meshes, given.optimizer, Machine(*rates), given.dtype, given.device)


def main(argv: list[str]) -> int:
    try:
        print(report(argv))
    except (ValueError, TypeError, NotImplementedError) as error:
        print(f"explain --plan: {error}", file=sys.stderr)
        return 2
    return 0
