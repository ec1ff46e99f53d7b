"""What rounding does to an algorithm over matrix verbs, by stochastic arithmetic (Parker, "Monte Carlo arithmetic").

`NoisyVerbs` multiply in float64 and add to every result noise as large as the rounding of the real verbs may be.  An
algorithm run on them several times, against itself without noise, shows how far rounding may take its result on this
very input: an estimate that sees which singular values are there, where a bound from norms alone is hundreds of times
too wide.  Only the difference of the algorithm to itself is used, so an algorithm that is wrong gains nothing by it.

Standard deviations, with u the unit roundoff of the working format, s its smallest subnormal, w = 2^-24 (all products
accumulate in float32, or in float64 when that is the working format), k the length of the sums:

    product A B       w sqrt(k/3) |A| |B|    k additions, each off by at most w times the partial sum, which is at most
                                             |A| |B|; independent, uniform errors of that size have this deviation
    result x stored   u |x| + s/2            the largest error of one rounding, the deviation of three

Verbs that compute one triangle and mirror it err alike in both, `mirrored`: later steps damp the antisymmetric half of
errors that are independent, but none of these.
"""

from __future__ import annotations

import math

import torch

from steepest.conformance.bounds import number_format


class NoisyVerbs:
    """The table of verbs (steepest.matrix.verbs) over float64 tensors; without a generator it is exact."""

    def __init__(self, dtype: torch.dtype, generator: torch.Generator | None, mirrored: bool = False):
        self.format = number_format(dtype)
        self.accumulation = min(2.0**-24, self.format.unit)
        if dtype == torch.float64:
            self.accumulation = self.format.unit
        self.generator, self.mirrored = generator, mirrored

    def stored(self, x: torch.Tensor, deviation: torch.Tensor | float = 0.0) -> torch.Tensor:
        if self.generator is None:
            return x
        deviation = deviation + self.format.unit * x.abs() + self.format.tiny / 2
        return x + deviation * torch.randn(x.shape, generator=self.generator, dtype=x.dtype)

    def product(self, a, b, alpha=1.0, rest=0.0):
        deviation = 0.0
        if self.generator is not None:
            deviation = abs(alpha) * self.accumulation * math.sqrt(a.shape[-1] / 3) * (a.abs() @ b.abs())
        return self.stored(alpha * (a @ b) + rest, deviation)

    def symmetric(self, y):
        return y.tril() + y.tril(-1).mT if self.mirrored and self.generator is not None else y

    def gram(self, x):
        return self.symmetric(self.product(x, x.mT))

    def symmetric_product(self, a, b, *, alpha=1.0, beta=0.0, c=None, diagonal=0.0):
        rest = diagonal * torch.eye(a.shape[-1], dtype=a.dtype)
        return self.symmetric(self.product(a, b, alpha, rest if c is None else rest + beta * c))

    def commuting_product(self, a, b, *, beta=0.0, c=None):
        return self.product(a, b, 1.0, 0.0 if c is None else beta * c)

    def long_product(self, q, x, *, alpha=1.0, shift=0.0):
        return self.product(q, x, alpha, shift * x)

    def combination(self, a, *, alpha=1.0, beta=0.0, c=None, diagonal=0.0, dtype=None):
        """Exact where nothing is added: a change of format alone rounds what has just been rounded."""
        if (alpha, c, diagonal) == (1.0, None, 0.0):
            return a
        rest = diagonal * torch.eye(a.shape[-1], dtype=a.dtype) if diagonal else 0.0
        return self.stored(alpha * a + rest + (0.0 if c is None else beta * c))

    def norm(self, a):
        """Summed in float64, whatever the working precision."""
        return torch.linalg.matrix_norm(a, keepdim=True)

    def divided(self, a, by, *, power, factor):
        """The divisor is rounded with the quotient, or not at all."""
        return self.stored(a / (by.where(by != 0, 1) ** power * factor))


def rounding_estimate(
    algorithm, x: torch.Tensor, dtype: torch.dtype, *, draws: int, seed: int, mirrored: bool = False
) -> float:
    """Root mean square, over the draws, of ||algorithm with noise - algorithm without||_F; x is rounded with noise too.

    algorithm(x, verbs) -> result, on float64 tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    exact = algorithm(x, NoisyVerbs(dtype, None))
    noisy = NoisyVerbs(dtype, generator, mirrored)
    squares = [(algorithm(noisy.stored(x), noisy) - exact).square().sum().item() for _ in range(draws)]
    return math.sqrt(sum(squares) / draws)
