"""Bytes that a step's work plan moves, counted: each tensor once per read and per write, in its own dtype."""

from __future__ import annotations

import pytest
import torch

from steepest import optim
from steepest.traffic import counted_traffic

F32, BF16 = torch.float32, torch.bfloat16
SIZES = (1, 128, 129, 1000)
BLOCKS = 1 + 1 + 2 + 8  # of 128 elements, whose exponent is a byte


def bytes_of_a_step(optimizer_of, dtype):
    params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in SIZES]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = optimizer_of(params)
    optimizer.step()  # makes the states
    with counted_traffic() as traffic:
        optimizer.step()
    return traffic.bytes


# Per element: the gradient once; parameter or master, states, average and correction bits twice; a master's copy once.
@pytest.mark.parametrize(
    ("name", "options", "dtype", "per_element", "per_block"),
    [
        ("AdamW", {}, F32, 28, 0),
        ("AdamW", {}, BF16, 14, 0),
        ("AdamW", {"amsgrad": True}, F32, 36, 0),
        ("AdamW", {"ema_decay": 0.9}, F32, 36, 0),
        ("AdamW", {"master_weights": True}, BF16, 2 + 2 + 8 + 16, 0),
        ("AdamW", {"correction_bits": 16}, BF16, 2 + 4 + 4 + 16, 0),
        ("AdamW", {"correction_bits": 8}, BF16, 2 + 4 + 2 + 16, 0),
        ("AdamW", {"state_dtype": "block8"}, F32, 12 + 4, 4),
        ("AdamW", {"correction_bits": 8, "state_dtype": "block8"}, BF16, 2 + 4 + 2 + 4, 4),
        ("Lion", {"state_dtype": "block8"}, F32, 12 + 2, 2),
        ("SGD", {}, F32, 12, 0),
        ("SGD", {"momentum": 0.9}, F32, 20, 0),
    ],
    ids=lambda x: "" if isinstance(x, int) else str(x),
)
def test_bytes_of_a_step(name, options, dtype, per_element, per_block):
    found = bytes_of_a_step(lambda params: getattr(optim, name)(params, lr=1e-3, **options), dtype)
    assert found == per_element * sum(SIZES) + per_block * BLOCKS
