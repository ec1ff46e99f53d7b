"""The benchmark suite: runs end to end, its clock, its comparisons, plots and inventories."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import clock
import compare
import plot
import problems
import pytest
import racing
import table
import torch

import steepest
from steepest.planning import inventories
from steepest.schedules import Schedule, named

ROOT = Path(__file__).parents[2]

TINY = "bench_adamw[cpu-2000x16 or 1x1K or bench_polar[cpu-128x128"


def run(*command, **environment) -> subprocess.CompletedProcess:
    # pytest-benchmark does not measure in a process that calls itself a worker of pytest-xdist; this is none.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**ours, **environment}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(what the command printed, pytest-benchmark's file)."""
    file = tmp_path_factory.mktemp("bench") / "tiny.json"
    options = ("--quick", "--device", "cpu", "--seconds", "0.01", "-k", TINY, "--json", file)
    done = run(sys.executable, "-m", "steepest", "bench", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, file


def test_command_prints_a_table_and_keeps_the_file(tiny):
    printed, file = tiny
    assert "adamw 2000 x 16 float32" in printed and "polar 128 x 128 float32" in printed
    assert "fastest peer" in printed and "of copy" in printed and "of matmul" in printed
    benchmarks = {b["name"]: b["extra_info"] for b in json.loads(file.read_text())["benchmarks"]}
    assert len(benchmarks) == 3
    figures = benchmarks["bench_adamw[cpu-2000x16-float32]"]
    assert figures["bytes"] == 28 * 32000 and figures["flops"] == 13 * 32000  # of the registry
    assert figures["peers"].keys() == {"torch fused", "torch foreach"} and figures["launches"] == 1
    for place in (figures, *figures["peers"].values()):
        assert place["ms"] > 0 and place["host_us"] > 0
    # foreach builds one list of float32 temporaries; ours works in place.
    assert figures["extra_bytes"] < 4 * 32000 <= figures["peers"]["torch foreach"]["extra_bytes"]
    # As rates are bytes by median: what the copy reaches follows.
    assert figures["GB_per_s"] == pytest.approx(figures["bytes"] / figures["ms"] / 1e6)
    assert figures["of_copy"] == pytest.approx(figures["GB_per_s"] / figures["copy_GB_per_s"])


def test_two_files_compare_with_pytest_benchmark_and_with_ours(tiny, tmp_path, capsys):
    _, file = tiny
    again = tmp_path / "again.json"
    suite = (
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "-q",
        "-p",
        "no:cacheprovider",
        "--scale",
        "quick",
        "--device",
        "cpu",
    )
    done = run(*suite, "--seconds", "0.01", "-k", "1x1K", f"--benchmark-compare={file}", f"--benchmark-json={again}")
    assert done.returncode == 0, done.stdout + done.stderr
    # Both runs are rows of pytest-benchmark's table; same machine, so nothing to warn of.
    assert "(NOW)" in done.stdout and done.stdout.count("bench_adamw[cpu-1x1K-float32]") >= 2
    assert "in the saved run" not in done.stdout + done.stderr
    assert compare.main([str(file), str(again)]) in (0, 1)
    assert "1 compared" in capsys.readouterr().out


def test_a_saved_result_says_the_same(tiny, tmp_path):
    _, file = tiny
    saved = table.save(file, tmp_path)
    content = table.read(saved)
    assert content["kind"] == "steepest-bench" and content["machine"]["torch"] == torch.__version__
    assert [b["name"] for b in content["benchmarks"]] == [b["name"] for b in json.loads(file.read_text())["benchmarks"]]
    assert compare.main([str(file), str(saved), "--threshold", "0"]) == 0


def test_separate_processes_make_one_file(tmp_path):
    file = tmp_path / "separate.json"
    options = (
        "--quick",
        "--device",
        "cpu",
        "--seconds",
        "0.01",
        "-k",
        "1x1K or bench_polar[cpu-128x128",
        "--json",
        file,
    )
    done = run(sys.executable, "-m", "steepest", "bench", "--separate", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "adamw 1 x 1024 float32" in done.stdout and "polar 128 x 128 float32" in done.stdout
    content = table.read(table.save(file, tmp_path))
    assert (
        len({b["name"] for b in content["benchmarks"]}) == 2 and "bench --quick --separate --json" in content["command"]
    )


@pytest.mark.parametrize("options", [(), ("--separate",)])
def test_no_match_is_said(options):
    done = run(sys.executable, "-m", "steepest", "bench", "--quick", *options, "-k", "nothing_like_it")
    assert done.returncode == 5 and "no benchmark matches -k 'nothing_like_it'" in done.stderr


# --- synthetic results ------------------------------------------------------------------------------------------------


def figures(**more) -> dict:
    return {
        "op": "adamw", "case": "1 x 8", "device": "cpu", "dtype": "float32", "ms": 1.0, "bytes": 10**6, "flops": 10**6,
        "GB_per_s": 1.0, "of_copy": 0.1, "GFLOP_per_s": 1.0, "of_matmul": 0.01, "matmul_GFLOP_per_s": 100.0,
        "peers": {"torch": {"ms": 2.0, "ratio": 2.0, "quartiles": [1.9, 2.1], "rounds_ms": [2.0] * 9}}, **more,
    }  # fmt: skip


def sweep(axis: str, fit: dict) -> dict:
    def at(x, ms):
        return {"ms": ms, "quartiles_ms": [0.9 * ms, 1.1 * ms]}

    points = [{"x": x, "runners": {"ours": at(x, 1.0 + x), "torch": at(x, 2.0 * x)}} for x in (1, 10, 100)]
    return figures(axis=axis, points=points, fit={"ours": fit, "torch": fit}, case=f"sweep of {axis}")


def content(rounds_ms: dict[str, list[float]], extra: dict | None = None) -> dict:
    machine = {"cpu": {"model": "Some CPU", "usable_cores": 2}, "torch": "2.x", "cuda": {}}
    rows = [{"name": name, "rounds_ms": times, "figures": figures()} for name, times in rounds_ms.items()]
    rows += [{"name": name, "rounds_ms": [1.0], "figures": found} for name, found in (extra or {}).items()]
    return {
        "schema": table.SCHEMA, "kind": table.KIND, "command": "none", "scale": "quick", "device": "cpu",
        "date": "2026-01-02", "commit": "0123456789ab", "machine": machine, "copy_GB_per_s": 10.0,
        "matmul_GFLOP_per_s": 100.0, "benchmarks": rows,
    }  # fmt: skip


def write(path: Path, what: dict) -> str:
    path.write_text(table.text(what))
    return str(path)


STEADY = [10.0, 10.1, 9.9, 10.2, 9.8, 10.05, 9.95, 10.15, 9.85]


@pytest.mark.parametrize(
    "after, options, status, verdict",
    [
        (STEADY, (), 0, "no difference found"),
        ([1.2 * t for t in STEADY], (), 1, "REGRESSION"),
        ([1.2 * t for t in STEADY], ("--threshold", "25"), 0, "within the threshold"),
        ([1.2 * t for t in STEADY], ("--alpha", "1e-9"), 0, "no difference found"),
        ([0.8 * t for t in STEADY], (), 0, "faster"),
        # Medians 20 % apart, but by chance: the ranges overlap throughout.
        ([5.0, 20.0, 8.0, 12.0, 12.1, 11.9, 9.0, 7.0, 13.0], (), 0, "no difference found"),
    ],
)
def test_compare_finds_regressions(tmp_path, capsys, after, options, status, verdict):
    a = write(tmp_path / "a.json", content({"x": STEADY, "only here": STEADY}))
    b = write(tmp_path / "b.json", content({"x": after}))
    assert compare.main([a, b, *options]) == status
    out = capsys.readouterr().out
    assert verdict in out and "1 compared" in out


def test_compare_relative_takes_out_a_slow_machine(tmp_path):
    slow = content({"x": [1.3 * t for t in STEADY]})
    slow["benchmarks"][0]["figures"]["peers"]["torch"]["rounds_ms"] = [2.6] * 9
    a, b = write(tmp_path / "a.json", content({"x": STEADY})), write(tmp_path / "b.json", slow)
    assert compare.main([a, b]) == 1
    assert compare.main([a, b, "--relative"]) == 0


def test_compare_refuses_what_it_cannot_compare(tmp_path, capsys):
    a = write(tmp_path / "a.json", content({"x": STEADY}))
    other = content({"x": STEADY})
    other["benchmarks"][0]["figures"]["case"] = "1 x 9"  # the same name at another size
    assert compare.main([a, write(tmp_path / "b.json", other)]) == 2
    assert "no benchmark in common" in capsys.readouterr().err
    assert compare.main([a, write(tmp_path / "c.json", {**content({}), "schema": 1})]) == 2
    assert "expected kind 'steepest-bench', schema 2" in capsys.readouterr().err


@pytest.mark.parametrize("b", [STEADY, [t + 0.13 for t in STEADY], [10.0] * 7, [9.9, 9.9, 10.0, 11.0]])
def test_mann_whitney_is_scipy_s(b):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.mannwhitneyu(STEADY, b, alternative="two-sided", method="asymptotic").pvalue
    assert compare.mann_whitney(STEADY, b) == pytest.approx(expected, rel=1e-12)


def test_plots_are_drawn_and_found_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr(table, "PLOTS", tmp_path / "plots")
    monkeypatch.setattr(table, "ROOT", tmp_path)
    folder = tmp_path / "some-cpu-2-cores"
    folder.mkdir()
    sweeps = {
        "count": sweep("tensors", {"us_per_added_tensor": 0.02}),
        "size": sweep("elements", {"ns_per_element": 1.5}),
        "n": sweep("n", {"exponent": 2.9}),
    }
    result = folder / "2026-01-02-0123456789ab.json"
    write(result, content({"x": STEADY}, sweeps))
    (folder / "2026-02-02-report.json").write_text('{"kind": "steepest-validate"}')  # of another kind, passed over
    assert [path.name for path in plot.stale()] == ["some-cpu-2-cores-roofline.svg", "some-cpu-2-cores-scaling.svg"]
    paths = plot.write()
    first = [path.read_bytes() for path in paths]
    assert "0.02 µs per tensor" in paths[1].read_text() and "adamw, fastest peer" in paths[0].read_text()
    assert plot.stale() == [] and "scaling.svg" in table.results_table(result)
    assert "ours 0.02 µs, torch 0.02 µs" in table.results_table(result)
    plot.write()
    assert [path.read_bytes() for path in paths] == first
    write(result, content({"x": [2 * t for t in STEADY]}))
    assert plot.stale() == paths
    assert "not measured" in plot.write()[1].read_text()
    result.unlink()
    assert plot.stale() == paths and plot.write() == [] and plot.stale() == []


def test_plots_of_the_repository_are_up_to_date():
    assert plot.stale() == [], "run: python bench/table.py write"


# --- inventories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, published, tensors",
    [("gpt-2", 124_439_808, 148), ("llama-3-8b", 8_030_261_248, 291), ("resnet-50", 25_557_032, 161)],
)
def test_inventories_have_the_published_counts(name, published, tensors):
    found = inventories.inventory(name)
    assert found.elements == published and len(found.shapes) == tensors and found.title == name


@pytest.mark.parametrize("name", inventories.MODELS)
@pytest.mark.parametrize("budget", [8 << 20, 96 << 20, 4 << 30])
def test_scaled_inventories_fit_and_say_how(name, budget):
    found = inventories.inventory(name, budget)
    full = inventories.inventory(name)
    assert 16 * found.elements <= budget
    assert (found.title == name) == (found.shapes == full.shapes)
    if found.title != name:
        assert "widths / " in found.title or " layers" in found.title


def test_inventories_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="gpt-2 does not fit into 1000 bytes"):
        inventories.inventory("gpt-2", 1000)
    with pytest.raises(ValueError, match="expected one of gpt-2, llama-3-8b, resnet-50"):
        inventories.inventory("gpt-3")


