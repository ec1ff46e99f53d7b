"""Shampoo: every side of a matrix preconditioned by an inverse root of its statistic; AdamW for everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest import check
from steepest.distributed.agreement import Roster
from steepest.distributed.shards import is_dtensor
from steepest.matrix.root_plan import ORDERS, plan
from steepest.ops_steps import traced_step
from steepest.optim.adamw import AdamW
from steepest.optim.base import FusedOptimizer, run_closure
from steepest.optim.shampoo_blocks import DIAGONAL, NONE, merged_shape, order_of, side_kinds
from steepest.optim.shampoo_step import ShampooStep
from steepest.optim.split import Assignment, assign

STATISTICS = ("shampoo", "kl")
GRAFTINGS = ("none", "sgd", "adagrad", "rmsprop", "adam")
ADAMW_DEFAULTS = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False)
FALLBACKS = {"one-sided": NONE, "diagonal": DIAGONAL}


class Shampoo(FusedOptimizer):
    """Shampoo in blocks with grafting (Distributed Shampoo), and AdamW for embeddings and vectors, in one optimizer.

    A parameter is cut into blocks; for a block G (d1 x ... x dk), in step t::

        L_i = b2 L_i + (1 - b2) G_(i) G_(i)^T              (b2 = 1: sums), G_(i) the unfolding along dimension i
        M   = b1 M + (1 - b1) G
        P   = M / (1 - b1^t), multiplied along dimension i by (L_i / (1 - b2^t) + ridge lambda_i I)^(-1/p), p = 2 k
        P   = P |graft| / |P|                              graft: the step of `grafting` from M / (1 - b1^t)
        B   = momentum B + P;  P = P + momentum B if nesterov else B
        W   = W (1 - lr weight_decay) - lr P

    With statistic="kl" (Lin et al. 2025, arXiv 2509.03378) the sides explain the gradient's covariance as a Kronecker
    product S_1 x ... x S_k: each statistic sees G whitened by the other sides' roots, and p is 2::

        S_i = b2 S_i + (1 - b2) H_(i) H_(i)^T / prod_(j != i) d_j,    H = G multiplied along all j != i by S_j^(-1/2)

    These are the roots of the last refresh; before the first one S_j counts as r^(2/k) I, r the root mean square of G.
    S_i starts as (1 - b2) r^(2/k) I, one gradient of that size without direction, and is divided by 1 - b2^(t + 1).

    lambda_i bounds the largest eigenvalue of its statistic within 2 (see `steepest.inverse_root`); the ridge is never
    written into a statistic.  Blocks of one shape are stacked and stepped together.

    Args:
        params: `model.named_parameters()`, parameters, or param groups of either.  With names, parameters of two or
            more dimensions that are neither embedding nor output head get Shampoo, without names all of two or more.
            A param group may say `algorithm="shampoo"` or `"adamw"` for all that it holds, and override any option.
        lr, weight_decay: decay is decoupled, as AdamW's.
        betas: of the filtered gradient (0: none) and of the statistics (1: sums).
        ridge, absolute_ridge, tol: of the roots; with absolute_ridge=True `ridge` itself is added, as papers do.
        block_size, merge_dims: the largest side of a block; neighbouring dimensions of parameters with more than two
            are merged up to it, unless merge_dims=False.
        precondition_frequency: steps between two roots of a block.  Blocks are refreshed in turn, so that every step
            has the same work.  Until its first root a block takes the graft's step; without grafting all blocks get
            roots in the first step.
        grafting: "none", "sgd", "adagrad", "rmsprop" or "adam", with grafting_beta and grafting_eps.
        momentum, nesterov: of the grafted step.
        exponent: p for all sides instead of 2 k: 1, 2, 3, 4, 6 or 8.
        statistic: "shampoo", or "kl" for KL-Shampoo's, which estimates all sides together (below).
        packed_statistics: keep the triangle of a statistic only, which halves its memory and changes no
            value; on a GPU the fused kernel of the statistics is not used then.
        large_dim, large_dim_fallback: a dimension larger than this is not cut, and preconditioned by nothing
            ("one-sided") or by its statistic's diagonal ("diagonal").
        adamw: options of the AdamW groups: lr, betas, eps, weight_decay.

        process_group: the ranks that hold plain parameters alike, as DistributedDataParallel's do: they share the work.

    With a process group, and for parameters that are DTensors (FSDP2, HSDP, tensor parallel), each block belongs to
    one rank, by cost, which alone keeps its states (see `steepest.distributed.shampoo`); checkpoints go through
    torch.distributed.checkpoint, and other numbers of ranks can load them.

    With betas=(0, 0) and precondition_frequency=1 a matrix block's statistics are those of one gradient, and its step
    is (G G^T + ridge lambda I)^(-1/2) G, by one root of its shorter side; no roots are kept then.

    A block whose gradient is not finite, or above 1e18 (1e150 in float64), is skipped in that step.  One whose
    statistic has no root keeps the previous one; `state[p]["refreshed.<block>"]` is the step of the last good root.
    All of this is decided on the device.

    `split` lists what became of each parameter and why.  State per block b: `statistic.<i>.<b>`, `root.<i>.<b>`,
    `refreshed.<b>` and, as options need, `exp_avg.<b>`, `graft_sq.<b>`, `momentum_buffer.<b>`, in float32 (float64 for
    float64 parameters); `step` per parameter.

    Raises:
        ValueError, TypeError: wrong options, sparse gradients; before any change.

    Cost per n x n block: 8 n^3 FLOPs for statistics and application each, and 1 / precondition_frequency of two
    roots (`steepest.inverse_root`).
    Sources: Gupta, Koren, Singer 2018 (arXiv 1802.09568); Anil et al. 2020 (arXiv 2002.09018); Shi et al. 2023 (arXiv
    2309.06497), whose values it has; decay follows AdamW's.
    """

    _step_supports_amp_scaling = False  # a GradScaler unscales and skips by itself
    _step_takes_sources = False

    def __init__(
        self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), ridge: float = 1e-6,
        block_size: int = 1024, precondition_frequency: int = 10, grafting: str = "adam", weight_decay: float = 0.0,
        momentum: float = 0.0, nesterov: bool = False, *, absolute_ridge: bool = False, tol: float = 1e-3,
        grafting_beta: float = 0.999, grafting_eps: float = 1e-8, exponent: int | None = None, large_dim: int = 16384,
        large_dim_fallback: str = "one-sided", merge_dims: bool = True, statistic: str = "shampoo",
        packed_statistics: bool = False, adamw: dict | None = None, process_group=None,
    ):  # fmt: skip
        unknown = set(adamw or ()) - set(ADAMW_DEFAULTS)
        if unknown:
            raise ValueError(f"Shampoo: adamw has unknown options {sorted(unknown)}; known: {sorted(ADAMW_DEFAULTS)}")
        self._shampoo_defaults = dict(
            lr=lr, betas=betas, ridge=ridge, block_size=block_size, precondition_frequency=precondition_frequency,
            grafting=grafting, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, tol=tol,
            absolute_ridge=absolute_ridge, grafting_beta=grafting_beta, grafting_eps=grafting_eps, exponent=exponent,
            large_dim=large_dim, large_dim_fallback=large_dim_fallback, merge_dims=merge_dims,
            statistic=statistic, packed_statistics=packed_statistics,
        )  # fmt: skip
        # The options of an AdamW group are those of steepest.optim.AdamW, whatever these are.
        template = AdamW([torch.zeros(1, requires_grad=True)], **{**ADAMW_DEFAULTS, **(adamw or {})})
        self._adamw_defaults = dict(template.defaults)
        self.process_group = process_group
        self._steps: dict[int, tuple[ShampooStep | None, ShampooStep | None]] = {}
        groups, self.split = self._split_groups(params)
        super().__init__(groups, {})

    def _split_groups(self, params) -> tuple[list[dict], list[Assignment]]:
        """Param groups that each hold one algorithm, and each parameter's assignment."""
        members = list(params)
        if not members:
            raise ValueError("Shampoo: got an empty parameter list")
        given = members if isinstance(members[0], dict) else [{"params": members}]
        defaults = {"shampoo": self._shampoo_defaults, "adamw": self._adamw_defaults}
        groups, split = [], []
        for group in given:
            options = {key: value for key, value in group.items() if key not in ("params", "algorithm")}
            held = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
            pairs = [entry if isinstance(entry, tuple) else (None, entry) for entry in held]
            places = [_place(name, p, group.get("algorithm")) for name, p in pairs]
            for algorithm, other in (("shampoo", "adamw"), ("adamw", "shampoo")):
                mine = [entry for entry, place in zip(held, places) if place.algorithm == algorithm]
                if mine:
                    # An option that the other algorithm alone knows stays with it.
                    own = {k: v for k, v in options.items() if k in defaults[algorithm] or k not in defaults[other]}
                    groups.append({**defaults[algorithm], **own, "algorithm": algorithm, "params": mine})
            split += places
        return groups, split

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
        where = f"Shampoo: param group {number}"
        if group["algorithm"] == "adamw":
            AdamW.kind.numbers(where, group)
            return
        for name in ("lr", "weight_decay", "grafting_eps"):
            check.number(where, name, group[name], 0)
        for name in ("momentum", "grafting_beta"):
            check.number(where, name, group[name], 0, 1)
        check.number(where, "betas[0]", group["betas"][0], 0, 1)
        check.number(where, "betas[1]", group["betas"][1], 0, 1 + 2**-52)
        for name in ("block_size", "precondition_frequency", "large_dim"):
            value = group[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{where}: {name} is {value!r}, expected a positive integer")
        choices = {"grafting": GRAFTINGS, "large_dim_fallback": tuple(FALLBACKS), "statistic": STATISTICS}
        for name, known in choices.items():
            if group[name] not in known:
                raise ValueError(f"{where}: {name} is {group[name]!r}, expected one of {', '.join(known)}")
        if group["exponent"] is not None and group["exponent"] not in ORDERS:
            raise ValueError(f"{where}: exponent is {group['exponent']!r}, expected one of {ORDERS} or None")
        if not isinstance(group["packed_statistics"], bool):
            raise ValueError(f"{where}: packed_statistics is {group['packed_statistics']!r}, expected True or False")
        if group["statistic"] == "kl" and group["betas"][1] == 1:
            raise ValueError(f"{where}: statistic='kl' is an average, expected betas[1] below 1")
        if group["nesterov"] and not group["momentum"]:
            raise ValueError(f"{where}: nesterov=True needs momentum, got momentum=0")
        plan(
            (2, 2), ridge=group["ridge"], tol=group["tol"], absolute=group["absolute_ridge"]
        )  # refused here, not later
        for p in group["params"]:
            if not p.is_floating_point():
                raise TypeError(f"{where}: a parameter has dtype {p.dtype}, expected a floating dtype")
            merged = merged_shape(p.shape, group["block_size"], group["merge_dims"])
            kinds = side_kinds(merged, group["large_dim"], FALLBACKS[group["large_dim_fallback"]])
            if group["exponent"] is None and group["statistic"] == "shampoo" and order_of(kinds) > 4:
                raise ValueError(
                    f"{where}: a parameter of shape {tuple(p.shape)} has {order_of(kinds)} sides after merging, "
                    "expected at most 4; raise block_size, give an exponent, or reshape it"
                )

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss, if there is a closure."""
        if torch.compiler.is_compiling():
            return traced_step(self, closure)
        loss = run_closure(closure)
        numbered = list(enumerate(self.param_groups))
        matrices = [(number, group) for number, group in numbered if group["algorithm"] == "shampoo"]
        others = [(number, group) for number, group in numbered if group["algorithm"] == "adamw"]
        try:
            for number, group in matrices:
                self._check_group(number, group)
                _check_gradients(number, group)
            prepared = [(self._prepared(n, group), group) for n, group in matrices]
            if any(spread for (_, spread), _ in prepared):  # other ranks must not find out in the middle of a step
                rules, _ = self._rules_and_numbers(AdamW.kind, others)
                self._prepared_tables(AdamW.kind, others, rules)
        except (ValueError, TypeError, RuntimeError) as error:
            for _, group in matrices:
                Roster("Shampoo.step", group["params"], self.process_group).agree(error)
            raise
        agreed = [step.roster.agree(None) for (_, step), _ in prepared if step is not None]
        self.step_rule(AdamW.kind, others)
        for (alone, spread), group in prepared:
            if alone is not None:
                alone.run(group)
            if spread is not None:
                spread.run_agreed(group, agreed.pop(0))
        return loss

    def _prepared(self, number: int, group: dict) -> tuple[ShampooStep | None, ShampooStep | None]:
        """What steps the group's own parameters and those that are spread over ranks; anew when these have changed."""
        spread = [p for p in group["params"] if self.process_group is not None or is_dtensor(p)]
        alone = [] if spread and self.process_group is not None else [p for p in group["params"] if not is_dtensor(p)]
        fallback = FALLBACKS[group["large_dim_fallback"]]
        own, shared = self._steps.get(number, (None, None))
        if alone and (own is None or not own.fits(alone, group, self.state)):
            own = ShampooStep(alone, group, self.state, fallback)
        if spread and (shared is None or not shared.fits(spread, group, self.state)):
            from steepest.distributed.shampoo import SpreadShampooStep

            shared = SpreadShampooStep(group, self.state, fallback, self.process_group)
        self._steps[number] = (own if alone else None), (shared if spread else None)
        return self._steps[number]

    def state_dict(self) -> dict:
        """As torch's; each tensor with memory of its own, not a view of the stacks."""
        packed = super().state_dict()
        for entry in packed["state"].values():
            for key, value in entry.items():
                if isinstance(value, Tensor) and "." in key:
                    entry[key] = value.clone()
        return packed

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._steps.clear()
        # torch has rounded states to their parameter's dtype; statistics and roots keep their own.
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, params):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and "." in key:
                    self.state[p][key] = value.detach().to(p.device, copy=True)

    def __getstate__(self) -> dict:
        return {key: value for key, value in super().__getstate__().items() if key != "_steps"} | {
            name: self.__dict__[name] for name in ("split", "_shampoo_defaults", "_adamw_defaults")
        }

    def __setstate__(self, state: dict) -> None:
        self._steps, self.process_group = {}, None
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint from before these options
            if group["algorithm"] == "shampoo":
                group.setdefault("statistic", "shampoo")
                group.setdefault("packed_statistics", False)


def _place(name: str | None, p: Tensor, algorithm: str | None) -> Assignment:
    if not isinstance(p, Tensor):
        raise TypeError(f"Shampoo: a parameter is a {type(p).__name__}, expected a torch.Tensor")
    label, shape = "(unnamed)" if name is None else name, tuple(p.shape)
    if algorithm is not None:
        if algorithm not in ("shampoo", "adamw"):
            raise ValueError(f"Shampoo: algorithm is {algorithm!r}, expected 'shampoo' or 'adamw'")
        return Assignment(label, shape, algorithm, "stated by the param group")
    if sum(size > 1 for size in shape) > 1 and len(shape) > 2:
        return Assignment(label, shape, "shampoo", f"{len(shape)}-D")
    found = assign(name, p)
    return Assignment(label, shape, "shampoo" if found.algorithm == "muon" else "adamw", found.reason)


def _check_gradients(number: int, group: dict) -> None:
    for i, p in enumerate(group["params"]):
        grad = p.grad
        if grad is not None and (grad.layout != torch.strided or grad.dtype != p.dtype):
            raise ValueError(
                f"Shampoo: param group {number}, params[{i}]: gradient is {grad.layout} {grad.dtype}, "
                f"expected dense {p.dtype}"
            )
