"""The compiled module reads tensors in one of three ways (pyext/tensors.h), which must not make a difference."""

from __future__ import annotations

import copy

import pytest
import torch

import steepest
from steepest._native import lib, reader

fastest = reader.way
WAYS = (lib.Way.PYTHON, lib.Way.DLPACK, lib.Way.DIRECT)
HYPER = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
SHAPES = [(33, 17), (5,), (), (0, 3), (1,), (4, 3, 5, 5), (64, 1), (1025,)]


@pytest.fixture(params=WAYS, ids=lambda way: way.name.lower())
def way(request):
    """Tensors are read in this way for as long as the test runs."""
    reader.way = request.param
    yield
    reader.way = fastest


def test_this_torch_is_read_in_the_fastest_way():
    assert fastest == lib.Way.DIRECT and reader.reads_both


def test_however_tensors_are_read_the_result_is_the_same(way):
    lists = [[torch.rand(shape) for shape in SHAPES] for _ in range(4)]
    others = copy.deepcopy(lists)
    steepest.adamw_(*lists, step=1, **HYPER)
    reader.way = fastest
    steepest.adamw_(*others, step=1, **HYPER)
    assert all(torch.equal(a, b) for x, y in zip(lists, others) for a, b in zip(x, y))


def test_however_tensors_are_read_an_optimizer_sees_what_became_of_them(way):
    """Each step, with other memory or another layout in the same Python objects, is a new optimizer's, bit for bit."""
    p = torch.nn.Parameter(torch.randn(6, 4))
    optimizer = steepest.optim.AdamW([p], lr=0.1)

    def step_as_expected():
        p.grad = torch.randn_like(p)
        twin = torch.nn.Parameter(p.detach().clone())
        fresh = steepest.optim.AdamW([twin], lr=0.1)
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        twin.grad = p.grad.clone()
        version, saved, before = p._version, p * p, p.detach().clone()
        optimizer.step(), fresh.step()
        assert torch.equal(p, twin) and (p != before).all()
        assert p._version == version + 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.sum().backward()

    step_as_expected()
    p.data = torch.randn(6, 4)
    step_as_expected()
    p.data = torch.randn(4, 6).t()
    optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
    step_as_expected()
    with torch.no_grad():
        p.set_(torch.randn(48)[3:27].view(4, 6).t())
    step_as_expected()
    storage, values = p.untyped_storage(), p.detach().clone()
    storage.resize_(0)
    storage.resize_(48 * 4)
    p.data.copy_(values)
    step_as_expected()


def test_what_cannot_be_read_is_turned_down(way):
    complex_, sparse = torch.zeros(3, dtype=torch.complex64), torch.zeros(3, 3).to_sparse()
    for strange in (complex_, sparse, 5, torch.zeros(3, device="meta")):
        found = lib.survey(reader, [strange], 2.0, 1.0, 1)
        assert found[0] in ("type", "dtype", "device")


class Special(torch.Tensor):
    pass


def test_odd_rows_among_many(way):
    """Rows are found by all threads; what becomes of some between steps is seen whichever thread has them."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3 + i % 5, 2, generator=generator) for i in range(600)]
    params = [torch.nn.Parameter(v.clone()) for v in values]
    twins = [torch.nn.Parameter(v.double()) for v in values]
    optimizer, expected = steepest.optim.SGD(params, lr=0.1), torch.optim.SGD(twins, lr=0.1)

    def new_memory(i):
        params[i].data = params[i].data.clone()

    def other_layout(i):
        params[i].data = params[i].data.t().contiguous().t()

    def gradient_of_another_layout(i):
        params[i].grad = params[i].grad.t().contiguous().t()

    def no_gradient(i):
        params[i].grad = twins[i].grad = None

    nothing = lambda i: None  # noqa: E731
    changes = (
        nothing, nothing, new_memory, other_layout, gradient_of_another_layout, no_gradient, nothing,
        nothing,
    )  # fmt: skip
    for change in changes:
        for p, twin in zip(params, twins):
            p.grad = torch.randn(p.shape, generator=generator)
            twin.grad = p.grad.double()
        for i in (0, 1, 77, 299, 300, 599):
            change(i)
        versions = [p._version for p in params]
        stepped = [p.grad is not None for p in params]
        optimizer.step(), expected.step()
        assert [p._version - before for p, before in zip(params, versions)] == [int(s) for s in stepped]
        for p, twin in zip(params, twins):
            # One rounding of the product and one of the sum, in each of at most nine steps; |p| < 8.
            assert (p.double() - twin).abs().max() < 9 * 2 * 8 * 2.0**-24


@pytest.mark.parametrize("kind", ["shared memory", "subclass", "sparse"])
@pytest.mark.parametrize("row", [0, 5, 599])
def test_an_impossible_row_among_many_changes_nothing(way, row, kind):
    params = [torch.nn.Parameter(torch.ones(4, 2)) for _ in range(600)]
    optimizer = steepest.optim.SGD(params, lr=0.1)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones(4, 2)
        optimizer.step()
    p, before = params[row], [p.detach().clone() for p in params]
    if kind == "shared memory":
        p.data = params[(row + 1) % 600].data
    else:
        p.grad = None
        p.grad = torch.ones(4, 2).as_subclass(Special) if kind == "subclass" else torch.ones(4, 2).to_sparse()
    with pytest.raises((TypeError, ValueError), match=r"memory|Special|dense"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before))


def test_gradients_that_python_has_never_seen(way):
    """As backward leaves them: no Python object exists until somebody asks for one."""
    params = [torch.nn.Parameter(torch.full((5,), float(i))) for i in range(300)]
    optimizer = steepest.optim.SGD(params, lr=0.25)
    for k in range(1, 4):
        optimizer.zero_grad()
        sum(i * p.sum() for i, p in enumerate(params)).backward()
        optimizer.step()
        assert all(torch.equal(p, torch.full((5,), i - 0.25 * k * i)) for i, p in enumerate(params))