# --- the correctness gate ---------------------------------------------------------------------------------------------


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setitem(
        problems.ADAMW_PEERS, "torch fused", lambda params, lr: torch.optim.AdamW(params, lr=lr * (1 + 2**-9))
    )
    with pytest.raises(AssertionError, match=r"torch fused is .* away from ours"):
        problems.adamw_runners(problems.parameters([(300,)]), ["torch fused"])


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (3, 20, 20)])
def test_the_gate_of_polar_passes_ours_and_sees_a_wrong_coefficient(shape):
    x = torch.randn(shape)
    schedule = named("polar-express", 5)
    exact, bound = problems.polar_gate(x, schedule, torch.float32)
    torch.testing.assert_close(exact, steepest.reference.polar(x.double()), rtol=0, atol=1e-12)
    assert problems.distance(steepest.polar(x), exact) <= bound
    first, *others = schedule.coefficients
    wrong = Schedule(((first[0] * (1 - 2**-10), *first[1:]), *others), 2, schedule.lower, schedule.upper, "wrong")
    assert problems.distance(steepest.polar(x, schedule=wrong), exact) > bound


# --- the device clock, on a device that does not exist ----------------------------------------------------------------


class FakeDevice:
    """As much of torch.cuda as DeviceClock calls; its time advances when something is said to run on it."""

    def __init__(self):
        self.now_ms = 0.0
        self.slept = []

    def synchronize(self):
        pass

    def get_device_properties(self, device):
        class Properties:
            L2_cache_size = 4096

        return Properties

    def _sleep(self, cycles):
        self.slept.append(cycles)
        self.now_ms += 50.0  # of no concern to the clock

    def Event(self, enable_timing):
        assert enable_timing
        device = self

        class Event:
            def record(self):
                self.at = device.now_ms

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()

    def kernel(self, ms):
        self.now_ms += ms


