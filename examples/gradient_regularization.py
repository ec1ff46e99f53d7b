"""Regularisers of the gradient and their relatives, on one task with one protocol.

300 digits, 30 % of their labels drawn anew, a network of 64-96-10 (tanh), SGD with momentum.  The strength of each
method is the one of its list with the lowest loss on a validation set, averaged over seeds; what counts is the test
loss.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import common
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import steepest
from steepest import dynamics


class WeightNormLinear(nn.Module):
    """A linear layer given by direction and length of its rows."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.v, self.bias = nn.Parameter(layer.weight.detach().clone()), layer.bias
        self.g = nn.Parameter(self.v.detach().norm(dim=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, steepest.weight_norm(self.v, self.g), self.bias)


def mlp(kind: str = "plain", rate: float = 0.0) -> nn.Sequential:
    first, last = nn.Linear(64, 96), nn.Linear(96, 10)
    if kind == "weight norm":
        first, last = WeightNormLinear(first), WeightNormLinear(last)
    if kind == "batch norm":
        return nn.Sequential(first, nn.BatchNorm1d(96), nn.Tanh(), last)
    if kind == "dropout":
        return nn.Sequential(first, nn.Tanh(), nn.Dropout(rate), last)
    return nn.Sequential(first, nn.Tanh(), last)


def weights(model) -> list[torch.Tensor]:
    return list(model.parameters())


def gradient_of(loss, model) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, weights(model), create_graph=True))


def gradient_penalty(loss, model, strength: float) -> torch.Tensor:
    """strength ‖∇L‖₂²."""
    return strength * sum(g.square().sum() for g in gradient_of(loss, model))


def largest_gradient(loss, model, strength: float) -> torch.Tensor:
    """strength max |∇L|."""
    return strength * torch.stack([g.abs().max() for g in gradient_of(loss, model)]).max()


def hessian_diagonal(loss, model, strength: float) -> torch.Tensor:
    """strength z·Hz with random signs z, whose mean is the sum of the Hessian's diagonal."""
    grads = gradient_of(loss, model)
    z = [torch.randint(0, 2, g.shape).float() * 2 - 1 for g in grads]
    products = torch.autograd.grad(grads, weights(model), z, create_graph=True)
    return strength * sum((a * b).sum() for a, b in zip(z, products))


def path_norm(loss, model, strength: float) -> torch.Tensor:
    """strength Σ over all paths from input to output of the product of squared weights (Neyshabur et al. 2015)."""
    return strength * (model[-1].weight.square() @ (model[0].weight.square().sum(1))).sum()


@dataclass(frozen=True)
class Method:
    """One strength is one number: handed to the model, to the optimizer or to the penalty."""

    strengths: tuple[float, ...] = (0.0,)
    kind: str = "plain"
    option: Callable[[float], dict] = lambda strength: {}
    penalty: Callable | None = None
    wrap: Callable | None = None


def two_passes(q: float, squared: bool = False):
    """The penalty on ‖∇L‖_q by two passes instead of second derivatives."""
    return lambda optimizer, s: steepest.optim.GradientNormPenalty(optimizer, s, q, squared=squared, radius=0.01)


METHODS = {
    "none": Method(),
    "clip by norm": Method((0.03, 0.1, 0.3, 1.0), option=lambda s: {"max_grad_norm": s}),
    "clip by value": Method((0.0003, 0.001, 0.003, 0.01), option=lambda s: {"clip_value": s}),
    "weight normalisation": Method(kind="weight norm"),
    "gradient penalty": Method((0.01, 0.1, 1.0), penalty=gradient_penalty),
    "gradient penalty, two passes": Method((0.01, 0.1, 1.0), wrap=two_passes(2.0, squared=True)),
    "largest-gradient penalty": Method((0.1, 1.0, 10.0), penalty=largest_gradient),
    "largest-gradient penalty, two passes": Method((0.1, 1.0, 10.0), wrap=two_passes(math.inf)),
    "Hessian-diagonal penalty": Method((0.0001, 0.001, 0.01), penalty=hessian_diagonal),
    "annealed gradient noise": Method((0.00001, 0.0001, 0.001, 0.01), option=lambda s: {"gradient_noise": (s, 0.55)}),
    "path normalisation": Method((0.001, 0.003, 0.01, 0.03), penalty=path_norm),
    "l1": Method((0.003, 0.01, 0.03, 0.1), option=lambda s: {"l1": s}),
    "l2": Method((0.001, 0.003, 0.01), option=lambda s: {"weight_decay": s}),
    "dropout": Method((0.3, 0.5, 0.7), kind="dropout"),
    "batch normalisation": Method(kind="batch norm"),
}


def stepper(method: Method, strength: float, x, y, options, seed: int):
    """(model, optimizer, a function that takes one step)."""
    torch.manual_seed(seed)
    model = mlp(method.kind, strength)
    optimizer = steepest.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, **method.option(strength))
    if method.wrap is not None:
        optimizer = method.wrap(optimizer, strength)
    generator = torch.Generator().manual_seed(seed)

    def step():
        index = torch.randint(len(x), (32,), generator=generator)

        def closure():
            optimizer.zero_grad()
            loss = cross_entropy(model(x[index]), y[index])
            if method.penalty is not None:
                loss = loss + method.penalty(loss, model, strength)
            loss.backward()
            return loss

        optimizer.step(closure)

    return model, optimizer, step


