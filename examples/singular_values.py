"""Draws what schedules do to singular values: each curve is f(s), from a singular value before to the one after.

    python examples/singular_values.py out/singular_values.png                       # the published sets
    python examples/singular_values.py out/mine.png keller polar-express:8 minimax:1e-3:5 tuned:schatten8:4

A curve is a name of `steepest.schedules.names()`, optionally with a number of steps; minimax:LOWER:STEPS; or
tuned:NORM:STEPS.  The dashed lines are certificates: f stays within them from the schedule's lower end on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from steepest import schedules
from steepest.matrix.norm_bounds import tuned


def parse(text: str) -> tuple[str, schedules.Schedule]:
    """The curve's label and its schedule; ValueError for what is neither."""
    kind, *rest = text.split(":")
    if kind == "minimax":
        lower, steps = rest
        return f"minimax from {lower}, {steps} steps", schedules.minimax(2, float(lower) ** 2, steps=int(steps))
    if kind == "tuned":
        norm, steps = rest
        return f"tuned to {norm}, {steps} steps", tuned(int(steps), norm)
    schedule = schedules.named(kind, int(rest[0])) if rest else schedules.named(kind)
    return f"{kind}, {schedule.steps} steps", schedule


def draw(curves: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    s = np.geomspace(1e-5, 1, 2000)
    for curve in curves:
        label, schedule = parse(curve)
        certificate = (
            f"within {schedule.error:.2g} from {schedule.lower**0.5:g}, safe up to {schedule.largest_safe:.4g}"
        )
        (line,) = axes.plot(s, schedule.apply(s**2), label=f"{label}: {certificate}")
        for edge in (1 - schedule.error, 1 + schedule.error):
            axes.hlines(edge, schedule.lower**0.5, 1, line.get_color(), "dashed", linewidth=0.6)
    axes.set(xscale="log", ylim=(0, 1.6), xlabel="singular value before, of the norm", ylabel="singular value after")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where to save the picture: .png, .svg or .pdf")
    parser.add_argument("curves", nargs="*", help="by default all published sets")
    options = parser.parse_args(argv)
    try:
        draw(options.curves or list(schedules.names()), options.file)
    except (ValueError, KeyError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
