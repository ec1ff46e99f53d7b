"""Muon on parameters that hold several matrices, and its other options: cautious decay, NorMuon, momentum dtype."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import steepest
from steepest.optim.muon_matrices import Piece, normalised_rows, pieces, row_shape
from steepest.optim.split import assign

PLAIN = dict(lr=0.1, momentum=0.0, weight_decay=0.0, scale="spectral")


def stepped(shape, grads, **options):
    """Parameter after steps with these gradients, from ones; and the optimizer."""
    p = torch.ones(shape).requires_grad_()
    optimizer = steepest.optim.Muon([p], **{**PLAIN, **options})
    for g in grads:
        p.grad = g.reshape(shape).clone()
        optimizer.step()
    return p.detach(), optimizer


DECLARED = [
    ((6, 4), "whole", [(slice(0, 6), 1)]),
    ((6, 4, 3), "flatten", [(slice(0, 6), 1)]),
    ((5, 2, 3, 3), "flatten", [(slice(0, 5), 1)]),
    ((12, 5), 3, [(slice(0, 12), 3)]),
    ((12, 5), (4, 8), [(slice(0, 4), 1), (slice(4, 12), 1)]),
    ((20, 5), ((12, 3), (4, 1), 4), [(slice(0, 12), 3), (slice(12, 16), 1), (slice(16, 20), 1)]),
]


@pytest.mark.parametrize("shape, matrices, parts", DECLARED)
@pytest.mark.parametrize("normuon", [None, 0.9])
def test_a_declared_parameter_steps_like_its_matrices_alone(shape, matrices, parts, normuon):
    grads = [torch.randn(shape) for _ in range(3)]
    together, _ = stepped(shape, grads, matrices=matrices, normuon=normuon)
    for rows, count in parts:
        cut = [g[rows].flatten(1).chunk(count) for g in grads]
        for i, expected in enumerate(together[rows].flatten(1).chunk(count)):
            alone, _ = stepped(cut[0][i].shape, [c[i] for c in cut], normuon=normuon)
            # Two float32 evaluations of one polynomial, each right to 1e-5 of its norm, for 3 steps of lr and scale.
            size = 3 * 0.1 * (alone.shape[0] / alone.shape[1]) ** 0.5 * min(alone.shape) ** 0.5
            assert (alone - expected).norm() <= 3e-5 * size


def test_a_stack_of_experts_is_as_many_matrices():
    grads = [torch.randn(2, 3, 6, 4) for _ in range(2)]
    for normuon in (None, 0.9):
        together, optimizer = stepped((2, 3, 6, 4), grads, matrices="stack", normuon=normuon)
        for i in range(2):
            for j in range(3):
                alone, _ = stepped((6, 4), [g[i, j] for g in grads], normuon=normuon)
                assert (together[i, j] - alone).norm() <= 2e-5
    (state,) = optimizer.state.values()
    assert state["row_moment"].shape == (2, 3, 6) and state["momentum_buffer"].shape == (2, 3, 6, 4)


def test_memory_layout_does_not_matter():
    grads = [torch.randn(8, 3, 3, 3) for _ in range(2)]
    contiguous, _ = stepped((8, 3, 3, 3), grads, matrices="flatten", momentum=0.9, weight_decay=0.1)
    p = torch.ones(8, 3, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    optimizer = steepest.optim.Muon([p], **{**PLAIN, "momentum": 0.9, "weight_decay": 0.1}, matrices="flatten")
    for g in grads:
        p.grad = g.to(memory_format=torch.channels_last)
        optimizer.step()
    assert (p.detach() - contiguous).norm() <= 1e-5
    assert p.is_contiguous(memory_format=torch.channels_last)


def test_names_of_a_model_with_convolutions():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8), "head": nn.Linear(8, 2)})
    found = {a.name: a for a in steepest.optim.Muon(model.named_parameters(), matrices="flatten").split}
    assert found["conv.weight"].algorithm == "muon" and found["conv.weight"].reason == "4-D, flattened"
    assert {n for n, a in found.items() if a.algorithm == "adamw"} == set(found) - {"conv.weight"}
    assert assign("conv.weight", torch.zeros(8, 3, 3, 3)).reason == "4-D, not a matrix"
    assert assign("experts.w", torch.zeros(4, 8, 3), "stack").reason == "3-D, a stack of matrices"
    assert assign("scale", torch.zeros(1, 8, 1), "flatten").algorithm == "adamw"
    assert assign("token_embedding.table", torch.zeros(4, 8, 3), "stack").algorithm == "adamw"


def test_a_group_may_declare_for_itself():
    qkv, conv = torch.randn(12, 4, requires_grad=True), torch.randn(5, 2, 3, requires_grad=True)
    optimizer = steepest.optim.Muon(
        [{"params": [qkv], "matrices": (4, 4, 4)}, {"params": [conv], "matrices": "flatten"}], lr=0.1
    )
    assert [g["algorithm"] for g in optimizer.param_groups] == ["muon", "muon"]
    for p in (qkv, conv):
        p.grad = torch.randn_like(p)
    optimizer.step()


@pytest.mark.parametrize(
    "shape, matrices, message",
    [
        ((4, 3, 3), "whole", "say matrices='flatten'"),
        ((4,), "flatten", "holds no matrix"),
        ((4,), "stack", "holds no matrix"),
        ((7, 4), 2, "7 rows are not 2 matrices of equal height"),
        ((7, 4), (3, 3), "which is 6 rows"),
        ((8, 4), ((8, 3),), "8 rows are not 3 matrices"),
        ((8, 4, 2), 2, "is not a matrix, whose rows"),
        ((8, 4), 0, "are not 0 matrices"),
        ((8, 4), "heads", "expected one of"),
        ((8, 4), True, "expected one of"),
    ],
)
def test_declarations_that_do_not_fit_are_refused(shape, matrices, message):
    with pytest.raises(ValueError, match=message):
        pieces(shape, matrices)
    with pytest.raises(ValueError, match=message):
        steepest.optim.Muon(
            [{"params": [torch.zeros(shape, requires_grad=True)], "algorithm": "muon"}], matrices=matrices
        )


def test_pieces_and_row_shapes():
    assert pieces((10, 4), (4, (6, 2))) == [Piece(0, 4, 1, 4, 4), Piece(4, 6, 2, 3, 4)]
    assert pieces((2, 3, 5, 4), "stack") == [Piece(0, 2, 6, 5, 4)]
    assert pieces((5, 4), "stack") == [Piece(0, 5, 1, 5, 4)]
    assert row_shape((8, 3, 3, 3), "flatten") == (8,) and row_shape((2, 3, 4), "stack") == (2, 3)


def test_cautious_decay_only_where_the_step_goes_towards_zero():
    w, g = torch.randn(6, 9), torch.randn(6, 9)
    p = w.clone().requires_grad_()
    p.grad = g
    steepest.optim.Muon([p], **{**PLAIN, "weight_decay": 0.5}, cautious=True).step()
    u = steepest.polar(g)
    decayed = torch.where(u * w > 0, w * (1 - 0.1 * 0.5), w)
    torch.testing.assert_close(p.detach(), decayed - 0.1 * (6 / 9) ** 0.5 * u, rtol=1e-5, atol=1e-6)
    assert 5 < (u * w > 0).sum() < 49


def test_normuon_is_the_published_rule_with_the_length_kept():
    moments, v = torch.zeros(1, 6), torch.zeros(6, dtype=torch.float64)
    for _ in range(4):
        o = torch.randn(1, 6, 9)
        exact = o[0].double()
        v = 0.9 * v + 0.1 * (exact**2).mean(1)
        p = exact / (v.sqrt() + 1e-8)[:, None]
        expected = p * exact.norm() / p.norm()
        found = normalised_rows(o, moments, 0.9)
        torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments[0].double(), v, rtol=1e-5, atol=0)
    assert torch.equal(normalised_rows(torch.zeros(1, 2, 3), torch.zeros(1, 2), 0.9), torch.zeros(1, 2, 3))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("param, kept", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_momentum_in_another_dtype_than_the_parameter(param, kept, nesterov):
    p = torch.randn(5, 8).to(param).requires_grad_()
    optimizer = steepest.optim.Muon([p], momentum=0.9, nesterov=nesterov, momentum_dtype=kept)
    exact = torch.zeros(5, 8)
    for _ in range(3):
        p.grad = torch.randn(5, 8).to(param)
        exact = torch.lerp(exact, p.grad.float(), 0.1).to(kept).float()
        optimizer.step()
    buffer = optimizer.state[p]["momentum_buffer"]
    assert buffer.dtype is kept and torch.equal(buffer.float(), exact)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    q = p.detach().clone().requires_grad_()
    other = steepest.optim.Muon([q], momentum=0.9, nesterov=nesterov, momentum_dtype=kept)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.state[q]["momentum_buffer"], buffer) and other.state[q]["momentum_buffer"].dtype is kept
    p.grad = torch.randn(5, 8).to(param)
    q.grad = p.grad.clone()
    optimizer.step()
    other.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"normuon": 1.0}, "normuon is 1.0"),
        ({"norm": "l2"}, "norm must be"),
        ({"momentum_dtype": torch.float16}, "momentum_dtype is torch.float16"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        steepest.optim.Muon([torch.zeros(4, 4, requires_grad=True)], **options)


def test_more_matrices_than_a_batch_holds(monkeypatch):
    from steepest.optim import muon

    grads = [torch.randn(3, 8, 4)]
    expected, _ = stepped((3, 8, 4), grads, matrices="stack")
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", 1)
    params = [torch.ones(8, 4, requires_grad=True) for _ in range(3)]
    for p, g in zip(params, grads[0]):
        p.grad = g
    steepest.optim.Muon(params, **PLAIN).step()
    assert (torch.stack([p.detach() for p in params]) - expected).norm() <= 1e-5
