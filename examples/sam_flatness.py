"""Flat minima: sharpness-aware minimisation in ℓ1, ℓ2 and ℓ∞ balls, and the loss around what it finds.

600 digits, 20 % of their labels drawn anew, a network of 64-64-10 (tanh), SGD with momentum inside SAM.  The radius of
each ball is the one of its list with the lowest loss on a validation set, averaged over seeds.  At each solution: the
largest eigenvalue and the trace of the training loss's Hessian, the rise of the loss to the worst point of a ball in
each norm (to first order), and the loss along random directions and along the sharpest one.
"""

from __future__ import annotations

import math
import statistics

import common
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import steepest
from steepest import dynamics

# p -> radii.  An l∞ ball of radius r reaches √4810 r = 69 r from its centre, an l1 ball r.
RADII = {1.0: (0.01, 0.1), 2.0: (0.3, 1.0, 2.0), math.inf: (0.003, 0.01, 0.02)}
# The balls in which the solutions are compared.
BALLS = {1.0: 0.1, 2.0: 0.1, math.inf: 0.002}


def label(p: float | None) -> str:
    return "SGD" if p is None else "SAM, p = ∞" if math.isinf(p) else f"SAM, p = {p:g}"


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def train(p: float | None, rho: float, data, options, seed: int) -> dict:
    """The trained network and its losses; p None: plain SGD."""
    x, y, x_valid, y_valid, x_test, y_test = data
    model = network(seed)
    optimizer = steepest.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if p is not None:
        optimizer = steepest.optim.SAM(optimizer, rho=rho, p=p)
    generator = torch.Generator().manual_seed(seed)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / options.steps)
        index = torch.randint(len(x), (64,), generator=generator)

        def closure(index=index):
            optimizer.zero_grad()
            loss = cross_entropy(model(x[index]), y[index])
            loss.backward()
            return loss

        optimizer.step(closure)
    with torch.no_grad():
        losses = [cross_entropy(model(a), b).item() for a, b in ((x, y), (x_valid, y_valid), (x_test, y_test))]
        error = (model(x_test).argmax(1) != y_test).double().mean().item()
    return dict(zip(("train", "valid", "test"), losses)) | {"error": error, "model": model}


def curvature(run: dict, data, options) -> dict:
    """Sharpness of the training loss at the solution; losses along directions of norm 1."""
    x, y = data[:2]
    model, generator = run["model"], torch.Generator().manual_seed(options.seed)
    params = list(model.parameters())

    def loss():
        return cross_entropy(model(x), y)

    top = dynamics.sharpness(loss, params, iterations=200, generator=generator)
    found = {"largest": top.value, "residual": top.residual}

    def closure():
        model.zero_grad()
        loss().backward()

    found["trace"] = steepest.hessian_trace(closure, params, samples=options.probes, seed=options.seed).item()
    for p, rho in BALLS.items():
        found[p] = dynamics.sam_sharpness(loss, params, rho=rho, p=p)
    random = [[torch.randn(w.shape, generator=generator) for w in params] for _ in range(options.directions)]
    for direction in random:
        size = math.sqrt(sum(d.square().sum().item() for d in direction))
        for d in direction:
            d.div_(size)
    distances = torch.linspace(-1.5, 1.5, options.points).tolist()
    found["distances"] = distances
    found["sharp"] = along(loss, params, top.vector, distances)
    curves = [along(loss, params, direction, distances) for direction in random]
    found["random"] = [statistics.fmean(values) for values in zip(*curves)]
    return found


@torch.no_grad()
def along(loss, params, direction, distances) -> list[float]:
    kept = [p.clone() for p in params]
    values = []
    for t in distances:
        for p, home, d in zip(params, kept, direction):
            p.copy_(home + t * d)
        values.append(loss().item())
    for p, home in zip(params, kept):
        p.copy_(home)
    return values


def mean(runs: list[dict], key) -> float:
    value = statistics.fmean(run[key] for run in runs)
    return value if math.isfinite(value) else math.inf


