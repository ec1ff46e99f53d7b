"""The mutation runner: its rules, its lists, and a sample of what it finds.  All mutants: `make mutants`."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import shutil
import struct
import subprocess
from types import SimpleNamespace

import pytest
from equivalents_kernels import pattern_reason
from mutation_equivalents import EQUIVALENT
from mutation_record import Record
from mutation_rules import cpp_code, edits, mutants, other_number, python_code
from mutation_switches import HEADER, lines_to_blame, switched, with_header
from mutation_targets import BACKENDS, EXEMPT, LISTED, ROOT, TARGETS, Target
from mutation_workspace import KILLED, SURVIVED, Verdict
from run import VERDICTS, choose, run


def changes(line: str, file: str = "x.h") -> set[str]:
    return {line[:begin] + new + line[end:] for _, begin, end, new in edits(line, line, file)}


def test_every_small_change_of_a_line_is_tried():
    assert changes("  p = p + (a * m) / d;") == {
        "  p = p - (a * m) / d;",
        "  p = p + (a / m) / d;",
        "  p = p + (a * m) * d;",
        "  p = p + (a * (1.0 * m)) / d;",
        "  p = p + (a * m) / (1.0 * d);",
        "  ;",
    }
    assert changes("  if (x < 0.5f) y = -x;") == {
        "  if (x >= 0.5f) y = -x;",
        "  if (x <= 0.5f) y = -x;",
        "  if (x < 1.5f) y = -x;",
        "  if (x < 0.5f) y = x;",
        "  ;",
    }
    assert changes("    m = g - s.rest", "x.py") == {"    m = g + s.rest", "    m = g"}
    assert "    s.a = static_cast<float>(1.0 - static_cast<float>(h.b));" in changes(
        "    s.a = static_cast<float>(1.0 - h.b);"
    )


def test_numbers_change():
    assert [other_number(x) for x in ("0", "7", "0x7fff", "0.5", "1e-3", "0.0")] == [
        "1", "8", "0x8000", "1.5", "0.003", "0.5",
    ]  # fmt: skip


def test_comments_strings_checks_and_device_code_are_left_alone():
    source = "\n".join(
        (
            "a = 1 + b;  // a + b",
            "#if defined(__CUDA_ARCH__)",
            "x = 1 + 2;",
            "#else",
            'y = 3 + "4 + 5";',
            "#endif",
            "#define Z 1 + 1",
        )
    )
    code = cpp_code(source)
    assert [line.split() for line in code.split("\n") if line.strip()] == [
        ["a", "=", "1", "+", "b;"],
        ["y", "=", "3", "+", ";"],
    ]
    source = "\n".join(
        (
            "def f(a=1 + 2):",
            '    """1 + 1"""',
            "    if a < 0:",
            '        raise ValueError(f"{a + 1}")',
            "    b: int | None = a",
            "    return a - 1  # a - 2",
        )
    )
    assert [line.split() for line in python_code(source, ["f"]).split("\n") if line.strip()] == [
        ["b:", "=", "a"],
        ["return", "a", "-", "1"],
    ]
    assert python_code(source, ["g"]).strip() == ""
    assert {m.text.count("\n") for m in mutants("x.py", source, None, "")} == {source.count("\n")}


SWITCHABLE = """#include <cmath>
// a comment
static float z_sink;
#define TWICE(x) ((x) + (x))
static int half(int x) {
  x += 4;
  if (x > 100 && x != 102) x = 100;
  return -x / 2 - 3;
}
static float mix(float x, float y) {
  const float z = (x * y) / 3.0f + y;
  struct { double a; } h{x / 7.0};
  z_sink = z;
  return static_cast<float>(h.a * h.a) - sqrtf(z * z) / y;
}
extern "C" double f(double a, int k) {
  double sum = 0.5 + a * 3.0f;
  for (int i = 0; i < k; ++i) sum = sum - (a / 7 + (k & 6) + (i << 1));
  if (a < 1.0)
    sum *= 2;
  else
    sum -= half(k);
  sum += mix(k + 0.1f, a + 1.0f);
  return TWICE(sum) + (sum >= 4.0 ? -sum : sum - a);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_switch_does_what_its_mutant_does(tmp_path):
    """All mutants of a small file, compiled together and one by one."""

    def library(name: str, text: str) -> ctypes.CDLL:
        (tmp_path / f"{name}.cpp").write_text(text)
        command = ["g++", "-std=gnu++17", "-O0", "-w", "-shared", "-fPIC", "-ffp-contract=off"]
        subprocess.run([*command, tmp_path / f"{name}.cpp", "-o", tmp_path / f"{name}.so"], check=True)
        loaded = ctypes.CDLL(str(tmp_path / f"{name}.so"))
        loaded.f.restype, loaded.f.argtypes = ctypes.c_double, (ctypes.c_double, ctypes.c_int)
        return loaded

    def values(loaded: ctypes.CDLL) -> list[float]:
        return [loaded.f(a, k) for a in (-3.0, 0.25, 1.0, 2.5) for k in (0, 1, 5, 98, 97, 300)]

    work = list(enumerate(mutants("x.cpp", SWITCHABLE, None, ""), 1))
    number, header = tmp_path / "number", tmp_path / "switches.h"
    number.write_bytes(bytes(mmap.PAGESIZE))
    header.write_text(f'#define STEEPEST_MUTANT_FILE "{number}"\n' + HEADER.read_text())
    text, numbers = switched(SWITCHABLE, work, ())
    left_out = [mutant.rule for k, mutant in work if k not in numbers]
    assert len(numbers) >= 50 and left_out in ([], ["rounding"])  # of what is no assignment
    assert {"rounding"} <= {mutant.rule for _, mutant in work}
    together, unchanged = library("together", with_header(text, header)), values(library("unchanged", SWITCHABLE))
    assert values(together) == unchanged
    differing = 0
    for k, mutant in work:
        some = mutant.line % 3 == 0 or mutant.rule == "rounding"  # each is compiled
        if some and "for" not in mutant.before:  # which might never end
            number.write_bytes(struct.pack("ii", k, 0) + bytes(mmap.PAGESIZE - 8))
            got = values(together)
            assert struct.unpack("ii", number.read_bytes()[:8]) == (k, 1), "executed"
            assert got == values(library(f"mutant{k}", mutant.text)), mutant.id
            differing += got != unchanged
    assert differing >= 10


def test_what_does_not_compile_with_switches_is_found():
    errors = """csrc/a.h: In instantiation of 'f':
csrc/b.cpp:12:7:   required from 'g'
csrc/b.cpp:40:7:   required from here
switches.h:30:5: error: no match
csrc/a.h:7:3: error: expected"""
    assert lines_to_blame(errors, ["csrc/a.h", "csrc/b.cpp"]) == {("csrc/b.cpp", 12), ("csrc/a.h", 7)}
    source = " a = b + c;\n d = e + f;\n"
    work = list(enumerate(mutants("x.h", source, None, ""), 1))
    text, numbers = switched(source, work, {1})
    assert numbers == {k for k, mutant in work if mutant.line == 2} != set() and "a = b + c;\n" in text


def test_no_rule_or_kernel_is_left_out():
    targets = {target.file for target in TARGETS}
    for folder, exempt in EXEMPT.items():
        files = {path.name for path in (ROOT / folder).iterdir() if path.suffix in (".h", ".cpp", ".cu", ".inc", ".py")}
        assert set(exempt) <= files, f"EXEMPT names files that {folder} does not have"
        assert not {name for name in files - set(exempt) if f"{folder}/{name}" not in targets}
    assert set(EXEMPT) == set(BACKENDS)
    assert {file for file in targets if not (ROOT / file).exists()} == set()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.file)
