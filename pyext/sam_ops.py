"""Sharpness-aware minimisation's two elementwise ops: the steepest ascent inside an lp ball, and the way back.

With 1/p + 1/q = 1 and all tensors taken as one vector, the first-order maximiser of the loss over ‖e‖_p <= rho is

    e = rho sign(g) (|g| / ‖g‖_q)^(q-1),        ‖e‖_p = rho,    <g, e> = rho ‖g‖_q

(Foret et al. 2021, equation 2).  p = 2 is rho g / ‖g‖₂, p = inf rho sign(g); p = 1 moves the largest |g| alone, and if
several are equally large they share rho evenly.  Adaptive (Kwon et al. 2021): with T = |w| + eta, e = T e' where e' is
the above for T g in the place of g.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steepest import _native, check, layout, norms, rules, storage
from steepest._native import lib, num_threads, reader
from steepest.distributed.collectives import gather_over
from steepest.distributed.norms import joint_norm, reduce_parts
from steepest.distributed.shards import Reach, check_placements, local, reach_of, reaches_of
from steepest.engine import Call, run_lists
from steepest.rules import hyper_fields
from steepest.storage import PLAIN, Storage

COUNT = 1e300  # |x / largest|^COUNT is 1 for the largest elements and 0 for all others: the sum counts them


@dataclass(frozen=True)
class Steepness:
    """How steep the loss is: what one read of the gradients (and, adaptive, the weights) says; 0-dim."""

    norm: Tensor  # float64: ‖x‖_q with x = g, or T g
    largest: Tensor  # float32: max |x|
    coefficient: Tensor  # float32: largest / norm; for q = inf 1 / the number of elements that are as large

    @property
    def nonfinite(self) -> Tensor:
        """bool: a gradient is inf or NaN (or T g overflows float32)."""
        return ~self.norm.isfinite()


@dataclass(frozen=True)
class Weighing:
    """T = alpha |w| + eps, of one group of parameters."""

    alpha: float = 0.0
    eps: float = 1.0

    @classmethod
    def of(cls, adaptive: bool, eta: float) -> Weighing:
        return cls(1.0, eta) if adaptive else cls()


def dual(op: str, p) -> float:
    """q with 1/p + 1/q = 1."""
    if p == math.inf:
        return 1.0
    p = check.number(op, "p", p, 0)
    if p < 1:
        raise ValueError(f"{op}: p is {p}, expected a number >= 1 or inf")
    return math.inf if p == 1 else p / (p - 1)


def measure(
    grads: list[Tensor], weights: list[Tensor], weighing: list[Weighing], q: float, reduce_norm=None,
    reaches: Sequence[Reach] | None = None,
) -> Steepness | None:  # fmt: skip
    """The joint norm of order q of all gradients; None for q = 1, whose direction needs no norm.

    Of DTensors it is the norm over all ranks, replicas once; reaches: over which they are spread on any rank, those of
    `grads` unless given.  reduce_norm(norm, q): where shards are plain tensors, the norm over all ranks from this
    rank's (0-dim float64); DTensors' shards are then taken for such.
    """
    if q == 1:
        return None
    filled = [i for i, g in enumerate(grads) if g.numel()]
    buckets: dict[tuple, list[int]] = {}
    for i in filled:
        check_placements(f"SAM: the gradient of parameter {i}", grads[i])
        reach = None if reduce_norm is not None else reach_of(grads[i])
        buckets.setdefault((grads[i].dtype, weights[i].dtype, weighing[i], reach), []).append(i)
    device = grads[0].device if grads else torch.device("cpu")
    parts = [
        Bucket([grads[i] for i in rows], [weights[i] for i in rows] if weigh.alpha else None, weigh, reach)
        for (_, _, weigh, reach), rows in buckets.items()
    ]
    return measure_parts(parts, q, device, reduce_norm, reaches_of(grads) if reaches is None else reaches)


def measure_parts(
    parts: list, q: float, device: torch.device, reduce_norm=None, reaches: Sequence[Reach] = ()
) -> Steepness | None:
    """The same of parts that can read(q, scale), as norms.from_lists, and on a GPU add themselves to a measure."""
    if q == 1:
        return None
    reaches = () if reduce_norm is not None else reaches
    if not reaches and _native.asynchronous(device) and _native.has_kernels(device):
        found = norms.new_measure(q, count_largest=math.isinf(q))
        for part in parts:
            part.add_to(found)
        found = norms.run_measure(found, device)
        if reduce_norm is None:
            return Steepness(found.norm, found.largest, found.steepness)
        largest, norm, share = found.largest.double(), found.norm, found.steepness.double()
    elif _native.asynchronous(device):
        largest, norm, share = _on_device(parts, q, device, reaches)
    else:
        largest, norm, share = _on_cpu(parts, q, reaches)
        if reduce_norm is None:
            coefficient = share if math.isinf(q) else largest / norm if norm else math.nan
            found = torch.tensor((norm, largest, coefficient), dtype=torch.float64)
            return Steepness(found[0], *found[1:].float().unbind())
        largest, norm, share = torch.tensor((largest, norm, share), dtype=torch.float64).unbind()
    if reduce_norm is not None:
        norm = reduce_norm(norm, q)
        if math.isinf(q):  # this rank's largest elements may not be the largest of all
            own = torch.where(largest == norm, 1 / share, 0.0)
            largest, share = norm.clone(), 1 / reduce_norm(own, 1.0)
    coefficient = share if math.isinf(q) else largest / norm
    return Steepness(norm, largest.float(), coefficient.float())


@dataclass(frozen=True)
class Bucket:
    """Gradients of one dtype and one weighing."""

    grads: list[Tensor]
    weights: list[Tensor] | None
    weigh: Weighing
    reach: Reach | None = None

    def read(self, q: float, scale: float) -> tuple[float, float, bool]:
        if self.weights is None:
            return norms.native(self.grads, q, scale)
        return _weighed(self.grads, self.weights, self.weigh.alpha, self.weigh.eps, q, scale, False)

    def add_to(self, measure: lib.Measure) -> None:
        weights = None if self.weights is None else [local(w.detach()) for w in self.weights]
        norms.add_lists(measure, [local(g) for g in self.grads], weights, self.weigh.alpha, self.weigh.eps)

    def weighed(self) -> list[Tensor]:
        grads = [local(g).float() for g in self.grads]
        if self.weights is None:
            return grads
        alpha, eps = self.weigh.alpha, self.weigh.eps
        return [g * (local(w.detach()).float().abs() * alpha + eps) for g, w in zip(grads, self.weights)]


def _weighed(tensors: list[Tensor], weights: list[Tensor], *options) -> tuple[float, float, bool]:
    found = lib.survey_weighed(reader, tensors, weights, *options, num_threads())
    if isinstance(found[0], str):  # gradients laid out unlike their weights, gaps between elements, ...
        rows = layout.Rows([tensors, weights], [False, False], [False, False])
        found = lib.survey_weighed(reader, *rows.roles, *options, num_threads())
        if isinstance(found[0], str):
            raise RuntimeError(f"survey: prepared tensors were turned down: {found}; please report this")
    return found


def inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """The inner product of two lists of tensors, as 0-dim float64; no host sync on a GPU.

    Of DTensors over all ranks, replicas once; every rank must list the same ones.
    """
    by_reach: dict[Reach | None, list[int]] = {reach: [] for reach in [None, *reaches_of(a)]}
    for i, x in enumerate(a):
        by_reach[reach_of(x)].append(i)
    total = torch.zeros((), dtype=torch.float64, device=a[0].device if a else None)
    for reach, rows in by_reach.items():
        part = _inner_here([local(a[i]) for i in rows], [local(b[i]) for i in rows]).to(total.device)
        if reach is not None:
            part = gather_over(reach, part, "SAM", "adding up inner products").sum()
        total = total + part
    return total


def _inner_here(a: list[Tensor], b: list[Tensor]) -> Tensor:
    rows = [i for i, x in enumerate(a) if x.numel()]
    if not rows:
        return torch.zeros((), dtype=torch.float64)
    device = a[rows[0]].device
    if _native.asynchronous(device):
        if _native.has_kernels(device):
            measure = norms.new_measure(1.0, inner=True)
            norms.add_lists(measure, [a[i] for i in rows], [b[i] for i in rows])
            return norms.run_measure(measure, device).norm
        return torch.stack([torch.sum(a[i] * b[i], dtype=torch.float64) for i in rows]).sum()
    buckets: dict[tuple, list[int]] = {}
    for i in rows:
        buckets.setdefault((a[i].dtype, b[i].dtype), []).append(i)
    parts = [_weighed([a[i] for i in k], [b[i] for i in k], 0.0, 1.0, 1.0, 1.0, True)[0] for k in buckets.values()]
    return torch.tensor(math.fsum(parts), dtype=torch.float64)


def _on_cpu(parts: list[Bucket], q: float, reaches=()) -> tuple[float, float, float]:
    """(largest, norm, 1 / how many are the largest)."""

    def read(order: float, scale: float) -> list[tuple[float, float, bool]]:
        found = [(part.reach if reaches else None, part.read(order, scale)) for part in parts]
        return reduce_parts("SAM", found, reaches)

    found = read(2.0 if q == 2 else math.inf, 1.0)
    largest = norms._largest(part[1] for part in found)
    norm, count = largest, 1.0
    if 0 < largest < math.inf and q != 2:
        found = read(COUNT if math.isinf(q) else q, largest)
        count = math.fsum(part[0] for part in found)
        norm = largest if math.isinf(q) else largest * count ** (1 / q)
    elif 0 < largest < math.inf:
        norm = math.sqrt(math.fsum(part[0] for part in found))
    return largest, norm, 1 / count


def _on_device(parts: list[Bucket], q: float, device, reaches=()) -> tuple[Tensor, Tensor, Tensor]:
    """The same as 0-dim float64 tensors, by torch's foreach norms: without CUDA kernels, and of DTensors."""
    one = torch.ones((), dtype=torch.float64, device=device)
    if not parts and not reaches:
        return one * 0, one * 0, one
    pairs = [(part.reach if reaches else None, x) for part in parts for x in part.weighed() if x.numel()]
    over = [reach for reach, _ in pairs]
    lists = [x for _, x in pairs]

    def joint(values: Sequence[Tensor], order: float) -> Tensor:
        return joint_norm("SAM", list(zip(over, values)), reaches, order, device)

    largest = joint(torch._foreach_norm(lists, math.inf) if lists else [], math.inf)
    if math.isinf(q):
        count = joint([(x.abs() == largest).sum() for x in lists], 1.0)
        return largest, largest, 1 / count
    scale = largest.float().clamp(min=torch.finfo(torch.float32).tiny)
    relative = torch._foreach_div(lists, scale) if lists else []
    return largest, largest * joint(torch._foreach_norm(relative, q) if lists else [], q), one


