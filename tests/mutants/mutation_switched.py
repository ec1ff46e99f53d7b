"""A workspace in which all mutants are compiled together, and judged by forks of a process that a target keeps."""

from __future__ import annotations

import json
import mmap
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mutation_switches
from mutation_rules import Mutant
from mutation_targets import TARGETS, Target
from mutation_workspace import KILLED, SURVIVED, Verdict, Workspace

ROUNDS = 12  # of leaving out lines that do not compile with switches
ANSWER_SECONDS = 1800
NOT_EXECUTED = "no check executes it"
# Constants and bounds of arrays ask no switch; other lines with `constexpr` may.
CONSTANT = re.compile(r"^(static |inline )*constexpr [^(]*=|^(alignas\(\d+\) )?(?!return )\w+ [\w*, ]*\[[^=]*;")
OF_THE_COMPILER = re.compile(r"constexpr|^(alignas\(\d+\) )?\w+ [\w*, ]*\[")


class Switched(Workspace):
    optimize = "-O1"

    def __init__(self, folder: Path, targets: Sequence[Target] = TARGETS):
        super().__init__(folder)
        self.numbers: dict[Mutant, int] = {}
        self.of_file: dict[str, list[tuple[int, Mutant]]] = {}
        self.compiled: set[int] = set()  # the mutants that are in the library and in the tests' programs
        self.blamed: set[tuple[str, int]] = set()  # lines without switches
        self.server: subprocess.Popen | None = None
        self.serving: Target | None = None
        self.settings, self.unchanged = {}, Verdict(SURVIVED)  # of the process, and what it said at its start
        for target in targets:
            if target.compiled:
                for mutant in target.mutants():
                    self.numbers[mutant] = len(self.numbers) + 1
                    self.of_file.setdefault(target.file, []).append((self.numbers[mutant], mutant))
        self.sources = {file: (folder / file).read_text() for file in self.of_file}
        (folder / "number").write_bytes(bytes(mmap.PAGESIZE))
        header = mutation_switches.HEADER
        for path in (*(folder / "csrc").rglob("*.cpp"), *(folder / "csrc").rglob("*.cu")):
            if str(path.relative_to(folder)) not in self.sources:
                path.write_text(mutation_switches.with_header(path.read_text(), folder / header.name))
        (folder / header.name).write_text(f'#define STEEPEST_MUTANT_FILE "{folder / "number"}"\n' + header.read_text())

    def build(self) -> str:
        """Every round leaves out the lines that the compiler did not take in the round before."""
        for _ in range(ROUNDS):
            self.write_switches()
            errors = self.compile_all()
            if not errors:
                return ""
            blamed = mutation_switches.lines_to_blame(errors, self.sources) - self.blamed
            if not blamed:
                break
            self.blamed |= blamed
        return errors[-4000:]

    def write_switches(self) -> None:
        self.compiled.clear()
        for file, text in self.sources.items():
            header = self.folder / mutation_switches.HEADER.name
            lines = {line for other, line in self.blamed if other == file}
            text, numbers = mutation_switches.switched(text, self.of_file[file], lines)
            if not file.endswith(".inc"):  # which is included inside a namespace, by a file that has the header
                text = mutation_switches.with_header(text, header)
            if (self.folder / file).read_text() != text:
                (self.folder / file).write_text(text)
            self.compiled |= numbers

    def compile_all(self) -> str:
        done = self.run("cmake", "--build", self.build_folder, "--parallel", 1, "--", "-k", "0")
        errors = done.stdout if done.returncode else ""
        for name in sorted(path.name for path in (self.folder / "csrc/engine").glob("cuda*.cu")):
            if any(file.startswith("csrc/engine/cuda") for file in self.sources):
                shim = ["-Itests/cuda_host", "-Itests/cuda_host/shim", "-include", "cuda_shim.h", "-x", "c++"]
                options = ["-std=gnu++17", "-fsyntax-only", "-w", "-Icsrc", "-Icsrc/include", *shim]
                errors += self.run("g++", *options, f"csrc/engine/{name}").stderr
        if not errors:
            library = next(self.build_folder.glob("libsteepest.*"))
            shutil.copy(library, self.folder / "pyext/lib" / library.name)
        return errors

    # --- the process ---------------------------------------------------------------------------------------------

    def place_of(self, target: Target) -> Path:
        return (self.folder / target.file).resolve()

    def serve(self, target: Target) -> Verdict:
        """Starts the process for a target; what it says about the unchanged file.  Like targets share one."""
        begin = time.perf_counter()
        python = target.file.endswith(".py")
        settings = {
            "package": str(self.folder / "package"), "root": str(self.folder), "op": target.op,
            "backends": list(target.backends), "quick": target.quick, "tests": list(target.tests),
            "without": target.without, "number_file": str(self.folder / "number"),
            "unchanged": str(self.place_of(target)) if python else None,
        }  # fmt: skip
        if self.server and settings == self.settings:
            self.serving = target
            return self.unchanged
        self.stop()
        self.settings = settings
        environment = {
            **os.environ, "PATH": self.path(), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(self.folder / "package"), "TRITON_INTERPRET": "1" if target.interpreted else "0",
        }  # fmt: skip
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "mutation_server.py"), json.dumps(settings)],
            cwd=self.folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.serving = target
        answer = self.receive()
        status = KILLED if answer["by"] else SURVIVED
        self.unchanged = Verdict(status, answer["by"], time.perf_counter() - begin)
        return self.unchanged

    def receive(self) -> dict:
        if not select.select([self.server.stdout], [], [], ANSWER_SECONDS)[0] or not (
            line := self.server.stdout.readline()
        ):
            raise RuntimeError(f"the process for {self.serving.file} does not answer; MUTANTS_DEBUG=1 shows its errors")
        return json.loads(line)

    def stop(self) -> None:
        if self.server:
            self.server.stdin.close()
            try:
                self.server.wait(30)
            except subprocess.TimeoutExpired:
                self.server.kill()
            self.server = None

    def try_switched(self, mutant: Mutant) -> Verdict | None:
        """None when the mutant has to be tried alone."""
        target, begin = self.serving, time.perf_counter()
        python = target.file.endswith(".py")
        number = self.numbers.get(mutant, 0)
        if not python and (number not in self.compiled or CONSTANT.search(mutant.before)):
            return None
        place, original = self.place_of(target), None
        try:
            if python:
                original = place.read_text()
                try:
                    compile(mutant.text, str(place), "exec")
                except SyntaxError:
                    return None
                place.write_text(mutant.text)
            print(json.dumps({"number": number, "file": str(place) if python else None}), file=self.server.stdin)
            answer = self.receive()
        finally:
            if original is not None:
                place.write_text(original)
        if answer["alone"] and (python or mutant.rule == "constant" or OF_THE_COMPILER.search(mutant.before)):
            return None
        status = KILLED if answer["by"] else SURVIVED
        by = answer["by"] or ("" if python or answer["executed"] else NOT_EXECUTED)
        return Verdict(status, by, time.perf_counter() - begin, answer["noticed"])