@pytest.fixture
def device(request, monkeypatch):
    """A fake device whose clock times the benchmarks that say device="cuda"."""
    fake = FakeDevice()
    timer = clock.DeviceClock(fake, "cpu")
    monkeypatch.setitem(racing.CLOCKS, "cuda", timer)
    request.node.add_marker(pytest.mark.benchmark(timer=timer))
    return fake


def test_device_clock_counts_the_device_alone(device, monkeypatch, request):
    benchmark = request.getfixturevalue("benchmark")
    if benchmark.disabled:
        pytest.skip("--benchmark-disable was used")
    monkeypatch.setattr(racing, "extra_memory", lambda function, device: 7)
    monkeypatch.setattr(racing, "copy_bandwidth", lambda device: 4e9)
    monkeypatch.setattr(racing, "matmul_rate", lambda device, dtype: 8e9)
    race = racing.Race(benchmark, "cuda", racing.Limits(seconds=0.01, slowest=1.0))
    found = race(
        lambda: device.kernel(2.0), {"peer": lambda: device.kernel(3.0)}, op="fake", case="1", nbytes=4 * 10**6,
        flops=10**6, points={n: (lambda n=n: device.kernel(n), {}) for n in (1, 2)},
    )  # fmt: skip
    # 4 MB in 2 ms of device time: 2 of 4 GB/s; the sleeps of 50 ms and the host's own time count nowhere.
    assert found["ms"] == pytest.approx(2.0) and found["of_copy"] == pytest.approx(0.5)
    assert found["GFLOP_per_s"] == pytest.approx(0.5) and found["of_matmul"] == pytest.approx(1 / 16)
    assert found["peers"]["peer"]["ms"] == pytest.approx(3.0) and found["peers"]["peer"]["ratio"] == pytest.approx(1.5)
    assert [p["runners"]["ours"]["ms"] for p in found["points"]] == [pytest.approx(1.0), pytest.approx(2.0)]
    assert 0 < found["host_us"] < 2000 and found["extra_bytes"] == 7
    assert device.slept and all(0 <= cycles <= 0.02 * 2e9 for cycles in device.slept)
    assert benchmark.stats.as_dict(include_data=False)["options"]["timer"] == "device_clock"
    row = table.row(found)
    assert row.case == "fake 1 on the GPU" and row.rate == "2 GB/s" and row.peak == "50% of copy"


