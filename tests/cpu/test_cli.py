"""python -m steepest, as a stranger meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import steepest.__main__ as command_line
from steepest.conformance import Figure, records, validate
from steepest.conformance.backends import interpreting
from steepest.explain import explain
from steepest.info import info


def steepest_command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "steepest", *arguments], capture_output=True, text=True, timeout=300, **options
    )


def test_help_names_every_command():
    done = steepest_command("--help")
    assert done.returncode == 0
    for name in ("info", "validate", "explain", "bench", "demo", "cmake-dir"):
        assert name in done.stdout


def test_an_unknown_command_is_named_and_help_follows(capsys):
    assert command_line.main(["vaildate"]) == 2
    error = capsys.readouterr().err
    assert "'vaildate' is not a command" in error and "validate" in error


@pytest.mark.parametrize("name", command_line.COMMANDS)
def test_every_command_exists_and_has_help(name, capsys):
    module, function = command_line.COMMANDS[name][0].split(":")
    assert callable(getattr(import_module(module), function))
    try:
        status = command_line.main([name, "--help"])
    except SystemExit as end:
        status = end.code
    assert status == 0 and name in capsys.readouterr().out


def test_info_says_what_is_installed():
    found = info()
    assert found["torch"] == torch.__version__
    assert found["cpu"]["torch_threads"] == torch.get_num_threads()
    assert found["native"]["abi"] >= 1
    json.dumps(found)
    done = steepest_command("info", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["steepest"] == found["steepest"]


def test_info_reports_what_is_missing_instead_of_raising(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "steepest._C", None)
    monkeypatch.delattr("steepest._C", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: 1 / 0)
    found = info()
    assert found["triton"].startswith("unavailable: ") and found["native"].startswith("unavailable: ")
    assert found["cuda"] == "unavailable: ZeroDivisionError: division by zero"


def test_cmake_dir_holds_the_package():
    done = steepest_command("cmake-dir")
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "steepest-config.cmake").is_file()


def test_bench_without_a_checkout_says_where_the_benchmarks_are(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["steepest.info"], "checkout", lambda: None)  # steepest.info is the function
    assert command_line.main(["bench"]) == 2
    assert "source tree" in capsys.readouterr().err


# --- validate ---------------------------------------------------------------------------------------------------------

ONE = ("--op", "adamw/one step", "--dtype", "bfloat16", "--backend", "cpu")


def test_validate_writes_a_table_and_a_report(tmp_path, capsys):
    file = tmp_path / "report.json"
    assert validate.main([*ONE, "--backend", "reference", "--json", str(file), "--cases", "--seed", "5"]) == 0
    table = capsys.readouterr().out
    assert "one step" in table and "same bits" in table and "2 ok, 0 FAIL" in table
    report = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert report["schema"] == 2 and report["kind"] == "steepest-validate" and report["seed"] == 5
    assert report["info"]["torch"] == torch.__version__ and report["totals"] == {"ok": 2}
    assert report["cases"]["adamw"]["one step"]["lr"] == 1e-3
    result = records.unpack(records.read(file))[-1]
    assert (result.op, result.backend, result.dtype, result.status) == ("adamw", "cpu", "bfloat16", "ok")
    figures = {figure.name: figure for figure in result.figures}
    assert 0 < figures["params error/bound"].value <= 1
    assert figures["bits"] == Figure("bits", 0, 0, "elements", "against the reference")


def test_validate_prints_the_report_alone_to_stdout(capsys):
    assert validate.main([*ONE, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["totals"] == {"ok": 1}


def test_validate_works_without_rich(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert validate.main(list(ONE)) == 0
    assert "adamw  bfloat16  ok (" in capsys.readouterr().out


@pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET=1 is set, so no worker process is needed")
def test_interpreted_triton_runs_in_a_process_of_its_own(capsys):
    pytest.importorskip("triton")
    arguments = [
        "--op",
        "adamw/(one step|tails)",
        "--dtype",
        "float32",
        "--backend",
        "triton-interpreted",
        "--json",
        "-",
    ]
    assert validate.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["totals"] == {"ok": 2} and [r.case for r in records.unpack(report)] == ["one step", "tails"]


@pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET=1 is set, so no worker process is needed")
def test_a_worker_that_dies_fails_its_cells(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert validate.main(["--op", "adamw/one step", "--dtype", "float32", "--backend", "triton-interpreted"]) == 1
    assert "worker process ended with status 1" in capsys.readouterr().out


def test_validate_explains_wrong_arguments(capsys):
    assert validate.main(["--op", "no such op"]) == 2
    assert "--list names them all" in capsys.readouterr().err
    assert validate.main(["--op", "("]) == 2
    assert "not a regular expression" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        validate.main(["--backend", "tpu"])
    assert end.value.code == 2 and "invalid choice" in capsys.readouterr().err


def test_validate_lists_without_running(capsys):
    assert validate.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert "adamw" in out and "special values, amsgrad" in out and "running error analysis" in out


# --- explain ----------------------------------------------------------------------------------------------------------


def test_explain_adamw_counts_what_the_call_will_do():
    params = [torch.zeros(10, 20), torch.zeros(7, dtype=torch.bfloat16), torch.zeros(8, 6)[:, ::2]]
    facts = explain("adamw_", params).facts
    assert facts["backend"] == "cpu (parameters are on cpu)"
    assert facts["tensors"] == "3, 231 elements, on cpu"
    assert facts["layout"].startswith("2 rows worked on in place, 1 copied in and out")
    assert facts["bytes"].startswith(f"{28 * 224 + 14 * 7:,} in all")
    assert "float32" in facts["dtypes"] and "bfloat16" in facts["dtypes"]
    assert "adamw_" in str(explain(__import__("steepest").adamw_, params))


def test_explain_polar_shows_plan_and_certificate():
    from steepest.matrix.polar import plan

    x = torch.zeros(64, 512)
    facts = explain("polar", x, steps=6).facts
    todo = plan(x.shape, steps=6)
    assert facts["form"].startswith("gram: ") and facts["flops"] == f"{todo.flops:,}"
    assert f"<= {todo.schedule.error:.3g} for singular values" in facts["certificate"]
    assert facts["schedule"].startswith("polar-express, 6 steps") and len(facts["schedule"].splitlines()) == 7


@pytest.mark.parametrize("op", ["polar", "inverse_root"])
def test_explain_says_whose_products_are_taken(op):
    for backend, text in (("native", "the C library"), ("torch", "torch's products")):
        assert text in explain(op, torch.eye(16), backend=backend).facts["launches"]


def test_explain_draws_the_map_of_singular_values():
    from steepest.schedules import named

    facts = explain("polar", torch.zeros(8, 8), schedule="keller", norm="schatten4").facts
    assert facts["norm"].startswith("schatten4: ")
    points, values, *plot, axis = facts["map"].splitlines()
    s, f = (list(map(float, line.split()[1:])) for line in (points, values))
    assert s[0] == 1e-5 and s[-1] == 1.0
    assert f == pytest.approx([named("keller").apply(one**2) for one in s], abs=6e-4)
    # One mark in every column, except where f is above 1.4 or below 0.
    marks = [line[6:].ljust(65) for line in plot]
    assert all(sum(line[k] == "*" for line in marks) == 1 for k in range(65))
    assert axis.split() == ["1e-5", "1e-4", "1e-3", "1e-2", "0.1", "1"]


def test_explain_on_the_command_line(capsys):
    assert command_line.main(["explain", "polar", "48x48", "--tol", "1e-3"]) == 0
    assert "plain: " in capsys.readouterr().out
    assert command_line.main(["explain", "adamw_", "5x4", "7", "--dtype", "float16"]) == 0
    assert "2, 27 elements" in capsys.readouterr().out
    assert command_line.main(["explain", "polar", "48x48", "--schedule", "best"]) == 2
    assert "unknown schedule 'best'" in capsys.readouterr().err
    assert command_line.main(["explain", "polar", "48"]) == 2
    assert "at least 2 dimensions" in capsys.readouterr().err


def test_explain_refuses_what_the_op_refuses():
    with pytest.raises(ValueError, match=r"adamw_: grads\[0\] has shape \(4, 5\), params\[0\] has \(5, 4\)"):
        explain("adamw_", [torch.zeros(5, 4)], [torch.zeros(4, 5)])
    with pytest.raises(ValueError, match="explain: op is 'adam', expected one of adamw_"):
        explain("adam")
