"""The cost model by which inverse roots choose their method, number by number."""

from __future__ import annotations

import pytest
import torch

from steepest.matrix import root_plan
from steepest.matrix.root_plan import EIGH_IN_PRODUCTS, composite_in_products, eigh_in_products
from steepest.matrix.verbs import symmetric_fraction


def test_what_composite_costs_in_products():
    assert composite_in_products(4, 10, False, "native") == 10 + 1 + 100
    assert composite_in_products(4, 10, True, "native") == 10 + 2.0 + 1 + 100
    assert composite_in_products(1, 10, False, "native") == composite_in_products(0, 10, False, "native") == 411
    assert composite_in_products(2, 10, True, "torch", whole=True) == 13.6 * 21
    for n in (0, 1):
        assert composite_in_products(n, 10, False, "torch", whole=True) == 10 * 41
    assert symmetric_fraction(2048, "cpu") < 1
    assert composite_in_products(2048, 10, False, "torch") == 10 * symmetric_fraction(2048, "cpu") * (1 + 40 / 2048)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_what_eigh_costs_between_the_sizes_that_were_measured(backend):
    """Geometric means half-way, on a logarithmic scale, between neighbours; the ends' values beyond them."""
    for threads, column in ((1, 1), (2, 2), (3, 2), (64, 2)):
        table = EIGH_IN_PRODUCTS[backend][column]
        for n, cost in table:
            assert eigh_in_products(n, threads, backend) == pytest.approx(cost, rel=1e-14)
        for (n0, c0), (n1, c1) in zip(table, table[1:]):
            assert n1 == 2 * n0
            assert eigh_in_products(n0 * 2**0.5, threads, backend) == pytest.approx((c0 * c1) ** 0.5, rel=1e-12)
        assert eigh_in_products(1, threads, backend) == table[0][1]
        assert eigh_in_products(1 << 20, threads, backend) == table[-1][1]


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("p, ridge, tol", [(4, 1e-6, 1e-3), (4, 1e-4, 1e-3), (1, 1e-5, 1e-2), (8, 1e-6, 5e-3)])
def test_a_plan_says_what_it_compared(backend, p, ridge, tol):
    """The sensitive products count as float64's exactly where the plan has them in float64."""
    options = {"p": p, "ridge": ridge, "tol": tol, "backend": backend}
    for n in (1, 100):
        composite = root_plan.plan((n, n), method="composite", **options)
        cost = composite_in_products(n, composite.products, composite.wide, backend)
        other = eigh_in_products(n, torch.get_num_threads(), backend)
        found = root_plan.plan((n, n), **options)
        assert found.why == f"composite costs as much as {cost:.3g} products, eigh as {other:.3g}"
        assert found.method == ("composite" if cost <= other else "eigh")


def test_some_of_these_plans_are_wide_and_some_are_not():
    wide = [root_plan.plan((9, 9), method="composite", ridge=ridge, backend="torch").wide for ridge in (1e-6, 1e-4)]
    assert wide == [True, False]


def test_of_equal_costs_composite_is_taken(monkeypatch):
    arguments = (64, "cpu", 1, 4, 1e-4, False, 1e-3, "float32", "native")
    products = root_plan.plan((64, 64), method="composite", ridge=1e-4, backend="native").products
    cost = composite_in_products(64, products, False, "native")
    for other, expected in ((cost, "composite"), (cost * (1 - 1e-9), "eigh")):
        monkeypatch.setattr(root_plan, "eigh_in_products", lambda *_, other=other: other)
        assert root_plan._choose_method(*arguments)[0] == expected
