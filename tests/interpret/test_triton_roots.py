"""inverse_root over the Triton verbs, interpreted, against the torch verbs: within the bounds of rounding of both."""

from __future__ import annotations

import pytest
import torch

from steepest.conformance.cases.roots import definite, plant
from steepest.conformance.root_bounds import CONSTANT
from steepest.matrix.root_plan import plan
from steepest.matrix.roots import execute
from steepest.matrix.triton_verbs import TritonVerbs
from steepest.matrix.verbs import TorchVerbs

pytestmark = pytest.mark.interpret
U = 2.0**-24


@pytest.mark.parametrize("p, ridge", [(4, 1e-4), (4, 1e-6), (2, 1e-3), (3, 1e-3)])
@pytest.mark.parametrize("method", ["composite", "newton"])
def test_triton_verbs_give_what_torch_verbs_give(p, ridge, method):
    a = definite("statistic", 21, seed=p, batch=(2,))
    todo = plan(a.shape, device="cuda", p=p, ridge=ridge, method=method)
    assert (todo.backend, todo.wide) == ("triton", False)
    x, status = execute(a, todo, ridge, False, TritonVerbs(todo.precision))
    y, other = execute(a, todo, ridge, False, TorchVerbs())
    # Both take the same power iterations, whose 7 products of 21 terms may be summed in another order.
    assert status.ok.all() and (status.scale / other.scale - 1).abs().max() <= 2 * 7 * 21 * U
    assert ((x - y).norm(dim=(-2, -1)) <= 2 * CONSTANT * U / (p * ridge) * y.norm(dim=(-2, -1))).all()
    assert torch.equal(x, x.mT)  # one triangle is computed and mirrored


def test_bad_blocks_do_not_disturb_their_neighbours():
    a = definite("clustered", 20, seed=0, batch=(4,))
    plant(a[1], "nan")
    plant(a[2], "indefinite")
    todo = plan(a.shape, device="cuda", ridge=1e-3)
    x, status = execute(a, todo, 1e-3, False, TritonVerbs(todo.precision))
    assert status.ok.tolist() == [True, False, False, True]
    for i in (0, 3):
        alone, _ = execute(a[i : i + 1], todo, 1e-3, False, TritonVerbs(todo.precision))
        assert torch.equal(alone[0], x[i])
