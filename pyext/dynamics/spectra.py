"""Spectra of gradients, Shampoo factors and features, from products alone: nothing is read back from a device."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from steepest.matrix.roots import effective_dimension
from steepest.matrix.verbs import TorchVerbs, Verbs, full_float32
from steepest.optim.shampoo_blocks import unpacked


class Timescales(NamedTuple):
    """eigenvalues, descending, and times = 1 / (rate eigenvalue), inf for those that rounding alone may have made."""

    eigenvalues: Tensor
    times: Tensor


@torch.no_grad()
def gradient_dimension(g: Tensor) -> Tensor:
    """Effective dimension (tr F)² / tr(F²) of F = G Gᵀ, for every matrix of g (..., m, n): from 1 to min(m, n).

    With singular values σᵢ it is (Σ σᵢ²)² / Σ σᵢ⁴.  Computed in float32 (float64 for float64) from the Gram matrix of
    the shorter side; returned in that dtype, of g's batch shape.  0 for a zero matrix, NaN for one that is not finite.

    Error: relative, to first order, 2 γ_k (1 + √d) + 2 γ_n + γ_{n²}, k and n the longer and shorter side, γ_j = j u.
    Raises TypeError for other than floating tensors, ValueError for fewer than two dimensions.
    Cost: one symmetric product, k n² FLOPs.
    """
    return effective_dimension(_short_gram("gradient_dimension", g)[0])


@torch.no_grad()
def stable_rank(g: Tensor, *, tol: float = 1e-2) -> Tensor:
    """‖G‖_F² / ‖G‖₂² for every matrix of g (..., m, n): from 1 to its rank.  Between 1 - tol and 1 of the exact value.

    ‖G‖₂² is the largest eigenvalue of the shorter side's Gram matrix F, bounded by squaring:
    λ₁ <= (tr F^N)^(1/N) <= n^(1/N) λ₁, with N = 2^(s+1) after s products such that n^(1/N) <= 1 / (1 - tol).
    With a gap below λ₁ it is exact long before that.  0 for a zero matrix, NaN for one that is not finite.

    Dtypes and errors as `gradient_dimension`; ValueError also for tol outside (0, 1).
    Cost: k n² FLOPs for F and n³ for each of ceil(log2(ln n / -ln(1 - tol))) - 1 products: 8 for n = 128, tol 1e-2.
    """
    if not 0 < tol < 1:
        raise ValueError(f"stable_rank: tol is {tol!r}, expected a number in (0, 1)")
    f, verbs = _short_gram("stable_rank", g)
    return _stable_rank(f, verbs, tol)


def spectra(g: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """(gradient_dimension, stable_rank) from one Gram matrix."""
    f, verbs = _short_gram("spectra", g)
    return effective_dimension(f), _stable_rank(f, verbs, tol)


def _stable_rank(f: Tensor, verbs: Verbs, tol: float) -> Tensor:
    n = f.shape[-1]
    if not n:
        return f.new_zeros(f.shape[:-2])
    trace = f.diagonal(dim1=-2, dim2=-1).sum(-1)
    scale = trace.where(trace != 0, 1)
    y, log_bound = f / scale[..., None, None], torch.zeros_like(trace)
    products = max(0, math.ceil(math.log2(max(1.0, math.log(n) / -math.log1p(-tol)))) - 1)
    with full_float32():
        for k in range(products + 1):
            # F^(2^k) = y exp(2^k log_bound), and ‖y‖_F² is its tr F^(2^(k+1)).
            norm = torch.linalg.vector_norm(y, dim=(-2, -1))
            norm = norm.where(norm != 0, 1)
            log_bound = log_bound + norm.log() / 2**k
            y = y / norm[..., None, None]
            if k < products:
                y = verbs.symmetric_product(y, y)
    return torch.exp(-log_bound) * (trace / scale)


def factor_dimensions(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Effective dimension of every Shampoo factor: {"<parameter>.<statistic key>": 0-dim tensor}, {} without any.

    The parameter is its name where the optimizer has names (`named_parameters()`), else its place in param_groups.
    Factors kept as diagonals are left out.  Cost: one read of the factors.
    """
    names, factors = [], []
    for label, p in _labelled(optimizer):
        for key, value in optimizer.state.get(p, {}).items():
            if not key.startswith("statistic."):
                continue
            root = optimizer.state[p][key.replace("statistic", "root", 1)]
            if root.dim() == 2:
                names.append(f"{label}.{key}")
                factors.append(value if value.dim() == 2 else unpacked(value[None], len(root))[0])
    found: dict[str, Tensor] = {}
    for indices in buckets(factors):
        values = effective_dimension(torch.stack([factors[i] for i in indices]))
        found.update((names[i], value) for i, value in zip(indices, values.unbind()))
    return {name: found[name] for name in names}


