"""`steepest.info()` and `python -m steepest info`: what is installed and what it runs on.

Only the standard library is imported at module level, and no probe may raise: this is what people run first when
something else does not work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable

ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OMP_PROC_BIND", "TRITON_INTERPRET")


def info() -> dict[str, Any]:
    """Build, versions, processor, devices and environment as plain JSON data; never raises.

    A part that cannot be found out is a string that begins with "unavailable:" and says why.
    """
    return {
        "steepest": _probe(_version),
        "commit": _probe(_commit),
        "native": _probe(_native),
        "python": platform.python_version(),
        "torch": _probe(lambda: _module_version("torch")),
        "triton": _probe(lambda: _module_version("triton")),
        "numpy": _probe(lambda: _module_version("numpy")),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _probe(_cpu),
        "cuda": _probe(_cuda),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k in ENVIRONMENT or k.startswith("STEEPEST_")},
    }


def _probe(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:  # any failure is the answer
        return f"unavailable: {type(error).__name__}: {error}"


def _version() -> str:
    from steepest._version import __version__

    return __version__


def _module_version(name: str) -> str:
    return __import__(name).__version__


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


def checkout() -> Path | None:
    """The source tree that this package lies in, or None for an installed one."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / ".git").exists() and (root / "pyext").is_dir() else None


def _commit() -> str | None:
    root = checkout()
    if root is None:
        return None
    commit = _run("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changed = _run("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with local changes" if changed else commit


def _native() -> dict[str, Any]:
    import torch  # noqa: F401  brings the OpenMP runtime that the library shares

    from steepest import _C
    from steepest._native import reader

    return {**json.loads(_C.build_info()), "reads_tensors": reader.way.name.lower()}


def _cpu() -> dict[str, Any]:
    import torch

    return {
        "model": _probe(_cpu_model),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cuda() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"torch_cuda": torch.version.cuda, "available": torch.cuda.is_available()}
    if shutil.which("nvidia-smi"):
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = _probe(lambda: _run(*query).splitlines()[0])
    if found["available"]:
        found["devices"] = [_probe(lambda i=i: _cuda_device(i)) for i in range(torch.cuda.device_count())]
    return found


def _cuda_device(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
    }


def _lines(data: dict[str, Any], indent: str = "") -> list[str]:
    width = max((len(key) for key in data), default=0)
    lines = []
    for key, value in data.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{key}", *_lines(value, indent + "  ")]
        elif isinstance(value, list):
            for i, entry in enumerate(value):
                lines += [
                    f"{indent}{key}[{i}]",
                    *_lines(entry if isinstance(entry, dict) else {"": entry}, indent + "  "),
                ]
        else:
            lines.append(f"{indent}{key:<{width}}  {value if value not in (None, '', {}) else '-'}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m steepest info", description="Build, versions, devices; never fails.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    found = info()
    print(json.dumps(found, indent=2) if arguments.json else "\n".join(_lines(found)))
    return 0
