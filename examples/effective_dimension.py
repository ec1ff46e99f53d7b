"""Effective dimension: that of the gradients through training, against the loss, and a law for it.

A network of 64-64-64-10 learns digits of which some labels are wrong.  F(t) = G Gᵀ / n is the Gram matrix of the
gradients of single samples, d_eff = (tr F)² / tr(F²).  Predictions: d_eff grows, stays, declines; it is a linear
function of ln(loss); it follows dd/dt = α L (d_data - d) - β d R, with L the training loss and R = ‖w‖² relative to the
start, fitted to it.  Beside it: the largest eigenvalue of the correlation matrix of the last hidden features, against
logistic growth λ(t) = a λ₀ / (b λ₀ + (a - b λ₀) e^(-a t)); and, from `steepest.dynamics.Monitor`, d_eff of the batch
gradient of each matrix and of Shampoo's factors.
"""

from __future__ import annotations

import math

import common
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import steepest
from steepest import dynamics

# Learning rates by the lowest training loss after the default steps, of 3 tried for each.
OPTIMIZERS = {
    "SGD": lambda model: steepest.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda model: steepest.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01),
    "Muon": lambda model: steepest.optim.Muon(model.named_parameters(), lr=0.02, adamw={"lr": 2e-3}),
    "Shampoo": lambda model: steepest.optim.Shampoo(model.named_parameters(), lr=2e-3, betas=(0.9, 0.99)),
}


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def sample_gradients(model: nn.Module, x, y) -> torch.Tensor:
    """One row per sample: the gradient of its loss by all weights."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, x, y):
        return nn.functional.cross_entropy(functional_call(model, weights, (x[None],)), y[None])

    rows = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    return torch.cat([g.flatten(1) for g in rows.values()], 1)


def train(report, name: str, data, options) -> dict[str, list[float]]:
    """Records along a run: step, training and test loss, d_eff, R, and what the monitor saw."""
    x, y, x_test, y_test = data
    model = network(options.seed)
    optimizer = OPTIMIZERS[name](model)
    due = {round(options.steps * (k / (options.records - 1)) ** 2) for k in range(options.records)}  # denser at first
    monitor = dynamics.Monitor(optimizer, every=None, spectra_every=max(1, options.steps // 40))
    generator = torch.Generator().manual_seed(options.seed)
    size = sum(p.square().sum().item() for p in model.parameters())
    found: dict[str, list[float]] = {key: [] for key in ("step", "loss", "test", "dimension", "penalty", "eigenvalue")}
    for step in report.progress(range(options.steps + 1), name):
        if step in due:
            with torch.no_grad():
                found["loss"].append(nn.functional.cross_entropy(model(x), y).item())
                found["test"].append(nn.functional.cross_entropy(model(x_test), y_test).item())
                found["eigenvalue"].append(dynamics.timescales(model[:-1](x)).eigenvalues[0].item())
            found["step"].append(step)
            # The rows of a subset; gradient_dimension takes the Gram matrix of the shorter side.
            rows = sample_gradients(model, x[: options.rows], y[: options.rows])
            found["dimension"].append(dynamics.gradient_dimension(rows).item())
            found["penalty"].append(sum(p.square().sum().item() for p in model.parameters()) / size)
        index = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    seen = monitor.history()
    found["batch"] = seen["dimension"].mean(1).tolist()
    found["factor"] = seen["factor_dimension"].mean(1).tolist() if "factor_dimension" in seen else []
    found["monitored"] = seen["spectra_step"].tolist()
    return found


def phases(dimension: list[float]) -> tuple[int, float, float]:
    """(place of the maximum, maximum / first, last / maximum)."""
    top = max(range(len(dimension)), key=dimension.__getitem__)
    return top, dimension[top] / dimension[0], dimension[-1] / dimension[top]


def main(argv=None) -> dict:
    options = common.options(
        __doc__, argv, steps=2000, records=60, rows=256, samples=600, noise=0.2,
        tiny={"steps": 30, "records": 8, "rows": 32, "samples": 100},
    )  # fmt: skip
    report = common.Report("effective_dimension", options)
    data = common.digits(options.seed, options.samples, noise=options.noise)
    runs = {name: train(report, name, data, options) for name in OPTIMIZERS}
    rows, fits, lines, growth = [], {}, {}, {}
    for name, run in runs.items():
        top = phases(run["dimension"])[0]
        fits[name] = dynamics.fit_dimension(run["step"], run["loss"], run["penalty"], run["dimension"])
        growth[name] = dynamics.fit_logistic(run["step"], run["eigenvalue"])
        lines[name] = common.line([math.log(v) for v in run["loss"]], run["dimension"])
        values = (run["dimension"][0], run["dimension"][top], run["dimension"][-1])
        rows.append(
            (
                name,
                *values,
                run["step"][top],
                run["loss"][-1],
                run["test"][-1],
                lines[name][2],
                fits[name].r2,
                growth[name].r2,
            )
        )
    report.table(
        f"d_eff of the gradients of {options.rows} samples, {options.noise:.0%} of the labels drawn anew",
        ["optimizer", "d_eff at first", "largest", "in the end", "step of the largest", "training loss", "test loss",
         "R² against ln(loss)", "R² of the law", "R² of logistic growth of λ₁"],
        rows,
    )  # fmt: skip
    verdicts(report, runs, lines, fits, growth)
    picture(report, runs, fits, growth)
    return report.save()


def verdicts(report, runs, lines, fits, growth) -> None:
    shapes = {name: phases(run["dimension"]) for name, run in runs.items()}
    report.claim(
        "d_eff grows (to over 1.5 times its first value) under every optimizer",
        all(growth > 1.5 for _, growth, _ in shapes.values()),
        ", ".join(f"{name} {growth:.1f} times" for name, (_, growth, _) in shapes.items()),
    )
    report.claim(
        "It then declines (below 0.8 of its largest value) under every optimizer",
        all(decline < 0.8 for _, _, decline in shapes.values()),
        "ends at " + ", ".join(f"{name} {decline:.2f}" for name, (_, _, decline) in shapes.items()),
    )
    plateau = {}
    for name, run in runs.items():
        top = max(run["dimension"])
        plateau[name] = (
            sum(b - a for a, b, d in zip(run["step"], run["step"][1:], run["dimension"]) if d >= 0.9 * top)
            / run["step"][-1]
        )
    report.claim(
        "Between the two it stays: within 10 % of its largest value for a fifth of the training, under every optimizer",
        all(share >= 0.2 for share in plateau.values()),
        ", ".join(f"{name} {share:.0%}" for name, share in plateau.items()),
    )
    report.claim(
        "d_eff is a linear function of ln(loss) (R² at least 0.9)",
        all(r2 >= 0.9 for _, _, r2 in lines.values()),
        "R² " + ", ".join(f"{name} {r2:.2f}" for name, (_, _, r2) in lines.items()),
    )
    report.claim(
        "The law dd/dt = α L (d_data - d) - β d R describes d_eff(t) (R² at least 0.9)",
        all(fit.r2 >= 0.9 for fit in fits.values()),
        "R² " + ", ".join(f"{name} {fit.r2:.2f}" for name, fit in fits.items()),
    )
    ends = {}
    for name, run in runs.items():
        fit = fits[name]
        law = {key: getattr(fit, key) for key in ("alpha", "beta", "d_data")}
        fixed = dynamics.dimension_fixed_point(run["loss"][-1], run["penalty"][-1], **law).item()
        ends[name] = fixed / run["dimension"][-1]
    report.claim(
        "At the end d_eff is at the law's fixed point α L d_data / (α L + β R) (within 25 %)",
        all(abs(ratio - 1) <= 0.25 for ratio in ends.values()),
        "fixed point / d_eff: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ends.items()),
    )
    report.claim(
        "The largest eigenvalue of the features' correlation matrix grows logistically (R² of ln λ₁ at least 0.9)",
        all(fit.r2 >= 0.9 for fit in growth.values()),
        "R² " + ", ".join(f"{name} {fit.r2:.2f}" for name, fit in growth.items()),
    )


def picture(report, runs, fits, growth) -> None:
    with report.figure(4, "Effective dimension of the gradients through training", width=3.8) as axes:
        for (name, run), color in zip(runs.items(), common.COLORS):
            axes[0].plot(run["step"], run["dimension"], color=color, label=name)
            axes[0].plot(run["step"], fits[name].path, "--", color=color, linewidth=0.9)
            axes[1].semilogx(run["loss"], run["dimension"], ".-", color=color, linewidth=0.7, markersize=3)
            axes[2].plot(run["step"], run["eigenvalue"], color=color)
            fitted = dynamics.logistic(run["step"], *growth[name][:3])
            axes[2].plot(run["step"], fitted, "--", color=color, linewidth=0.9)
            axes[3].plot(run["monitored"], run["batch"], color=color, linewidth=0.8)
            if run["factor"]:
                axes[3].plot(run["monitored"], run["factor"], "--", color=color, label=f"{name}'s factors")
        axes[0].set(xlabel="step", ylabel="d_eff", title="single samples; dashed: the law, fitted")
        axes[0].legend(frameon=False, fontsize=8)
        axes[1].set(xlabel="training loss", title="d_eff against the loss")
        axes[2].set(xlabel="step", title="λ₁ of the last features; dashed: logistic")
        axes[3].set(xlabel="step", title="d_eff of batch gradients, mean over matrices")
        axes[3].legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