def main(argv=None) -> dict:
    options = common.options(
        __doc__, argv, steps=800, seeds=4, samples=600, noise=0.2, probes=30, directions=8, points=31,
        tiny={"steps": 8, "seeds": 2, "samples": 80, "probes": 2, "directions": 2, "points": 5},
    )  # fmt: skip
    report = common.Report("sam_flatness", options)
    x, y, rest, labels = common.digits(options.seed, options.samples, noise=options.noise)
    data = (x, y, rest[:400], labels[:400], rest[400:], labels[400:])
    chosen: dict[float | None, tuple[float, list[dict]]] = {}
    for p in report.progress((None, *RADII), "training"):
        radii = (0.0,) if p is None else RADII[p]
        tried = {rho: [train(p, rho, data, options, options.seed + k) for k in range(options.seeds)] for rho in radii}
        rho = min(tried, key=lambda rho: mean(tried[rho], "valid"))
        chosen[p] = rho, [run | curvature(run, data, options) for run in tried[rho]]
    report.table(
        f"{options.samples} digits, {options.noise:.0%} of the labels drawn anew, {options.steps} steps; mean of "
        f"{options.seeds} seeds",
        ["method", "radius", "training loss", "test loss", "test error", "largest eigenvalue", "trace",
         *(f"rise in ℓ{'∞' if math.isinf(p) else f'{p:g}'}, {rho:g}" for p, rho in BALLS.items())],
        [
            (label(p), rho, *(mean(runs, key) for key in ("train", "test", "error", "largest", "trace", *BALLS)))
            for p, (rho, runs) in chosen.items()
        ],
    )  # fmt: skip
    verdicts(report, chosen)
    picture(report, chosen)
    return report.save()


def verdicts(report, chosen) -> None:
    plain = chosen[None][1]
    for p in RADII:
        runs = chosen[p][1]
        for key, text in (("largest", "largest Hessian eigenvalue"), ("test", "test loss")):
            change, error = common.differs([run[key] for run in runs], [run[key] for run in plain])
            report.claim(
                f"{label(p)} lowers the {text} (by more than two standard errors)",
                change < -2 * error,
                f"{change:+.3g} ± {error:.2g} of {mean(plain, key):.3g}",
            )
    own = {p: min(RADII, key=lambda other, p=p: mean(chosen[other][1], p)) for p in RADII}
    right = [label(p) for p in RADII if own[p] == p]
    report.claim(
        "Each of the three leaves the smallest rise in its own ball",
        len(right) == 3,
        f"true of {len(right)} of 3; smallest in ℓ1, ℓ2, ℓ∞: {', '.join(label(own[p]) for p in RADII)}",
    )
    steeper = {
        p: statistics.fmean(max(run["sharp"]) - run["train"] for run in runs)
        / statistics.fmean(max(run["random"]) - run["train"] for run in runs)
        for p, (_, runs) in chosen.items()
    }
    report.claim(
        "Random directions show little: along the sharpest one the loss rises over ten times as much, everywhere",
        all(ratio > 10 for ratio in steeper.values()),
        ", ".join(f"{label(p)} {ratio:.1f} times" for p, ratio in steeper.items()) + ", within distance 1.5",
    )


def picture(report, chosen) -> None:
    with report.figure(3, "The training loss around the solutions") as axes:
        for (p, (_, runs)), color in zip(chosen.items(), common.COLORS):
            for ax, key in ((axes[0], "random"), (axes[1], "sharp")):
                values = [statistics.fmean(run[key][i] for run in runs) for i in range(len(runs[0][key]))]
                ax.semilogy(runs[0]["distances"], values, color=color, label=label(p))
            axes[2].loglog(
                [run["largest"] for run in runs], [run["test"] for run in runs], "o", color=color, markersize=4
            )
        axes[0].set(xlabel="distance", ylabel="loss", title="random directions (mean)")
        axes[0].legend(frameon=False, fontsize=8)
        axes[1].set(xlabel="distance", title="sharpest direction")
        axes[1].sharey(axes[0])
        axes[2].set(xlabel="largest Hessian eigenvalue", ylabel="test loss", title="one point per seed")


if __name__ == "__main__":
    main()
