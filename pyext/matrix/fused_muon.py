"""A Muon step for contiguous matrices of one shape over fused kernels: no update is ever stored.

momentum, Nesterov, cast and norm in one pass (`kernels.momentum`); the polar factor's products on what that stored,
with the norm as a scalar that the first Gram matrix and the first product take from the device; the parameter written
in the epilogue of the last product (`kernels.long`).  The algorithm is that of `polar`, over verbs that know which of
its products is the first and which the last.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from steepest.kernels import long, symmetric
from steepest.kernels.momentum import Momentum
from steepest.matrix.norm_bounds import margin
from steepest.matrix.polar import Plan, _gram_form, _plain_form
from steepest.matrix.triton_verbs import TritonVerbs


class FusedMuon:
    """Workspace and tables for a list of parameters of one shape, kept from step to step.

    params, grads, buffers: contiguous (rows, columns), each role of one dtype and all on one device.  The addresses are
    kept: make a new one when a tensor is replaced (`fits`).  working: the dtype of the products.
    """

    def __init__(self, params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], todo: Plan, prescale=None):
        shape, device = params[0].shape, params[0].device
        self.params, self.grads, self.buffers = params, grads, buffers
        self.todo = dataclasses.replace(todo, resident=False)
        self.x = torch.empty(len(params), *shape, dtype=todo.dtype, device=device)
        prescale = torch.ones(len(params), device=device) if prescale is None else prescale
        self.momentum = Momentum(grads, buffers, list(self.x), prescale, margin(todo.dtype))
        self.table = torch.tensor([p.data_ptr() for p in params], dtype=torch.int64).to(device)

    def fits(self, params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]) -> bool:
        mine = (*self.params, *self.grads, *self.buffers)
        given = (*params, *grads, *buffers)
        return len(mine) == len(given) and all(a.data_ptr() == b.data_ptr() for a, b in zip(mine, given))

    def step(
        self, hyper: Tensor, momentum: float, nesterov: bool, *, cautious: bool = False, seed: int | None = None
    ) -> None:
        """W = W keep + step polar(U), hyper = (keep, step) float32 on the device; U as `Momentum.launch` says."""
        self.momentum.launch(momentum, nesterov)
        verbs = _FusedVerbs(self, hyper, cautious, seed)
        x = self.x if self.x.shape[1] <= self.x.shape[2] else self.x.mT
        (_gram_form if self.todo.form == "gram" else _plain_form)(x, self.todo, verbs)


class _FusedVerbs(TritonVerbs):
    """The verbs of one step: the first Gram matrix and the first long product scale, the last long product applies."""

    def __init__(self, owner: FusedMuon, hyper: Tensor, cautious: bool, seed: int | None):
        super().__init__()
        self.owner, self.hyper, self.cautious, self.seed = owner, hyper, cautious, seed
        self.left = owner.todo.long_products

    def gram(self, x: Tensor) -> Tensor:
        if self.left < self.owner.todo.long_products:
            return super().gram(x)
        scale = self.owner.momentum.scale
        squares = (scale * scale)[:, None].expand(-1, 3)
        return symmetric.gram(x, scalars=squares, input_precision=self.input_precision)

    def long_product(self, q: Tensor, x: Tensor, *, alpha: float = 1.0, shift: float = 0.0) -> Tensor:
        first = self.left == self.owner.todo.long_products
        self.left -= 1
        stored = x if x.is_contiguous() else x.mT
        options = dict(
            alpha=alpha,
            shift=shift,
            scale=self.owner.momentum.scale if first else None,
            input_precision=self.input_precision,
        )
        if self.left:
            y = long.long_product(q, stored, **options)
            return y if stored is x else y.mT
        own = self.owner
        options |= dict(cautious=self.cautious, seed=self.seed)
        long.apply_long_product(q, stored, own.params, own.table, self.hyper, **options)
        return x
