"""Norms: steepest descent in four of them, normalised and not, and Muon against AdamW, on softmax regression.

In a norm ‖·‖ the step is lr·LMO(G), LMO(G) = -argmax <G, D> over ‖D‖ = 1, and the first-order decrease is lr times
the dual norm of G.  Frobenius (l2), largest element (l∞), spectral and nuclear norm have the duals Frobenius, sum of
magnitudes, nuclear, spectral.  Not normalised, the step is also multiplied by the dual norm.  On separable data,
normalised steepest descent in a norm finds in the limit the classifier with the largest margin min (w_y - w_j)·x / ‖W‖
in that norm (Gunasekar et al. 2018).
"""

from __future__ import annotations

import math

import common
import torch
from torch import nn

import steepest

NORMS = ("l2", "linf", "spectral", "nuclear")
SIZE = {
    "l2": lambda w: torch.linalg.matrix_norm(w).item(),
    "linf": lambda w: w.abs().max().item(),
    "spectral": lambda w: torch.linalg.matrix_norm(w, 2).item(),
    "nuclear": lambda w: torch.linalg.matrix_norm(w, "nuc").item(),
}
DUAL = {
    "l2": SIZE["l2"],
    "linf": lambda w: w.abs().sum().item(),
    "spectral": SIZE["nuclear"],
    "nuclear": SIZE["spectral"],
}


class NuclearDescent(torch.optim.Optimizer):
    """W <- W - lr u₁ v₁ᵀ of G = Σ σᵢ uᵢ vᵢᵀ, times σ₁ if not normalised: steepest.optim has no rule for it."""

    def __init__(self, params, lr: float, normalized: bool = True):
        super().__init__(params, dict(lr=lr, normalized=normalized))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                u, s, vh = torch.linalg.svd(p.grad, full_matrices=False)
                size = group["lr"] * (1.0 if group["normalized"] else s[0].item())
                p.addmm_(u[:, :1], vh[:1], alpha=-size)


def descent(norm: str, normalized: bool = True):
    if norm == "nuclear":
        return lambda p, lr: NuclearDescent(p, lr, normalized)
    return lambda p, lr: steepest.optim.NormedDescent(p, lr=lr, norm=norm, normalized=normalized)


RATES = tuple(10.0**k for k in (-2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5))
METHODS = {f"{norm}, normalised": (descent(norm), RATES) for norm in NORMS}
METHODS |= {f"{norm}, not normalised": (descent(norm, False), RATES) for norm in NORMS}
METHODS |= {
    "AdamW": (lambda p, lr: steepest.optim.AdamW(p, lr=lr, weight_decay=0.0), RATES),
    "Muon": (lambda p, lr: steepest.optim.Muon(p, lr=lr, weight_decay=0.0, scale="none"), RATES),
}


def objective(w, x, y, penalty: float) -> torch.Tensor:
    return nn.functional.cross_entropy(x @ w.T, y) + penalty / 2 * w.square().sum()


