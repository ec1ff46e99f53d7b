"""Runs the examples, or writes their pictures, tables and verdicts into examples/README.md.

python examples/gallery.py run [NAME ...]    two at a time, each with one thread, into out/gallery
python examples/gallery.py write             copies pictures and JSON to examples/gallery, renders README.md
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
KEPT = HERE / "gallery"
OUTPUT = HERE.parent / "out" / "gallery"
# In the order of the page; memorization, the longest, starts early all the same.
NAMES = (
    "sgd_vs_gd", "norms", "sam_flatness", "mode_connectivity", "grokking", "double_descent", "memorization",
    "effective_dimension", "gradient_regularization", "staggered_roots",
)  # fmt: skip
HEAD = """# Training dynamics, measured with the kernels

Each script takes about a minute on one core (`python examples/NAME.py --help`), prints its tables and verdicts, and
writes `out/gallery/NAME.json` and `NAME.png`. A verdict is computed from the numbers beside it; where a claim does not
hold in the run shown, it says so. Monitors, laws and sharpness are in `steepest.dynamics`.

`make gallery` runs all of them and writes this page; `make gallery GALLERY=grokking` runs one.
"""


def names() -> tuple[str, ...]:
    """Of the examples that are there."""
    return tuple(name for name in NAMES if (HERE / f"{name}.py").exists())


def run(chosen: list[str]) -> int:
    unknown = set(chosen) - set(names())
    if unknown:
        raise SystemExit(f"gallery: unknown examples {sorted(unknown)}; known: {', '.join(names())}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def one(name: str) -> int:
        command = [sys.executable, str(HERE / f"{name}.py"), "--quiet", "--output", str(OUTPUT)]
        status = subprocess.run(command, env=environment).returncode
        if not status:
            seconds = json.loads((OUTPUT / f"{name}.json").read_text(encoding="utf-8"))["seconds"]["all"]
            print(f"{name}: {seconds:.0f} s", flush=True)
        return status

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        return max(pool.map(one, chosen or names()))


def render(folder: Path = KEPT) -> str:
    """The page, from the JSON files in `folder`."""
    from common import markdown

    contents = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names()]
    lines = [HEAD, "| example | verdicts that agree |", "|---|---:|"]
    for content in contents:
        agree = sum(claim["verdict"] == "agrees" for claim in content["claims"])
        title, _ = text_of(content["name"])
        lines.append(f"| [{title}](#{content['name']}) | {agree} of {len(content['claims'])} |")
    for content in contents:
        name = content["name"]
        title, text = text_of(name)
        chosen = {key: value for key, value in content["settings"].items() if key != "tiny"}
        settings = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in chosen.items())
        lines += [
            "",
            f'## <a name="{name}"></a>{title}',
            "",
            escaped(text),
            "",
            f"`python examples/{name}.py {settings}`",
            "",
        ]
        lines += [f"![{title}](gallery/{name}.png)", "", markdown(escaped(content)).rstrip()]
    return "\n".join(lines) + "\n"


def escaped(value):
    """Strings anywhere in a JSON value as Markdown shows them: f* is no emphasis."""
    if isinstance(value, dict):
        return {key: escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [escaped(inner) for inner in value]
    return value.replace("*", r"\*") if isinstance(value, str) else value


def text_of(name: str) -> tuple[str, str]:
    """A script's docstring: the title, which ends at the first colon, and all after the first line."""
    first, _, rest = (HERE / f"{name}.py").read_text(encoding="utf-8").split('"""')[1].partition("\n\n")
    return first.split(":")[0].rstrip("."), rest.strip()


def write() -> None:
    KEPT.mkdir(exist_ok=True)
    for name in names():
        for suffix in ("json", "png"):
            source = OUTPUT / f"{name}.{suffix}"
            if source.exists():
                shutil.copy(source, KEPT / source.name)
    (HERE / "README.md").write_text(render(), encoding="utf-8")


def main(argv: list[str]) -> int:
    if argv[:1] == ["run"]:
        return run(argv[1:])
    if argv == ["write"]:
        write()
        return 0
    raise SystemExit(__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
