"""NormedDescent against the reference's exact direction, and the properties that define it."""

import pytest
import torch

import steepest
from steepest import optim, reference

SHAPES = [(6, 10), (10, 6), (7,), (3, 4, 5), (), (0, 3)]
NORMS = ("l2", "linf", "spectral")


def lists(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES] for _ in range(2)]


def slack(norm: str, p: torch.Tensor, lr: float, dual: float) -> float:
    """Rounding of a few float32 operations; the spectral direction is off by the polar schedule's certified error."""
    error = lr * dual * (0.35 if norm == "spectral" else 8 * 2.0**-24) + 4 * 2.0**-24 * (1 + lr * dual)
    return error + (torch.finfo(p.dtype).eps * (p.abs().max().item() + lr * dual) if p.dtype != torch.float32 else 0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_reference(norm, normalized, maximize, dtype):
    lr = 0.1
    (params, grads), (exact, _) = lists(dtype), lists(dtype)
    exact = [p.double() for p in exact]
    options = dict(lr=lr, norm=norm, normalized=normalized, weight_decay=0.1, maximize=maximize)
    steepest.normed_descent_(params, grads, **options)
    reference.normed_descent_(exact, [g.double() for g in grads], **options)
    leaves = [p.requires_grad_() for p in lists(dtype)[0]]
    for p, g in zip(leaves, grads):
        p.grad = g
    optim.NormedDescent(leaves, **options).step()
    for p, q, x, g in zip(params, leaves, exact, grads):
        assert torch.equal(p, q)
        if p.numel():
            dual = 1.0 if normalized else reference.normed_descent.direction(g.double(), norm)[1].item()
            assert (p.double() - x).abs().max() <= slack(norm, p, lr, dual)


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_has_norm_lr_and_descends(norm):
    params, grads = lists()
    before = [p.clone() for p in params]
    steepest.normed_descent_(params, grads, lr=0.5, norm=norm)
    for p, b, g in zip(params, before, grads):
        if not p.numel():
            continue
        step = (b - p).double()
        assert (step * g).sum() > 0
        size = {
            "l2": step.norm(),
            "linf": step.abs().max(),
            "spectral": torch.linalg.matrix_norm(reference.normed_descent.as_matrix(step), 2),
        }[norm]
        assert abs(size.item() - 0.5) <= 0.5 * (0.35 if norm == "spectral" else 1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradients_move_nothing(norm):
    p = torch.ones(3, 4)
    steepest.normed_descent_([p], [torch.zeros(3, 4)], lr=0.1, norm=norm)
    assert torch.equal(p, torch.ones(3, 4))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="norm is 'l1', expected one of l2, linf, spectral"):
        optim.NormedDescent([torch.zeros(2, requires_grad=True)], norm="l1")
    with pytest.raises(ValueError, match=r"grads\[0\] has shape"):
        steepest.normed_descent_([torch.zeros(2)], [torch.zeros(3)], lr=0.1)
    with pytest.raises(ValueError, match="lr is -1"):
        steepest.normed_descent_([torch.zeros(2)], [torch.zeros(2)], lr=-1)
