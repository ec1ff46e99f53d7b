"""Worlds of gloo ranks for tests: one start-up for many checks, processes forked from a server that knows torch.

A check is a function of a `Rank`; modules of checks are named checks_*.py.  Each check says in which worlds it runs.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

TIMEOUT = 20  # seconds that a rank waits for others
PRELOAD = ["torch", "numpy", "torch.distributed.fsdp", "torch.distributed.tensor.parallel",
           "torch.distributed.checkpoint.state_dict", "steepest.optim", "steepest.distributed.muon"]  # fmt: skip


@dataclass
class Rank:
    rank: int
    world: int
    folder: str  # shared by the world


def check(*worlds: int):
    """Marks a function as a check for worlds of these sizes."""

    def mark(function):
        function.worlds = worlds
        return function

    return mark


def checks(modules: list[str]) -> list[tuple[str, str, int]]:
    """(module, function, world) of every check, in the order of the source."""
    found = []
    for module in modules:
        for name, value in vars(importlib.import_module(module)).items():
            found += [(module, name, world) for world in getattr(value, "worlds", ())]
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _main(rank: int, world: int, port: int, folder: str, todo: list[tuple[str, str]], results) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
    )
    for module, name in todo:
        error, start = "", time.process_time()
        try:
            torch.manual_seed(0)
            getattr(importlib.import_module(module), name)(Rank(rank, world, folder))
        except Exception:
            error = traceback.format_exc()
        results.put((name, rank, error, time.process_time() - start))
        if error:
            break  # other ranks may be waiting for this one inside the check: they will say so
    results.close()
    results.join_thread()
    dist.destroy_process_group()


def run(
    world: int, todo: list[tuple[str, str]], limit: float = 120.0, shared: str | None = None
) -> dict[str, dict[int, str]]:
    """Runs the checks in one world; what each rank said about each check, "" for success; absent: not reached.

    shared: a folder that outlives the world.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, *{module for module, _ in todo}])
    results, port, folder = context.Queue(), free_port(), shared or tempfile.mkdtemp()
    os.environ["OMP_NUM_THREADS"] = "1"
    ranks = [context.Process(target=_main, args=(r, world, port, folder, todo, results)) for r in range(world)]
    said: dict[str, dict[int, str]] = {name: {} for _, name in todo}
    try:
        for process in ranks:
            process.start()
        end = time.monotonic() + limit
        while time.monotonic() < end and sum(map(len, said.values())) < world * len(todo):
            try:
                name, rank, error, _ = results.get(timeout=0.2)
                said[name][rank] = error
            except multiprocessing.queues.Empty:
                if not any(process.is_alive() for process in ranks):
                    break
        for process in ranks:
            process.join(max(1.0, end - time.monotonic()))
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
        if shared is None:
            shutil.rmtree(folder, ignore_errors=True)
    return said


def verdict(said: dict[int, str], world: int) -> str:
    """What went wrong on any rank; "" for a check that succeeded on all."""
    wrong = [f"rank {rank}: {error}" for rank, error in sorted(said.items()) if error]
    missing = sorted(set(range(world)) - set(said))
    return "\n".join(wrong + ([f"ranks {missing} did not come to this check"] if missing else []))


HERE = Path(__file__).parent


if __name__ == "__main__":  # python worlds.py checks_elementwise 4 [check ...]: runs some checks, and says how long they took
    import sys

    _module, _world, _names = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    _todo = [(m, n) for m, n, w in checks([_module]) if w == _world and (not _names or n in _names)]
    for _name, _said in run(_world, _todo).items():
        print(_name, verdict(_said, _world) or "ok")