@torch.no_grad()
def timescales(features: Tensor, *, rate: float = 1.0) -> Timescales:
    """Times in which gradient flow fits each mode of a linear model on `features` (samples, p), slowest last.

    For the loss ‖Φ w - y‖² / (2 n) the error along eigenvector i of the correlation matrix U = ΦᵀΦ / n decays as
    exp(-λᵢ rate t): τᵢ = 1 / (rate λᵢ).  A loss of ‖Φ w - y‖² / n has rate 2.  All min(samples, p) eigenvalues that can
    differ from zero are returned.  Those at most max(n, p) u λ₁, which rounding may have made, get τ = inf.

    Computed in float64.  Raises TypeError and ValueError for other than a floating matrix with samples, rate <= 0.
    Cost: a Gram matrix of the shorter side and its eigenvalues.
    """
    _check_matrix("timescales", features)
    if features.dim() != 2 or not features.shape[0]:
        raise ValueError(f"timescales: features has shape {tuple(features.shape)}, expected (samples, p)")
    if not rate > 0:
        raise ValueError(f"timescales: rate is {rate!r}, expected a positive number")
    x = features.detach().double()
    gram = TorchVerbs().gram(x if x.shape[0] <= x.shape[1] else x.mT) / x.shape[0]
    eigenvalues = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    unit = torch.finfo(torch.promote_types(features.dtype, torch.float32)).eps / 2
    floor = max(x.shape) * unit * eigenvalues[:1]
    times = torch.where(
        eigenvalues > floor, 1 / (rate * eigenvalues.clamp(min=torch.finfo(torch.float64).tiny)), math.inf
    )
    return Timescales(eigenvalues, times)


def buckets(tensors: list[Tensor]) -> list[list[int]]:
    """Indices of tensors of one shape, dtype and device."""
    found: dict[tuple, list[int]] = {}
    for i, tensor in enumerate(tensors):
        found.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(i)
    return list(found.values())


def _labelled(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """(name or "group.index", parameter) of every parameter."""
    found = []
    for number, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [f"{number}.{i}" for i in range(len(group["params"]))]
        found += zip(names, group["params"])
    return found


def _check_matrix(op: str, g: Tensor) -> None:
    if not isinstance(g, Tensor) or not g.is_floating_point():
        raise TypeError(f"{op}: got {getattr(g, 'dtype', type(g).__name__)}, expected a floating tensor")
    if g.dim() < 2:
        raise ValueError(f"{op}: got shape {tuple(g.shape)}, expected (..., m, n)")


def _short_gram(op: str, g: Tensor) -> tuple[Tensor, Verbs]:
    """Gram matrices of the shorter side of g / max |g|, whose squares stay in range."""
    _check_matrix(op, g)
    x = g.detach().to(torch.promote_types(g.dtype, torch.float32))
    verbs: Verbs = TorchVerbs()
    if x.is_cuda and x.dtype != torch.float64:
        from steepest.matrix.triton_verbs import TritonVerbs

        verbs = TritonVerbs("tf32x3")
    x = x if x.shape[-2] <= x.shape[-1] else x.mT
    if not x.numel():
        return x.new_zeros(*x.shape[:-1], x.shape[-2]), verbs
    largest = x.abs().amax((-2, -1), keepdim=True)
    with full_float32():
        return verbs.gram(x / largest.where(largest != 0, 1)), verbs
