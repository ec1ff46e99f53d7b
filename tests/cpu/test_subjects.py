"""Other libraries through our cases: what is found out about torch, that verdicts are fair, and that they can fail."""

from __future__ import annotations

import os
import re
import shlex
import signal
from functools import partial

import pytest
import torch

from steepest.conformance import records, validate
from steepest.conformance.bounds import Tracked
from steepest.conformance.cases import adamw
from steepest.conformance.memory import Guarded, finite_surroundings, threads
from steepest.conformance.noise import NoisyVerbs
from steepest.conformance.registry import Backend
from steepest.conformance.runner import FAIL, OK, UNSUPPORTED, Cell, run_cell
from steepest.conformance.subjects import LIBRARIES, Library, adamw_judge, command, isolate, ops, polar_judge
from steepest.conformance.subjects.base import refusals
from steepest.conformance.subjects.isolate import RemoteLibrary
from steepest.reference import adamw_, polar
from steepest.schedules import named

STRIDES = {"layout gaps", "layout: grad transposed", "layout: all different", "layout: param view with gaps"}
MUON_CASES = r"polar, keller/(gaussian|exponential|rank deficient|tiny), 48 x 48$"


@pytest.fixture(autouse=True)
def _one_thread():
    with threads(1):
        yield


@pytest.fixture(scope="module")
def torch_process():
    """One process for all tests: a new one takes 4 s, most of it torch.optim's import of the compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        remote = RemoteLibrary("torch")
    yield remote
    remote.close()


@pytest.fixture
def shared_process(torch_process, monkeypatch):
    monkeypatch.setattr(command, "RemoteLibrary", lambda name: torch_process)
    monkeypatch.setattr(torch_process, "close", lambda: None)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = validate.main(list(arguments))
    return status, *capsys.readouterr()


# --- what is found out about torch ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shared_process")
def test_torch_fused_adamw_is_found_wrong_for_mismatched_strides(capsys, tmp_path):
    file = tmp_path / "report.json"
    status, out, _ = run(capsys, "--subject", "torch", "--op", "adamw/layout", "--json", str(file))
    assert status == 0  # nothing of ours fails
    written = records.read(file)
    results = records.unpack(written)
    assert {r.status for r in results if r.backend in ("cpu", "torch for-loop", "torch foreach")} == {OK}
    fused = [r for r in results if r.backend == "torch fused"]
    assert {r.case for r in fused if r.status == FAIL} == STRIDES
    assert {r.dtype for r in fused if r.status == FAIL} == {"float32", "bfloat16", "float16"}
    gaps = next(r for r in fused if (r.case, r.dtype) == ("layout: param view with gaps", "float32"))
    figures = {f.name: f for f in gaps.figures}
    assert figures["guards"].value > 100  # elements between the parameter's own were overwritten
    assert not figures["params error/bound"].ok
    assert written["subjects"]["torch"]["version"] == torch.__version__
    assert "findings about torch: none" not in out and "guards" in out

    line = next(line.strip() for line in out.splitlines() if "--op '^adamw/layout: grad transposed$'" in line)
    words = shlex.split(line)
    assert words[:4] == ["python", "-m", "steepest", "validate"]
    status, again, _ = run(capsys, *words[4:])
    assert status == 0 and "torch fused · adamw · layout: grad transposed · float32" in again


def test_torch_for_loop_passes_every_case_that_it_supports():
    column = next(s for s in LIBRARIES["torch"].implementations() if s.name == "torch for-loop")
    op = ops.ops_of([column])["adamw"]
    results = [run_cell(Cell(op, column, dtype, case)) for case in op.cases if case.quick for dtype in case.dtypes]
    assert [f"{r.dtype} {r.case}: {r.reason}" for r in results if r.status not in (OK, UNSUPPORTED)] == []
    assert {(r.case, r.reason) for r in results if r.status == UNSUPPORTED} == {
        *((case, "no grad_scale and found_inf in the step") for case in ("grad_scale", "found_inf 0", "found_inf 1")),
        ("float32 states", "keeps states in bfloat16"),
        ("float32 states", "keeps states in float16"),
        ("float32 grads and states", "gradients have their parameter's dtype"),
        ("bfloat16 grads", "gradients have their parameter's dtype"),
    }


@pytest.mark.usefixtures("shared_process")
def test_muon_error_in_bfloat16_is_reported_beside_ours(capsys, tmp_path):
    file = tmp_path / "report.json"
    status, out, _ = run(capsys, "--subject", "torch", "--op", MUON_CASES, "--json", str(file))
    assert status == 0
    results = records.unpack(records.read(file))
    rounding = {
        (r.backend, r.case): next(f.value for f in r.figures if f.name == "rounding") for r in results if r.status == OK
    }
    for case in ("gaussian, 48 x 48", "exponential, 48 x 48", "rank deficient, 48 x 48"):
        assert rounding["torch Muon", case] > 1000 * rounding["cpu", case]
        assert rounding["torch Muon", case] > 2**-8  # bfloat16
    row = next(line for line in out.splitlines() if re.match(r"float32\W+rounding", line))
    ours, muon, plain = (float(text) for text in re.findall(r"(\S+) \(", row))
    assert muon > 1000 * ours and plain == muon
    tiny = next(r for r in results if (r.backend, r.case) == ("torch Muon", "tiny, 48 x 48"))
    assert tiny.status == FAIL and "method" in tiny.reason  # its eps of 1e-7 swallows the matrix


@pytest.mark.usefixtures("shared_process")
def test_muon_without_nesterov_overwrites_its_momentum_in_bfloat16(capsys):
    status, out, _ = run(capsys, "--subject", "torch", "--op", "polar, keller/33 x 65", "--dtype", "bfloat16")
    assert status == 0
    assert "torch Muon, nesterov=False · polar, keller · 33 x 65 · bfloat16\n      momentum kept 2145 > 0" in out


# --- the command ------------------------------------------------------------------------------------------------------


def test_unknown_and_uninstalled_subjects(capsys, monkeypatch):
    status, _, err = run(capsys, "--subject", "tensorflow")
    assert status == 2 and "'tensorflow' is unknown; known: torch, pytorch-optimizer, heavyball" in err
    absent = Library("heavyball", "heavyball_adapter", "no_such_module", "heavyball", "heavyball", "")
    monkeypatch.setitem(LIBRARIES, "heavyball", absent)
    status, _, err = run(capsys, "--subject", "heavyball")
    assert status == 2 and "heavyball is not installed: pip install heavyball" in err
    status, out, _ = run(capsys, "--list-subjects")
    assert status == 0 and "pip install heavyball" in out and torch.__version__ in out
    libraries, missing = command.resolve(["all"])
    assert "heavyball" not in [library.name for library in libraries]
    assert "heavyball is not installed: pip install heavyball" in missing
    assert run(capsys, "--subject", "torch", "--op", "(")[0] == 2
    assert run(capsys, "--subject", "torch", "--op", "no such case")[0] == 2


@pytest.mark.usefixtures("shared_process")
def test_a_fail_of_ours_is_the_exit_status(capsys, monkeypatch):
    def wrong(*args, **kwargs):
        adamw_(*args, **{**kwargs, "lr": kwargs["lr"] * 1.01})

    monkeypatch.setattr(ops, "ours", lambda op: [Backend("cpu", wrong)])
    status, out, _ = run(capsys, "--subject", "torch", "--op", "adamw/one step", "--dtype", "float32")
    assert status == 1 and "FAIL  adamw · cpu · float32 · one step" in out and "findings about torch: none" in out


@pytest.mark.usefixtures("shared_process")
def test_markdown_has_a_command_beside_every_row_and_finding(capsys):
    status, out, _ = run(capsys, "--subject", "torch", "--op", "adamw/layout: grad", "--dtype", "float32", "--markdown")
    assert status == 0 and out.startswith(f"## torch {torch.__version__}")
    row = next(line for line in out.splitlines() if line.startswith("| adamw | float32"))
    assert "`python -m steepest validate --subject torch --op '^adamw/' --dtype float32`" in row
    finding = out[out.index("- **torch fused · adamw · layout: grad transposed · float32**") :]
    assert "`python -m steepest validate --subject torch --op '^adamw/layout: grad transposed$'" in finding


def test_a_subject_that_dies_costs_one_cell(torch_process):
    remote = torch_process
    op = ops.ops_of(remote.subjects)["adamw"]
    cell = Cell(op, next(s for s in remote.subjects if s.name == "torch for-loop"), "float32", op.cases[0])
    assert remote.run(cell, 0).status == OK
    remote.process.kill()
    died = remote.run(cell, 0)
    assert died.status == FAIL and "signal 9" in died.reason
    assert remote.run(cell, 0).status == OK


BITSANDBYTES = """
import os, signal, sys
import torch

