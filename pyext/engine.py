"""From lists of tensors to a kernel: which backend, which rows are worked on in place, what is refused.

The compiled gatherer (rows.cpp) approves the usual lists in nanoseconds per tensor.  What it turns down comes to
`check_rows`, which raises unless `step_checked` can handle it: by grouping rows of one device and dtype, and by copying
rows whose layouts differ in and out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from steepest import check, layout, storage
from steepest._native import WITH_CUDA, lib, num_threads, reader
from steepest.distributed.shards import local_lists
from steepest.rules import Rule, hyper_fields

log = logging.getLogger("steepest")
BACKENDS = ("auto", "cpu", "cuda", "triton")
SCALARS = ("grad_scale", "clip_coefficient", "found_inf")


@dataclass(frozen=True)
class Call:
    """A rule with the one-element float32 tensors that apply to all rows; None where there is none."""

    rule: Rule
    grad_scale: Tensor | None = None
    clip_coefficient: Tensor | None = None
    found_inf: Tensor | None = None
    first_index: list[int] | None = None  # see storage.py
    # Steps that are counted where the tensors live (steepest_step_args.counters and what belongs to it).
    counters: lib.Addresses | None = None
    live: tuple[tuple[int, int, bool, int], ...] = ()  # row, field, whether float64, address; in the order of rows
    device_rows: Tensor | None = None  # scratch on a GPU

    @property
    def scalars(self) -> tuple[Tensor | None, ...]:
        return self.grad_scale, self.clip_coefficient, self.found_inf

    def on(self, device: torch.device) -> Call:
        there = {name: t.to(device) for name, t in zip(SCALARS, self.scalars) if t is not None and t.device != device}
        return replace(self, **there) if there else self

    def of_rows(self, rows: list[int]) -> Call:
        first = None if self.first_index is None else [self.first_index[i] for i in rows]
        counters = None if self.counters is None else self.counters.take(rows)
        return replace(self, first_index=first, counters=counters)

    def native(self, hyper: list[tuple], index: list[int] | None) -> lib.Step:
        """As the compiled module takes it; the scalars must outlive the call."""
        address = [0 if t is None else t.data_ptr() for t in self.scalars]
        rule, kept = self.rule, self.rule.storage
        return lib.Step(
            rule=rule.number, flags=rule.flags, hyper=hyper, index=index, clip_value=rule.clip_value,
            kinds=kept.kinds(rule.states), stochastic=kept.stochastic, seed=kept.seed, first_index=self.first_index,
            num_threads=num_threads(), counters=self.counters, live=self.live,
            device_rows=0 if self.device_rows is None else self.device_rows.data_ptr(), **dict(zip(SCALARS, address)),
        )  # fmt: skip


def check_scalars(op: str, call: Call, first) -> bool:
    """Checks the device scalars; False when one must be moved to reach the tensors."""
    local = True
    for name, value in zip(SCALARS, call.scalars):
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.numel() != 1 or value.dtype != torch.float32:
            found = (
                f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            )
            raise ValueError(f"{op}: {name} is {found}, expected a one-element float32 tensor")
        local = local and isinstance(first, Tensor) and value.device == first.device
    return local


def step_native(roles: list[list[Tensor]], call: Call, hyper: list[tuple], index: list[int] | None):
    """None when the step was taken; otherwise why the lists are not plain, with nothing changed."""
    return lib.step(reader, roles, call.native(hyper, index))


def check_rows(op: str, rule: Rule, roles: list[list[Tensor]], backend: str) -> None:
    """For lists that the compiled gatherer turned down: raises unless `step_checked` can handle them."""
    check.rows(op, rule.names, roles, rule.written, rule.dtypes)
    check.no_overlap(op, rule.names, roles, rule.written)
    for group in layout.by_device_and_dtype(roles):
        row = [role[group[0]] for role in roles]
        _supported(op, choose_backend(op, backend, row[0]), rule, row)


def step_checked(
    op: str, call: Call, roles: list[list[Tensor]], hyper: list[tuple], index: list[int] | None, backend: str = "auto"
) -> None:
    """Steps over checked lists of any layouts, dtypes and devices: grouped by device and dtype, copied if need be."""
    written = [name in call.rule.written for name in call.rule.names]
    flat = [name.endswith("_exponents") for name in call.rule.names]
    for group in layout.by_device_and_dtype(roles):
        rows = layout.Rows([[role[i] for i in group] for role in roles], written, flat)
        rows_index = None if index is None else [index[i] for i in group]
        local = call.of_rows(group).on(roles[0][group[0]].device)
        if choose_backend(op, backend, roles[0][group[0]]) == "triton":
            _triton(rows.roles, local, hyper, rows_index)
        else:
            reason = step_native(rows.roles, local, hyper, rows_index)
            if reason is not None:
                raise RuntimeError(f"{op}: prepared rows were turned down: {reason}; please report this")
        rows.write_back()


def triton_missing(call: Call) -> str:
    """Why Triton has no kernel for a call; "" when it has."""
    rule = call.rule
    if not rule.storage.plain or call.first_index is not None:
        return "other storage than one number per element, noise and averages"
    if call.counters is not None:
        return "steps that are counted on the device (capturable=True)"
    if rule.number != lib.ADAM or not rule.flags & lib.DECOUPLED:
        return f"{rule.name}; it has AdamW"
    if rule.flags & lib.CAUTIOUS or rule.clip_value or call.clip_coefficient is not None:
        return "clipping and cautious decay"
    return ""


def _triton(roles, call: Call, hyper, index) -> None:
    from steepest.kernels.adamw import adamw_step

    vmax = roles[4] if len(roles) == 5 else None
    scalars = [tuple(row) for row in lib.adam_scalars(hyper)]
    maximize = bool(call.rule.flags & lib.MAXIMIZE)
    adamw_step(
        *roles[:4], vmax, scalars, index, maximize=maximize, grad_scale=call.grad_scale, found_inf=call.found_inf
    )


def _supported(op: str, backend: str, rule: Rule, row: list[Tensor]) -> None:
    states = row[2 : 2 + len(rule.states)]
    if len({tensor.dtype for tensor in states}) > 1:
        found = {name: tensor.dtype for name, tensor in zip(rule.states, states)}
        raise TypeError(f"{op}: the states of one row differ in dtype: {found}")
    check.storage(op, rule.names, row, rule.storage)
    if backend != "triton":  # the others take any combination
        return
    state = states[0].dtype if states else row[0].dtype
    if row[0].dtype != row[1].dtype or state not in (row[0].dtype, torch.float32):
        raise NotImplementedError(
            f"{op}: backend {backend} has no kernel for {row[0].dtype} params, {row[1].dtype} grads, {state} states; "
            "supported: grads like params, states like params or float32"
        )


def choose_backend(op: str, backend: str, param: Tensor) -> str:
    """The backend that a call with `param` takes: "cpu", "cuda" or "triton"."""
    device = getattr(getattr(param, "device", None), "type", "cpu")
    if backend == "auto":
        return _auto_backend(op, device)
    if backend in ("cpu", "cuda") and device != backend:
        raise ValueError(f"{op}: backend={backend!r}, but params[0] is on {param.device}")
    if backend == "triton" and device == "cpu" and not _triton_interprets():
        raise ValueError(
            f"{op}: backend='triton' on CPU tensors needs Triton's interpreter: set TRITON_INTERPRET=1 before importing"
        )
    if backend == "cuda" and not WITH_CUDA:
        raise NotImplementedError(f"{op}: backend='cuda', but this build has no CUDA kernels (no nvcc at build time)")
    return backend


@cache
def _auto_backend(op: str, device: str) -> str:
    if device != "cuda":
        choice, why = "cpu", "parameters are on the CPU"
    elif WITH_CUDA:
        choice, why = "cuda", "parameters are on a CUDA device"
    else:
        choice, why = "triton", "parameters are on a CUDA device and this build has no CUDA kernels"
    log.info("%s: backend auto -> %s (%s)", op, choice, why)
    return choice


def _triton_interprets() -> bool:
    from steepest.kernels.portable import INTERPRETING

    return bool(INTERPRETING)


def steps_and_index(op: str, values: dict[str, float], step, count: int) -> tuple[list, list[int] | None]:
    """Hyper-parameter rows and, unless there is one row for all, each tensor's row."""
    fields = hyper_fields(values)
    if isinstance(step, (list, tuple)):
        if len(step) != count:
            raise ValueError(f"{op}: step has {len(step)} numbers for {count} params")
        steps = [_step(op, f"step[{i}]", value) for i, value in enumerate(step)]
        distinct = sorted(set(steps)) or [1]
        row = {value: i for i, value in enumerate(distinct)}
        return [(fields, value) for value in distinct], [row[value] for value in steps]
    return [(fields, _step(op, "step", step))], None


