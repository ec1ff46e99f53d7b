"""What every example shares: options, progress, a table, claims with a computed verdict, a picture, a JSON file.

    options = common.options(__doc__, passes=60, seeds=5, tiny={"passes": 3, "seeds": 1})
    report = common.Report("name", options)
    ...
    report.table("Losses", ["optimizer", "loss"], rows)
    report.claim("Muon is faster", ratio > 1, f"{ratio:.2f} times")
    report.save()

Everything in the JSON file but "seconds" and tables that are "measured" is the same in every run with one seed, one
thread and one kind of machine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

COLORS = ["#4c8fd6", "#e07b28", "#3a9a5b", "#9a4fb0", "#b03a48", "#12355b", "#8c6d31", "#5b8c8c", "#c06c9a", "#777777"]
AGREES, DIFFERS = "agrees", "does not agree"


def options(doc: str, argv: Sequence[str] | None, *, tiny: dict[str, int | float], **sizes) -> argparse.Namespace:
    """Command line options: each of `sizes` with its default; --tiny takes the values of `tiny` for those not given."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=None, help=f"default {value}")
    parser.add_argument("--tiny", action="store_true", help="seconds instead of a minute; says little")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch; these problems are too small for more")
    parser.add_argument("--output", type=Path, default=Path("out/gallery"), help="folder for NAME.json and NAME.png")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    found = parser.parse_args(argv)
    for name, value in sizes.items():
        if getattr(found, name) is None:
            setattr(found, name, tiny.get(name, value) if found.tiny else value)
    torch.set_num_threads(found.threads)
    torch.manual_seed(found.seed)
    return found


class Report:
    """Collects what an example has to say; `save` writes and prints it."""

    def __init__(self, name: str, options: argparse.Namespace):
        self.name, self.options, self.begin = name, options, time.perf_counter()
        self.tables: list[dict] = []
        self.claims: list[dict] = []
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}

    def progress(self, items: Iterable, label: str) -> Iterable:
        """The items, with a progress bar on stderr."""
        items = list(items)
        if self.options.quiet:
            yield from items
            return
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description=label, console=Console(stderr=True), transient=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence], *, measured: bool = False) -> None:
        """Cells are strings or numbers; numbers are kept to four digits.  measured: holds times, not repeatable."""
        cells = [[_cell(x) for x in row] for row in rows]
        table = {"title": title, "columns": list(columns), "rows": cells}
        self.tables.append(table | ({"measured": True} if measured else {}))

    def claim(self, claim: str, agrees: bool, numbers: str) -> None:
        """A statement, whether this run bears it out (computed, never written down), and the figures that decide it."""
        self.claims.append({"claim": claim, "verdict": AGREES if agrees else DIFFERS, "numbers": numbers})

    def note(self, text: str) -> None:
        """A sentence about what was seen, its figures computed."""
        self.notes.append(text)

    @contextmanager
    def figure(self, count: int, title: str, width: float = 4.6):
        """Axes side by side; saved as NAME.png."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width * count, 3.7), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, count, squeeze=False)[0]
        yield axes
        for ax in axes:
            ax.spines[["top", "right"]].set_visible(False)
            ax.title.set_fontsize(10)
        figure.suptitle(title, fontsize=11)
        self.options.output.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.options.output / f"{self.name}.png", dpi=90, metadata={"Software": None})

    def save(self) -> dict:
        """Writes NAME.json, prints tables and verdicts; returns the content."""
        self.seconds["all"] = round(time.perf_counter() - self.begin, 1)
        left_out = ("output", "quiet", "threads")
        settings = {name: value for name, value in vars(self.options).items() if name not in left_out}
        content = {"name": self.name, "settings": settings, "tables": self.tables, "claims": self.claims}
        content |= {"notes": self.notes, "seconds": self.seconds}
        self.options.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        (self.options.output / f"{self.name}.json").write_text(text, encoding="utf-8")
        if not self.options.quiet:
            print(markdown(content))
        return content


def markdown(content: dict) -> str:
    """Tables, verdicts and notes of an example's JSON."""
    lines = []
    for table in content["tables"]:
        lines += [f"**{table['title']}**", "", "| " + " | ".join(table["columns"]) + " |"]
        lines += ["|---|" + "---:|" * (len(table["columns"]) - 1)]
        lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in table["rows"]] + [""]
    lines += ["| claim | verdict | numbers |", "|---|---|---|"]
    lines += [f"| {c['claim']} | **{c['verdict']}** | {c['numbers']} |" for c in content["claims"]] + [""]
    lines += content["notes"] + [""] * bool(content["notes"]) + [seen(content["claims"]), ""]
    return "\n".join(lines)


def seen(claims: list[dict]) -> str:
    """What a run comes to, in a sentence or two."""
    missing = [c["claim"] for c in claims if c["verdict"] == DIFFERS]
    text = f"Seen: {len(claims) - len(missing)} of {len(claims)} claims hold in this run."
    return text + (" Not: " + "; ".join(missing) + "." if missing else "")


def _cell(value) -> str:
    if isinstance(value, str):
        return value
    value = float(value)
    if math.isnan(value):
        return "–"
    return f"{value:.4g}"


# --- statistics that verdicts rest on ---------------------------------------------------------------------------------


def line(x, y) -> tuple[float, float, float]:
    """(slope, intercept, R²) of the least-squares line through (x, y)."""
    x, y = (torch.as_tensor(v, dtype=torch.float64) for v in (x, y))
    dx, dy = x - x.mean(), y - y.mean()
    slope = (dx @ dy) / (dx @ dx)
    left = (dy - slope * dx).square().sum()
    return slope.item(), (y.mean() - slope * x.mean()).item(), 1 - (left / dy.square().sum()).item()


def spread(values) -> float:
    """(largest - smallest) / mean."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return ((values.max() - values.min()) / values.mean()).item()


def first(condition: Iterable[bool]) -> int | None:
    """Index of the first True."""
    return next((i for i, value in enumerate(condition) if value), None)


def differs(a, b) -> tuple[float, float]:
    """(mean of a - b, its standard error) of paired values."""
    d = torch.as_tensor(a, dtype=torch.float64) - torch.as_tensor(b, dtype=torch.float64)
    return d.mean().item(), (d.std() / math.sqrt(len(d))).item() if len(d) > 1 else math.nan


# --- data -------------------------------------------------------------------------------------------------------------


def digits(seed: int, train: int, *, noise: float = 0.0, dtype=torch.float32):
    """scikit-learn's 1797 handwritten digits as (x, y, x_test, y_test), features centred and of unit size on average;
    `noise` of the training labels are drawn anew."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float64), torch.tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    x = x - x.mean(0)
    x, y = (x / x.square().mean().sqrt()).to(dtype)[order], y[order]
    x_train, y_train = x[:train], y[:train].clone()
    wrong = torch.rand(train, generator=generator) < noise
    y_train[wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=generator)
    return x_train, y_train, x[train:], y[train:]
