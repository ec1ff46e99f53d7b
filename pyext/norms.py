"""One read of many tensors: their joint norm, the largest magnitude, whether anything is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest import _native, check, layout
from steepest._native import lib, num_threads, reader
from steepest.distributed.norms import reduce_norm, reduce_parts
from steepest.distributed.shards import Reach, check_placements, local, reach_of, reaches_of

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm that it divides by


@dataclass(frozen=True)
class Survey:
    """0-dim tensors on the device of the tensors surveyed."""

    norm: Tensor  # float32: (sum |x|^q)^(1/q), or max |x| for q = inf
    max_abs: Tensor  # float32: max |x|; NaN if any element is
    q: float

    @property
    def nonfinite(self) -> Tensor:
        """bool: an element is inf or NaN."""
        return ~self.max_abs.isfinite()

    def clip_coefficient(self, max_norm: float) -> Tensor:
        """min(max_norm / (norm + 1e-6), 1), what torch.nn.utils.clip_grad_norm_ multiplies gradients by; float32."""
        if not _native.asynchronous(self.norm.device):  # one operation of torch's instead of three
            return torch.tensor(lib.clip(self.norm.item(), max_norm, 1.0)[1], dtype=torch.float32)
        return (max_norm / (self.norm + CLIP_EPS)).clamp(max=1.0)


@torch.no_grad()
def survey(tensors: Sequence[Tensor], *, q: float = 2.0) -> Survey:
    """Joint norm of all elements of all tensors, from one read (two for q other than 1, 2 and inf).

        norm = (sum over all tensors and elements of |x|^q)^(1/q)

    Sums are float64, in memory order and grouped by the sizes alone: the result does not depend on threads or vector
    width.  Powers are taken relative to the largest element, so that none overflows.

    Of DTensors it is the norm of what all ranks hold together (see `steepest.distributed.reduce_norm`), which every
    rank of their meshes must then ask for.

    Args:
        tensors: float32, bfloat16 or float16 tensors on one device, of any shapes and layouts; may be empty.
        q: >= 1, or math.inf.

    Raises ValueError or TypeError for anything else.  Cost: 4 bytes per float32 element (twice for q other than 1, 2
    and inf); on CUDA nothing waits for the device, and the bits are the CPU's.  Of DTensors on CUDA the shards' norms
    come from torch.
    """
    op = "survey"
    shards = _checked(op, tensors)
    q = _power(op, q)
    if not len(tensors):
        return _result(0.0, 0.0, q, torch.device("cpu"))
    device = tensors[0].device
    reaches = reaches_of(tensors)
    if _native.asynchronous(device):
        return _on_device(tensors, q, shards)
    alike: dict[tuple[Reach | None, torch.dtype], list[Tensor]] = {}
    for tensor, shard in zip(tensors, shards):
        if shard.numel():
            alike.setdefault((reach_of(tensor), shard.dtype), []).append(shard)

    def read(q, scale):
        parts = [(reach, native(same, q, scale)) for (reach, _), same in alike.items()]
        return reduce_parts(op, parts, reaches)

    return from_lists(read, q, device)


def from_lists(read, q: float, device: torch.device) -> Survey:
    """The survey whose parts read(q, scale) returns as (sum |x / scale|^q, largest |x|, non-finite flag) triples."""
    return _result(*numbers(read, q), q, device)


def numbers(read, q: float) -> tuple[float, float]:
    """The same as numbers: the norm and the largest |x|."""
    direct = q in (1.0, 2.0) or math.isinf(q)
    parts = read(q, 1.0) if direct else _scaled(read, q)
    largest = _largest(part[1] for part in parts)
    if math.isinf(q) or not math.isfinite(largest):
        return largest, largest
    power_sum = math.fsum(part[0] for part in parts)
    # As csrc/formula/survey.h has it, which other devices compute.
    norm = power_sum if q == 1 else math.sqrt(power_sum) if q == 2 else largest * power_sum ** (1 / q)
    return norm, largest


def _scaled(read, q: float) -> list[tuple[float, float, bool]]:
    """Powers relative to the largest element, which a first read finds."""
    largest = _largest(part[1] for part in read(math.inf, 1.0))
    return read(q, largest) if 0 < largest < math.inf else [(0.0, largest, False)]


def _largest(values: Iterable[float]) -> float:
    """NaN if any is."""
    found = 0.0
    for value in values:
        found = value if value > found or math.isnan(value) else found
        if math.isnan(found):
            break
    return found


def native(tensors: list[Tensor], q: float, scale: float) -> tuple[float, float, bool]:
    """(sum |x / scale|^q, largest |x|, non-finite flag) of CPU tensors of one dtype; q = inf: no sum."""
    found = lib.survey(reader, tensors, q, scale, num_threads())
    if isinstance(found[0], str):  # gaps between elements, a tensor subclass ...
        plain = [t.detach() if layout.is_dense(t) else t.detach().contiguous() for t in tensors]
        found = lib.survey(reader, plain, q, scale, num_threads())
        if isinstance(found[0], str):
            raise RuntimeError(f"survey: prepared tensors were turned down: {found}; please report this")
    return found


def _result(norm: float, largest: float, q: float, device: torch.device) -> Survey:
    return Survey(*torch.tensor((norm, largest), dtype=torch.float32, device=device).unbind(), q)


def _on_device(tensors: Sequence[Tensor], q: float, shards: list[Tensor] | None = None) -> Survey:
    shards = list(tensors) if shards is None else shards
    filled = [shard for shard in shards if shard.numel()]
    whole = all(reach_of(tensor) is None for tensor in tensors)
    if whole and not filled:
        return _result(0.0, 0.0, q, shards[0].device)
    if whole and _native.has_kernels(shards[0].device):
        measure = new_measure(q)
        add_lists(measure, filled)
        found = run_measure(measure, shards[0].device)
        return Survey(found.norm32, found.largest, q)
    if whole:
        largest = torch.stack([n.float() for n in torch._foreach_norm(filled, math.inf)]).max()
        joint = torch.linalg.vector_norm(torch.stack([n.double() for n in torch._foreach_norm(filled, q)]), q).float()
    else:
        largest, joint = (
            reduce_norm([torch.linalg.vector_norm(t, p, dtype=torch.float32) if t.numel() else 0.0 for t in shards],
                        tensors, p)
            for p in (math.inf, q)
        )  # fmt: skip
    return Survey(largest if math.isinf(q) else joint, largest, q)


def of_gradients(params: Sequence[Tensor]) -> Survey:
    """The survey (q = 2) of the gradients on a device; a rank on which some are missing takes part with nothing."""
    grads = [p.grad for p in params]
    shards = [p.new_empty(0) if grad is None else local(grad) for p, grad in zip(map(local, params), grads)]
    return _on_device([p if grad is None else grad for p, grad in zip(params, grads)], 2.0, shards)


@dataclass(frozen=True)
class Measured:
    """What one or two reads say about tensors, 0-dim where they live (steepest_measure_result)."""

    norm: Tensor  # float64: (sum |x|^q)^(1/q), or the inner product
    norm32: Tensor  # float32: that divided by a loss scale
    largest: Tensor  # float32: max |x|
    clip_coefficient: Tensor  # float32
    steepness: Tensor  # float32: largest / norm; q = inf: 1 / how many are the largest, if they were counted
    nonfinite: Tensor  # bool


def new_measure(q: float, *, inner: bool = False, count_largest: bool = False) -> lib.Measure:
    return lib.Measure(q=q, inner=inner, count_largest=count_largest)


def add_lists(
    measure: lib.Measure, tensors: Sequence[Tensor], weights: Sequence[Tensor] | None = None, alpha: float = 0.0,
    eps: float = 1.0,
) -> None:  # fmt: skip
    """Adds plain tensors of any dtypes and layouts, those of a row of one shape."""
    buckets: dict[tuple, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.numel():
            buckets.setdefault((tensor.dtype, None if weights is None else weights[i].dtype), []).append(i)
    for rows in buckets.values():
        lists = [[role[i] for i in rows] for role in ([tensors] if weights is None else [tensors, weights])]
        if measure.add(reader, lists[0], None if weights is None else lists[1], alpha, eps) is None:
            continue
        # Gaps between elements, a row of tensors laid out unlike each other, a tensor subclass ...
        plain = layout.Rows([[t.detach() for t in role] for role in lists], [False] * len(lists), [False] * len(lists))
        reason = measure.add(reader, plain.roles[0], None if weights is None else plain.roles[1], alpha, eps)
        if reason is not None:
            raise RuntimeError(f"survey: prepared tensors were turned down: {reason}; please report this")


def run_measure(
    measure: lib.Measure, device: torch.device, *, max_norm: float = 0.0, grad_scale: Tensor | None = None
) -> Measured:
    """Runs it once on everything that was added; nothing waits for the device."""
    size = measure.workspace_bytes
    workspace = torch.empty(size // 8, dtype=torch.float64, device=device)  # which a graph being captured keeps
    result = torch.empty(4, dtype=torch.float64, device=device)
    measure.run(
        reader=reader, max_norm=max_norm, grad_scale=0 if grad_scale is None else grad_scale.data_ptr(),
        workspace=workspace.data_ptr(), workspace_bytes=size, result=result.data_ptr(), num_threads=num_threads(),
    )  # fmt: skip
    _, _, norm32, largest, clip_coefficient, steepness, _, _ = result.view(torch.float32).unbind()
    nonfinite = result.view(torch.bool)[24]
    return Measured(result[0], norm32, largest, clip_coefficient, steepness, nonfinite)


def _power(op: str, q) -> float:
    if q == math.inf:
        return math.inf
    q = check.number(op, "q", q, 0)
    if q < 1:
        raise ValueError(f"{op}: q is {q}, expected a number >= 1 or inf")
    return q


def _checked(op: str, tensors) -> list[Tensor]:
    check.tensor_lists(op, ("tensors",), [tensors])
    found = []
    for i, tensor in enumerate(tensors):
        where = f"{op}: tensors[{i}]"
        check_placements(where, tensor)
        found.append(local(tensor))
        check.one(where, found[-1], written=False)
        if found[-1].device != found[0].device:
            raise ValueError(f"{where} is on {tensor.device}, tensors[0] is on {found[0].device}")
    return found


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_: scales all gradients by min(max_norm / (norm + 1e-6), 1); returns the norm.

    An optimizer's `max_grad_norm` does the same inside the step, without writing the gradients.

    Args:
        parameters: a tensor or an iterable of tensors; those without a gradient are passed over.
        max_norm: >= 0.
        norm_type: q >= 1, or inf.
        error_if_nonfinite: raise if the norm is inf or NaN, before any gradient is changed.
        foreach: accepted for compatibility and without effect.

    Raises RuntimeError for a non-finite norm if asked to, ValueError and TypeError as `survey`.
    Cost: 12 bytes per float32 element (2 reads, 1 write).
    """
    op = "clip_grad_norm_"
    max_norm = check.number(op, "max_norm", max_norm, 0)
    grads = [p.grad for p in ([parameters] if isinstance(parameters, Tensor) else parameters) if p.grad is not None]
    found = survey(grads, q=norm_type)
    if error_if_nonfinite and bool(found.nonfinite):
        raise RuntimeError(
            f"{op}: the total norm of order {norm_type} of the gradients is not finite, so they cannot be clipped; "
            "error_if_nonfinite=False would scale them by it anyway"
        )
    if grads:
        coefficient = found.clip_coefficient(max_norm)
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for grad in grads:
            by_dtype.setdefault(grad.dtype, []).append(grad)
        for dtype, same in by_dtype.items():
            torch._foreach_mul_([local(grad) for grad in same], coefficient.to(dtype))
    return found.norm