def train(method: Method, strength: float, data, options, seed: int) -> dict:
    """Final losses, norms of the gradient along the run."""
    x, y, x_valid, y_valid, x_test, y_test = data
    model, optimizer, step = stepper(method, strength, x, y, options, seed)
    monitor = dynamics.Monitor(optimizer, every=max(1, options.steps // 60), update=False)
    for _ in range(options.steps):
        step()
    model.eval()
    with torch.no_grad():
        losses = [cross_entropy(model(a), b).item() for a, b in ((x, y), (x_valid, y_valid), (x_test, y_test))]
        error = (model(x_test).argmax(1) != y_test).double().mean().item()
    seen = monitor.history()
    found = dict(zip(("train", "valid", "test"), losses)) | {"error": error}
    return found | {"step": seen["step"].tolist(), "gradient": seen["gradient_norm"].tolist()}


def costs(chosen, data, options, rounds: int) -> dict[str, tuple[float, float]]:
    """name -> (median milliseconds per step, median ratio to the plain step of the same round), methods in turn."""
    steps = {name: stepper(METHODS[name], strength, *data[:2], options, 0)[2] for name, (strength, _) in chosen.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            taken[name].append(1e3 * (time.perf_counter() - begin))
    plain = taken["none"]
    median = statistics.median
    return {name: (median(times), median(t / p for t, p in zip(times, plain))) for name, times in taken.items()}


def mean(runs: list[dict], key: str) -> float:
    value = statistics.fmean(run[key] for run in runs)
    return value if math.isfinite(value) else math.inf


def main(argv=None) -> dict:
    options = common.options(
        __doc__, argv, steps=500, seeds=4, samples=300, lr=0.1, noise=0.3,
        tiny={"steps": 8, "seeds": 2, "samples": 60},
    )  # fmt: skip
    report = common.Report("gradient_regularization", options)
    x, y, rest, labels = common.digits(options.seed, options.samples, noise=options.noise)
    data = (x, y, rest[:500], labels[:500], rest[500:], labels[500:])
    chosen: dict[str, tuple[float, list[dict]]] = {}
    for name, method in report.progress(METHODS.items(), "methods"):
        tried = {
            s: [train(method, s, data, options, options.seed + k) for k in range(options.seeds)]
            for s in method.strengths
        }
        best = min(tried, key=lambda s: mean(tried[s], "valid"))
        chosen[name] = best, tried[best]
    tables(report, chosen, data, options)
    verdicts(report, chosen)
    picture(report, chosen)
    return report.save()


def tables(report, chosen, data, options) -> None:
    plain = [run["test"] for run in chosen["none"][1]]
    rows = []
    for name, (strength, runs) in chosen.items():
        change, error = common.differs([run["test"] for run in runs], plain)
        last = statistics.fmean(statistics.fmean(run["gradient"][-10:]) for run in runs)
        shown = f"{strength:g}" if len(METHODS[name].strengths) > 1 else "–"
        difference = "–" if name == "none" else f"{change:+.3f} ± {error:.3f}"
        rows.append((name, shown, mean(runs, "train"), mean(runs, "test"), difference, mean(runs, "error"), last))
    report.table(
        f"{options.samples} digits, {options.noise:.0%} of the labels drawn anew, {options.steps} steps, "
        f"mean of {options.seeds} seeds",
        [
            "method",
            "strength",
            "training loss",
            "test loss",
            "change ± standard error",
            "test error",
            "‖gradient‖ in the end",
        ],
        rows,
    )
    rounds = 5 if options.tiny else 100
    found = costs(chosen, data, options, rounds)
    report.table(
        f"Step cost: forward, backward and update; median of {rounds} steps, methods in turn",
        ["method", "ms per step", "times the plain step"],
        [(name, *values) for name, values in found.items()],
        measured=True,
    )


def verdicts(report, chosen) -> None:
    plain = chosen["none"][1]
    for name, (_, runs) in chosen.items():
        if name == "none":
            continue
        change, error = common.differs([run["test"] for run in runs], [run["test"] for run in plain])
        report.claim(
            f"{name} lowers the test loss (by more than two standard errors)",
            change < -2 * error,
            f"{change:+.3f} ± {error:.3f} of {mean(plain, 'test'):.3f}; training loss {mean(runs, 'train'):.3f}",
        )
    for name in ("gradient penalty", "largest-gradient penalty"):
        exact, passes = chosen[name][1], chosen[f"{name}, two passes"][1]
        change, error = common.differs([run["test"] for run in passes], [run["test"] for run in exact])
        report.claim(
            f"{name}: two passes do what second derivatives do (test losses within 0.02 of each other)",
            abs(change) <= 0.02,
            f"{change:+.3f} ± {error:.3f}; strengths {chosen[name][0]:g} and {chosen[name + ', two passes'][0]:g}",
        )
    order = sorted(chosen, key=lambda name: mean(chosen[name][1], "test"))
    report.note(f"Lowest test losses: {', '.join(order[:3])}; highest: {order[-1]}.")


def picture(report, chosen) -> None:
    with report.figure(3, "Regularisers, one task") as axes:
        names = list(chosen)
        for key, shift, color in (("train", -0.2, common.COLORS[0]), ("test", 0.2, common.COLORS[1])):
            values = [mean(chosen[name][1], key) for name in names]
            axes[0].barh([i + shift for i in range(len(names))], values, 0.4, color=color, label=key)
        axes[0].set_yticks(range(len(names)), names, fontsize=7)
        axes[0].invert_yaxis()
        axes[0].set(xlabel="loss", title="loss in the end")
        axes[0].legend(frameon=False, fontsize=8)
        for i, name in enumerate(names):
            run = chosen[name][1][0]
            axes[1 + (i > 7)].semilogy(
                run["step"], run["gradient"], color=common.COLORS[i % 10], label=name, linewidth=1
            )
        for ax in axes[1:]:
            ax.set(xlabel="step", ylabel="‖gradient‖", title="norm of the batch gradient, penalty included")
            ax.legend(frameon=False, fontsize=6)


if __name__ == "__main__":
    main()
