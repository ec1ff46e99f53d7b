"""One process per target that has imported everything and forks for every mutant: what is left is the check itself.

    python mutation_server.py SETTINGS   (JSON; cwd: the workspace)

Reads one line of JSON per mutant, {"number": the switch to turn on, "file": a Python file that has been replaced},
and answers with one: {"by": what noticed or "", "noticed": the check's name, "alone": whether this proves nothing,
"executed": whether any check came to the switch}.
A Python mutant gets into the running package by the code of its functions.  One that runs while the package is
imported has to be tried alone.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import linecache
import os
import resource
import select
import signal
import struct
import sys
import time
import types
from pathlib import Path

MEMORY = 6 << 30
COMPILING = "tests/formula", "tests/cuda_host", "tests/matrix"  # folders of tests that compile C++ themselves
GRACE = 3.0  # seconds of work that a check may take beyond 8 times what it takes without a mutant
WAITING = 6  # times as long by the clock: a machine with other work to do, or a process that waits for ever


class Server:
    def __init__(self, settings: dict):
        self.settings = settings
        self.checks: dict[str, object] = {}  # name -> callable that returns what it noticed, "" for nothing
        self.seconds: dict[str, float] = {}
        self.hits: dict[str, float] = {}  # how often a check noticed something of late
        self.functions: dict[str, list[types.FunctionType]] = {}  # of the files asked for
        self.imported: set[types.CodeType] = set()  # code that ran during the import
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        if not os.environ.get("MUTANTS_DEBUG"):
            os.dup2(nowhere, 2)

    def start(self) -> None:
        sys.dont_write_bytecode = True
        sys.path.insert(0, self.settings["package"])
        self.turn_on(0)
        import torch  # noqa: F401

        root = os.path.realpath(self.settings["root"])

        def seen(frame, event, _):
            if event == "call" and frame.f_code.co_filename.startswith(root):
                self.imported.add(frame.f_code)

        sys.setprofile(seen)
        from steepest.conformance import runner

        op, backends, quick = self.settings["op"], self.settings["backends"], self.settings["quick"]
        cells = runner.select(op, backends, quick=quick) or runner.select("", backends, quick=quick)
        sys.setprofile(None)
        for cell in cells if backends else ():
            self.checks[cell.id] = lambda cell=cell: self.cell(runner, cell)
        if self.settings["tests"]:
            self.start_tests()
        else:
            self.serve()

    @staticmethod
    def cell(runner, cell) -> str:
        result = runner.run_cell(cell)
        return f"{cell.id}: {result.reason.splitlines()[0]}" if result.status == runner.FAIL else ""

    def start_tests(self) -> None:
        import pytest

        options = ["-q", "-s", "-p", "no:cacheprovider", "--tb=short", *self.settings["tests"]]
        if self.settings["without"]:
            options += ["-k", f"not {self.settings['without']}"]
        pytest.main(options, plugins=[self])

    def pytest_runtestloop(self, session) -> bool:
        from _pytest.runner import runtestprotocol

        # Each module's fixtures live on, for what they have compiled, while tests of other modules run.
        stacks: dict[object, dict] = {}

        def test(item) -> str:
            stack = session._setupstate.stack
            stack.clear()
            stack.update(stacks.get(item.parent, {}))
            reports = runtestprotocol(item, nextitem=item.parent, log=False)
            stacks[item.parent] = dict(stack)
            if os.environ.get("MUTANTS_DEBUG"):
                print(*(r.longreprtext for r in reports if r.failed), file=sys.stderr)
            return item.nodeid if any(report.failed for report in reports) else ""

        for item in session.items:
            self.checks[item.nodeid] = lambda item=item: test(item)
            if item.nodeid.startswith(COMPILING):
                self.checks[item.nodeid]()  # compiles here what the forks then share; starts no threads
        self.serve()
        return True

    def serve(self) -> None:
        by = self.fork_and_check(list(self.checks), 600.0, self.settings["unchanged"])
        self.answer(**by, checks=len(self.checks), seconds=sum(self.seconds.values()))
        order = sorted(self.checks, key=lambda name: self.seconds.get(name, 0.0))
        for line in sys.stdin:
            job = json.loads(line)
            if job["file"] and self.runs_while_imported(job["file"]):
                self.answer(by="", noticed="", alone=True)
                continue
            if job["file"]:
                self.functions_of(job["file"])
            self.turn_on(job["number"])
            promising = sorted(self.hits, key=lambda name: (self.seconds.get(name, 0.0) + 0.01) / self.hits[name])
            found = self.fork_and_check(list(dict.fromkeys((*promising, *order))), None, job["file"])
            executed = self.executed()
            self.turn_on(0)
            if found["noticed"] in self.checks:
                self.hits = {name: 0.9 * hits for name, hits in self.hits.items() if hits > 0.01}
                self.hits[found["noticed"]] = self.hits.get(found["noticed"], 0.0) + 1
            # What no check executes is perhaps a number that the compiler used.
            self.answer(**found, alone=not (found["by"] or executed or job["file"]), executed=executed)

    def answer(self, **what) -> None:
        print(json.dumps(what, ensure_ascii=False), file=self.answers)

    def turn_on(self, number: int) -> None:
        with open(self.settings["number_file"], "r+b") as file:
            file.write(struct.pack("ii", number, 0))

    def executed(self) -> bool:
        with open(self.settings["number_file"], "rb") as file:
            return struct.unpack("ii", file.read(8))[1] != 0

    def fork_and_check(self, names: list[str], limit: float | None, file: str | None) -> dict:
        """limit None: the checks' usual time; otherwise measures it, and one that fails does not end it."""
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reading)
            self.child(names, file, writing, to_the_end=limit is not None)
        os.close(writing)
        name, found, buffer, begun, worked, waited = "start", "", b"", time.perf_counter(), 0.0, 0.0
        try:
            while True:
                patience = limit or GRACE + 8 * self.seconds.get(name, 0.0)
                left = begun + patience - time.perf_counter()
                asked = time.perf_counter()
                ready, _, _ = select.select([reading], [], [], left if left > 0 else 1.0)
                # A process that was stopped and goes on has not waited all that time.
                waited += min(time.perf_counter() - asked, patience)
                if not ready:
                    if worked_seconds(process) - worked < patience and waited < WAITING * patience:
                        continue  # others use the processor
                    return {"by": f"{name}: no end within {patience:.0f} s", "noticed": name}
                if not (part := os.read(reading, 1 << 16)):
                    break
                *lines, buffer = (buffer + part).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    if "done" in event and limit is not None:
                        self.seconds[event["done"]] = event["seconds"]
                    name, begun, waited = event.get("begin", name), time.perf_counter(), 0.0
                    worked = worked_seconds(process)
                    if event.get("found") and not found:
                        found = event["found"]
                        found_by = name
                    if "end" in event:
                        return {"by": found, "noticed": found_by if found else ""}
            if found:
                return {"by": found, "noticed": found_by}
            return {"by": f"{name}: the process ended", "noticed": name}
        finally:
            os.close(reading)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)

    def child(self, names: list[str], file: str | None, writing: int, to_the_end: bool) -> None:
        def say(**what) -> None:
            os.write(writing, json.dumps(what, ensure_ascii=False).encode() + b"\n")

        try:
            os.setsid()
            if not any(test.startswith(COMPILING) for test in self.settings["tests"]):  # sanitizers map terabytes
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            if file:
                self.install(file)
            for name in names:
                begin = time.perf_counter()
                say(begin=name)
                try:
                    found = self.checks[name]()
                except BaseException as error:
                    found = f"{name}: {type(error).__name__}"
                if found:
                    say(found=found)
                    if not to_the_end:
                        break
                say(done=name, seconds=time.perf_counter() - begin)
            say(end=True)
        except BaseException as error:
            say(found=f"{type(error).__name__}: {error}")
        finally:
            os._exit(0)

    def install(self, file: str) -> None:
        linecache.clearcache()
        codes = {(code.co_name, code.co_firstlineno): code for code in nested(compiled(file))}
        for function in self.functions_of(file):
            old = function.__code__
            if (new := codes.get((old.co_name, old.co_firstlineno))) and new.co_freevars == old.co_freevars:
                function.__code__ = new

    def functions_of(self, file: str) -> list[types.FunctionType]:
        """Asked for before the forks, which have the same objects: looking at all objects takes seconds."""
        if file not in self.functions:
            everything = (thing for thing in gc.get_objects() if isinstance(thing, types.FunctionType))
            self.functions[file] = [f for f in everything if real(f.__code__.co_filename) == file]
        return self.functions[file]

    def runs_while_imported(self, file: str) -> bool:
        new = {(code.co_name, code.co_firstlineno): own(code) for code in nested(compiled(file))}
        return any(
            real(old.co_filename) == file and new.get((old.co_name, old.co_firstlineno), own(old)) != own(old)
            for old in self.imported
        )


def worked_seconds(process: int) -> float:
    """Of a process and its children that have ended."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


@functools.cache
def real(path: str) -> str:
    return os.path.realpath(path)


def own(code: types.CodeType) -> tuple:
    """What a function does, without the functions inside it."""
    return code.co_code, code.co_names, [c for c in code.co_consts if not isinstance(c, types.CodeType)]


def compiled(file: str) -> types.CodeType:
    return compile(Path(file).read_text(), file, "exec")


def nested(code: types.CodeType):
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from nested(constant)


if __name__ == "__main__":
    Server(json.loads(sys.argv[1])).start()
