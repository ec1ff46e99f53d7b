"""Keeps benchmark results and renders README's generated parts from them.

python bench/table.py save FILE [FOLDER]   compact a pytest-benchmark file into FOLDER/<machine>/ (bench/results)
python bench/table.py write                redraw bench/results/plots, then rewrite README.md from the newest result
python bench/table.py check                exit with 1 if README.md or a plot is stale
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PLOTS = RESULTS / "plots"
README = ROOT / "README.md"
SCHEMA, KIND = 2, "steepest-bench"


def compact(raw: dict) -> dict:
    """What claims, tables, plots and comparisons need of a pytest-benchmark file, every time by round.

    Schema 2: command, scale, date, commit, machine as in `steepest.info()`, measured rates, and per benchmark its name,
    `rounds_ms` and `figures`, which are those of bench/racing.py; a `note`, written by hand, where it is not one run.
    """
    machine = raw["machine_info"]
    rows = [
        {"name": b["name"], "rounds_ms": [t * 1e3 for t in b["stats"]["data"]], "figures": b["extra_info"]}
        for b in raw["benchmarks"]
        if b["extra_info"]  # a run that was interrupted leaves its last benchmark without figures
    ]
    options = " --quick" if machine["scale"] == "quick" else ""
    options += " --separate" if machine.get("separate") else ""
    content = {
        "schema": SCHEMA,
        "kind": KIND,
        "command": f"python -m steepest bench{options} --json FILE && python bench/table.py save FILE",
        "scale": machine["scale"],
        "device": machine["device"],
        "date": raw["datetime"][:10],
        "commit": machine["steepest"].get("commit"),
        "machine": machine["steepest"],
        "copy_GB_per_s": machine["copy_GB_per_s"],
        "matmul_GFLOP_per_s": machine["matmul_GFLOP_per_s"],
        "benchmarks": rows,
    }
    return short(content)


def short(value):
    """The same with five significant digits: ten times smaller than the spread of any time."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: short(entry) for key, entry in value.items()}
    return [short(entry) for entry in value] if isinstance(value, list) else value


def read(path: Path) -> dict:
    """A compact result, from a file of this format or of pytest-benchmark's.  ValueError for anything else."""
    content = json.loads(path.read_text())
    if "machine_info" in content:
        if "scale" not in content["machine_info"]:
            raise ValueError(f"{path} was written by pytest-benchmark, but not from this bench/")
        return compact(content)
    if content.get("kind") != KIND or content.get("schema") != SCHEMA:
        found = f"kind {content.get('kind')!r}, schema {content.get('schema')!r}"
        raise ValueError(f"{path} has {found}, expected kind {KIND!r}, schema {SCHEMA}")
    return content


def text(content: dict) -> str:
    """JSON with one line per benchmark."""
    head = json.dumps({key: value for key, value in content.items() if key != "benchmarks"}, indent=1)
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in content["benchmarks"])
    return f'{head[:-2]},\n "benchmarks": [\n{lines}\n]}}\n'


def machine_name(content: dict) -> str:
    cpu, cuda = content["machine"]["cpu"], content["machine"]["cuda"]
    name = f"{cpu['model']} {cpu['usable_cores']} cores"
    if content["device"] == "cuda":
        name = cuda["devices"][0]["name"]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def save(source: Path, folder: Path = RESULTS) -> Path:
    content = read(source)
    if not content["benchmarks"]:
        raise SystemExit(f"{source} holds no benchmarks")
    name = f"{content['date']}-{(content['commit'] or 'unknown')[:12]}.json"
    target = folder / machine_name(content) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text(content))
    return target


def newest_by_machine() -> dict[str, Path]:
    """The newest benchmark result of each machine, by its folder's name; reports of other kinds are passed over."""
    found = {}
    for path in sorted(RESULTS.glob("*/*.json"), key=lambda path: (path.name[:10], path.stat().st_mtime)):
        if json.loads(path.read_text()).get("kind") == KIND:
            found[path.parent.name] = path
    return found