def test_targets_match_the_sources(target):
    found = list(target.mutants())
    assert len(found) >= 3 or target not in LISTED
    texts = {text for mutant in found for text in (mutant.after, f"{mutant.before} => {mutant.after}")}
    explained = {line for lines in EQUIVALENT.get(target.file, {}).values() for line in lines}
    assert explained <= texts, "explained as equivalent, but no longer a mutant"
    for test in target.tests:
        assert (ROOT / test).exists()


def test_update_rules_must_be_noticed_by_validate_alone():
    rules = [target for target in TARGETS if target.file.startswith("csrc/formula/")]
    shared = ("number", "options", "perturb", "power", "random", "storage", "survey")  # what every rule uses
    numbers = {f"csrc/formula/{name}.h" for name in shared}
    assert {target.file for target in rules if target.tests} == numbers
    assert set(EQUIVALENT) <= {target.file for target in TARGETS}
    for target in TARGETS:
        found = list(target.mutants())
        # Hints to Triton's compiler, which compute nothing, apart.
        excused = [m for m in found if target.reason(m) and not pattern_reason(m.file, m.before, m.after)]
        assert len(excused) <= 0.2 * len(found)


def test_a_record_keeps_what_was_killed_until_something_changes(tmp_path, monkeypatch):
    target, path = Target("csrc/formula/number.h", "", ()), str(tmp_path / "record.jsonl")
    test, (a, b, c, d, *_) = "tests/formula/test_formulas.py", target.mutants()
    record = Record(path, [target])
    record.put(a, Verdict(KILLED, "a cell", 0.5, "a cell"))
    record.put(b, Verdict(SURVIVED))
    record.put(c, Verdict(KILLED, "assert", 0.5, f"{test}::test_it"))
    record.save()
    again = Record(path, [target])
    assert [again.get(m) and again.get(m).status for m in (a, b, c, d)] == [KILLED, None, KILLED, None]
    assert again.get(c).noticed == test and again.get(b, for_people=True).status == SURVIVED
    # A test changes: what it noticed is to be tried again, and only that.
    row = again.rows[target.file]
    row.judges[test] = "another"
    assert again.get(a) and again.get(c) is None and again.get(c, for_people=True)
    again.put(d, Verdict(KILLED, "assert", 0.5, f"{test}::test_it"))
    assert again.get(d) and again.get(a) and again.get(c, for_people=True) is None
    # The source changes.
    monkeypatch.setattr("mutation_record.digest_of", lambda place: "another")
    assert not any(Record(path, [target]).get(m, for_people=True) for m in (a, b, c))
    nothing = Record(None, [target])
    nothing.put(a, Verdict(KILLED))
    nothing.save()
    assert Record(None, [target]).get(a) is None