def test_calls_in_a_loop_are_timed_after_one_of_their_own(monkeypatch):
    """Each runner's first call of a loop, after another's, takes 100 times as long and does not count."""
    now, last = [0.0], [None]

    def runner(name, seconds):
        def call():
            now[0] += seconds * (1 if last[0] == name else 100)
            last[0] = name

        return call

    monkeypatch.setattr(racing.time, "perf_counter", lambda: now[0])
    found = racing.in_loops({"ours": runner("ours", 1.0), "peer": runner("peer", 3.0)})
    assert found == {"ours": pytest.approx(1.0), "peer": pytest.approx(3.0)}


def test_ratios_in_a_loop_reach_the_table(monkeypatch, benchmark):
    race = racing.Race(benchmark, "cpu", racing.Limits(seconds=0.01, slowest=1.0))
    times = {racing.OURS: 0.002, "slow": 0.008, "fast": 0.004}
    monkeypatch.setattr(racing, "in_loops", lambda runners: {name: times[name] for name in runners})
    found = race(lambda: None, {"slow": lambda: None, "fast": lambda: None}, op="fake", case="1")
    if benchmark.disabled:
        return
    assert found["loop_ms"] == pytest.approx(2.0) and found["peers"]["slow"]["loop_ratio"] == pytest.approx(4.0)
    assert table.row(found).loop_text == "2, 2.00×"
    assert table.row(found | {"peers": {}}).loop_text == "2"
    del found["loop_ms"]  # results of before
    assert table.row(found).loop_text == "–"