def _step(op: str, name: str, value) -> int:
    number = check.number(op, name, value, 1)
    if number != int(number):
        raise ValueError(f"{op}: {name} is {value!r}, expected a whole number >= 1")
    return int(number)


def step_lists(
    op: str, call: Call, lists: Sequence[Sequence[Tensor]], values: dict[str, float], step, backend: str, given: dict
) -> None:
    """What every functional op does: checks everything, steps, counts the parameters' versions up.

    `given`: the arguments that storage.py describes.
    """
    check.tensor_lists(op, call.rule.names, lists)
    params = lists[0]
    if given:
        kept = storage.parse(op, call.rule.states, params, given)
        call = replace(call, rule=replace(call.rule, storage=kept.storage), first_index=kept.first_index)
        lists, values = [*lists, *kept.lists], values | kept.values
        check.tensor_lists(op, call.rule.names, lists)
    hyper, index = steps_and_index(op, values, step, len(params))
    run_lists(op, call, lists, hyper, index, backend)


def run_lists(
    op: str, call: Call, lists: Sequence[Sequence[Tensor]], hyper: list[tuple], index: list[int] | None, backend: str
) -> None:
    """Checks lists of equal length, steps with the hyper-parameter rows given, counts the parameters' versions up."""
    rule, params = call.rule, lists[0]
    check.leaves(op, [p for p in params if isinstance(p, Tensor)])
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if not len(params):
        return
    roles = [list(role) for role in lists]
    local = check_scalars(op, call, roles[0][0])
    triton = choose_backend(op, backend, roles[0][0]) == "triton"
    if triton and triton_missing(call):
        raise NotImplementedError(f"{op}: backend triton has no kernel for {triton_missing(call)}")
    if triton or not local or step_native(roles, call, hyper, index) is not None:
        shards = local_lists(op, rule.names, roles)
        check_rows(op, rule, shards, backend)
        step_checked(op, call, shards, hyper, index, backend)
    # Kernels write through addresses; autograd must still notice that a tensor it saved has changed.
    torch.autograd.graph.increment_version(roles[0])