def test_a_record_keeps_what_another_run_has_written(tmp_path):
    one, two = Target("csrc/formula/number.h", "", ()), Target("csrc/formula/lion.h", "", ())
    path, records = str(tmp_path / "record.jsonl"), []
    for target in (one, two):
        records.append(Record(path, [one, two]))
        records[-1].put(next(target.mutants()), Verdict(KILLED))
    for record in records:
        record.save()
    both = Record(path, [one, two])
    assert both.get(next(one.mutants())) and both.get(next(two.mutants()))


def test_no_mutant_survives_on_record():
    record = Record(str(VERDICTS), TARGETS)
    verdicts = {mutant.id: record.get(mutant, for_people=True) for _, mutant in choose()}
    assert len(verdicts) >= 6000 and any(verdicts.values())
    assert [name for name, verdict in verdicts.items() if verdict and verdict.status == SURVIVED] == []


def test_no_mutant_begins_when_time_is_up(monkeypatch):
    monkeypatch.setattr("run.Judge", lambda *_: SimpleNamespace(switched=SimpleNamespace(configure=int, stop=int)))
    monkeypatch.setattr("run.prepare_process_server", lambda: None)
    assert list(run(choose(sample=3), jobs=1, until=0.0)) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.skipif(importlib.util.find_spec("steepest._C") is None, reason="the package is not built")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_sample_is_killed(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # `run` sets it; the tests that follow get the old value back
    samples = {"csrc/formula/adam": 2, "kernels/adamw": 1, "reference/adamw": 1}
    work = [item for only, count in samples.items() for item in choose(only, count, seed=1)]
    verdicts = {mutant.id: verdict for _, mutant, verdict in run(work, jobs=1)}
    assert len(verdicts) == sum(samples.values())
    assert {name: verdict for name, verdict in verdicts.items() if verdict.status != KILLED} == {}
