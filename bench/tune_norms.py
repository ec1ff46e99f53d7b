"""Prints, for every norm and number of steps, the lower end that suits it: how `norm_bounds.TUNED_LOWER` was found.

    python bench/tune_norms.py

Exact arithmetic on the singular values of conformance.zoo: no matrix is multiplied.  The measure is the root mean
square of 1 - f(s / nu), which is ‖polar(X) - U Vᵀ‖_F / √n, averaged over the matrices.
"""

from __future__ import annotations

import numpy as np

from steepest.conformance import zoo
from steepest.conformance.recorded import RECORDED
from steepest.reference.polar import ORDERS
from steepest.schedules import Schedule, minimax, named

SHAPES = ((64, 64), (64, 96), (64, 256), (256, 256), (256, 1024))
SPECTRA = ("gaussian", "power law", "steep power law", "exponential", "clustered", "log-uniform 1e-3", "one large")
SPECTRA += ("arithmetic",)


def singular_values() -> list[np.ndarray]:
    """Largest 1, one array per spectrum and shape; the recorded gradients have no 256 rows."""
    pairs = [(name, shape) for name in SPECTRA for shape in SHAPES]
    pairs += [(name, shape) for name in RECORDED for shape in SHAPES[:3]]
    found = [zoo.matrix(name, *shape, seed=1)[1].numpy() for name, shape in pairs]
    return [s / s.max() for s in found]


def error(schedule: Schedule, norm: str, matrices: list[np.ndarray]) -> float:
    def one(s):
        nu = np.linalg.norm(s, ORDERS[norm]) * (1 + 2**-10)
        return np.sqrt(np.mean((1 - schedule.apply((s / nu) ** 2)) ** 2))

    return float(np.mean([one(s) for s in matrices]))


def main() -> None:
    matrices = singular_values()
    print("steps  norm       lower     error   certified   slope")
    for steps in range(1, 9):
        for norm in ORDERS:
            ends = np.geomspace(3e-5, 0.3, 49)
            tried = [(error(minimax(2, end**2, steps=steps), norm, matrices), end) for end in ends]
            least, end = min(tried)
            best = minimax(2, end**2, steps=steps)
            print(f"{steps:5}  {norm:9}  {end:.2e}  {least:.3f}  {best.error:9.3f}  {best.slope:7.0f}", end="")
            if steps in (5, 6):
                print(f"   polar-express {error(named('polar-express', steps), norm, matrices):.3f}", end="")
            print()


if __name__ == "__main__":
    main()
