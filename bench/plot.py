"""Roofline and scaling plots of the newest result of each machine, as SVG in bench/results/plots/.

    python bench/plot.py            draw them all
    python bench/plot.py check      exit with 1 if one is missing or was drawn from other figures

Each file carries a digest of what it was drawn from, so that a stale one is found without matplotlib; with the same
matplotlib the bytes are the same.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import table

OURS, PEERS = "#12355b", ["#e07b28", "#3a9a5b", "#9a4fb0", "#b03a48"]
AXES = {
    "tensors": "tensors, same elements in all",
    "elements": "elements of one tensor",
    "n": "n of an n × n matrix",
}


def digest(source: Path) -> str:
    """Of the figures, and of this file, which decides how they are shown."""
    return hashlib.sha256(source.read_bytes() + Path(__file__).read_bytes()).hexdigest()


def targets() -> dict[Path, tuple[Path, str]]:
    """(source, kind) of every plot that there should be."""
    machines = table.newest_by_machine().items()
    return {table.PLOTS / f"{name}-{kind}.svg": (source, kind) for name, source in machines for kind in DRAW}


def stale() -> list[Path]:
    """Plots that are missing, out of date, or of nothing any more."""
    wanted = targets()
    old = [path for path, (source, _) in wanted.items() if not path.exists() or digest(source) not in path.read_text()]
    return old + [path for path in sorted(table.PLOTS.glob("*.svg")) if path not in wanted]


def write() -> list[Path]:
    wanted = targets()
    for path in stale():
        if path not in wanted:
            path.unlink()
    for path, (source, kind) in wanted.items():
        draw(source, kind, path)
    return list(wanted)


def draw(source: Path, kind: str, target: Path) -> None:
    """One plot; `kind` is "roofline" or "scaling"."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # no display, and the process's backend stays as it is
    from matplotlib.figure import Figure

    content = table.read(source)
    # Fixed ids, text as text, and no date: the same figures give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "steepest", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        DRAW[kind](figure, content)
        name = content["machine"]["cpu"]["model"]
        if content["device"] == "cuda":
            name = content["machine"]["cuda"]["devices"][0]["name"]
        figure.suptitle(
            f"{name}, torch {content['machine']['torch']}, {content['date']}, {content['commit']}", fontsize=9
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, metadata={"Date": None, "Description": f"drawn from {source.name}, {digest(source)}"})


def colours(runners) -> dict[str, str]:
    """By name; ours is always the same."""
    others = [name for name in runners if name != "ours"]
    return {"ours": OURS, **{name: PEERS[i % len(PEERS)] for i, name in enumerate(others)}}


def roofline(figure, content: dict) -> None:
    """GFLOP/s over FLOPs per byte that must be moved; full marks: ours, hollow: the fastest peer."""
    import numpy as np

    figure.set_size_inches(7.5, 4.5)
    axes = figure.subplots()
    rows = [b["figures"] for b in content["benchmarks"] if {"bytes", "flops"} <= b["figures"].keys()]
    rows = [f for f in rows if f["device"] == content["device"]]
    xs = [f["flops"] / f["bytes"] for f in rows] or [1.0]
    span = np.geomspace(min(xs) / 4, max(xs) * 4, 200)
    copy = content["copy_GB_per_s"]
    rates = {f["dtype"]: f["matmul_GFLOP_per_s"] for f in rows} or {"float32": content["matmul_GFLOP_per_s"]}
    for dtype, rate in sorted(rates.items()):
        axes.plot(span, np.minimum(span * copy, rate), color="#888888", linewidth=1)
        axes.text(span[-1], rate, f"matmul {dtype}, {rate:.3g} GFLOP/s", ha="right", va="bottom", color="#555555")
    axes.text(span[0], span[0] * copy, f"  copy, {copy:.3g} GB/s", ha="left", va="bottom", color="#555555", rotation=0)
    colour = colours(["ours", *sorted({f["op"] for f in rows})])
    for op in sorted({f["op"] for f in rows}):
        mine = [f for f in rows if f["op"] == op]
        x = [f["flops"] / f["bytes"] for f in mine]
        axes.plot(x, [f["GFLOP_per_s"] for f in mine], "o", color=colour[op], label=f"{op}, ours")
        best = [min((p["ms"] for p in f["peers"].values()), default=np.nan) for f in mine]
        rate = [f["flops"] / (ms * 1e6) for f, ms in zip(mine, best)]
        axes.plot(x, rate, "o", color=colour[op], fillstyle="none", label=f"{op}, fastest peer")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must be moved", ylabel="GFLOP/s")
    finish(axes, legend=bool(rows))


def scaling(figure, content: dict) -> None:
    """Milliseconds over the number of tensors, of elements, and the size of matrices; bands: quartiles."""
    figure.set_size_inches(11, 3.8)
    found = {b["figures"]["axis"]: b["figures"] for b in content["benchmarks"] if "points" in b["figures"]}
    for axes, axis in zip(figure.subplots(1, len(AXES)), AXES):
        axes.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel="ms per call")
        if axis not in found:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
            continue
        curve(axes, found[axis])
        axes.set_title(found[axis]["op"], fontsize=9)
        finish(axes, legend=True)


def curve(axes, figures: dict) -> None:
    points = figures["points"]
    xs = [point["x"] for point in points]
    for name, colour in colours(points[0]["runners"]).items():
        runs = [point["runners"][name] for point in points]
        axes.plot(xs, [run["ms"] for run in runs], "o-", color=colour, markersize=3, label=label(name, figures))
        low, high = zip(*(run["quartiles_ms"] for run in runs))
        axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)


def label(name: str, figures: dict) -> str:
    """The runner and what the fit says of it."""
    fit = figures.get("fit", {}).get(name, {})
    if "us_per_added_tensor" in fit:
        return f"{name}: {fit['us_per_added_tensor']:.2g} µs per tensor"
    if "ns_per_element" in fit:
        return f"{name}: {fit['ns_per_element']:.2g} ns per element"
    return f"{name}: n^{fit['exponent']:.1f}" if "exponent" in fit else name


def finish(axes, legend: bool) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=8)


DRAW = {"roofline": roofline, "scaling": scaling}


def main(arguments: list[str]) -> int:
    if arguments == ["check"]:
        old = stale()
        print("\n".join(f"stale: {path}" for path in old) or "all plots are up to date")
        return int(bool(old))
    if arguments:
        print(__doc__)
        return 2
    written = write()
    print("\n".join(map(str, written)) or f"no results under {table.RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
