"""Elementwise steps over lists of tensors, in place, one call for any number of tensors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from steepest import check, layout
from steepest._native import WITH_CUDA, lib, num_threads, reader

log = logging.getLogger("steepest")
BACKENDS = ("auto", "cpu", "cuda", "triton")
ADAMW_ROLES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
ADAMW_WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    step: int | Sequence[int],
    max_exp_avg_sqs: Sequence[Tensor] | None = None,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One AdamW step over all tensors, in place (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs; grads are only read).

    For every element, in float32 and in this order, which is that of torch.optim.AdamW's for-loop::

        g = grad / grad_scale                       (then -g if maximize)
        p = p (1 - lr wd)
        m = m + (1 - beta1) (g - m)
        v = v beta2 + ((1 - beta2) g) g             (AMSGrad: vmax = max(vmax, v) stands for v below)
        p = p + (-lr / (1 - beta1^t) m) / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    The scalars 1 - beta, bias corrections and 1 - lr wd are computed in float64 and rounded once.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: lists of equal length; row i has one shape and device.  Any shape, 0-dim
            and empty too.  dtypes float32, bfloat16, float16, freely mixed on the CPU; each result is rounded once to
            its tensor's dtype.  Rows in one dense layout (contiguous, transposed, channels_last, ...) are worked on
            in place; other rows are copied in and out, which costs extra but is right.
        lr, betas, eps, weight_decay: numbers; lr, eps, weight_decay >= 0, betas in [0, 1).
        step: number t of this step, the first being 1; or one number per tensor.
        max_exp_avg_sqs: AMSGrad's running maxima; None for plain AdamW.
        grad_scale: one-element float32 tensor on the parameters' device; gradients are divided by it.
        found_inf: one-element float32 tensor; nothing changes when it is not 0.
        backend: "auto" (by device), "cpu", "cuda" or "triton".

    Raises:
        ValueError, TypeError: wrong lengths, shapes, devices, dtypes, numbers; sparse, aliased or non-leaf tensors.
        NotImplementedError: this build or backend has no kernel for the device or dtypes.
        All before anything is changed.

    Cost: 28 bytes per float32 element (4 reads, 3 writes); 36 with AMSGrad; 14 with 16-bit tensors throughout.
    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019; Reddi et al. 2018 for AMSGrad.
    """
    op = "adamw_"
    roles = [params, grads, exp_avgs, exp_avg_sqs] + ([] if max_exp_avg_sqs is None else [max_exp_avg_sqs])
    check.tensor_lists(op, ADAMW_ROLES, roles)
    numbers = adamw_numbers(op, lr, betas, eps, weight_decay)
    hyper, index = _hyper_rows(op, numbers, step, len(params))
    check.leaves(op, [p for p in params if isinstance(p, Tensor)])
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if not len(params):
        return
    roles = [list(role) for role in roles]
    scalars = (grad_scale, found_inf)
    local = [_device_scalar(op, name, t, roles) for name, t in zip(("grad_scale", "found_inf"), scalars)]
    plain = all(local) and choose_backend(op, backend, roles[0][0]) != "triton"
    if not plain or _native(roles, hyper, index, maximize, *scalars) is not None:
        check_rows(op, roles, backend)
        step_checked(op, roles, hyper, index, maximize=maximize, scalars=scalars, backend=backend)
    # Kernels write through addresses; autograd must still notice that a tensor it saved has changed.
    torch.autograd.graph.increment_version(roles[0])


def adamw_numbers(op: str, lr, betas, eps, weight_decay) -> tuple[float, float, float, float, float]:
    """(lr, beta1, beta2, eps, weight_decay), checked."""
    try:
        beta1, beta2 = betas
    except (TypeError, ValueError):
        raise ValueError(f"{op}: betas is {betas!r}, expected two numbers in [0, 1)") from None
    return (
        check.number(op, "lr", lr, 0),
        check.number(op, "betas[0]", beta1, 0, 1),
        check.number(op, "betas[1]", beta2, 0, 1),
        check.number(op, "eps", eps, 0),
        check.number(op, "weight_decay", weight_decay, 0),
    )


