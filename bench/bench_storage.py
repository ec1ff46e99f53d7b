"""AdamW's ways to keep parameters and states, beside what one writes by hand with torch where there is such a thing."""

from __future__ import annotations

import pytest
import torch
from problems import copies, parameters, step_runners

import steepest

LR = 1e-3
EMA, NOISE = 0.999, (1e-4, 0.55)
# mode: (options, dtype of the parameters, bytes per parameter and step).
MODES = {
    "float32 master": (dict(master_weights=True), torch.bfloat16, 28),
    "16 correction bits": (dict(correction_bits=16), torch.bfloat16, 26),
    "8 correction bits, 8-bit states": (dict(correction_bits=8, state_dtype="block8"), torch.bfloat16, 12 + 4 / 128),
    "stochastic rounding": (dict(stochastic_rounding=True), torch.bfloat16, 14),
    "average": (dict(ema_decay=EMA), torch.float32, 36),
    "gradient noise": (dict(gradient_noise=NOISE), torch.float32, 28),
}


def master_by_hand(params):
    """float32 copies stepped by torch's fused AdamW, gradients widened, the result rounded back."""
    masters = [p.detach().float().requires_grad_() for p in params]
    for p in masters:
        p.grad = torch.empty_like(p)
    optimizer = torch.optim.AdamW(masters, lr=LR, fused=True)
    grads, wide = [p.grad for p in params], [p.grad for p in masters]
    low = [p.detach() for p in params]

    def step():
        torch._foreach_copy_(wide, grads)
        optimizer.step()
        torch._foreach_copy_(low, [p.detach() for p in masters])

    return step


def average_by_hand(params):
    optimizer = torch.optim.AdamW(params, lr=LR, fused=True)
    averages, values = [p.detach().clone() for p in params], [p.detach() for p in params]

    def step():
        optimizer.step()
        torch._foreach_lerp_(averages, values, 1 - EMA)

    return step


def noise_by_hand(params):
    """Other noise than ours, so its parameters are not compared."""
    optimizer = torch.optim.AdamW(params, lr=LR, fused=True)
    deviation = (NOISE[0] / 2 ** NOISE[1]) ** 0.5

    def step():
        for p in params:
            p.grad.add_(torch.randn_like(p), alpha=deviation)
        optimizer.step()

    return step


BY_HAND = {"float32 master": master_by_hand, "average": average_by_hand}


@pytest.mark.cases(
    quick={mode: (mode, 1, 1 << 20) for mode in MODES},
    full={mode: (mode, 1, 16 << 20) for mode in MODES} | {"float32 master, small": ("float32 master", 2000, 4096)},
)
def bench_storage(race, device, case):
    mode, count, size = case
    options, dtype, nbytes = MODES[mode]
    params = parameters([(size,)] * count, dtype, device)

    def ours(p):
        return steepest.optim.AdamW(p, lr=LR, **options).step

    peers = {"torch by hand": BY_HAND[mode]} if mode in BY_HAND else {}
    mine, theirs = step_runners(params, ours, peers)
    if mode == "gradient noise":
        theirs = {"torch by hand": noise_by_hand(copies(params))}
    elements = count * size
    race(
        mine, theirs, op="adamw", case=f"{mode}, {count} x {size} {str(dtype).removeprefix('torch.')}",
        nbytes=int(nbytes * elements), flops=15 * elements, tensors=count, elements=elements,
    )  # fmt: skip