def test_rates_of_other_rules_are_a_sentence_and_no_row(tmp_path):
    peers = {
        "Lion": {"ms": 0.5, "ratio": 0.5, "quartiles": [0.5, 0.5], "rate_of_ours": 0.96, "loop_rate_of_ours": 0.97},
        "SGD": {"ms": 0.5, "ratio": 0.5, "quartiles": [0.5, 0.5], "rate_of_ours": 0.985},
    }
    rules = figures(op="rules", case="1 x 9", peers=peers)
    assert table.in_table(figures()) and not table.in_table(rules) and not table.in_table({})
    expected = "Bytes per second, of AdamW's in the same rounds, 1 x 9: Lion 96.0% (97.0% in a loop), SGD 98.5%."
    assert table.scaling_sentences(content({}, {"a": rules})) == [expected]
    assert table.scaling_sentences(content({"x": STEADY})) == []


def test_a_peer_that_takes_too_long_is_left_out_with_the_reason(benchmark):
    import time

    race = racing.Race(benchmark, "cpu", racing.Limits(seconds=0.01, slowest=0.05))
    found = race(lambda: None, {"snail": lambda: time.sleep(0.06)}, op="fake", case="1")
    if not benchmark.disabled:
        assert found["peers"] == {} and found["left_out"]["snail"].startswith("one call takes 0.")
        assert "snail left out: one call takes" in table.row(found).peer


def test_gpu_benchmarks_are_skipped_with_a_reason_or_run():
    done = run(
        sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "-m", "gpu", "--scale", "quick",
        "--seconds", "0.01", "-k", "1x1K or half",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    if not torch.cuda.is_available():
        assert "no NVIDIA GPU on this machine" in done.stdout and "5 skipped" in done.stdout


def test_gpu_report_runs_dry(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("here it would be the real thing, of minutes")
    done = run("bash", "bench/gpu_report.sh", tmp_path, PYTHON=sys.executable, STEEPEST_STEPS="info gpu_tests bench")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [(step["step"], step["rc"]) for step in steps] == [("info", 0), ("gpu_tests", 0), ("bench", 0)]
    assert done.stdout.count("no NVIDIA GPU on this machine") >= 2
    assert json.loads((tmp_path / "info.json").read_text())["torch"] == torch.__version__
    assert {path.name for path in tmp_path.iterdir()} == {"steps.jsonl", "info.json", "gpu_tests.xml", "log.txt"}