def minimum(x, y, penalty: float) -> float:
    """The least value of the objective, in float64."""
    w = torch.zeros(10, x.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        value = objective(w, x.double(), y, penalty)
        value.backward()
        return value

    solver.step(closure)
    return closure().item()


def train(build, lr: float, x, y, steps: int, penalty: float = 0.0) -> tuple[list[float], torch.Tensor]:
    """The objective in each step and the final 10 x 65 matrix, full batch, the rate falling linearly to zero."""
    w = torch.zeros(10, x.shape[1], requires_grad=True)
    optimizer = build([w], lr)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss = objective(w, x, y, penalty)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(objective(w, x, y, penalty).item())
    return losses, w.detach()


def margin(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> float:
    """The smallest w_y·x - w_j·x over samples and wrong classes j."""
    scores = x @ w.T
    right = scores.gather(1, y[:, None])
    return (right[:, 0] - scores.scatter(1, y[:, None], -math.inf).amax(1)).min().item()


def main(argv=None) -> dict:
    options = common.options(
        __doc__, argv, steps=150, margin_steps=4000, samples=600, penalty=1e-2,
        tiny={"steps": 15, "margin_steps": 30, "samples": 200},
    )  # fmt: skip
    report = common.Report("norms", options)
    x, y, x_test, y_test = common.digits(options.seed, options.samples)
    x, x_test = (torch.cat([v, torch.ones(len(v), 1)], 1) for v in (x, x_test))
    one_step(report, x, y)
    runs, rows = {}, []
    least = minimum(x, y, options.penalty)
    for name, (build, rates) in report.progress(METHODS.items(), "methods"):
        tried = {lr: train(build, lr, x, y, options.steps, options.penalty) for lr in rates}
        lr = min(tried, key=lambda lr: tried[lr][0][-1] if math.isfinite(tried[lr][0][-1]) else math.inf)
        runs[name] = [value - least for value in tried[lr][0]]
        w = tried[lr][1]
        right = ((x_test @ w.T).argmax(1) == y_test).double().mean().item()
        target = common.first(v < 1e-2 for v in runs[name])
        rows.append((name, lr, math.nan if target is None else target, runs[name][-1], right))
    report.table(
        f"Softmax regression on {options.samples} digits with {options.penalty:g}/2 ‖W‖², {options.steps} full-batch "
        f"steps, the rate falling to 0, best of {len(RATES)} rates; least value {least:.4f}",
        ["method", "lr", "steps to f - f* = 0.01", "f - f* at the end", "test accuracy"],
        rows,
    )
    muon, adamw = (runs[name][-1] for name in ("Muon", "AdamW"))
    report.claim("Muon ends nearer to the minimum than AdamW", muon < adamw, f"{muon:.3g} against {adamw:.3g}")
    gain = {n: runs[f"{n}, not normalised"][-1] / runs[f"{n}, normalised"][-1] for n in NORMS}
    report.claim(
        "Normalised steps end nearer to the minimum than those multiplied by the dual norm, in every norm",
        all(value > 1 for value in gain.values()),
        "f - f* not normalised / normalised: " + ", ".join(f"{n} {value:.3g}" for n, value in gain.items()),
    )
    found = margins(report, x, y, options)
    with report.figure(3, "Steepest descent under a norm, softmax regression on digits") as axes:
        for ax, suffix in ((axes[0], "normalised"), (axes[1], "not normalised")):
            for name, color in zip((*(f"{n}, {suffix}" for n in NORMS), "AdamW", "Muon"), common.COLORS):
                ax.semilogy([max(v, 1e-7) for v in runs[name]], color=color, label=name.split(",")[0])
            ax.set(xlabel="step", ylabel="f - f*", title=suffix, ylim=(1e-6, 3))
        axes[0].legend(frameon=False, fontsize=7)
        axes[2].imshow(found.numpy(), cmap="viridis", vmin=0, vmax=1)
        axes[2].set(title="margin in a norm / largest in that column", ylabel="descended in", xlabel="measured in")
        axes[2].set_xticks(range(4), NORMS, fontsize=8)
        axes[2].set_yticks(range(4), NORMS, fontsize=8)
        for i in range(4):
            for j in range(4):
                axes[2].text(j, i, f"{found[i, j]:.2f}", ha="center", va="center", color="white", fontsize=8)
    return report.save()


def one_step(report, x, y) -> None:
    """<G, D> of a unit step is the dual norm of G; the polar factor is a polynomial with a certificate."""
    allowed = steepest.schedules.named("polar-express", 5).error
    found = {}
    for norm in NORMS:
        w = torch.zeros(10, x.shape[1], requires_grad=True)
        nn.functional.cross_entropy(x @ w.T, y).backward()
        build = descent(norm)
        build([w], 1.0).step()
        gain = -(w.grad.double() * w.detach().double()).sum().item()
        found[norm] = abs(gain / DUAL[norm](w.grad.double()) - 1)
    report.claim(
        "A unit step decreases the linearised loss by the gradient's dual norm "
        "(spectral: within the schedule's certificate)",
        all(value < (allowed if norm == "spectral" else 1e-5) for norm, value in found.items()),
        "relative difference " + ", ".join(f"{n} {v:.1e}" for n, v in found.items()) + f"; certificate {allowed:.2f}",
    )


def margins(report, x, y, options) -> torch.Tensor:
    """Margin of each descent's solution in each norm, relative to the best of the column; one row per descent."""
    found = []
    for norm in report.progress(NORMS, "margins"):
        tried = [train(descent(norm), lr, x, y, options.margin_steps)[1] for lr in (0.001, 0.01, 0.1)]
        values = [[margin(w, x, y) / SIZE[n](w) for n in NORMS] for w in tried]
        found.append(max(values, key=lambda row, norm=norm: row[NORMS.index(norm)]))
    values = torch.tensor(found)
    report.table(
        f"Margin min (w_y - w_j)·x / ‖W‖ after {options.margin_steps} normalised steps",
        ["descended in", *(f"measured in {n}" for n in NORMS)],
        [(n, *row) for n, row in zip(NORMS, found)],
    )
    own = values.argmax(0)
    right = [n for i, n in enumerate(NORMS) if own[i] == i]
    report.claim(
        "Each descent has the largest margin of the four in its own norm",
        len(right) == 4,
        f"true of {len(right)} of 4" + (f": {', '.join(right)}" if right else ""),
    )
    return values / values.amax(0)


if __name__ == "__main__":
    main()