def newest(device: str = "cpu") -> Path:
    files = [path for path in newest_by_machine().values() if read(path)["device"] == device]
    if not files:
        raise SystemExit(
            f"no results under {RESULTS}: run `make bench`, then `python bench/table.py save out/bench.json`"
        )
    return max(files, key=lambda path: (path.name[:10], path.stat().st_mtime))


class Row(NamedTuple):
    """One benchmark as a line of a table; the peer is the fastest one, if there is any."""

    case: str
    ours_ms: float
    peer: str
    peer_ms: float | None
    ratio: float | None  # peer / ours: above 1 we are faster
    quartiles: tuple[float, float] | None
    rate: str
    peak: str
    loop_ms: float | None = None  # ours in a loop
    loop_ratio: float | None = None  # to the peer that is fastest there

    @property
    def loop_text(self) -> str:
        if self.loop_ms is None:
            return "–"
        return f"{self.loop_ms:.4g}" + ("" if self.loop_ratio is None else f", {self.loop_ratio:.2f}×")

    @property
    def peer_text(self) -> str:
        return "–" if self.peer_ms is None else f"{self.peer_ms:.4g}"

    @property
    def ratio_text(self) -> str:
        return "–" if self.ratio is None else f"{self.ratio:.2f}× ({self.quartiles[0]:.2f}–{self.quartiles[1]:.2f})"


def in_table(figures: dict) -> bool:
    """False for steps that move other bytes than ours: a sentence says their rates."""
    return bool(figures) and not any("rate_of_ours" in peer for peer in figures["peers"].values())


def row(figures: dict) -> Row:
    """The roof is the nearer one: copying what must be moved, or multiplying what must be computed."""
    copy, matmul = figures.get("of_copy", 0.0), figures.get("of_matmul", 0.0)
    rate = peak = "–"
    if copy or matmul:
        rate = f"{figures['GB_per_s']:.3g} GB/s" if copy > matmul else f"{figures['GFLOP_per_s']:.3g} GFLOP/s"
        peak = f"{copy:.0%} of copy" if copy > matmul else f"{matmul:.0%} of matmul"
    case = f"{figures['op']} {figures['case']}" + (" on the GPU" if figures["device"] == "cuda" else "")
    if not figures["peers"]:
        why = "; ".join(f"{name} left out: {reason}" for name, reason in figures.get("left_out", {}).items())
        return Row(case, figures["ms"], why or "–", None, None, None, rate, peak, figures.get("loop_ms"))
    name, best = min(figures["peers"].items(), key=lambda entry: entry[1]["ms"])
    loop = min((peer["loop_ratio"] for peer in figures["peers"].values() if "loop_ratio" in peer), default=None)
    peers = (name, best["ms"], best["ratio"], tuple(best["quartiles"]))
    return Row(case, figures["ms"], *peers, rate, peak, figures.get("loop_ms"), loop)


