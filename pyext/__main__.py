"""The command line: python -m steepest COMMAND.  Each command's module is imported only when it is called."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

COMMANDS = {
    "info": ("steepest.info:main", "build, versions, devices; never fails"),
    "validate": ("steepest.conformance.validate:main", "do the numerics hold on this machine? op by op, case by case"),
    "explain": ("steepest.explain:main", "which path, precision, bytes and launches an op takes, and why"),
    "bench": ("steepest.bench:main", "run the benchmarks of the source tree: ours, peers, share of the roofline"),
    "demo": ("steepest.demo:main", "train a small transformer with torch's optimizers and ours; table and plot"),
    "cmake-dir": ("steepest.__main__:cmake_dir", "where find_package(steepest CONFIG) finds the C library"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m steepest COMMAND [options]", "", *lines, "", "COMMAND --help lists its options."]
    )


def cmake_dir(argv: list[str]) -> int:
    if argv:
        print("usage: python -m steepest cmake-dir")
        return 0 if argv[0] in ("-h", "--help") else 2
    path = Path(__file__).resolve().parent / "lib" / "cmake" / "steepest"
    if not path.is_dir():
        print(f"cmake-dir: {path} does not exist; install the package with `pip install .`", file=sys.stderr)
        return 1
    print(path)
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] not in COMMANDS:
        print(f"steepest: {argv[0]!r} is not a command\n\n{usage()}", file=sys.stderr)
        return 2
    module, function = COMMANDS[argv[0]][0].split(":")
    return getattr(importlib.import_module(module), function)(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
