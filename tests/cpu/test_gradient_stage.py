"""What a rule gets, bit for bit: the gradient, divided, multiplied, clamped, with noise; and the scalars of Adam."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import steepest
from steepest._native import lib
from steepest.reference import adamw
from steepest.rules import hyper_fields

LR = 1.0  # then the parameter 0 becomes -g
NOISE = dict(gradient_noise=(0.1, 0.55), seed=3)


def prepared(grad: torch.Tensor, divisor: float, coefficient: float, limit: float | None, noise: bool) -> torch.Tensor:
    """The gradient that plain descent took."""
    p = torch.zeros_like(grad)
    steepest.sgd_(
        [p], [grad], lr=LR, step=1, maximize=divisor < 0, clip_value=limit,
        grad_scale=None if abs(divisor) == 1 else torch.tensor(abs(divisor)),
        clip_coefficient=None if coefficient == 1 else torch.tensor(coefficient), **(NOISE if noise else {}),
    )  # fmt: skip
    return -p


@pytest.mark.parametrize("noise", [False, True])
def test_every_combination_of_parts(noise):
    grad = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    parts = itertools.product((1.0, 3.0, 7.0), (1, -1), (1.0, 0.37, 3.0), (None, 0.7, 2.5))
    added = prepared(torch.zeros(1000), 1.0, 1.0, None, noise).numpy()
    for scale, sign, coefficient, limit in parts:
        expected = grad.numpy() / np.float32(scale * sign) * np.float32(coefficient)
        expected = (expected if limit is None else expected.clip(-np.float32(limit), np.float32(limit))) + added
        found = prepared(grad, scale * sign, coefficient, limit, noise)
        assert np.array_equal(found.numpy(), expected), (scale, sign, coefficient, limit)
    assert (added == 0).all() != noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.1])
def test_decay_is_added_to_gradients_of_any_type(dtype, decay):
    p, g = (torch.randn(1001, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    wide, rate = g.float() + torch.tensor(decay) * p.float() if decay else g.float(), torch.tensor(-0.3)
    expected = (p.float() + rate * wide).to(dtype)
    steepest.sgd_([p], [g], lr=0.3, weight_decay=decay, step=1)
    assert torch.equal(p, expected)


def test_the_scalars_of_adam_are_rounded_once():
    """Worked out in float64 from the numbers given, then rounded to float32: for many of those."""
    numbers = np.random.default_rng(0)
    for _ in range(2000):
        lr, eps, decay = 10.0 ** numbers.uniform(-5, 0), 10.0 ** numbers.uniform(-12, -2), numbers.uniform(0, 0.2)
        betas, step = (numbers.uniform(0, 0.99), 1 - 10.0 ** numbers.uniform(-4, -1)), int(numbers.integers(1, 2000))
        row = dict(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=decay)
        shrink, lerp, _, *others = lib.adam_scalars([(hyper_fields(row), step)])[0]
        s = adamw.scalars(lr=lr, betas=betas, eps=eps, weight_decay=decay, step=step)
        expected = (s.decay, s.lerp, s.beta2, s.beta2_rest, s.negative_step_size, s.eps)
        assert [shrink, lerp, *others] == [np.float32(x) for x in expected], (row, step)
