"""Staggered roots: Shampoo's losses and the work of each step on the demo's transformer, against AdamW.

The character-level transformer of `python -m steepest demo` reads the Python standard library's sources, each optimizer
from the same weights on the same batches.  Shampoo takes new inverse roots in every step, or of a tenth of its blocks
in each step, in turn.  The work of a step is the sum of n³ over the statistics that got a new root in it, read from
the state `refreshed.<block>`; a schedule that refreshes all blocks in every tenth step would have ten times the mean
in one step of ten and none in the others.
"""

from __future__ import annotations

from statistics import mean, median

import common

from steepest.demo.model import Transformer
from steepest.demo.optimizers import OPTIMIZERS
from steepest.demo.run import parse
from steepest.demo.text import VOCABULARY_SIZE, load_text, training_batches, validation_windows
from steepest.demo.train import Run, train

KEYS = ("adamw", "shampoo", "shampoo-1")
FREQUENCY = 10


def work_of_last_step(optimizer) -> int:
    """Sum of n³ over the statistics of the blocks whose roots are of the parameter's newest step."""
    total = 0
    for state in optimizer.state.values():
        for key, refreshed in state.items():
            if key.startswith("refreshed.") and refreshed == state["step"]:
                block = key.removeprefix("refreshed.")
                total += sum(state[f"root.{side}.{block}"].shape[0] ** 3 for side in (0, 1))
    return total


def largest_block(optimizer) -> int:
    """Work of the costliest block."""
    found = 0
    for state in optimizer.state.values():
        blocks = [key.removeprefix("refreshed.") for key in state if key.startswith("refreshed.")]
        found = max([found, *(sum(state[f"root.{s}.{b}"].shape[0] ** 3 for s in (0, 1)) for b in blocks)])
    return found


def trained(key: str, options, report) -> tuple[Run, list[int], int]:
    """The run of one optimizer, the work of each of its steps, and that of its costliest block."""
    text = load_text(None, options.characters, options.context)
    batches = training_batches(text.train, options.steps, options.batch, options.context, options.seed)
    windows = validation_windows(text.validation, options.context)
    model = Transformer(VOCABULARY_SIZE, options.context, options.width, options.layers, 4, seed=options.seed)
    optimizer = OPTIMIZERS[key].build(model, parse([]))
    work: list[int] = []

    def on_step(run: Run) -> None:
        work.append(work_of_last_step(optimizer))

    run = train(
        model, optimizer, report.progress(list(batches), key), windows, options.steps, options.steps // 4, on_step
    )
    return run, work, largest_block(optimizer)


def main(argv=None) -> dict:
    options = common.options(
        __doc__, argv, steps=300, batch=16, context=128, width=128, layers=5, characters=5_000_000,
        tiny={"steps": 24, "batch": 2, "context": 16, "width": 16, "layers": 1, "characters": 40_000},
    )  # fmt: skip
    report = common.Report("staggered_roots", options)
    runs = {key: trained(key, options, report) for key in KEYS}
    losses = {key: run.validation[-1][1] for key, (run, *_) in runs.items()}
    report.table(
        "Losses and work",
        ["optimizer", "validation loss", "training loss, mean of the last tenth", "work of a step, mean", "largest"],
        [
            (
                OPTIMIZERS[key].name,
                losses[key],
                mean(run.train_loss[-max(1, options.steps // 10) :]),
                mean(work),
                max(work),
            )
            for key, (run, work, _) in runs.items()
        ],
    )
    times(report, runs["shampoo"])
    verdicts(report, runs, losses)
    picture(report, runs)
    return report.save()


def times(report, found) -> None:
    """Median time of the steps of each slot, without the first ten, in which kernels and caches are new."""
    run, work, _ = found
    steps = range(FREQUENCY, len(work))
    ms = [1e3 * s for s in run.optimizer_seconds]
    rows = []
    for slot in range(FREQUENCY):
        mine = [i for i in steps if i % FREQUENCY == slot]
        rows.append((str(slot), mean(work[i] for i in mine), median(ms[i] for i in mine)))
    every = [ms[i] for i in steps]
    rows.append(("all", mean(work[i] for i in steps), median(every)))
    report.table(
        "Shampoo with roots in every tenth step: the optimizer's own time, without the passes",
        ["step modulo 10", "work", "median ms"], rows, measured=True,
    )  # fmt: skip


def verdicts(report, runs, losses) -> None:
    for key, name in (("shampoo-1", "every step"), ("shampoo", "every 10 steps")):
        report.claim(
            f"Shampoo with roots {name} ends at or below AdamW's validation loss",
            losses[key] <= losses["adamw"],
            f"{losses[key]:.3f} against {losses['adamw']:.3f}",
        )
    _, work, largest = runs["shampoo"]
    report.claim(
        "Staggered, the work of no two steps differs by more than the costliest block's",
        max(work) - min(work) <= largest,
        f"{min(work):,} to {max(work):,} per step, costliest block {largest:,}",
    )


def picture(report, runs) -> None:
    with report.figure(3, "Shampoo on the demo's transformer", width=4.4) as axes:
        for (key, (run, work, _)), color in zip(runs.items(), common.COLORS):
            name = OPTIMIZERS[key].name.removeprefix("steepest ")
            axes[0].plot([s for s, _ in run.validation], [v for _, v in run.validation], ".-", color=color, label=name)
            axes[1].plot([1e3 * s for s in run.optimizer_seconds], color=color, linewidth=0.7)
            axes[2].plot(work, color=color, linewidth=0.9)
        axes[0].set(xlabel="step", title="validation loss")
        axes[0].legend(frameon=False, fontsize=8)
        axes[1].set(xlabel="step", yscale="log", title="optimizer's own time, ms")
        axes[2].set(xlabel="step", title="work: sum of n³ over new roots")


if __name__ == "__main__":
    main()
