"""Muon: momentum, orthogonalised by the polar factor, for hidden matrices; AdamW for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from steepest import check
from steepest.matrix.polar import plan, polar
from steepest.optim.adamw import AdamW
from steepest.optim.base import FusedOptimizer, run_closure
from steepest.optim.options import shared_defaults
from steepest.optim.split import Assignment, assign
from steepest.optim.table import NO_SCALARS

SCALES: dict[str, Callable[[int, int], float]] = {
    # out x in matrix -> factor on lr.  Sources: Jordan et al. 2024; Liu et al. 2025 (Moonlight), which matches the
    # root mean square of AdamW's update; Bernstein & Newhouse 2024, steepest descent in the spectral norm.
    "keller": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match-adamw-rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral": lambda rows, columns: math.sqrt(rows / columns),
    "none": lambda rows, columns: 1.0,
}
ADAMW_DEFAULTS = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
# Same-shape matrices are orthogonalised in one batch of at most this many elements (64 MiB in float32).
BATCH_ELEMENTS = 1 << 24


ADAMW_SHARED = shared_defaults(maximize=False, cautious=False, l1=0.0, clip_value=None, decoupled_weight_decay=True)


class Muon(FusedOptimizer):
    """Muon for hidden matrices and AdamW for the rest, in one optimizer with ordinary param groups.

    For a matrix W (out x in) with gradient G::

        B = B + (1 - momentum) (G - B)
        U = G + momentum (B - G)  if nesterov else  B
        W = W (1 - lr weight_decay) - lr scale(out, in) polar(U)

    Everything else is stepped by `steepest.adamw_` in one kernel call.

    Args:
        params: `model.named_parameters()`, parameters, or param groups of either.  With names, 2-D parameters that are
            neither embedding nor output head get Muon (see `optim.split`); without names every 2-D parameter does.
            A param group may say `algorithm="muon"` or `"adamw"` for all that it holds, and override any option.
        lr, momentum, nesterov, weight_decay: of the Muon groups; defaults of torch.optim.Muon.
        schedule, steps: of the polar factor, see `steepest.polar`.
        scale: factor on lr: "keller" sqrt(max(1, out/in)), "match-adamw-rms" 0.2 sqrt(max(out, in)), "spectral"
            sqrt(out/in), "none", or a callable (out, in) -> float.
        adamw: options of the AdamW groups: lr (1e-3), betas (0.9, 0.999), eps (1e-8), weight_decay (1e-2).

    `split` lists what became of each parameter and why.  State: `momentum_buffer` in the parameter's dtype for
    matrices; `step`, `exp_avg`, `exp_avg_sq` for the others.  Gradients are never modified.

    Raises:
        ValueError, TypeError: wrong options, non-leaf parameters, sparse gradients; before any change.

    Cost per matrix: the products of `steepest.polar`; 24 bytes per float32 element besides.
    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """

    _step_takes_sources = False

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        schedule="polar-express",
        steps: int = 5,
        scale: str | Callable[[int, int], float] = "keller",
        adamw: dict | None = None,
    ):
        unknown = set(adamw or ()) - set(ADAMW_DEFAULTS)
        if unknown:
            raise ValueError(f"Muon: adamw has unknown options {sorted(unknown)}; known: {sorted(ADAMW_DEFAULTS)}")
        self._muon_defaults = dict(
            lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, schedule=schedule, steps=steps,
            scale=scale,
        )  # fmt: skip
        self._adamw_defaults = {**ADAMW_DEFAULTS, **(adamw or {}), "amsgrad": False, **ADAMW_SHARED}
        self.split: list[Assignment] = []
        groups, self.split = self._split_groups(params)
        super().__init__(groups, {})

    def _split_groups(self, params) -> tuple[list[dict], list[Assignment]]:
        """Param groups that each hold one algorithm, and each parameter's assignment."""
        members = list(params)
        if not members:
            raise ValueError("Muon: got an empty parameter list")
        given = members if isinstance(members[0], dict) else [{"params": members}]
        groups, split = [], []
        for group in given:
            options = {key: value for key, value in group.items() if key not in ("params", "algorithm")}
            held = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
            pairs = [entry if isinstance(entry, tuple) else (None, entry) for entry in held]
            places = [_place(name, p, group.get("algorithm")) for name, p in pairs]
            for algorithm, defaults in (("muon", self._muon_defaults), ("adamw", self._adamw_defaults)):
                mine = [entry for entry, place in zip(held, places) if place.algorithm == algorithm]
                if mine:
                    # An option that the other algorithm alone knows stays with it.
                    own = {k: v for k, v in options.items() if k in defaults or k not in self._other(algorithm)}
                    groups.append({**defaults, **own, "algorithm": algorithm, "params": mine})
            split += places
        return groups, split

    def _other(self, algorithm: str) -> dict:
        return self._adamw_defaults if algorithm == "muon" else self._muon_defaults

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group; one that does not say `algorithm` yet is split as the constructor splits."""
        if "algorithm" in param_group and "lr" in param_group:
            super().add_param_group(param_group)
            return
        groups, split = self._split_groups([param_group])
        for group in groups:
            super().add_param_group(group)
        self.split += split

    def _check_group(self, number: int, group: dict) -> None:
        where = f"Muon: param group {number}"
        if group["algorithm"] == "adamw":
            AdamW.kind.numbers(where, group)
            return
        check.number(where, "lr", group["lr"], 0)
        check.number(where, "momentum", group["momentum"], 0, 1)
        check.number(where, "weight_decay", group["weight_decay"], 0)
        if not callable(group["scale"]) and group["scale"] not in SCALES:
            raise ValueError(f"{where}: scale is {group['scale']!r}, expected one of {sorted(SCALES)} or a callable")
        for p in group["params"]:
            if p.ndim != 2:
                shape = tuple(p.shape)
                raise ValueError(f"{where}: a parameter of shape {shape} is not a matrix; use algorithm='adamw'")
            if not p.is_floating_point():
                raise TypeError(f"{where}: a parameter has dtype {p.dtype}, expected a floating dtype")
        # Wrong schedules and step counts are refused here, not in the first step.
        plan((2, 2), torch.float32, torch.device("cpu"), schedule=group["schedule"], steps=group["steps"])

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss, if there is a closure."""
        loss = run_closure(closure)
        numbered = list(enumerate(self.param_groups))
        others = [(number, group) for number, group in numbered if group["algorithm"] == "adamw"]
        rules, numbers = self._rules_and_numbers(AdamW.kind, others)
        matrices = [group for _, group in numbered if group["algorithm"] == "muon"]
        for number, group in numbered:
            if group["algorithm"] == "muon":
                self._check_group(number, group)
                _check_gradients(number, group)
        for table in self._prepared_tables(AdamW.kind, others, rules):
            table.run(numbers, NO_SCALARS)
        for group in matrices:
            self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict) -> None:
        buckets: dict[tuple, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None and p.numel():
                buckets.setdefault((p.shape, p.dtype, p.device), []).append(p)
        for (shape, _, _), params in buckets.items():
            at_once = max(1, BATCH_ELEMENTS // shape.numel())
            for first in range(0, len(params), at_once):
                self._step_batch(group, params[first : first + at_once])

    def _step_batch(self, group: dict, params: list[Tensor]) -> None:
        """Momentum, polar factor and update for matrices of one shape."""
        lr, momentum = float(group["lr"]), group["momentum"]
        scale = group["scale"] if callable(group["scale"]) else SCALES[group["scale"]]
        grads = [p.grad for p in params]
        buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, buffers, momentum) if group["nesterov"] else buffers
        # On a GPU half precision is the working precision of choice: 8x more accurate than bfloat16 at its speed.
        working = torch.float16 if params[0].is_cuda else None
        options = dict(schedule=group["schedule"], steps=group["steps"], dtype=working)
        factors = polar(torch.stack(updates), **options).unbind() if len(params) > 1 else [polar(updates[0], **options)]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, list(factors), alpha=-lr * scale(*params[0].shape))


def _place(name: str | None, p: Tensor, algorithm: str | None) -> Assignment:
    if not isinstance(p, Tensor):
        raise TypeError(f"Muon: a parameter is a {type(p).__name__}, expected a torch.Tensor")
    if algorithm is None:
        return assign(name, p)
    if algorithm not in ("muon", "adamw"):
        raise ValueError(f"Muon: algorithm is {algorithm!r}, expected 'muon' or 'adamw'")
    return Assignment("(unnamed)" if name is None else name, tuple(p.shape), algorithm, "stated by the param group")


def _check_gradients(number: int, group: dict) -> None:
    for i, p in enumerate(group["params"]):
        grad = p.grad
        if grad is not None and (grad.layout != torch.strided or grad.dtype != p.dtype):
            raise ValueError(
                f"Muon: param group {number}, params[{i}]: gradient is {grad.layout} {grad.dtype}, "
                f"expected dense {p.dtype}"
            )
