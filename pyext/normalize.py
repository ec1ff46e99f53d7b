"""Weight normalisation, differentiable, and path normalisation: the regularisers that rescale parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from steepest import check, norms
from steepest._native import lib, num_threads


def weight_norm(v: Tensor, g: Tensor, dim: int | None = 0) -> Tensor:
    """A weight given by direction and length: w = g v / ‖v‖, with its gradient.

        w_i = g_i v_i / ‖v_i‖,   ∂g_i = <∂w_i, v_i> / ‖v_i‖,   ∂v_i = g_i / ‖v_i‖ (∂w_i - <∂w_i, v_i> / ‖v_i‖² v_i)

    for each slice i along `dim`.  On the CPU in float32 both are one pass of a kernel of this library over each slice,
    norms and inner products summed in float64 in a fixed order; other dtypes and CUDA take torch's own fused kernel
    (torch._weight_norm).  A slice with NaN is NaN.  A slice of zeros gives zeros, in both directions; from torch's
    kernel it is NaN.

    Args:
        v: direction, float tensor of at least one dimension.
        g: length, with v's size along `dim` and 1 elsewhere; for dim=None a 0-dim or one-element tensor.
        dim: the dimension along which slices have lengths of their own; None: one length for all of v.

    Raises ValueError or TypeError for other shapes, dtypes or devices.
    Cost: forward 8 bytes per element, backward 12.  Source: Salimans & Kingma 2016, "Weight Normalization".
    """
    shape = _check(v, g, dim)
    if not v.numel():  # torch's kernel divides by the number of elements (torch 2.13: SIGFPE)
        return v * g.reshape(shape if dim is not None else (1,) * v.dim())
    if v.device.type != "cpu" or v.dtype != torch.float32:
        whole = dim is None
        found = torch._weight_norm(v.reshape(1, -1) if whole else v, g.reshape(shape), 0 if whole else dim)
        return found.reshape(v.shape)
    if dim is None:
        return _WeightNorm.apply(v.reshape(1, -1), g.reshape(1)).reshape(v.shape)
    rows = v.movedim(dim, 0)
    matrix = rows.reshape(len(rows), math.prod(rows.shape[1:]))
    return _WeightNorm.apply(matrix, g.reshape(-1)).reshape(rows.shape).movedim(0, dim)


def _check(v: Tensor, g: Tensor, dim: int | None) -> tuple[int, ...]:
    """The shape that g must have for torch's kernel."""
    op = "weight_norm"
    for name, x in (("v", v), ("g", g)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{op}: {name} is {found}, expected a floating-point tensor")
    if v.dim() == 0:
        raise ValueError(f"{op}: v has no dimension, expected at least one")
    if dim is not None and not -v.dim() <= dim < v.dim():
        raise ValueError(f"{op}: dim is {dim}, expected None or a dimension of v, which has {v.dim()}")
    if g.device != v.device or g.dtype != v.dtype:
        raise ValueError(f"{op}: g is {g.dtype} on {g.device}, v is {v.dtype} on {v.device}")
    wanted = 1 if dim is None else v.shape[dim]
    shape = tuple(wanted if dim is not None and d == dim % v.dim() else 1 for d in range(v.dim()))
    if g.numel() != wanted or (dim is not None and tuple(g.shape) not in (shape, (wanted,))):
        raise ValueError(f"{op}: g has shape {tuple(g.shape)}, expected {shape}, a length for each slice of v")
    return (1, 1) if dim is None else shape


class _WeightNorm(torch.autograd.Function):
    """Of the rows of a matrix."""

    @staticmethod
    def forward(ctx, v, g):
        v, g = v.contiguous(), g.contiguous()
        w, lengths = torch.empty_like(v), torch.empty_like(g)
        lib.weight_norm(
            *v.shape, v.data_ptr(), g.data_ptr(), lengths.data_ptr(), w.data_ptr(), 0, 0, 0, num_threads()
        )  # fmt: skip
        ctx.save_for_backward(v, g, lengths)
        return w

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_w):
        v, g, lengths = ctx.saved_tensors
        grad_w, grad_v, grad_g = grad_w.contiguous(), torch.empty_like(v), torch.empty_like(g)
        lib.weight_norm(
            *v.shape, v.data_ptr(), g.data_ptr(), lengths.data_ptr(), 0, grad_w.data_ptr(), grad_v.data_ptr(),
            grad_g.data_ptr(), num_threads(),
        )  # fmt: skip
        return grad_v, grad_g


@torch.no_grad()
def path_normalize_(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """Divides parameters by the length of all gradients together, in place: w / sqrt(sum_i ‖g_i‖²).

    Args:
        params: tensors, scaled in place, each rounded once to its dtype.
        grads: tensors on one device, read once; any number of them (those of several steps, say).

    Returns the root, a 0-dim float32 tensor on the gradients' device; nothing changes where it is 0.  No host sync on
    CUDA.  Raises ValueError or TypeError for tensors that `survey` refuses.  Cost: 4 bytes per float32 gradient element
    and 8 per parameter.
    """
    op = "path_normalize_"
    check.tensor_lists(op, ("params",), [params])
    for i, p in enumerate(params):
        check.one(f"{op}: params[{i}]", p, written=True)
    check.leaves(op, params)
    norm = norms.survey(list(grads)).norm
    factor = torch.where(norm > 0, 1 / norm.double(), 1.0).float()
    if params:
        torch._foreach_mul_(list(params), factor)
    return norm
