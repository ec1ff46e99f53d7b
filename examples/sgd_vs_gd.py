"""Finite sums: gradient descent against stochastic and adaptive methods on logistic regression, and Adam's divergence.

The loss is f(w) = (1/n) Σ log(1 + exp(-yᵢ xᵢ·w)) + (λ/2) ‖w‖², strongly convex with constant μ and with L-Lipschitz
gradient.  Its minimum f* is found by Newton's method.  Adam's counterexample is that of Reddi, Kale & Kumar 2018:
f_t(x) = C x in every third step, else -x, on [-1, 1], minimised at -1.
"""

from __future__ import annotations

import math

import common
import torch

import steepest

F64 = torch.float64


class Logistic:
    """Breast-cancer data of scikit-learn (569 × 30, standardised, with a constant); gradients in closed form."""

    def __init__(self, penalty: float):
        from sklearn.datasets import load_breast_cancer

        data = load_breast_cancer()
        x = torch.tensor(data.data, dtype=F64)
        x = (x - x.mean(0)) / x.std(0)
        self.x = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)
        self.y = torch.tensor(data.target, dtype=F64) * 2 - 1
        self.penalty = penalty
        self.x32, self.y32 = self.x.float(), self.y.float()
        self.best = self._newton()
        self.minimum = self.loss(self.best)
        # σ'(z) <= 1/4.
        correlation = torch.linalg.eigvalsh(self.x.T @ self.x / len(self.x))
        self.smoothness = 0.25 * correlation[-1].item() + penalty

    def loss(self, w: torch.Tensor) -> float:
        margin = self.y * (self.x @ w.double())
        return (torch.nn.functional.softplus(-margin).mean() + self.penalty / 2 * w.double().square().sum()).item()

    def gradient(self, w: torch.Tensor, index=slice(None)) -> torch.Tensor:
        x, y = self.x32[index], self.y32[index]
        return x.T @ (-y * torch.sigmoid(-y * (x @ w))) / len(x) + self.penalty * w

    def _newton(self) -> torch.Tensor:
        w = torch.zeros(self.x.shape[1], dtype=F64)
        for _ in range(30):
            s = torch.sigmoid(-self.y * (self.x @ w))
            slope = self.x.T @ (-self.y * s) / len(s) + self.penalty * w
            h = (self.x * (s * (1 - s))[:, None]).T @ self.x / len(s) + self.penalty * torch.eye(len(w), dtype=F64)
            w = w - torch.linalg.solve(h, slope)
        return w


# name -> (optimizer of (params, lr), learning rates, batch): None: all data at once.
METHODS = {
    "GD": (lambda p, lr: steepest.optim.SGD(p, lr=lr), "1/L", None),  # and 1.8/L
    "GD + momentum": (lambda p, lr: steepest.optim.SGD(p, lr=lr, momentum=0.9), (0.1, 0.3, 1.0), None),
    "SGD": (lambda p, lr: steepest.optim.SGD(p, lr=lr), (0.01, 0.03, 0.1, 0.3), 16),
    "SGD + momentum": (lambda p, lr: steepest.optim.SGD(p, lr=lr, momentum=0.9), (0.001, 0.003, 0.01, 0.03), 16),
    "AdaGrad": (lambda p, lr: steepest.optim.Adagrad(p, lr=lr), (0.03, 0.1, 0.3, 1.0), 16),
    "RMSprop": (lambda p, lr: steepest.optim.RMSprop(p, lr=lr), (0.001, 0.003, 0.01, 0.03), 16),
    "Adam": (lambda p, lr: steepest.optim.Adam(p, lr=lr), (0.003, 0.01, 0.03, 0.1), 16),
    "AdamW": (lambda p, lr: steepest.optim.AdamW(p, lr=lr, weight_decay=0.01), (0.003, 0.01, 0.03, 0.1), 16),
}


