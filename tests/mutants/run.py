"""Breaks every formula and kernel in every small way, one at a time, and lists what notices.

    python tests/mutants/run.py                     all of them
    python tests/mutants/run.py --only adam.h       files that match
    python tests/mutants/run.py --sample 20         some of them, chosen by --seed
    python tests/mutants/run.py --list              name them, run nothing
    python tests/mutants/run.py --count             what is known of them, run nothing

A mutant is killed when a cell of `python -m steepest validate` FAILs or, for files other than the update rules, when a
test fails.  Exit status 1 when one survives.  Needs a built package (`make build`) and a C++ compiler.

What it finds it keeps in tests/mutants/verdicts.jsonl, which belongs to the sources.  `make mutants` runs for at most
14 minutes at a time; run it again to go on, exit status 2 says that some are left.  A mutant that was killed is tried
again only when its file, or what noticed it (the cases or a test's file), has changed.
"""

from __future__ import annotations

import argparse
import os
import queue
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutation_record import Record
from mutation_rules import Mutant
from mutation_switched import Switched
from mutation_targets import TARGETS, Target
from mutation_workspace import KILLED, NO_BUILD, SURVIVED, Verdict, Workspace, prepare_process_server

Work = tuple[Target, Mutant]
VERDICTS = Path(__file__).with_name("verdicts.jsonl")


def choose(only: str = "", sample: int = 0, seed: int = 0) -> list[Work]:
    """Mutants that are not known to be equivalent."""
    work = [
        (target, mutant)
        for target in TARGETS
        if re.search(only, target.file)
        for mutant in target.mutants()
        if not target.reason(mutant)
    ]
    return random.Random(seed).sample(work, min(sample, len(work))) if sample else work


class Judge:
    """Tries a mutant together with the others where that decides, and alone where it does not."""

    def __init__(self, folder: Path, targets: list[Target]):
        self.switched, self.alone = Switched(folder / "switched", targets), Workspace(folder / "alone")
        self.alone_is_built, self.limits = False, {}

    def begin(self, target: Target) -> None:
        """RuntimeError when an unchanged source is not ok: then nothing would mean anything."""
        unchanged = self.switched.serve(target)
        if unchanged.status != SURVIVED:
            raise RuntimeError(f"{target.file} FAILs without any change: {unchanged.by}")

    def judge(self, target: Target, mutant: Mutant, how: str = "") -> Verdict | None:
        """None, when it is to be tried together with others, for one that has to be compiled alone."""
        found = None if how == "alone" else self.switched.try_switched(mutant)
        return found if found or how == "together" else self.try_alone(target, mutant)

    def try_alone(self, target: Target, mutant: Mutant) -> Verdict:
        if not self.alone_is_built:
            self.alone.configure()
            self.alone_is_built = True
        if target not in self.limits:
            unchanged = self.alone.try_out(target, None, 600)
            if unchanged.status != SURVIVED:
                raise RuntimeError(f"{target.file} FAILs without any change, alone: {unchanged.by}")
            self.limits[target] = 30 + 5 * unchanged.seconds  # a mutant that takes longer never ends
        return self.alone.try_out(target, mutant, self.limits[target])


def run(
    work: list[Work], jobs: int, until: float = float("inf"), how: str = ""
) -> Iterator[tuple[Target, Mutant, Verdict]]:
    """Verdicts as they come, begun before `until` (time.perf_counter).

    how: "together" without those that must be compiled alone, "alone" to compile each by itself."""
    prepare_process_server()
    targets = list(dict.fromkeys(target for target, _ in work))
    jobs = max(1, min(jobs, len(targets)))
    with tempfile.TemporaryDirectory(prefix="steepest-mutants-") as folder, ThreadPoolExecutor(jobs) as pool:
        judges = [Judge(Path(folder, str(i)), targets) for i in range(jobs)]
        waiting: queue.Queue[Target] = queue.Queue()
        for target in targets:
            waiting.put(target)
        found: queue.Queue[tuple[Target, Mutant, Verdict] | None] = queue.Queue()

        def all_of_some_targets(judge: Judge) -> None:
            try:
                if how != "alone":
                    judge.switched.configure()
                while time.perf_counter() < until:
                    target = waiting.get_nowait()
                    if how != "alone":
                        judge.begin(target)
                    for mutant in (mutant for t, mutant in work if t is target):
                        if time.perf_counter() >= until:
                            return
                        if verdict := judge.judge(target, mutant, how):
                            found.put((target, mutant, verdict))
            except queue.Empty:
                pass
            finally:
                judge.switched.stop()
                found.put(None)

        ends = [pool.submit(all_of_some_targets, judge) for judge in judges]
        for _ in ends:
            yield from iter(found.get, None)
        for end in ends:
            end.result()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="files to mutate")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="so many mutants, chosen at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no mutant after this time")
    parser.add_argument(
        "--how",
        default="",
        choices=("", "together", "alone"),
        help="together: leave out those that have to be compiled alone; alone: compile each by itself",
    )
    parser.add_argument("--record", metavar="FILE", default=str(VERDICTS), help="where verdicts are kept")
    parser.add_argument("--count", action="store_true", help="count what the record holds, run nothing")
    parser.add_argument("--list", action="store_true", help="name the mutants, run nothing")
    return parser