def _hyper_rows(op: str, numbers: tuple, step, count: int) -> tuple[list[tuple], list[int] | None]:
    """Hyper-parameter rows and, unless there is one row for all, each tensor's row."""
    if isinstance(step, (list, tuple)):
        if len(step) != count:
            raise ValueError(f"{op}: step has {len(step)} numbers for {count} params")
        steps = [_step(op, f"step[{i}]", value) for i, value in enumerate(step)]
        distinct = sorted(set(steps)) or [1]
        row = {value: i for i, value in enumerate(distinct)}
        return [(*numbers, value) for value in distinct], [row[value] for value in steps]
    return [(*numbers, _step(op, "step", step))], None


def _step(op: str, name: str, value) -> int:
    number = check.number(op, name, value, 1)
    if number != int(number):
        raise ValueError(f"{op}: {name} is {value!r}, expected a whole number >= 1")
    return int(number)


def _native(roles, hyper, index, maximize, grad_scale, found_inf):
    """None when the step was taken; otherwise why the lists are not plain, with nothing changed."""
    address = [0 if t is None else t.data_ptr() for t in (grad_scale, found_inf)]
    return lib.adamw(reader, roles, hyper, index, maximize, *address, num_threads())


def check_rows(op: str, roles: list[list[Tensor]], backend: str) -> None:
    """For lists that the compiled gatherer turned down: raises unless `step_checked` can handle them."""
    names = ADAMW_ROLES[: len(roles)]
    check.rows(op, names, roles, ADAMW_WRITTEN)
    check.no_overlap(op, names, roles, ADAMW_WRITTEN)
    for group in layout.by_device_and_dtype(roles):
        row = [role[group[0]] for role in roles]
        _supported(op, choose_backend(op, backend, row[0]), row, names)


def step_checked(
    op: str,
    roles: list[list[Tensor]],
    hyper: list[tuple],
    index: list[int] | None,
    *,
    maximize: bool,
    scalars: tuple[Tensor | None, Tensor | None] = (None, None),
    backend: str = "auto",
) -> None:
    """Steps over checked lists of any layouts, dtypes and devices: grouped by device and dtype, copied if need be."""
    written = [name in ADAMW_WRITTEN for name in ADAMW_ROLES[: len(roles)]]
    for group in layout.by_device_and_dtype(roles):
        rows = layout.Rows([[role[i] for i in group] for role in roles], written)
        rows_index = None if index is None else [index[i] for i in group]
        local = [t if t is None else t.to(roles[0][group[0]].device) for t in scalars]
        if choose_backend(op, backend, roles[0][group[0]]) == "triton":
            _triton(rows.roles, hyper, rows_index, maximize, *local)
        else:
            reason = _native(rows.roles, hyper, rows_index, maximize, *local)
            if reason is not None:
                raise RuntimeError(f"{op}: prepared rows were turned down: {reason}; please report this")
        rows.write_back()


def _triton(roles, hyper, index, maximize, grad_scale, found_inf) -> None:
    from steepest.kernels.adamw import adamw_step

    vmax = roles[4] if len(roles) == 5 else None
    scalars = [tuple(row) for row in lib.adamw_scalars(hyper)]
    adamw_step(*roles[:4], vmax, scalars, index, maximize=maximize, grad_scale=grad_scale, found_inf=found_inf)


def _supported(op: str, backend: str, row: list[Tensor], names: Sequence[str]) -> None:
    states = {tensor.dtype for tensor in row[2:]}
    if len(states) > 1:
        found = {name: tensor.dtype for name, tensor in zip(names[2:], row[2:])}
        raise TypeError(f"{op}: the states of one row differ in dtype: {found}")
    if backend == "cpu":
        return
    dtypes = (row[0].dtype, row[1].dtype, row[2].dtype)
    if dtypes[0] != dtypes[1] or dtypes[2] not in (dtypes[0], torch.float32):
        raise NotImplementedError(
            f"{op}: backend {backend} has no kernel for {dtypes[0]} params, {dtypes[1]} grads, {dtypes[2]} states; "
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


def _device_scalar(op: str, name: str, value, roles) -> bool:
    """Checks a device scalar; False when it must be moved to reach the tensors."""
    if value is None:
        return True
    if not isinstance(value, Tensor) or value.numel() != 1 or value.dtype != torch.float32:
        found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{op}: {name} is {found}, expected a one-element float32 tensor")
    return isinstance(roles[0][0], Tensor) and value.device == roles[0][0].device