def train(
    problem: Logistic, build, lr: float, batch: int | None, passes: int, seed: int, *, decay: float = 5.0,
    reshuffle: bool = True,
) -> list[float]:  # fmt: skip
    """f - f* after each pass.  Stochastic rates fall as 1 / (1 + passes / decay); batches are drawn without replacement
    (a new order in each pass) unless reshuffle is False."""
    w = torch.zeros(problem.x.shape[1], requires_grad=True)
    optimizer = build([w], lr)
    generator = torch.Generator().manual_seed(seed)
    gaps, n = [problem.loss(w.detach()) - problem.minimum], len(problem.x)
    for done in range(passes):
        if batch:
            optimizer.param_groups[0]["lr"] = lr / (1 + done / decay)
        order = [slice(None)]
        if batch:
            drawn = torch.randperm(n, generator=generator)
            drawn = drawn if reshuffle else torch.randint(n, (n,), generator=generator)
            order = drawn.split(batch)
        for index in order:
            w.grad = problem.gradient(w.detach(), index)
            optimizer.step()
        gaps.append(problem.loss(w.detach()) - problem.minimum)
    return gaps


def reddi(amsgrad: bool, steps: int, c: float = 3.0) -> list[float]:
    """x in every step of Adam (β₁ = 0, β₂ = 1 / (1 + C²), lr 0.5/√t), projected onto [-1, 1] after it."""
    x = torch.zeros(1, requires_grad=True)
    optimizer = steepest.optim.Adam([x], betas=(0.0, 1 / (1 + c * c)), eps=1e-12, amsgrad=amsgrad)
    path = []
    for t in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 0.5 / math.sqrt(t)
        x.grad = torch.tensor([c if t % 3 == 1 else -1.0])
        optimizer.step()
        with torch.no_grad():
            x.clamp_(-1, 1)
        path.append(x.item())
    return path


def reached(gaps: list[float], target: float) -> float:
    found = common.first(gap <= target for gap in gaps)
    return math.nan if found is None else found


def main(argv=None) -> dict:
    options = common.options(
        __doc__, argv, passes=60, long_passes=300, reddi_steps=10000, penalty=1e-2,
        tiny={"passes": 4, "long_passes": 20, "reddi_steps": 500},
    )  # fmt: skip
    report = common.Report("sgd_vs_gd", options)
    problem = Logistic(options.penalty)
    curves, chosen = {}, {}
    for name, (build, rates, batch) in report.progress(METHODS.items(), "methods"):
        rates = (1 / problem.smoothness, 1.8 / problem.smoothness) if rates == "1/L" else rates
        runs = {lr: train(problem, build, lr, batch, options.passes, options.seed) for lr in rates}
        chosen[name] = min(runs, key=lambda lr: runs[lr][-1] if math.isfinite(runs[lr][-1]) else math.inf)
        curves[name] = runs[chosen[name]]
    columns = ["method", "lr", "f - f* after 1 pass", f"after {options.passes}", "passes to 1e-2", "to 1e-4"]
    report.table(
        f"f - f*, breast-cancer data, λ = {options.penalty:g}, batches of 16 for stochastic methods",
        columns,
        [(name, chosen[name], g[1], g[-1], reached(g, 1e-2), reached(g, 1e-4)) for name, g in curves.items()],
    )
    rates_of_descent(report, problem, curves, options)
    noise_floor(report, problem, options)
    adam, amsgrad = (reddi(flag, options.reddi_steps) for flag in (False, True))
    report.claim(
        "Adam ends at the worst point (+1) of Reddi's problem, AMSGrad at the minimum (-1)",
        adam[-1] > 0.9 and amsgrad[-1] < -0.9,
        f"after {options.reddi_steps} steps: Adam {adam[-1]:+.3f}, AMSGrad {amsgrad[-1]:+.3f}",
    )
    with report.figure(3, "Finite-sum logistic regression") as axes:
        for (name, gaps), color in zip(curves.items(), common.COLORS):
            axes[0].semilogy([max(g, 1e-9) for g in gaps], color=color, label=name)
        axes[0].set(xlabel="passes over the data", ylabel="f - f*", title="Best rate of each method")
        axes[0].legend(frameon=False, fontsize=7)
        for (name, gaps), color in zip(report.long.items(), common.COLORS):
            axes[1].semilogy([max(g, 1e-9) for g in gaps], color=color, label=name)
        axes[1].set(xlabel="passes over the data", title="SGD: floors of constant rates", ylim=(1e-6, 3))
        axes[1].legend(frameon=False, fontsize=6, ncol=2, loc="upper right")
        for name, path, color in (("Adam", adam, common.COLORS[1]), ("AMSGrad", amsgrad, common.COLORS[0])):
            axes[2].semilogx(range(1, len(path) + 1), path, color=color, label=name, linewidth=0.8)
        axes[2].set(xlabel="step", ylabel="x (the minimum is -1)", title="Reddi's counterexample")
        axes[2].legend(frameon=False)
    return report.save()


