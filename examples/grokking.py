"""Grokking: modular addition, memorised early and understood late, under AdamW and Muon, with and without weight decay.

A network (embedding, two hidden layers of ReLU) learns a + b mod p from a share of all pairs, full batch.  Training is
done when 99 % of the training pairs are right; the rule is found when 95 % of the others are.
"""

from __future__ import annotations

import math

import common
import torch
from torch import nn

import steepest

# Of rates 0.003 (AdamW) and 0.005, 0.01, 0.02, 0.03, 0.05 (Muon) with decays 0.1, 0.3 and 1.
OPTIMIZERS = {
    "AdamW": lambda model, decay: steepest.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=decay
    ),
    "Muon": lambda model, decay: steepest.optim.Muon(
        model.named_parameters(),
        lr=0.03,
        weight_decay=decay,
        adamw={"lr": 3e-3, "betas": (0.9, 0.98), "weight_decay": decay},
    ),
}


class Adder(nn.Module):
    def __init__(self, p: int, width: int, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.up = nn.Embedding(p, 64), nn.Linear(128, width)
        self.mix, self.head = nn.Linear(width, width), nn.Linear(width, p)
        nn.init.normal_(self.embed.weight, std=1 / 8)

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.mix(torch.relu(self.up(self.embed(pairs).flatten(1))))))


def addition(p: int, share: float, seed: int):
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    sums = pairs.sum(1) % p
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    train, test = order.split([round(share * len(pairs)), len(pairs) - round(share * len(pairs))])
    return pairs[train], sums[train], pairs[test], sums[test]


def train(report, name: str, decay: float, data, options) -> dict[str, list[float]]:
    """Accuracies and norm of the weights every `every` steps."""
    x, y, x_test, y_test = data
    model = Adder(options.modulus, options.width, options.seed)
    optimizer = OPTIMIZERS[name](model, decay)
    found: dict[str, list[float]] = {key: [] for key in ("step", "train", "test", "norm")}
    for step in report.progress(range(options.steps + 1), f"{name}, decay {decay:g}"):
        optimizer.zero_grad()
        scores = model(x)
        nn.functional.cross_entropy(scores, y).backward()
        if step % options.every == 0:
            with torch.no_grad():
                found["step"].append(step)
                found["train"].append((scores.argmax(1) == y).double().mean().item())
                found["test"].append((model(x_test).argmax(1) == y_test).double().mean().item())
                found["norm"].append(steepest.survey([p.detach() for p in model.parameters()]).norm.item())
        optimizer.step()
    return found


def when(run: dict, key: str, level: float) -> float:
    found = common.first(value >= level for value in run[key])
    return math.nan if found is None else run["step"][found]


def reached(step: float, options) -> str:
    return f"not in {options.steps} steps" if math.isnan(step) else f"step {step:g}"


def main(argv=None) -> dict:
    options = common.options(
        __doc__, argv, modulus=31, width=128, share=0.65, decay=1.0, steps=3000, every=25,
        tiny={"modulus": 7, "width": 16, "steps": 40, "every": 10},
    )  # fmt: skip
    report = common.Report("grokking", options)
    data = addition(options.modulus, options.share, options.seed)
    runs = {(n, decay): train(report, n, decay, data, options) for n in OPTIMIZERS for decay in (options.decay, 0.0)}
    rows = []
    for (name, decay), run in runs.items():
        known, found = when(run, "train", 0.99), when(run, "test", 0.95)
        rows.append(
            (
                f"{name}, decay {decay:g}",
                known,
                found,
                found / known if known else math.nan,
                run["test"][-1],
                run["norm"][-1],
            )
        )
    report.table(
        f"a + b mod {options.modulus}, {options.share:.0%} of the pairs for training, {options.steps} steps",
        ["optimizer", "step: training 99 %", "step: test 95 %", "ratio", "test accuracy in the end", "‖w‖ in the end"],
        rows,
    )
    for name in OPTIMIZERS:
        known, found = when(runs[name, options.decay], "train", 0.99), when(runs[name, options.decay], "test", 0.95)
        report.claim(
            f"{name} with weight decay generalises, at least five times later than it has learned the training pairs",
            found >= 5 * known,
            f"{reached(known, options)} and {reached(found, options)}",
        )
        last = runs[name, 0.0]["test"][-1]
        report.claim(
            f"{name} without weight decay does not generalise in {options.steps} steps",
            math.isnan(when(runs[name, 0.0], "test", 0.95)),
            f"test accuracy {last:.1%} in the end (chance {1 / options.modulus:.1%})",
        )
    adamw, muon = (when(runs[name, options.decay], "test", 0.95) for name in OPTIMIZERS)
    numbers = f"{reached(muon, options)} against {reached(adamw, options)}"
    report.claim("Muon generalises in fewer steps than AdamW", muon < adamw, numbers)
    with report.figure(2, f"Grokking: a + b mod {options.modulus}", width=5.5) as axes:
        for ((name, decay), run), color in zip(runs.items(), common.COLORS):
            axes[0].semilogx([s + 1 for s in run["step"]], run["test"], color=color, label=f"{name}, decay {decay:g}")
            axes[0].semilogx([s + 1 for s in run["step"]], run["train"], ":", color=color, linewidth=1)
            axes[1].semilogx([s + 1 for s in run["step"]], run["norm"], color=color)
        axes[0].set(xlabel="step", ylabel="accuracy", title="test (full) and training (dotted) accuracy")
        axes[0].legend(frameon=False, fontsize=8)
        axes[1].set(xlabel="step", title="norm of all weights")
    return report.save()


if __name__ == "__main__":
    main()