class AdamW(torch.optim.Optimizer):
    def __init__(self, parameters, lr, betas, eps, weight_decay, amsgrad):
        super().__init__(parameters, {})
        os.write(1, b"compiling something ...\\n")  # as a C library prints
        if eps == 0.1:
            os.kill(os.getpid(), signal.SIGSEGV)

    def step(self):
        pass

optim = type(sys)("optim")
optim.AdamW = AdamW
"""


def test_all_subjects_go_on_after_one_crashes(capsys, monkeypatch, tmp_path, shared_process, torch_process):
    (tmp_path / "bitsandbytes.py").write_text(BITSANDBYTES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(
        command, "RemoteLibrary", lambda name: torch_process if name == "torch" else RemoteLibrary(name)
    )
    for name in LIBRARIES.keys() - {"torch", "bitsandbytes"}:
        monkeypatch.setitem(LIBRARIES, name, Library(name, "", "no_such_module", name, name, ""))
    file, html = tmp_path / "report.json", tmp_path / "report.html"
    status, out, err = run(
        capsys, "--subject", "all", "--op", "adamw/(eps 0.1|one step)$", "--dtype", "float32", "--markdown",
        "--json", str(file), "--html", str(html),
    )  # fmt: skip
    assert status == 0
    results = {(r.backend, r.case): r for r in records.unpack(records.read(file))}
    assert results["bitsandbytes AdamW", "eps 0.1"].reason.startswith("its process ended with signal 11")
    after = results["bitsandbytes AdamW", "one step"]  # of a new process
    assert after.status == FAIL and "params error/bound" in after.reason
    assert {r.status for r in results.values() if r.backend in ("cpu", "torch for-loop")} == {OK}
    assert "## torch" in out and "## bitsandbytes" in out and "signal 11" in out
    assert "not run: heavyball is not installed: pip install heavyball" in err
    assert "bitsandbytes AdamW" in html.read_text() and "signal 11" in html.read_text()


def test_a_subject_that_hangs_and_cannot_start_again_fails_what_is_left(torch_process, monkeypatch):
    op = ops.ops_of(torch_process.subjects)["adamw"]
    cell = Cell(op, torch_process.subjects[0], "float32", op.cases[0])

    def unusable(self):
        raise isolate.LibraryUnusable("torch: no longer there")

    with monkeypatch.context() as patch:
        patch.setattr(RemoteLibrary, "_start", unusable)
        patch.setattr(isolate, "SECONDS", 0.3)
        torch_process.process.send_signal(signal.SIGSTOP)
        assert "gave no answer within 0.3 s" in torch_process.run(cell, 0).reason
        again = torch_process.run(cell, 0)
        assert again.status == FAIL and "did not start again after a crash: torch: no longer there" in again.reason
    torch_process.lost = ""
    torch_process._start()


# --- fairness ---------------------------------------------------------------------------------------------------------


def test_an_exception_is_a_refusal_only_while_nothing_changed():
    x = torch.zeros(3)
    with pytest.raises(NotImplementedError, match="raises ValueError: no"), refusals([x]):
        raise ValueError("no\nmore lines")
    with pytest.raises(RuntimeError, match="changed its arguments, then raised ValueError"), refusals([x]):
        x[1] = 1
        raise ValueError("too late")


RULES = {
    "late_correction": adamw_judge.late_correction,
    "corrected_moments, lerp": adamw_judge.corrected_moments(adamw_judge.lerp),
    "corrected_moments, sum": adamw_judge.corrected_moments(adamw_judge.weighted_sum),
    "corrected_states": adamw_judge.corrected_states,
}


@pytest.mark.parametrize("beta1", [0.3, 0.9])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_adamw(name, beta1):
    hyper = dict(lr=0.01, betas=(beta1, 0.95), eps=1e-3, weight_decay=0.1)
    values = [torch.randn(50, dtype=torch.float64) for _ in range(4)]
    if name == "corrected_states":
        values[2:] = [torch.zeros(50, dtype=torch.float64)] * 2  # means something else there, except for zero
    p, g, m, v = (x.clone() for x in (values[0], values[1], values[2], values[3].square()))
    states = [Tracked.exact(x.clone(), torch.float64) for x in (p, g, m, v)]  # `adamw_` writes into p, m and v
    for step in (1, 2, 3):
        adamw_([p], [g], [m], [v], **hyper, step=step)
        new = RULES[name](*states, None, partial(Tracked.constant, dtype=torch.float64), **hyper, step=step)
        states = [new[0], states[1], *new[1:3]]
    torch.testing.assert_close(states[0].value, p, rtol=1e-12, atol=1e-14)
    if name != "corrected_states":
        torch.testing.assert_close(states[2].value, m, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(states[3].value, v, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("algorithm", ["newton_schulz", "horner", "gram_newton_schulz"])
def test_every_polar_algorithm_is_the_polynomial(algorithm):
    x, schedule = torch.randn(6, 11, dtype=torch.float64), named("keller", 5)
    y = getattr(polar_judge, algorithm)(x / x.norm() / (1 + 2**-10), NoisyVerbs(torch.float64, None), schedule)
    torch.testing.assert_close(y, polar(x, schedule=schedule), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "broken, failing",
    [
        (lambda y: y, set()),
        (lambda y: -y, {"rounding", "negative part", "dual gap"}),
        (lambda y: y * 1.5, {"rounding"}),
        (lambda y: y.flip(0), {"rounding", "asymmetry"}),
        (lambda y: y * 0, {"rounding", "method"}),
    ],
    ids=["right", "negated", "scaled", "permuted", "zero"],
)
def test_a_wrong_polar_factor_fails_even_with_a_bfloat16_bound(broken, failing):
    torch.manual_seed(1)
    x, schedule = torch.randn(20, 30), named("keller", 5)
    how = polar_judge.Arithmetic(torch.bfloat16, polar_judge.newton_schulz, norm_dtype=torch.bfloat16)
    start = (x.bfloat16() / x.bfloat16().norm())[None]
    y = start
    for a, b, c in schedule.coefficients:
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    measured = polar_judge.measure(x, broken(y[0].float()), schedule, how)
    found = {f.name for f in measured.figures if not f.ok}
    assert failing <= found if failing else not found


def test_a_bound_for_16_bit_steps_still_finds_a_wrong_step():
    column = next(s for s in LIBRARIES["torch"].implementations() if s.name == "torch for-loop")
    case = next(c for c in adamw.CASES if c.id == "one step")
    problem = adamw.build(case, torch.bfloat16, 0)
    outputs = adamw.run(lambda *args, **kwargs: column.function(*args, **{**kwargs, "lr": 0.1}), problem)
    assert any(not f.ok for f in adamw_judge.judge(problem, outputs, column))


@pytest.mark.parametrize("dtype, excused", [(torch.float32, False), (torch.float16, True)])
def test_nan_for_infinity_is_excused_only_by_its_own_arithmetic(dtype, excused):
    column = next(s for s in LIBRARIES["torch"].implementations() if s.name == "torch for-loop")
    case = adamw.AdamWCase("", shapes=((4,),), layouts=("contiguous",))
    problem = adamw.build(case, dtype, 0)
    for role, value in (("params", torch.inf), ("grads", 1e-5), ("exp_avgs", 0.1), ("exp_avg_sqs", 0.0)):
        problem.tensors[role][0].fill_(value)
        problem.expected["start"][role][0].fill_(value)
    outputs = adamw.run(column.function, problem)
    assert bool(outputs["params[0]"].isnan().all()) == excused  # float16: eps = 1e-8 is 0, so 0.1 / 0
    outputs["params[0]"] = torch.full((4,), torch.nan, dtype=dtype)
    wrong = {f.name: f.value for f in adamw_judge.judge(problem, outputs, column) if not f.ok}
    assert wrong == ({} if excused else {"params non-finite": 4})


def test_an_update_in_place_that_reaches_too_far_is_seen():
    with finite_surroundings():  # amid NaN it is not: on most processors NaN times 0.9 is the same NaN
        guarded = Guarded(torch.ones(10))
    guarded.buffer.view(torch.float32).mul_(0.9)
    assert guarded.overwritten() == 128


# --- the other libraries, where they are installed --------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LIBRARIES if name != "torch"])
def test_other_libraries_run(name, capsys, tmp_path):
    if missing := LIBRARIES[name].missing():
        pytest.skip(missing)
    file = tmp_path / "report.json"
    pattern = r"adamw/(first step|float32 states)|polar.*/33 x 65"
    status, out, _ = run(capsys, "--subject", name, "--op", pattern, "--json", str(file))
    assert status == 0 and f"{name} {LIBRARIES[name].version}" in out
    columns = records.read(file)["subjects"][name]["columns"]
    results = records.unpack(records.read(file))
    ran = {r.backend for r in results if r.backend in columns and r.status in (OK, FAIL) and r.figures}
    assert ran == set(columns)  # an adapter that breaks would only be refused or raise
