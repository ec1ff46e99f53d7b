"""Corners of inverse roots where a mutant went unnoticed."""

from __future__ import annotations

import pytest
import torch

import steepest
from steepest.matrix import root_plan


def definite(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape, shape[-1] + 4, generator=torch.Generator().manual_seed(0))
    return x @ x.mT


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_batch_is_as_if_its_parts_came_alone(count):
    """Two and three parts of the matrices that are walked through all steps at once."""
    options = dict(ridge=1e-3, backend="torch", precision="float64")
    group = root_plan.plan((10**6, 48, 48), **options).group
    a = definite(group * (count - 1) + 2, 48)
    roots, status = steepest.inverse_root(a, return_status=True, **options)
    assert len(roots) == len(a) and all(len(field) == len(a) for field in status)
    for part, expected in zip(a.split(group), zip(*(field.split(group) for field in (roots, *status)))):
        alone = steepest.inverse_root(part, return_status=True, **options)
        assert all(torch.equal(x, y) for x, y in zip((alone[0], *alone[1]), expected))


def test_matrices_without_elements():
    a = torch.zeros(2, 3, 0, 0)
    todo = root_plan.plan((2, 3, 0, 0), method="composite", ridge=1e-3)
    roots, status = steepest.inverse_root(a, return_status=True, method="composite", ridge=1e-3)
    assert roots.shape == a.shape and status.ok.all() and not status.residual.any() and (status.scale == 1).all()
    assert (status.iterations == todo.steps).all() and todo.steps > 1
    assert steepest.effective_dimension(a).tolist() == [[0.0] * 3] * 2
