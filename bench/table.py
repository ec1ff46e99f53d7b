"""Keeps benchmark results and renders README's tables from them.

    python bench/table.py save out/bench.json     compact a pytest-benchmark file into bench/results/<machine>/
    python bench/table.py write                   rewrite the generated parts of README.md from the newest result
    python bench/table.py check                   exit with 1 if README.md is stale
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"


def save(source: Path) -> Path:
    """The figures that a claim needs (command, machine, commit, medians, spread), without the raw timings."""
    raw = json.loads(source.read_text())
    machine = raw["machine_info"]
    info = machine["steepest"]
    rows = []
    for entry in raw["benchmarks"]:
        stats = entry["stats"]
        spread = {key: stats[key] * 1e3 for key in ("min", "median", "q1", "q3")}
        rows.append({"name": entry["name"], "rounds": stats["rounds"], "ms": spread, "figures": entry["extra_info"]})
    content = {
        "schema": 1,
        "command": "make bench && python bench/table.py save out/bench.json",
        "date": raw["datetime"][:10],
        "commit": info.get("commit"),
        "machine": info,
        "copy_GB_per_s": machine["copy_GB_per_s"],
        "matmul_GFLOP_per_s": machine["matmul_GFLOP_per_s"],
        "benchmarks": rows,
    }
    name = re.sub(r"[^a-z0-9]+", "-", f"{info['cpu']['model']} {info['cpu']['usable_cores']} cores".lower()).strip("-")
    target = RESULTS / name / f"{content['date']}-{(info.get('commit') or 'unknown')[:12]}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=1) + "\n")
    return target


def newest() -> Path:
    files = sorted(RESULTS.glob("*cores*/*.json"), key=lambda path: (path.name[:10], path.stat().st_mtime))
    if not files:
        raise SystemExit(f"no results under {RESULTS}: run `make bench`, then `python bench/table.py save out/bench.json`")
    return files[-1]


def results_table(path: Path) -> str:
    """One line per benchmark: our median, each peer's, the ratio with its quartiles, and the share of the roofline."""
    content = json.loads(path.read_text())
    lines = ["| case | ours, ms | peer | peer, ms | ratio (quartiles) | of measured peak |", "|---|---:|---|---:|---:|---:|"]
    for row in content["benchmarks"]:
        figures = row["figures"]
        peak = (
            f"{figures['of_copy']:.0%} of copy" if "of_copy" in figures
            else f"{figures['of_matmul']:.0%} of matmul" if "of_matmul" in figures else "–"
        )  # fmt: skip
        for peer, theirs in figures.items():
            if isinstance(theirs, dict):
                low, high = theirs["quartiles"]
                lines.append(
                    f"| {figures['op']} {figures['case']} | {figures['ms']:.2f} | {peer} | {theirs['ms']:.2f} "
                    f"| {theirs['ratio']:.2f}× ({low:.2f}–{high:.2f}) | {peak} |"
                )
    cpu = content["machine"]["cpu"]
    lines += [
        "",
        f"{cpu['model']}, {cpu['usable_cores']} cores, torch {content['machine']['torch']}, commit {content['commit']}, "
        f"{content['date']}; copy {content['copy_GB_per_s']:.1f} GB/s, matmul {content['matmul_GFLOP_per_s']:.0f} GFLOP/s. "
        f"Medians of interleaved runs; `{content['command']}`; file `{path.relative_to(ROOT)}`.",
    ]
    return "\n".join(lines)


def ops_table() -> str:
    """Op by backend by dtype, from the conformance registry."""
    from steepest.conformance.registry import COLUMNS, registered_ops

    lines = ["| op | " + " | ".join(COLUMNS) + " | dtypes | cases |", "|---|" + "---|" * (len(COLUMNS) + 2)]
    for op in registered_ops().values():
        names = {backend.name for backend in op.backends()}
        marks = ["yes" if column in names else "–" for column in COLUMNS]
        dtypes = [d for d in ("float32", "bfloat16", "float16") if any(d in case.dtypes for case in op.cases)]
        lines.append(f"| `{op.name}` | " + " | ".join(marks) + f" | {', '.join(dtypes)} | {len(op.cases)} |")
    return "\n".join(lines)


def render(text: str) -> str:
    for title, table in (("table of ops", ops_table()), ("table of results", results_table(newest()))):
        pattern = re.compile(rf"(<!-- generated: {title}[^\n]*-->\n).*?(<!-- end generated -->)", re.S)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no part marked 'generated: {title}'")
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def main(arguments: list[str]) -> int:
    if len(arguments) == 2 and arguments[0] == "save":
        print(save(Path(arguments[1])))
        return 0
    if arguments == ["write"]:
        README.write_text(render(README.read_text()))
        return 0
    if arguments == ["check"]:
        stale = render(README.read_text()) != README.read_text()
        print("README.md is stale: python bench/table.py write" if stale else "README.md is up to date")
        return int(stale)
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