def rates_of_descent(report, problem: Logistic, curves: dict, options) -> None:
    gd = train(problem, METHODS["GD"][0], 1 / problem.smoothness, None, options.long_passes, options.seed)
    allowed = 1 - problem.penalty / problem.smoothness
    worst = max(b / a for a, b in zip(gd, gd[1:]) if a > 1e-6)
    report.claim(
        "GD with rate 1/L contracts f - f* by at least 1 - μ/L in every step",
        worst <= allowed,
        f"slowest step {worst:.5f}, bound {allowed:.5f} (L = {problem.smoothness:.2f}, μ = λ = {problem.penalty:g})",
    )
    momentum = curves["GD + momentum"][-1] / curves["GD"][-1]
    report.claim(
        "Momentum makes GD faster at equal cost",
        momentum < 1,
        f"f - f* after {options.passes} passes: {momentum:.3g} of GD's",
    )
    ahead = common.first(gap <= curves["SGD"][1] for gap in gd)
    text = f"more than {options.long_passes}" if ahead is None else str(ahead)
    report.claim("One pass of SGD is worth at least ten of GD", ahead is None or ahead >= 10, f"{text} passes of GD")
    best = min((name for name in curves if name not in ("GD", "GD + momentum", "SGD")), key=lambda n: curves[n][-1])
    report.claim(
        "Adaptive rates beat tuned SGD on this convex problem",
        best in ("AdaGrad", "RMSprop", "Adam", "AdamW") and curves[best][-1] < curves["SGD"][-1],
        f"best of the others: {best} {curves[best][-1]:.2e}; SGD {curves['SGD'][-1]:.2e}",
    )


def noise_floor(report, problem: Logistic, options) -> None:
    """The mean of f - f* over the second half of long runs with a constant rate, by how batches are drawn."""
    report.long = {}
    rates, floors = (0.2, 0.1, 0.05), {}
    for reshuffle, label in ((False, "independent"), (True, "reshuffled")):
        for lr in rates:
            gaps = train(
                problem,
                METHODS["SGD"][0],
                lr,
                16,
                options.long_passes,
                options.seed,
                decay=math.inf,
                reshuffle=reshuffle,
            )
            floors[label, lr] = sum(gaps[len(gaps) // 2 :]) / len(gaps[len(gaps) // 2 :])
            report.long[f"{label}, {lr:g}"] = gaps
    for label, expected in (("independent", 2), ("reshuffled", 4)):
        found = [floors[label, lr] for lr in rates]
        ratios = [a / b for a, b in zip(found, found[1:])]
        report.claim(
            f"SGD at a constant rate stops at a floor; with {label} batches halving the rate divides it by {expected} "
            "(within 35 %)",
            all(expected / 1.35 <= ratio <= expected * 1.35 for ratio in ratios),
            f"floors {', '.join(f'{x:.2e}' for x in found)} at {', '.join(f'{r:g}' for r in rates)}: "
            f"ratios {', '.join(f'{r:.2f}' for r in ratios)}",
        )
    falling = train(
        problem, METHODS["SGD"][0], rates[0], 16, options.long_passes, options.seed, decay=20, reshuffle=False
    )
    report.long["independent, 0.2 / (1 + passes / 20)"] = falling
    report.claim(
        "A falling rate goes below the floor of the rate that it starts from",
        falling[-1] < floors["independent", rates[0]],
        f"{falling[-1]:.2e} against {floors['independent', rates[0]]:.2e}",
    )


if __name__ == "__main__":
    main()