def main() -> int:
    begin, options = time.perf_counter(), parser().parse_args()
    work = choose(options.only, options.sample, options.seed)
    if options.list:
        for _, m in work:
            print(f"{m.file}:{m.line}  {m.rule:<10}  {m.before}  =>  {m.after}")
        print(f"{len(work)} mutants")
        return 0
    record = Record(options.record, TARGETS)
    found = {mutant: old for _, mutant in work if (old := record.get(mutant, options.count))}
    if options.count:
        outdated = sum(record.get(mutant) is None for mutant, old in found.items() if old.status == KILLED)
        print(f"{outdated} of those killed were so by what has changed since")
        return summary(work, found, options.only, 0.0)
    left = [(target, mutant) for target, mutant in work if mutant not in found]
    left.sort(key=lambda each: record.get(each[1], True) is not None)  # those that survived before come last
    print(f"{len(work)} mutants, {len(found)} known from {options.record}" if found else f"{len(work)} mutants")
    verdicts = run(left, options.jobs, begin + 60 * options.minutes, options.how)
    for number, (_, mutant, verdict) in enumerate(verdicts, 1):
        found[mutant] = verdict
        record.put(mutant, verdict)
        text = f"{mutant.file}:{mutant.line}  {mutant.before}  =>  {mutant.after}"
        print(f"[{number}/{len(left)}] {verdict.status}  {text}\n      {verdict.by}", flush=True)
    record.save()
    return summary(work, found, options.only, time.perf_counter() - begin)


def summary(work: list[Work], found: dict[Mutant, Verdict], only: str, seconds: float) -> int:
    """Prints it.  1 when a mutant survived, else 2 when some were not tried, else 0."""
    equivalent = Counter(
        target.file
        for target in TARGETS
        for mutant in (target.mutants() if re.search(only, target.file) else ())
        if target.reason(mutant)
    )
    rows = Counter((target.file, found[mutant].status) for target, mutant in work if mutant in found)
    for file in dict.fromkeys(target.file for target, _ in work):
        counts = [f"{rows[file, s]} {s}" for s in (KILLED, SURVIVED, NO_BUILD) if rows[file, s]]
        counts += [f"{equivalent[file]} equivalent"] if equivalent[file] else []
        untried = sum(target.file == file and mutant not in found for target, mutant in work)
        counts += [f"{untried} not tried"] if untried else []
        print(f"{file:<32}  {', '.join(counts)}")
    count = Counter(verdict.status for verdict in found.values())
    by_tests = sum(verdict.by.startswith(("tests/", "pytest")) for verdict in found.values())
    survivors = [m for _, m in work if m in found and found[m].status == SURVIVED]
    left = len(work) - len(found)
    print(
        f"{count[KILLED]} killed ({count[KILLED] - by_tests} by validate, {by_tests} by tests), "
        f"{count[SURVIVED]} survived, {count[NO_BUILD]} do not build, {sum(equivalent.values())} equivalent, "
        f"{left} left, {seconds:.0f} s"
    )
    for m in survivors:
        print(f"SURVIVED  {m.file}:{m.line}  {m.before}  =>  {m.after}  {found[m].by}")
    return 1 if survivors else 2 if left else 0


if __name__ == "__main__":
    sys.exit(main())