def results_table(path: Path) -> str:
    """One line per benchmark, what a further tensor costs, where the figures come from, and the plots."""
    content = read(path)
    lines = [
        "| case | ours, ms | fastest peer | its ms | ratio (quartiles) | in a loop, ms | rate | of measured peak |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for entry in content["benchmarks"]:
        if not in_table(entry["figures"]):
            continue
        r = row(entry["figures"])
        lines.append(
            f"| {r.case} | {r.ours_ms:.4g} | {r.peer} | {r.peer_text} | {r.ratio_text} | {r.loop_text} "
            f"| {r.rate} | {r.peak} |"
        )
    cpu = content["machine"]["cpu"]
    lines += ["", *scaling_sentences(content)]
    lines += [
        f"{cpu['model']}, {cpu['usable_cores']} cores, torch {content['machine']['torch']}, "
        f"commit {content['commit']}, {content['date']}; copy {content['copy_GB_per_s']:.1f} GB/s, "
        f"matmul {content['matmul_GFLOP_per_s']:.0f} GFLOP/s. "
        "Medians of interleaved runs, each of which finds cold caches, as between a model's passes. In a loop: ours "
        "where every runner's calls follow one another, as timing loops have it, and the ratio there. "
        f"`{content['command']}`; file `{path.relative_to(ROOT)}`.",
    ]
    if "note" in content:
        lines[-1] += f" {content['note']}"
    for name in ("scaling", "roofline"):
        plot = PLOTS / f"{path.parent.name}-{name}.svg"
        if plot.exists():
            lines += ["", f"![{name} of the table above]({plot.relative_to(ROOT)})"]
    return "\n".join(lines)


def scaling_sentences(content: dict) -> list[str]:
    """What each further tensor costs, for ours and the peers, where a sweep has measured it; the rules' rates."""
    sentences = []
    for entry in content["benchmarks"]:
        fits = {name: fit.get("us_per_added_tensor") for name, fit in entry["figures"].get("fit", {}).items()}
        if all(value is not None for value in fits.values()) and fits:
            costs = ", ".join(f"{name} {value:.3g} µs" for name, value in fits.items())
            sentences.append(f"A further tensor at the same total size costs: {costs}.")
        sentences += rates_sentence(entry["figures"])
    return sentences


def rates_sentence(figures: dict) -> list[str]:
    """The other rules' bytes per second as shares of AdamW's, where both were timed in the same rounds."""
    parts = []
    for name, peer in figures["peers"].items():
        if "rate_of_ours" in peer:
            loop = f" ({peer['loop_rate_of_ours']:.1%} in a loop)" if "loop_rate_of_ours" in peer else ""
            parts.append(f"{name} {peer['rate_of_ours']:.1%}{loop}")
    return [f"Bytes per second, of AdamW's in the same rounds, {figures['case']}: {', '.join(parts)}."] if parts else []


def ops_table() -> str:
    """Op by backend by dtype, from the conformance registry."""
    from steepest.conformance.registry import COLUMNS, registered_ops

    lines = ["| op | " + " | ".join(COLUMNS) + " | dtypes | cases |", "|---|" + "---|" * (len(COLUMNS) + 2)]
    for op in registered_ops().values():
        names = {backend.name for backend in op.backends() if backend.exists}
        marks = ["yes" if column in names else "–" for column in COLUMNS]
        dtypes = [d for d in ("float32", "bfloat16", "float16") if any(d in case.dtypes for case in op.cases)]
        lines.append(f"| `{op.name}` | " + " | ".join(marks) + f" | {', '.join(dtypes)} | {len(op.cases)} |")
    return "\n".join(lines)


# Llama 3 8B on 8 to 10,000 GPUs: the rows that README shows.
PLAN = ["--mesh", "shards=8", "replicas=8,shards=8", "shards=128,tensor=8", "shards=10000", "replicas=1250,shards=8"]


def plan_table() -> str:
    """What `python -m steepest explain --plan` says."""
    from steepest.planning.command import report

    return f"`python -m steepest explain --plan {' '.join(PLAN)}`: {report(PLAN)}"


def render(page: str) -> str:
    parts = {"table of ops": ops_table(), "table of results": results_table(newest()), "table of plans": plan_table()}
    for title, table in parts.items():
        pattern = re.compile(rf"(<!-- generated: {title}[^\n]*-->\n).*?(<!-- end generated -->)", re.S)
        if not pattern.search(page):
            raise SystemExit(f"README.md has no part marked 'generated: {title}'")
        page = pattern.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", page)
    return page


def main(arguments: list[str]) -> int:
    if 2 <= len(arguments) <= 3 and arguments[0] == "save":
        print(save(*map(Path, arguments[1:])))
        return 0
    if arguments == ["write"]:
        import plot

        plot.write()
        README.write_text(render(README.read_text()))
        return 0
    if arguments == ["check"]:
        import plot

        stale = [str(path.relative_to(ROOT)) for path in plot.stale()]
        stale += ["README.md"] if render(README.read_text()) != README.read_text() else []
        print(f"stale: {', '.join(stale)}; run: python bench/table.py write" if stale else "all is up to date")
        return int(bool(stale))
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
