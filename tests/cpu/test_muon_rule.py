"""Muon's rule in parts: the update of weights by given polar factors, and what it moves."""

from __future__ import annotations

import pytest
import torch

from steepest.matrix import muon_rule

LR, DECAY = 0.25, 0.5


def group(**options) -> dict:
    return {"lr": LR, "weight_decay": DECAY, "scale": "spectral", "cautious": False, "nesterov": True, **options}


def expected(targets, steps, cautious: bool, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """W keep - size O in float64, keep 1 where a cautious group's step does not go towards zero (or is zero); and how
    far roundings to `dtype` of both products and of their sum may be from it: u (|W keep| + |size O| + |sum|), with
    2u of that for roundings of what is rounded."""
    unit = torch.finfo(dtype).eps / 2
    out = []
    for w, o in zip(targets, steps):
        w, o = w.double(), o.to(dtype).double()
        keep = torch.where(o.sign() == w.sign(), 1 - LR * DECAY, 1.0) if cautious else 1 - LR * DECAY
        kept, moved = w * keep, LR * (8 / 2) ** 0.5 * o
        out.append((kept - moved, unit * (1 + 2 * unit) * (kept.abs() + moved.abs() + (kept - moved).abs())))
    return out


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cautious", [False, True])
def test_weights_decay_and_move(cautious, dtype, live):
    generator = torch.Generator().manual_seed(1)
    targets = [torch.randn(8, 2, generator=generator).to(dtype) for _ in range(2)]
    steps = [torch.randn(8, 2, generator=generator) for _ in range(2)]
    steps[0][::3] = 0
    wanted = expected(targets, steps, cautious, dtype)
    numbers = {"lr": torch.tensor(LR, dtype=torch.float64), "capturable": True} if live else {}
    muon_rule.apply(group(cautious=cautious, **numbers), 8, 2, targets, steps)
    for w, (right, bound) in zip(targets, wanted):
        # Of float64 the expectation is rounded alike.
        assert w.dtype == dtype and ((w.double() - right).abs() <= bound * (2 if dtype == torch.float64 else 1)).all()


def test_without_decay_cautious_changes_nothing():
    targets, steps = [torch.randn(8, 2)], [torch.randn(8, 2)]
    twin = [targets[0].clone()]
    muon_rule.apply(group(weight_decay=0.0, cautious=True), 8, 2, targets, steps)
    muon_rule.apply(group(weight_decay=0.0), 8, 2, twin, steps)
    assert torch.equal(targets[0], twin[0])


@pytest.mark.parametrize("nesterov, momentum", [(False, 3), (True, 6)])  # B, G -> B; then G, B -> U
@pytest.mark.parametrize("cautious, decay, update", [(False, 0.1, 5), (True, 0.0, 5), (True, 0.1, 8)])
def test_elements_moved_are_reads_and_writes(nesterov, momentum, cautious, decay, update):
    """W -> W, then W, O -> W; a cautious one also O, W -> mask."""
    moved = muon_rule.elements_moved(group(nesterov=nesterov, cautious=cautious, weight_decay=decay))
    assert moved == momentum + update
