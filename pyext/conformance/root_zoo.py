"""Positive definite matrices for inverse roots: families x condition x size, with their eigenvalues and vectors.

A matrix of a family is built in float64 and rounded once, to float32 for conditions up to 1e6 and not at all above:
rounding to float32 alone moves eigenvalues by more than a ridge below 1e-6.  What it is judged by is float64 eigh of
the rounded matrix, not the spectrum that it was built from, and one eigh serves all conditions of a family that does
not depend on the condition.

    spectra           those of cases.roots: LAPACK's generators, clusters, power laws, rank deficiency, 1e30 and 1e-30,
                      and "statistic", the mean of six outer products
    latms 1 ... 6     the modes of LAPACK's test matrix generator at COND = kappa: one large, one small, geometric,
                      arithmetic, random logarithms, random values
    low rank + ridge  n / 8 eigenvalues in [0.1, 1], the rest 1 / kappa
    graded            D B D with B of condition 2 and D from 1 to kappa^(-1/2): elements and eigenvectors are graded
    demo, left/right  statistics of the demo model while it trains: G G^T of an attention matrix and G^T G of the larger
                      one of the feed-forward part, of a model of width n; below 200 rows from recorded gradients

Sources: LAPACK Users' Guide (xLATMS); steepest.conformance.zoo for the spectra.
"""

from __future__ import annotations

import functools
from typing import Callable

import torch
from torch import Tensor

from steepest.conformance import recorded, zoo
from steepest.conformance.cases import roots as cases

KAPPAS = (1e2, 1e4, 1e6, 1e8, 1e10, 1e12)
F64 = torch.float64
DEMO_ROWS = 200  # from here on the demo model itself has this width; recorded gradients have at most 192 rows
DEMO_STEPS = 6


def _places(n: int) -> Tensor:
    """0 ... 1 in n steps."""
    return torch.arange(n, dtype=F64) / max(n - 1, 1)


def _one_large(n, kappa, generator):
    return torch.where(torch.arange(n) == 0, 1.0, 1 / kappa).to(F64)


def _low_rank(n, kappa, generator):
    rank = max(n // 8, 1)
    return torch.cat([torch.linspace(1, 0.1, rank, dtype=F64), torch.full((n - rank,), 1 / kappa, dtype=F64)])


# name -> eigenvalues (n, kappa, generator)
WITH_KAPPA: dict[str, Callable] = {
    "latms 1": _one_large,
    "latms 2": lambda n, kappa, generator: (1 + 1 / kappa) - _one_large(n, kappa, generator).flip(0),
    "latms 3": lambda n, kappa, generator: kappa ** -_places(n),
    "latms 4": lambda n, kappa, generator: 1 - _places(n) * (1 - 1 / kappa),
    "latms 5": lambda n, kappa, generator: kappa ** -torch.rand(n, generator=generator, dtype=F64),
    "latms 6": lambda n, kappa, generator: torch.rand(n, generator=generator, dtype=F64),
    "low rank + ridge": _low_rank,
}
DEMO = ("demo, left", "demo, right")
FAMILIES = (*cases.SPECTRA, *WITH_KAPPA, "graded", *DEMO)


def depends_on_kappa(family: str) -> bool:
    return family == "graded" or (family in WITH_KAPPA and family != "latms 6")


def dtype_of(kappa: float) -> torch.dtype:
    return torch.float32 if kappa <= 1e6 else F64


@functools.lru_cache(maxsize=2)
def _vectors(n: int, odd: bool) -> Tensor:
    return zoo._haar(n, n, torch.Generator().manual_seed(2 * n + odd))


def matrix(family: str, n: int, kappa: float) -> Tensor:
    """(n, n) in `dtype_of(kappa)`.  Families at odd places of FAMILIES and those at even places have one Q each."""
    place = FAMILIES.index(family)
    generator = torch.Generator().manual_seed(1000 * place + n)
    if family == "statistic":
        return cases.definite(family, n, seed=n, dtype=dtype_of(kappa))
    if family in DEMO:
        a = _of_demo(n)[DEMO.index(family)]
    else:
        q = _vectors(n, bool(place % 2))
        if family == "graded":
            d = kappa ** (-_places(n) / 2)
            a = d[:, None] * ((q * (1 + _places(n))) @ q.mT) * d
        elif family in WITH_KAPPA:
            a = (q * WITH_KAPPA[family](n, kappa, generator)) @ q.mT
        else:
            a = (q * zoo.SPECTRA[family](n, 1.0, generator)) @ q.mT
    return ((a + a.mT) / 2).to(dtype_of(kappa))


@functools.lru_cache(maxsize=2)
def _of_demo(n: int) -> tuple[Tensor, Tensor]:
    """(G G^T of attention.value summed over steps, G^T G of up), float64, (n, n) each."""
    left, right = torch.zeros(n, n, dtype=F64), torch.zeros(n, n, dtype=F64)
    if n < DEMO_ROWS:
        generator = torch.Generator().manual_seed(n)
        for name in recorded.RECORDED:
            left += _square(recorded.part(name, n, 48, generator))
            right += _square(recorded.part(name, 192, n, generator).mT)
        return left, right
    for value, up in _gradients(n):
        left += _square(value)
        right += _square(up.mT)
    return left, right


def _square(g: Tensor) -> Tensor:
    return g @ g.mT


def _gradients(width: int):
    """(attention.value, up) of the demo model of one layer, on its own text, at each of DEMO_STEPS steps of AdamW."""
    from steepest.demo.model import Transformer
    from steepest.demo.text import VOCABULARY_SIZE, load_text, training_batches

    context, batch = 32, 8
    model = Transformer(VOCABULARY_SIZE, context, width, layers=1, heads=2, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = load_text(None, 100_000, context)
    for inputs, targets in training_batches(text.train, DEMO_STEPS, batch, context, 0):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        block = model.blocks[0]
        yield block.attention.value.weight.grad.double(), block.up.weight.grad.double()
        optimizer.step()


class Decompositions:
    """float64 (eigenvalues, vectors) of the matrices of one size and dtype, each computed once."""

    def __init__(self):
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}

    def of(self, family: str, a: Tensor) -> tuple[Tensor, Tensor]:
        if depends_on_kappa(family):
            return torch.linalg.eigh(a.double())
        if family not in self.kept:
            self.kept[family] = torch.linalg.eigh(a.double())
        return self.kept[family]


def gradient(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """L^(1/2) N R^(1/2) for sides given by (eigenvalues, vectors), scaled to largest eigenvalues of 1; N normal."""
    n, m = len(left[0]), len(right[0])
    g = torch.randn(n, m, generator=torch.Generator().manual_seed(n + m), dtype=F64)
    (w, q), (v, r) = ((w.clamp(min=0) / w.abs().max(), q) for w, q in (left, right))
    return ((q * w.sqrt()) @ (q.mT @ g @ r) @ (r * v.sqrt()).mT).to(dtype)
