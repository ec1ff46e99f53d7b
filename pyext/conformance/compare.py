"""Figures from results: equality in bits, error in units of a bound, error in ulp, non-finite values by themselves."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from steepest.conformance.bounds import Tracked, number_format
from steepest.conformance.memory import differing
from steepest.conformance.registry import Figure


def nonfinite_mismatches(x: torch.Tensor, exact: torch.Tensor, error: torch.Tensor | None = None) -> int:
    """Elements where x is NaN, +inf, -inf or finite and the exact value is not the same of these.

    Where the bound makes no claim (an intermediate result may overflow in the working format) nothing is counted.
    """
    x, exact = x.detach().cpu().double(), exact.double()
    same = (x.isnan() & exact.isnan()) | (x.isinf() & (x == exact)) | (x.isfinite() & exact.isfinite())
    claimed = torch.ones_like(same) if error is None else error.isfinite() | ~exact.isfinite()
    return int((~same & claimed).sum())


def worst_share(x: torch.Tensor, expected: Tracked) -> float:
    """max |x - exact| / bound over the elements for which both are finite."""
    x = x.detach().cpu().double()
    distance = (x - expected.value).abs()
    judged = x.isfinite() & expected.value.isfinite() & expected.error.isfinite() & (distance != 0)
    shares = distance[judged] / expected.error[judged]
    return float(shares.max()) if shares.numel() else 0.0


def worst_ulp(x: torch.Tensor, expected: Tracked, scale: float) -> float:
    """max |x - exact| in ulp (of x's dtype) of the larger of |exact| and `scale`."""
    f = number_format(x.dtype)
    x = x.detach().cpu().double()
    judged = x.isfinite() & expected.value.isfinite() & expected.error.isfinite()
    if not judged.any():
        return 0.0
    exact = expected.value[judged]
    size = exact.abs().clamp(min=max(scale, f.tiny / (2 * f.unit)))
    ulp = torch.exp2(size.log2().floor()) * (2 * f.unit)
    return float(((x[judged] - exact).abs() / ulp).max())


def tracked_figures(role: str, x: torch.Tensor, expected: Tracked, scale: float) -> list[Figure]:
    """The three figures of one role (say "params"): non-finite values, share of the bound, ulp."""
    of = f"ulp of max(|x|, {scale:g})" if scale else "ulp"
    return [
        Figure(f"{role} non-finite", nonfinite_mismatches(x, expected.value, expected.error), 0, "elements"),
        Figure(f"{role} error/bound", worst_share(x, expected), 1.0, "of bound"),
        Figure(f"{role} ulp", worst_ulp(x, expected, scale), None, of),
    ]


def bits_figure(name: str, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], note: str = "") -> Figure:
    """Elements that differ in any bit; none may."""
    return Figure(name, sum(differing(a, b) for a, b in pairs), 0, "elements", note)
