"""Muon: momentum, orthogonalised by the polar factor, for hidden matrices; AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steepest import check
from steepest.distributed.shards import is_dtensor
from steepest.matrix import muon_rule
from steepest.matrix.muon_rule import SCALES
from steepest.matrix.polar import plan
from steepest.ops_steps import traced_step
from steepest.optim.adamw import AdamW
from steepest.optim.base import FusedOptimizer, run_closure
from steepest.optim.muon_fused import FusedSteps, takes
from steepest.optim.muon_matrices import Piece, normalised_rows, pieces, row_shape
from steepest.optim.options import shared_defaults, without_tensors
from steepest.optim.split import Assignment, assign
from steepest.optim.table import NO_SCALARS

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

    A parameter may hold several matrices (`matrices`); momentum is its own, the rest is done matrix by matrix, and
    `scale` sees the shape of the matrix. Everything else is stepped by `steepest.adamw_` in one kernel call.

    Args:
        params: `model.named_parameters()`, parameters, or param groups of either.  With names, 2-D parameters that are
            neither embedding nor output head get Muon (see `optim.split`); without names every 2-D parameter does.
            A param group may say `algorithm="muon"` or `"adamw"` for all that it holds, and override any option.
        lr, momentum, nesterov, weight_decay: of the Muon groups; defaults of torch.optim.Muon.
        schedule, steps, norm: of the polar factor, see `steepest.polar`.
        scale: factor on lr: "keller" sqrt(max(1, out/in)), "match-adamw-rms" 0.2 sqrt(max(out, in)), "spectral"
            sqrt(out/in), "none", or a callable (out, in) -> float.
        matrices: which matrices a parameter holds: "whole", "flatten" (convolution kernels, out x in kh kw), "stack"
            (experts), a number of heads, or sizes of row blocks such as (768, 768, 768) or ((768, 12), (768, 12), 768)
            for a fused projection; see `optim.muon_matrices`.  With "flatten" or "stack", parameters of more than two
            dimensions that are no embeddings get Muon; else they get AdamW.  Usually said by a param group.
        cautious: decay only where the step moves towards zero (Chen et al. 2025, "Cautious Weight Decay").
        normuon: rows of the polar factor are divided by the root of their running mean square, with this decay (0.95
            in Li et al. 2025, arXiv 2510.05491; None: not), and the whole brought back to its Frobenius norm.
        momentum_dtype: torch.float32 or torch.bfloat16, which halves the state; None: the parameter's dtype.
        adamw: options of the AdamW groups: lr (1e-3), betas (0.9, 0.999), eps (1e-8), weight_decay (1e-2).
        capturable: steps can be captured in a CUDA graph after the first few: AdamW counts on the device, and lr,
            weight_decay and AdamW's betas may be tensors of one element, which each replay reads anew.
        process_group: the ranks that hold plain parameters alike, as DistributedDataParallel's do: they share the work.

    Matrices that are DTensors (FSDP2, HSDP, tensor parallel) are shared out among the ranks of their mesh: each goes
    whole to one rank, by cost, or, if it is cut along its long side alone and that sends less, n x n Gram matrices are
    added up (see `steepest.distributed.muon`).  A parameter without a gradient on some ranks counts as zero there.
    normuon is refused for them.

    `split` lists what became of each parameter and why.  State: `momentum_buffer` and with normuon `row_moment`
    (float32) for matrices; `step`, `exp_avg`, `exp_avg_sq` for the others.  Gradients are never modified.

    Raises:
        ValueError, TypeError: wrong options, non-leaf parameters, sparse gradients; before any change.

    Cost per matrix: the products of `steepest.polar`; 24 bytes per float32 element besides.  Extra memory during a step
    on the CPU: one copy of the gradients (Nesterov's updates), input and result of one batch of at most 2^24 elements,
    and the scratch of `steepest.polar`.
    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """

    _step_supports_amp_scaling = False  # a GradScaler unscales and skips by itself
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
        *,
        norm: str = "auto",
        matrices: str | int | tuple = "whole",
        cautious: bool = False,
        normuon: float | None = None,
        momentum_dtype: torch.dtype | None = None,
        process_group=None,
        capturable: bool = False,
    ):
        unknown = set(adamw or ()) - set(ADAMW_DEFAULTS)
        if unknown:
            raise ValueError(f"Muon: adamw has unknown options {sorted(unknown)}; known: {sorted(ADAMW_DEFAULTS)}")
        self._muon_defaults = dict(
            lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, schedule=schedule, steps=steps,
            scale=scale, norm=norm, matrices=matrices, cautious=cautious, normuon=normuon,
            momentum_dtype=momentum_dtype, capturable=capturable,
        )  # fmt: skip
        self._adamw_defaults = {
            **ADAMW_DEFAULTS, **(adamw or {}), "amsgrad": False, **ADAMW_SHARED, "capturable": capturable
        }  # fmt: skip
        self.split: list[Assignment] = []
        self._fused, self.process_group, self._spread = FusedSteps(), process_group, None
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
            matrices = options.get("matrices", self._muon_defaults["matrices"])
            places = [_place(name, p, group.get("algorithm"), matrices) for name, p in pairs]
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
        group, _ = without_tensors(where, group)
        if group["algorithm"] == "adamw":
            AdamW.kind.numbers(where, group)
            return
        check.number(where, "lr", group["lr"], 0)
        check.number(where, "momentum", group["momentum"], 0, 1)
        check.number(where, "weight_decay", group["weight_decay"], 0)
        if not callable(group["scale"]) and group["scale"] not in SCALES:
            raise ValueError(f"{where}: scale is {group['scale']!r}, expected one of {sorted(SCALES)} or a callable")
        if group["normuon"] is not None:
            check.number(where, "normuon", group["normuon"], 0, 1)
        if group["momentum_dtype"] not in (None, torch.float32, torch.bfloat16):
            found = group["momentum_dtype"]
            raise ValueError(f"{where}: momentum_dtype is {found!r}, expected torch.float32, torch.bfloat16 or None")
        for p in group["params"]:
            try:
                pieces(p.shape, group["matrices"])
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if not p.is_floating_point():
                raise TypeError(f"{where}: a parameter has dtype {p.dtype}, expected a floating dtype")
        # Wrong schedules and step counts are refused here, not in the first step.
        options = {name: group[name] for name in ("schedule", "steps", "norm")}
        plan((2, 2), torch.float32, torch.device("cpu"), **options)

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss, if there is a closure."""
        if torch.compiler.is_compiling():
            return traced_step(self, closure)
        loss = run_closure(closure)
        numbered = list(enumerate(self.param_groups))
        others = [(number, group) for number, group in numbered if group["algorithm"] == "adamw"]
        matrices = {number: group for number, group in numbered if group["algorithm"] == "muon"}
        spread = self._spread_step(matrices)
        try:
            rules, numbers = self._rules_and_numbers(AdamW.kind, others)
            for number, group in matrices.items():
                self._check_group(number, group)
                _check_gradients(number, group)
            if spread is not None:
                spread.check()
            tables = self._prepared_tables(AdamW.kind, others, rules)
        except (ValueError, TypeError, RuntimeError) as error:
            if spread is not None:
                spread.roster.agree(error)  # the other ranks must not wait for this one
            raise
        given = None if spread is None else spread.roster.agree(None)
        for table in tables:
            table.run(numbers, NO_SCALARS)
        for number, group in matrices.items():
            self._step_matrices(number, group)
        if spread is not None:
            spread.run(given, self._buffer)
        return loss

    def _spread_step(self, matrices: dict[int, dict]):
        """What steps the matrices that are spread over ranks; None when there are none."""
        if self.process_group is None and not any(is_dtensor(p) for g in matrices.values() for p in g["params"]):
            return None
        from steepest.distributed.muon import MuonStep

        if self._spread is None or not self._spread.fits(matrices):
            self._spread = MuonStep("Muon.step", matrices, self.process_group)
        return self._spread

    def _step_matrices(self, number: int, group: dict) -> None:
        """Momentum for all parameters, then polar factors and updates for the matrices of one shape at a time."""
        own = [] if self.process_group is not None else [p for p in group["params"] if not is_dtensor(p)]
        params = [p for p in own if p.grad is not None and p.numel()]
        fused = [p for p in params if takes(group, p, self._buffer(group, p))]
        if fused:
            self._fused.step(number, group, fused, [self._buffer(group, p) for p in fused])
            taken = {id(p) for p in fused}
            params = [p for p in params if id(p) not in taken]
        if not params:
            return
        buckets: dict[tuple, list[tuple[Tensor, Piece, Tensor]]] = {}
        for p, update in zip(params, self._updates(group, params)):
            for piece in pieces(p.shape, group["matrices"]):
                key = (piece.rows, piece.columns, p.dtype, update.dtype, p.device)
                buckets.setdefault(key, []).append((p, piece, update))
        for (rows, columns, *_), members in buckets.items():
            held, count = [], 0
            for member in members:
                if held and (count + member[1].batch) * rows * columns > BATCH_ELEMENTS:
                    self._step_batch(group, held)
                    held, count = [], 0
                held.append(member)
                count += member[1].batch
            self._step_batch(group, held)

    def _buffer(self, group: dict, p: Tensor) -> Tensor:
        dtype, entry = group["momentum_dtype"] or p.dtype, self.state[p]
        buffer = entry.get("momentum_buffer")
        if buffer is None or buffer.dtype != dtype:
            buffer = torch.zeros_like(p, dtype=dtype) if buffer is None else buffer.to(dtype)
            entry["momentum_buffer"] = buffer
        return buffer

    def _updates(self, group: dict, params: list[Tensor]) -> list[Tensor]:
        """Advances the momentum buffers; what is to be orthogonalised: the buffers themselves unless nesterov."""
        return muon_rule.with_momentum(group, [p.grad for p in params], [self._buffer(group, p) for p in params])

    def _step_batch(self, group: dict, members: list[tuple[Tensor, Piece, Tensor]]) -> None:
        """Polar factors and updates for matrices of one shape."""
        rows, columns = members[0][1].rows, members[0][1].columns
        parts = [u.narrow(0, m.start, m.length).reshape(m.batch, rows, columns) for _, m, u in members]
        factors = muon_rule.factors(group, parts)
        if group["normuon"] is not None:
            factors = [self._rows_normalised(group, p, m, f) for (p, m, _), f in zip(members, factors)]
        targets = [p.narrow(0, m.start, m.length) for p, m, _ in members]
        muon_rule.apply(group, rows, columns, targets, factors)

    def _rows_normalised(self, group: dict, p: Tensor, piece: Piece, factors: Tensor) -> Tensor:
        entry = self.state[p]
        if "row_moment" not in entry:
            entry["row_moment"] = torch.zeros(row_shape(p.shape, group["matrices"]), device=p.device)
        # A view: the first dimension is cut as the parameter's is.
        moments = entry["row_moment"].narrow(0, piece.start, piece.length).view(piece.batch, piece.rows)
        return normalised_rows(factors, moments, group["normuon"])

    def __getstate__(self) -> dict:
        left_out = ("_fused", "_spread", "process_group")
        kept = {key: value for key, value in super().__getstate__().items() if key not in left_out}
        return kept | {name: self.__dict__[name] for name in ("split", "_muon_defaults", "_adamw_defaults")}

    def __setstate__(self, state: dict) -> None:
        self._fused, self._spread, self.process_group = FusedSteps(), None, None
        super().__setstate__(state)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # torch has rounded states to their parameter's dtype; momentum and row moments keep their own.
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, p in zip(saved, (p for group in self.param_groups for p in group["params"])):
            for key in ("momentum_buffer", "row_moment"):
                value = state_dict["state"].get(index, {}).get(key)
                if value is not None and self.state[p][key].dtype != value.dtype:
                    self.state[p][key] = value.detach().to(p.device, copy=True)


def _place(name: str | None, p: Tensor, algorithm: str | None, matrices) -> Assignment:
    if not isinstance(p, Tensor):
        raise TypeError(f"Muon: a parameter is a {type(p).__name__}, expected a torch.Tensor")
    if algorithm is None:
        return assign(name, p, matrices if isinstance(matrices, str) else "whole")
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