def ascend(
    op: str, lists: list[list[Tensor]], rows: list[tuple], index: list[int] | None, q: float,
    steepness: Steepness | None, *, maximize: bool = False, kept: Storage = PLAIN, first_index: list[int] | None = None,
    backend: str = "auto",
) -> None:  # fmt: skip
    """One call.  lists: params, grads, backups (not with masters), and what `kept` names; rows: as `row` gives."""
    rule = rules.perturb(op, q=q, backup="masters" not in kept.lists, maximize=maximize)
    scalars = () if steepness is None else (steepness.largest, steepness.coefficient)
    call = replace(Call(replace(rule, storage=kept), *scalars), first_index=first_index)
    run_lists(op, call, lists, rows, index, backend)


def row(op: str, rho: float, weigh: Weighing, q: float, step: int = 1) -> tuple:
    """A row of hyper-parameters."""
    values = rules.numbers(op, lr=check.number(op, "rho", rho, 0), alpha=weigh.alpha, eps=weigh.eps)
    return hyper_fields(values | {"q": q}), step


@torch.no_grad()
def perturb_(
    params: Sequence[Tensor], grads: Sequence[Tensor], backups: Sequence[Tensor] | None, *, rho: float = 0.05,
    p: float = 2.0, adaptive: bool = False, eta: float = 0.01, step: int = 1, backend: str = "auto", **kept,
) -> Steepness | None:  # fmt: skip
    """backups <- params bit for bit, then params <- params + e, the steepest ascent of length rho; in place.

    In float32 and in this order, with T = |p| + eta if adaptive (else 1) and q the dual exponent of p::

        x = g T;    r = |x| / largest               (largest = max |x| over all tensors)
        d = r c                                     p = 2, c = largest / ‖x‖₂
        d = 1 where x != 0                          p = inf
        d = 1/count where r = 1, else 0             p = 1: the largest |x|, of which there are `count`
        d = (r c)^(q-1)                             other p, c = largest / ‖x‖_q; the power in float64
        p = p + sign(x) rho (T d)

    Gradients are only read.  Where a gradient or the norm is inf or NaN (adaptive: or |g| T overflows float32), and
    where all gradients are zero, nothing moves; p = inf looks at each element alone.

    16-bit parameters lose most of e when they are rounded to nearest: at 1e8 parameters 86 % of the ascent.  With
    `masters` p is read from there, params get the rounded sum, whose error the masters' low bits make random, masters
    stay as they are and no backup is needed (backups=None).  With `residuals` p is params and residuals together, and
    only params are written.  With `stochastic_rounding` (bfloat16) the sum is rounded without bias.

    Args:
        params, grads, backups: lists of tensors, as in `steepest.adamw_`; backups of their params' dtypes.
        rho: length of the ascent, >= 0.
        p: norm that it is measured in, >= 1 or inf; jointly over all tensors.
        adaptive: measure each element relative to |p| + eta.
        step: with seed, decides random numbers; otherwise without effect.
        masters, residuals, stochastic_rounding, seed, first_index: see steepest.storage.
        backend: "auto", "cpu" or "cuda".

    Returns: the Steepness (norm and largest gradient as device scalars, no host sync); None for p = inf.
    Raises ValueError, TypeError, NotImplementedError before anything changes.
    Cost in float32: 16 bytes per element, and 4 for the norm (none for p = inf; 8 adaptive; twice for p other than 1,
    2, inf).  bfloat16: half of it; with float32 masters 2 for the norm and
    8.  Source: Foret et al. 2021; Kwon et al. 2021 (adaptive).
    """
    op = "perturb_"
    q, weigh = dual(op, p), Weighing.of(adaptive, check.number(op, "eta", eta, 0))
    hyper = row(op, rho, weigh, q, step)
    if (backups is None) != (kept.get("masters") is not None):
        raise ValueError(f"{op}: expected backups, or masters in their place")
    lists = [params, grads] + ([] if backups is None else [backups])
    check.tensor_lists(op, ("params", "grads", "backups"), lists)
    parsed = storage.parse(op, (), params, kept)
    for name in parsed.storage.lists:
        if name not in ("masters", "residuals"):
            raise ValueError(f"{op}: {name} have no meaning here, expected masters or residuals")
    lists = [list(role) for role in [*lists, *parsed.lists]]
    rule = replace(rules.perturb(op, q=q, backup=backups is not None), storage=parsed.storage)
    check.tensor_lists(op, rule.names, lists)
    check.rows(op, rule.names, lists, ("params", "backups"), rule.dtypes)
    if backups is not None:
        _check_same_dtypes(op, lists[0], lists[2])
    weights = lists[0] if backups is not None else lists[2]
    steepness = measure(lists[1], weights, [weigh] * len(weights), q)
    ascend(op, lists, [hyper], None, q, steepness, kept=parsed.storage, first_index=parsed.first_index, backend=backend)
    return steepness


@torch.no_grad()
def restore_(
    params: Sequence[Tensor], backups: Sequence[Tensor], *, backend: str = "auto", unless: Tensor | None = None
) -> None:
    """params <- backups, in place: bit for bit where dtypes agree; a float32 master is rounded to nearest.

    unless: one-element float32 tensor; nothing changes where it is not 0, which nobody waits for to find out.

    Raises ValueError, TypeError before anything changes.  Cost: 8 bytes per float32 element.
    """
    op = "restore_"
    check.tensor_lists(op, ("params", "backups"), [params, backups])
    call = Call(rules.restore(op), found_inf=unless)
    run_lists(op, call, [list(params), list(backups)], [(hyper_fields({}), 1)], None, backend)


def _check_same_dtypes(op: str, params: list[Tensor], backups: list[Tensor]) -> None:
    for i, (p, backup) in enumerate(zip(params, backups)):
        if isinstance(p, Tensor) and isinstance(backup, Tensor) and p.dtype != backup.dtype:
            raise TypeError(f"{op}: backups[{i}] is {backup.dtype}, params[{i}] is {p.dtype}: a backup is bit for bit")
