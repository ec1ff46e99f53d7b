"""Upper bounds of the largest singular value that cost no product, and the schedules that suit them.

The polar factor's polynomials need X / ν with ν ≥ σ₁, and do best where the other singular values are large too: the
tighter the bound, the fewer steps are spent on making them grow. With M = X Xᵀ, which the first step computes anyway,

    frobenius   ‖X‖_F        = (Σ σ²)^(1/2)
    schatten4   ‖M‖_F^(1/2)  = (Σ σ⁴)^(1/4)
    schatten8   ‖M²‖_F^(1/4) = (Σ σ⁸)^(1/8)

each at most the one before, and none moves the singular vectors, unlike the one-sided scaling of Turbo-Muon (arXiv
2512.04632). M² is computed anyway by polynomials of degree 2 and more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.matrix.verbs import Verbs
from steepest.schedules import NORM_MARGIN, Schedule, minimax

NORMS = ("frobenius", "schatten4", "schatten8")
# Lower ends, relative to ν, for which the minimax schedule of so many steps has the least root mean square of
# 1 - f(σ / ν), averaged over 8 spectra × 5 shapes from 64 × 64 to 256 × 1024 and recorded gradients: bench/
# tune_norms.py finds them. What is reached, beside polar-express under the same norm:
#     steps           3     4     5     6    polar-express × 5   × 6
#     frobenius     .50   .36   .25   .17          .26           .19
#     schatten4     .47   .31   .22   .16          .25           .17
#     schatten8     .45   .30   .22   .16          .24           .17
# So a tighter norm is worth half a step over these, and where most singular values are of one size a whole one.
# Measured on Gaussian matrices, two cores: 4 steps in schatten8 against polar-express × 5, that error and the time
#     768 × 3072        .052 for .088,  89 ms for  95        512 × 512        .083 for .107, 12.6 ms for 15.6
#     256 × (64 × 64)   .081 for .103, 8.3 ms for 9.1        1024 × 1024      .078 for .124,   95 ms for  118
TUNED_LOWER = {
    "frobenius": (1.4e-3, 3.0e-2, 9.5e-3, 3.6e-3, 1.4e-3, 5.3e-4, 2.0e-4, 4.4e-5),
    "schatten4": (1.2e-1, 3.6e-2, 1.2e-2, 4.4e-3, 1.7e-3, 6.5e-4, 2.0e-4, 4.4e-5),
    "schatten8": (1.4e-1, 4.4e-2, 1.2e-2, 5.3e-3, 1.7e-3, 6.5e-4, 2.0e-4, 4.4e-5),
}


def tuned(steps: int, norm: str, safety: float = 1.0) -> Schedule:
    """The minimax schedule of so many steps whose lower end suits the norm. ValueError beyond the table's steps."""
    table = TUNED_LOWER[norm]
    if not isinstance(steps, int) or not 1 <= steps <= len(table):
        raise ValueError(
            f"polar: schedule 'tuned' has 1 to {len(table)} steps, asked for {steps!r}; use tol or minimax"
        )
    return minimax(2, table[steps - 1] ** 2, steps=steps, safety=safety)


def safety_of(unit: float) -> float:
    """Slack above 1 that a generated schedule needs where products round to `unit`; 1 for float32 and float64.

    Storing an iterate moves singular values by a few units of the largest; minimax schedules diverge above 1.000007.
    Float32 is covered by the margin of the norm; float16 gets 1.008 and bfloat16 1.06.
    """
    return 1 + 16 * unit if unit > 2.0**-20 else 1.0


def initial_size(norm: str, rows: int, unit: float) -> float:
    """What ‖X‖_F the first Gram matrix is computed at: 1, or a power of 2 near rows^(1/4) in half precision.

    There M would be small with X (an element near ‖X‖_F² / rows), and float16 has few bits below 6e-5; with a Schatten
    norm to follow, M may be as large as √rows, M² as rows.
    """
    return 2.0 ** ((rows.bit_length() - 1) // 4) if norm != "frobenius" and unit > 2.0**-20 else 1.0


def tightened(x: Tensor, m: Tensor, norm: str, verbs: Verbs) -> tuple[Tensor, Tensor, Tensor | None]:
    """(X / ν, M / ν², M² / ν⁴ or None) for x (batch, n, m) with M = X Xᵀ and the margin of ν included."""
    if norm == "frobenius":
        return x, m, None
    square = verbs.symmetric_product(m, m) if norm == "schatten8" else None
    size = verbs.norm(m if square is None else square)

    def divided(y, k):
        """y / νᵏ."""
        return verbs.divided(y, size, power=k * (0.5 if square is None else 0.25), factor=(1 + margin(m.dtype)) ** k)

    return divided(x, 1), divided(m, 2), None if square is None else divided(square, 4)


def margin(dtype: torch.dtype) -> float:
    """By how much ν exceeds the computed norm: what rounding may add after the norm is known (`polar.normalised`)."""
    return max(NORM_MARGIN, 2 * torch.finfo(dtype).eps)
