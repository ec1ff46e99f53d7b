"""Recorded chains of matrix products: executed step by step in float64 they are the algorithm that was recorded."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from steepest.conformance.cases.roots import definite
from steepest.conformance.noise import NoisyVerbs
from steepest.matrix import polar, root_plan, roots, tape
from steepest.schedules import minimax

F64 = torch.float64
EXACT = NoisyVerbs(F64, None)


def executed(chain: tape.Chain, x: torch.Tensor) -> torch.Tensor:
    """What the kernel's loop over the tables does, on one matrix; a step that overwrites its own operand fails."""
    buffers = [x, *(torch.full(shape, torch.nan, dtype=F64) for shape in chain.shapes[1:])]
    for row, (alpha, beta, gamma, diagonal) in zip(chain.steps.tolist(), chain.numbers.tolist()):
        kind, rows, columns, k, a, b, c, e, d, mirror = row
        assert d not in (c, e) and (not k or d not in (a, b)) and d > 0
        value = torch.zeros(rows, columns, dtype=F64)
        if k:
            left, right = buffers[a], buffers[b]
            assert k == left.shape[0 if kind == tape.GRAM_OF_COLUMNS else 1]
            left = left.mT if kind == tape.GRAM_OF_COLUMNS else left
            value += alpha * (left @ (right.mT if kind == tape.GRAM_OF_ROWS else right))
        for factor, number in ((beta, c), (gamma, e)):
            value += factor * buffers[number] if number >= 0 else 0
        value += diagonal * torch.eye(rows, columns, dtype=F64)
        assert value.shape == buffers[d].shape and (rows == columns or not mirror)
        if mirror:
            torch.testing.assert_close(value, value.mT, rtol=1e-9, atol=1e-9)
            value = value.tril() + value.tril(-1).mT
        buffers[d] = value
    return buffers[1]


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 7)])
@pytest.mark.parametrize("schedule", ["polar-express", "cubic", "deepseek-v4", minimax(2, 1e-6, degree=3, steps=4)])
def test_the_gram_form_of_the_polar_factor(schedule, shape):
    steps = 10 if schedule == "deepseek-v4" else 5
    todo = polar.plan(shape, torch.float16, "cuda", schedule=schedule, steps=steps)
    assert todo.resident and todo.form == "gram" and todo.restarts
    x = polar.normalised(torch.randn(1, *shape, dtype=F64), F64)
    expected = polar.iterate(x, todo, EXACT)[0]
    chain = polar._tape(todo, *shape, shape[0] > shape[1])
    products = [row for row in chain.steps.tolist() if row[3]]
    assert len(products) == todo.grams + todo.symmetric_products + todo.long_products
    assert len(chain.shapes) <= 8
    torch.testing.assert_close(executed(chain, x[0]), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("p", root_plan.ORDERS)
@pytest.mark.parametrize("method", ["composite", "newton"])
def test_inverse_roots(p, method):
    todo = root_plan.plan((7, 7), device="cuda", p=p, ridge=1e-3, method=method)
    todo = dataclasses.replace(todo, dtype=F64)
    assert todo.resident and todo.mirrored
    m = definite("clustered", 7, seed=p, dtype=F64)
    m = (m / torch.linalg.matrix_norm(m, 2) + 1e-3 * torch.eye(7, dtype=F64)) / 1.01
    chain = roots._tape(todo, 7)
    assert sum(row[3] > 0 for row in chain.steps.tolist()) == todo.products
    assert len(chain.shapes) <= 8
    torch.testing.assert_close(executed(chain, m), roots.iterate(m[None], todo, EXACT)[0], rtol=1e-9, atol=1e-9)


def test_squares_alone_are_mirrored_where_precision_demands_it():
    """Mirroring other products of single-pass tf32 would lose what is small in them."""
    todo = root_plan.plan((8, 8), device="cuda", ridge=1e-3, method="composite", precision="tf32")
    assert todo.resident and not todo.mirrored
    products = [row for row in roots._tape(todo, 8).steps.tolist() if row[3]]
    mirrored = [row for row in products if row[9]]
    assert len(mirrored) < len(products)
    # But for the polynomial of the last step, whose rounding nothing enlarges.
    assert all(row[4] == row[5] for row in mirrored[:-1])
    assert all(row[9] for row in roots._tape(dataclasses.replace(todo, mirrored=True), 8).steps.tolist() if row[3])
    assert [tape.symmetric_fraction(n) for n in (1, 64, 65, 128)] == [1.0, 1.0, 0.75, 0.75]


def test_a_tall_matrix_stays_tall_when_padding_makes_it_square():
    """Its Gram matrix over the long side would have a null space, where rounding grows."""
    todo = polar.plan((7, 3), torch.float16, "cuda")
    x = torch.zeros(8, 8, dtype=F64)
    x[:7, :3] = polar.normalised(torch.randn(1, 7, 3, dtype=F64), F64)[0]
    chain = polar._tape(todo, 8, 8, True)
    assert chain.steps[0, 0] == tape.GRAM_OF_COLUMNS
    expected = polar.iterate(x[None, :7, :3], todo, EXACT)[0]
    torch.testing.assert_close(executed(chain, x)[:7, :3], expected, rtol=1e-10, atol=1e-11)


def test_sums_of_multiples_are_one_step_and_multiples_are_matrices_of_their_own():
    def algorithm(x, verbs):
        z = verbs.symmetric_product(x, x)
        twice = z * 2.0
        twice.diagonal(dim1=-2, dim2=-1).add_(3.0)
        same = z * 1.0
        same.diagonal(dim1=-2, dim2=-1).add_(5.0)
        return torch.add(twice, torch.add(same * 0.5, z, alpha=-1.0), alpha=4.0)

    recorded, result = tape.record(algorithm, 3, 3)
    assert len(recorded.steps) == 5
    x = torch.randn(3, 3, dtype=F64)
    x = x + x.mT
    z, eye = x @ x, torch.eye(3, dtype=F64)
    expected = 2 * z + 3 * eye + 4 * (0.5 * (z + 5 * eye) - z)
    torch.testing.assert_close(executed(tape.allocate(recorded, result, 3, 3), x), expected)


@pytest.mark.parametrize("tall", [False, True])
def test_every_verb_multiplies_out_the_factors_of_its_operands(tall):
    def algorithm(verbs, x):
        z = verbs.gram(x * 0.5)
        a, c = z * 2.0, z * -0.5
        b = verbs.symmetric_product(a, z * 3.0, alpha=0.5, beta=2.0, c=c, diagonal=1.5)
        d = verbs.commuting_product(a, b * 0.25, beta=-1.0, c=c)
        d = verbs.commuting_product(d, a)
        e = verbs.combination(a, alpha=3.0, beta=0.5, c=d * 4.0, diagonal=2.0)
        f = verbs.combination(e * 0.5)
        g = verbs.combination(f, beta=1.0, c=z * 0.25)
        g = verbs.combination(g, beta=0.0, c=e)
        g = verbs.symmetric_product(g, z, beta=0.0, c=e)
        q = torch.add(g, torch.add(f * 2.0, b * 0.125, alpha=-3.0))
        return verbs.long_product(q * 0.75, verbs.long_product(z, x * 0.5, alpha=0.5, shift=-2.0))

    # Small whole numbers and binary fractions: nothing is rounded.
    x = torch.randint(-1, 2, (3, 5), generator=torch.Generator().manual_seed(0)).double()
    recorded, result = tape.record(lambda x, verbs: algorithm(verbs, x), *((5, 3) if tall else (3, 5)), tall)
    chain = tape.allocate(recorded, result, *((5, 3) if tall else (3, 5)))
    got = executed(chain, x.mT.contiguous()).mT if tall else executed(chain, x)
    assert torch.equal(got, algorithm(EXACT, x[None])[0]) and got.abs().amax() > 1


def test_the_input_is_never_overwritten_and_what_is_not_recorded_is_refused():
    recorded, result = tape.record(lambda x, verbs: verbs.gram(x), 3, 8)
    chain = tape.allocate(recorded, result, 3, 8)
    assert chain.steps[:, 8].min() == 1
    with pytest.raises(NotImplementedError, match="is not recorded"):
        tape.record(lambda x, verbs: torch.matmul(x, x), 3, 3)

    def late(x, verbs):
        z = verbs.gram(x)
        verbs.gram(x)
        z.diagonal(dim1=-2, dim2=-1).add_(1.0)
        return z

    with pytest.raises(NotImplementedError, match="diagonal of the newest"):
        tape.record(late, 3, 3)


@pytest.mark.parametrize("dtype, unit", [(torch.float32, 4), (torch.float16, 8)])
def test_padding_to_16_bytes(dtype, unit):
    x = torch.randn(2, 2 * unit, 3 * unit).to(dtype)
    assert tape.padded(x) is x
    for odd in (x[:, 1:], x[:, :, 1:], x.mT, x[:, :, ::2]):
        wide = tape.padded(odd)
        rows, columns = odd.shape[1:]
        assert wide.shape[1] % unit == wide.shape[2] % unit == wide.stride(1) % unit == wide.data_ptr() % 16 == 0
        assert torch.equal(wide[:, :rows, :columns], odd)
        assert wide.count_nonzero() == odd.count_nonzero()
    assert np.prod(tape.padded(x[:, 1:]).shape) == x.numel()


def test_the_planner_takes_one_program_per_matrix_up_to_128_rows():
    options = dict(dtype=torch.float32, device="cuda")
    assert polar.plan((4, 128, 4096), **options).resident and polar.plan((4096, 128), **options).resident
    assert not polar.plan((129, 200), **options).resident
    assert not polar.plan((64, 64), **options, norm="schatten4").resident
    assert not polar.plan((64, 64), **options, form="plain").resident
    assert not polar.plan((64, 64), torch.float32, "cpu").resident
    assert root_plan.plan((9, 128, 128), device="cuda").resident
    assert not root_plan.plan((9, 129, 129), device="cuda").resident and not root_plan.plan((9, 9)).resident
