"""A copy of the sources in which one file at a time is replaced by a mutant, rebuilt where it is C++, and checked."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mutation_rules import Mutant
from mutation_targets import ROOT, Target

KILLED, SURVIVED, NO_BUILD = "killed", "SURVIVED", "does not build"
TESTS_SECONDS = 300
COPIED = ("csrc", "cmake", "pyext", "kernels", "tests", "bench", "CMakeLists.txt", "pyproject.toml")
MULTIPROCESSING = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Verdict:
    status: str
    by: str = ""  # what noticed
    seconds: float = 0.0
    noticed: str = ""  # the cell or the test, by which it can be run first for the next mutant


def prepare_process_server() -> None:
    """Checks run in forks of a process that has imported torch, which takes most of their time otherwise."""
    # Before any thread pool exists.  Cells compare one thread with two by themselves.
    os.environ["OMP_NUM_THREADS"] = "1"
    MULTIPROCESSING.set_forkserver_preload(["torch", "numpy"])


class Workspace:
    """Mutants one by one: written into the file, compiled, tried in a process that imports everything anew."""

    optimize = "-O0"  # contraction is off, so that every level of optimization rounds alike

    def __init__(self, folder: Path):
        self.folder = folder
        ignored = shutil.ignore_patterns("__pycache__", "lib", "include-installed", "mutants", "results")
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(
                source, folder / name, **({"ignore": ignored} if source.is_dir() else {})
            )
        (folder / "pyext/kernels").symlink_to("../kernels")
        (folder / "package").mkdir()
        (folder / "package/steepest").symlink_to("../pyext")
        self.build_folder = folder / "build"
        self.change("CMakeLists.txt", " -O3 ", f" {self.optimize} ")
        # Matrix products would be too slow.  A mutant is to be noticed by what it does, not by a warning.
        self.change("CMakeLists.txt", "-ffp-contract=fast)", '"-ffp-contract=fast;-O1")')
        for test in ("tests/formula/test_formulas.py", "tests/matrix/test_matrix_core.py"):
            self.change(test, '"-Werror"', '"-Wno-error"')
        self.change("tests/formula/test_formulas.py", '"-O3"', '"-O1"')  # minutes for the lines with all their switches
        self.change("tests/formula/test_kept.py", '"-O2"', '"-O1"')
        self.library_is_mutated = False
        self.killers: dict[Target, list[str]] = {}  # what noticed other mutants, the latest first

    def change(self, file: str, old: str, new: str) -> None:
        text = (self.folder / file).read_text()
        if old not in text:
            raise LookupError(f"{file} has no {old!r}")
        (self.folder / file).write_text(text.replace(old, new))

    def configure(self) -> None:
        """The C++ library for the CPU.  The Python module is the installed one: it finds the library beside itself."""
        module = Path(importlib.util.find_spec("steepest._C").origin)
        shutil.copy(module, self.folder / "pyext" / module.name)
        (self.folder / "pyext/lib").mkdir()
        generator = ["-G", "Ninja"] if shutil.which("ninja", path=self.path()) else []
        self.run("cmake", "-S", self.folder, "-B", self.build_folder, *generator, "-DSTEEPEST_CUDA=OFF", check=True)
        if problem := self.build():
            raise RuntimeError(f"the unchanged library does not build:\n{problem}")

    def path(self) -> str:
        return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run(self, *command, check: bool = False, **environment) -> subprocess.CompletedProcess:
        """TimeoutExpired when it takes too long; nothing that it started goes on then."""
        arguments = [str(part) for part in command]
        process = subprocess.Popen(
            arguments, cwd=self.folder, env={**os.environ, "PATH": self.path(), **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            out, errors = process.communicate(timeout=TESTS_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if check and process.returncode:
            raise subprocess.CalledProcessError(process.returncode, arguments, out, errors)
        return subprocess.CompletedProcess(arguments, process.returncode, out, errors)

    def build(self) -> str:
        """Brings the library up to date; what the compiler says when it cannot."""
        done = self.run("cmake", "--build", self.build_folder, "--parallel", 1)
        if done.returncode:
            return done.stdout[-2000:]
        library = next(self.build_folder.glob("libsteepest.*"))
        shutil.copy(library, self.folder / "pyext/lib/new")
        os.replace(self.folder / "pyext/lib/new", self.folder / "pyext/lib" / library.name)
        return ""

    def try_out(self, target: Target, mutant: Mutant | None, seconds: float = 600.0) -> Verdict:
        """Judges one mutant, or the unchanged file; a check that takes longer than `seconds` has noticed, too."""
        begin, path = time.perf_counter(), self.folder / target.file
        original = path.read_text()
        try:
            if mutant:
                path.write_text(mutant.text)
            if target.native or self.library_is_mutated:
                self.library_is_mutated = target.native
                if self.build():
                    return Verdict(NO_BUILD)
            noticed, by = self.check(target, seconds, mutant is not None)
        finally:
            path.write_text(original)
        if noticed:
            known = self.killers.setdefault(target, [])
            self.killers[target] = [noticed, *(name for name in known if name != noticed)][:20]
        return Verdict(KILLED if by else SURVIVED, by, time.perf_counter() - begin, noticed)

    def check(self, target: Target, seconds: float, with_tests: bool) -> tuple[str, str]:
        """What notices, and how: first what noticed the mutant before, cells of `validate` or tests."""
        kinds = [lambda: self.validate(target, seconds)] if target.backends else []
        if with_tests:
            kinds.append(lambda: (self.tests(target),) * 2)
        if self.killers.get(target, [""])[0].startswith("tests/"):
            kinds.reverse()
        return next((found for kind in kinds if (found := kind())[1]), ("", ""))

    def validate(self, target: Target, seconds: float) -> tuple[str, str]:
        """The first cell that FAILs, and how; those that noticed other mutants come first, then the quick ones."""
        answer = self.folder / "answer.json"
        answer.unlink(missing_ok=True)
        arguments = (
            str(self.folder / "package"),
            target.op,
            target.backends,
            target.quick,
            target.interpreted,
            self.killers.get(target, []),
            str(answer),
        )
        process = MULTIPROCESSING.Process(target=run_cells, args=arguments, daemon=True)
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            return "", f"validate: no end within {seconds:.0f} s"
        if not answer.exists():
            return "", f"validate: the process ended with status {process.exitcode}"
        return tuple(json.loads(answer.read_text()))

    def tests(self, target: Target) -> str:
        """The first test that fails; "" when none does."""
        if not target.tests:
            return ""
        first = [name for name in self.killers.get(target, []) if name.startswith("tests/")]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--tb=no",
            *first,
            *target.tests,
        ]
        if target.without:
            command += ["-k", f"not {target.without}"]
        try:
            done = self.run(
                *command,
                PYTHONPATH=str(self.folder / "package"),
                PYTHONDONTWRITEBYTECODE="1",
                TRITON_INTERPRET="1" if target.interpreted else "0",
            )
        except subprocess.TimeoutExpired:
            return f"pytest: no end within {TESTS_SECONDS} s"
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if failed:
            return failed[0].split(" - ")[0].split(" ", 1)[1]
        return f"pytest: status {done.returncode}" if done.returncode else ""


def run_cells(
    package: str,
    op: str,
    backends: tuple[str, ...],
    quick: bool,
    interpreted: bool,
    first: list[str],
    answer: str,
) -> None:
    """In a process of its own: what `validate --op OP --backend ...` runs, up to the first FAIL.

    Writes [the cell's name, what it says] or two empty texts to the file `answer`."""
    sys.dont_write_bytecode = True  # mutants of one file differ in less than a second and may have equal size
    sys.path.insert(0, package)
    os.environ["TRITON_INTERPRET"] = "1" if interpreted else "0"
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    found = "", ""
    try:
        from steepest.conformance.runner import FAIL, run_cell, select

        def turn(cell):
            return first.index(cell.id) if cell.id in first else len(first) + (not cell.case.quick)

        cells = select(op, list(backends), quick=quick) or select("", list(backends), quick=quick)
        for cell in sorted(cells, key=turn):
            result = run_cell(cell)
            if result.status == FAIL:
                found = cell.id, f"{cell.id}: {result.reason.splitlines()[0]}"
                break
    except Exception as error:  # the package does not even start
        found = "", f"{type(error).__name__}: {error}"
    Path(answer).write_text(json.dumps(found))
