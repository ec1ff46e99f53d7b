"""AdamW for any number of tensors in one launch (two where some addresses are not multiples of 16 bytes).

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (2019); AMSGrad: Reddi et al. (2018).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from .portable import DTYPES, narrow, on_device, require_device, widen

# 8 elements per thread and role keep eight 16-byte loads per thread in flight at 4 warps without spilling.
TILE = 1024
WARPS = 4
VECTOR_BYTES = 16

# Columns of the table, one row per tensor.  The first five are addresses; the fifth is 0 without AMSGrad.
VMAX = tl.constexpr(4)
NUMEL = tl.constexpr(5)
FIRST_TILE = tl.constexpr(6)
SCALARS = tl.constexpr(7)
COLUMNS = tl.constexpr(8)


@triton.jit
def adamw_formula(p, g, m, v, vmax, scalars_ptr, AMSGRAD: tl.constexpr):
    """The rule in float32, in the operation order of csrc/formula/adamw.h."""
    decay = tl.load(scalars_ptr)
    lerp = tl.load(scalars_ptr + 1)
    lerp_rest = tl.load(scalars_ptr + 2)
    beta2 = tl.load(scalars_ptr + 3)
    beta2_rest = tl.load(scalars_ptr + 4)
    negative_step_size = tl.load(scalars_ptr + 5)
    eps = tl.load(scalars_ptr + 6)

    p = p * decay
    # torch's lerp: the form that is exact at its own end of [0, 1].
    toward = g - m
    m = tl.where(lerp < 0.5, m + lerp * toward, g - toward * lerp_rest)
    v = v * beta2 + (beta2_rest * g) * g
    second = v
    if AMSGRAD:
        # NaN in either operand is kept, as torch.maximum keeps it.
        second = tl.where((v > vmax) | (v != v), v, vmax)
    p = p + tl.div_rn(negative_step_size * m, tl.sqrt_rn(second) + eps)
    return p, m, v, second


@triton.jit
def adamw_tile(p_ptr, g_ptr, m_ptr, v_ptr, vmax_ptr, mask, divisor, scalars_ptr, AMSGRAD: tl.constexpr):
    """Steps one tile; `mask` is None for a full one, since a mask of unknown length forbids vector accesses."""
    p = widen(tl.load(p_ptr, mask=mask))
    g = widen(tl.load(g_ptr, mask=mask))
    m = widen(tl.load(m_ptr, mask=mask))
    v = widen(tl.load(v_ptr, mask=mask))
    vmax = v
    if AMSGRAD:
        vmax = widen(tl.load(vmax_ptr, mask=mask))
    if divisor != 1.0:
        g = tl.div_rn(g, divisor)
    p, m, v, second = adamw_formula(p, g, m, v, vmax, scalars_ptr, AMSGRAD)
    tl.store(p_ptr, narrow(p, p_ptr.dtype.element_ty), mask=mask)
    tl.store(m_ptr, narrow(m, m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr, narrow(v, v_ptr.dtype.element_ty), mask=mask)
    if AMSGRAD:
        tl.store(vmax_ptr, narrow(second, vmax_ptr.dtype.element_ty), mask=mask)


@triton.jit
def tile_pointers(row_ptr, column: tl.constexpr, dtype: tl.constexpr, offsets, ALIGNED: tl.constexpr):
    """Pointers into the tensor whose address stands in `column` of a table row."""
    base = tl.load(row_ptr + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base + offsets


@triton.jit
def scalar_at(address, default: tl.constexpr):
    """The float32 at `address`, or `default` if the address is 0."""
    value = default
    if address != 0:
        value = tl.load(address.to(tl.pointer_type(tl.float32)))
    return value


@triton.jit(do_not_specialize=["grad_scale_address", "found_inf_address", "maximize"])
def adamw_kernel(
    table_ptr,
    owner_ptr,
    scalars_ptr,
    grad_scale_address: tl.int64,
    found_inf_address: tl.int64,
    maximize: tl.int32,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program steps one tile of the tensor `owner_ptr[program]`; the flags are run-time values, addresses or 0."""
    tile = tl.program_id(0)
    row_ptr = table_ptr + tl.load(owner_ptr + tile).to(tl.int64) * COLUMNS
    start = (tile - tl.load(row_ptr + FIRST_TILE)) * TILE
    rest = tl.load(row_ptr + NUMEL) - start
    rest = tl.where(scalar_at(found_inf_address, 0.0) != 0, 0, rest)  # nothing is left to store
    divisor = scalar_at(grad_scale_address, 1.0)
    # Negation commutes with rounding: dividing by -scale is dividing by scale and negating.
    if maximize != 0:
        divisor = -divisor

    within = tl.arange(0, TILE)
    p_ptr = tile_pointers(row_ptr, 0, PARAM, start + within, ALIGNED)
    g_ptr = tile_pointers(row_ptr, 1, GRAD, start + within, ALIGNED)
    m_ptr = tile_pointers(row_ptr, 2, STATE, start + within, ALIGNED)
    v_ptr = tile_pointers(row_ptr, 3, STATE, start + within, ALIGNED)
    vmax_ptr = tile_pointers(row_ptr, VMAX, STATE, start + within, ALIGNED)
    row_scalars_ptr = scalars_ptr + tl.load(row_ptr + SCALARS) * 7
    if rest >= TILE:
        adamw_tile(p_ptr, g_ptr, m_ptr, v_ptr, vmax_ptr, None, divisor, row_scalars_ptr, AMSGRAD)
    else:
        adamw_tile(p_ptr, g_ptr, m_ptr, v_ptr, vmax_ptr, within < rest, divisor, row_scalars_ptr, AMSGRAD)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies a host table without making the host wait for the device."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def launch_arguments(
    rows: np.ndarray, scalars: torch.Tensor, flags: tuple[int, int, int], dtypes: tuple[torch.dtype, ...], aligned: bool
) -> tuple[tuple[int, ...], tuple, dict]:
    """Grid, positional and keyword arguments of one launch; fills the FIRST_TILE column of `rows` (tensors, 8)."""
    tiles = -(-rows[:, NUMEL.value] // TILE)
    ends = np.cumsum(tiles)
    rows[:, FIRST_TILE.value] = ends - tiles
    programs = int(ends[-1])
    indices = torch.arange(len(rows), dtype=torch.int32, device=scalars.device)
    owner = torch.repeat_interleave(indices, to_device(tiles, scalars.device), output_size=programs)
    options = {role: DTYPES[dtype] for role, dtype in zip(("PARAM", "GRAD", "STATE"), dtypes)}
    options |= {"AMSGRAD": bool(rows[0, VMAX.value]), "ALIGNED": aligned, "TILE": TILE}
    options |= {"num_warps": WARPS, "enable_fp_fusion": False}
    return (programs,), (to_device(rows, scalars.device), owner, scalars, *flags), options


def adamw_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    max_exp_avg_sqs: Sequence[torch.Tensor] | None,
    scalars: Sequence[tuple[float, ...]],
    scalar_index: Sequence[int] | None,
    *,
    maximize: bool = False,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """One AdamW step, in place, for any number of tensors.

    Per element, in float32:  p = decay p;  m = m + lerp (g - m);  v = beta2 v + beta2_rest g²;
    p = p + negative_step_size m / (sqrt(v) + eps), where AMSGrad puts max(vmax, v) in the place of v.

    The caller has checked the lists: dense tensors on one device, one dtype per role (float32, float16, bfloat16; all
    states alike), and per tensor the same shape and strides in every role.

    Args:
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs: the tensors; the last is None without AMSGrad.
        scalars: tuples (decay, lerp, lerp_rest, beta2, beta2_rest, negative_step_size, eps), the last two with the
            bias corrections, computed in float64 and rounded to float32.  Run-time values, like everything here but
            dtypes: a new learning rate compiles nothing.
        scalar_index: tensor i uses scalars[scalar_index[i]]; None: all use scalars[0].
        maximize: steps along the gradient instead of against it.
        grad_scale: one float32 on the device; the gradients are divided by it.
        found_inf: one float32 on the device; unless it is 0, everything stays as it is.

    The tables are copied from the host at every call, which a CUDA graph would not repeat: do not capture it.

    Cost: 28 bytes per element in float32 (AMSGrad 36).  Raises ValueError for tensors that Triton cannot reach.
    """
    if not params:
        return
    device = params[0].device
    require_device("adamw_step", params[0])
    flags = (*(0 if flag is None else flag.data_ptr() for flag in (grad_scale, found_inf)), int(maximize))
    roles = [params, grads, exp_avgs, exp_avg_sqs]
    addresses = [[tensor.data_ptr() for tensor in role] for role in roles]
    addresses.append([v.data_ptr() for v in max_exp_avg_sqs] if max_exp_avg_sqs else [0] * len(params))
    rows = np.zeros((len(params), COLUMNS.value), dtype=np.int64)
    rows[:, : VMAX.value + 1] = np.array(addresses, dtype=np.int64).T
    rows[:, NUMEL.value] = [p.numel() for p in params]
    rows[:, SCALARS.value] = 0 if scalar_index is None else scalar_index

    dtypes = (params[0].dtype, grads[0].dtype, exp_avgs[0].dtype)
    table = to_device(np.array(scalars, dtype=np.float32).reshape(-1, 7), device)
    rows = rows[rows[:, NUMEL.value] > 0]
    fits = (rows[:, : VMAX.value + 1] % VECTOR_BYTES == 0).all(axis=1)
    with on_device(params[0]):
        for aligned in (True, False):
            chosen = rows[fits == aligned]
            if len(chosen) == 0:
                continue
            grid, arguments, options = launch_arguments(chosen, table, flags, dtypes, aligned)
            adamw_kernel[grid](*arguments, **options)
