"""Gradients of a real training run, kept as data: what no formula for a spectrum has, such as rows of which some are
28 times as long as others, and singular vectors that are far from random.

    python -m steepest.conformance.recorded pyext/conformance/recorded.npz

trains the demo's character model (width 48, two layers) by AdamW on the standard library's sources and keeps the
gradients below.  The text differs between Python versions, and rounding between processors: hence the data.  They are
float16 relative to their largest element, and none is so small that it became zero; singular values below some 1e-4 of
the largest are partly those of the rounding.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch

FILE = Path(__file__).with_name("recorded.npz")
# name of the spectrum -> (the parameter, the step whose gradient it is)
RECORDED = {
    "recorded query, step 1": ("blocks.1.attention.query.weight", 1),
    "recorded value, step 200": ("blocks.0.attention.value.weight", 200),
    "recorded up, step 200": ("blocks.1.up.weight", 200),
    "recorded down, step 200": ("blocks.0.down.weight", 200),
}
WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 48, 2, 4, 64, 16


@functools.cache
def gradients() -> dict[str, torch.Tensor]:
    """By name, float64, with the long side first; largest element 1."""
    import numpy as np

    with np.load(FILE) as file:
        found = {name: torch.from_numpy(file[name]).double() for name in RECORDED}
    return {name: x if x.shape[0] >= x.shape[1] else x.T.contiguous() for name, x in found.items()}


def part(name: str, m: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """m x n of a recorded gradient, float64: rows and columns in an order drawn by the generator, none twice before all
    were taken once; long side along long side."""
    x = gradients()[name]
    long, short = (_drawn(size, count, generator) for size, count in zip((max(m, n), min(m, n)), x.shape))
    chosen = x[long][:, short]
    return chosen if m >= n else chosen.T


def _drawn(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-size // count) or 1)])[:size]


def record(steps: int = 200) -> dict[str, torch.Tensor]:
    """Trains, and returns the gradients as they are kept."""
    from steepest.demo.model import Transformer
    from steepest.demo.text import VOCABULARY_SIZE, load_text, training_batches

    text = load_text(None, 1_000_000, CONTEXT)
    model = Transformer(VOCABULARY_SIZE, CONTEXT, WIDTH, LAYERS, HEADS, seed=0)
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=3e-3), {}
    for step, (inputs, targets) in enumerate(training_batches(text.train, steps, BATCH, CONTEXT, 0), 1):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        for name, (parameter, when) in RECORDED.items():
            if step == when:
                gradient = model.get_parameter(parameter).grad
                found[name] = (gradient / gradient.abs().max()).half()
        optimizer.step()
    return found


def main(arguments: list[str]) -> int:
    import numpy as np

    if len(arguments) != 1:
        print("usage: python -m steepest.conformance.recorded FILE.npz", file=sys.stderr)
        return 2
    np.savez_compressed(arguments[0], **{name: x.numpy() for name, x in record().items()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
