"""What the demo leaves behind: a table on the screen, a plot of the curves and a JSON file of everything measured."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

from rich.table import Table

from steepest.demo.optimizers import OPTIMIZERS
from steepest.demo.train import Run


def differences(runs: dict[str, Run]) -> dict[str, float]:
    """max |Δ train loss| of each run to its twin, for those whose twin ran too."""
    twins = {key: OPTIMIZERS[key].twin for key in runs}
    return {key: runs[key].largest_difference(runs[twin]) for key, twin in twins.items() if twin in runs}


def table(runs: dict[str, Run]) -> Table:
    """One row per optimizer; the lowest final validation loss in bold."""
    result = Table(caption_justify="left")
    result.add_column("Optimizer", no_wrap=True)
    for heading in ("Validation\nloss at end", "Optimizer\nms/step", "Whole step\nms", "Max |Δ train\nloss|"):
        result.add_column(heading, justify="right")
    lowest = min(run.validation[-1][1] for run in runs.values())
    apart = differences(runs)
    for key, run in runs.items():
        loss = run.validation[-1][1]
        result.add_row(
            OPTIMIZERS[key].name,
            f"[bold]{loss:.4f}[/bold]" if loss == lowest else f"{loss:.4f}",
            f"{run.optimizer_ms:.2f}",
            f"{run.step_ms:.1f}",
            f"{apart[key]:.1e}" if key in apart else "–",
        )
    twins = [f"{OPTIMIZERS[key].name} to {OPTIMIZERS[OPTIMIZERS[key].twin].name}" for key in apart]
    result.caption = "Medians over the steps." + f" Δ: {', '.join(twins)}, over all steps." * bool(twins)
    return result


def results(runs: dict[str, Run], settings: dict) -> dict:
    """Everything measured, ready for JSON: a loss that is not finite becomes null."""
    apart = differences(runs)
    return {
        "settings": settings,
        "runs": {
            key: {
                "name": OPTIMIZERS[key].name,
                "final_validation_loss": _number(run.validation[-1][1]),
                "optimizer_ms": run.optimizer_ms,
                "step_ms": run.step_ms,
                "max_train_loss_difference_to_twin": _number(apart.get(key, math.nan)),
                "validation": [[step, _number(loss)] for step, loss in run.validation],
                "train_loss": [_number(loss) for loss in run.train_loss],
                "step_seconds": run.step_seconds,
                "optimizer_seconds": run.optimizer_seconds,
            }
            for key, run in runs.items()
        },
    }


def save_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def save_plot(path: Path, runs: dict[str, Run], title: str) -> None:
    """Loss against steps, and validation loss against steps times the median seconds per step, as one image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no change of the process's backend
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    by_step, by_time = figure.subplots(1, 2)
    followed = {OPTIMIZERS[key].twin for key in runs}
    colors = itertools.cycle(["#4c8fd6", "#12355b", "#e07b28", "#3a9a5b", "#9a4fb0", "#b03a48"])
    for (key, run), color in zip(runs.items(), colors):
        # A curve that another has to reproduce is a wide pale band, and the other a thin dashed line on it.
        band = {"linewidth": 6, "alpha": 0.4, "zorder": 1} if key in followed else {"linewidth": 1.6, "zorder": 3}
        band["linestyle"] = "--" if OPTIMIZERS[key].twin in runs else "-"
        steps, losses = zip(*run.validation)
        # At the median pace, or a busy moment bends the curve: once 9 of 300 steps took over 0.5 s, the median 0.14 s.
        seconds = [step * run.step_ms / 1e3 for step in steps]
        window = max(1, len(run.train_loss) // 30)
        if key not in followed:
            by_step.plot(*_running_mean(run.train_loss, window), color=color, linewidth=0.8, alpha=0.5)
        by_step.plot(steps, losses, color=color, label=OPTIMIZERS[key].name, **band)
        by_time.plot(seconds, losses, color=color, label=OPTIMIZERS[key].name, **band)
    for axes, label in ((by_step, "step"), (by_time, "seconds of training, at the median time per step")):
        axes.set(xlabel=label, ylabel="loss (nats per character)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    by_step.set_title("Validation loss; thin: training loss, running mean", fontsize=10)
    by_time.set_title("Validation loss", fontsize=10)
    by_time.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def _running_mean(values: list[float], window: int) -> tuple[list[int], list[float]]:
    ends = range(window, len(values) + 1)
    return list(ends), [sum(values[end - window : end]) / window for end in ends]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
