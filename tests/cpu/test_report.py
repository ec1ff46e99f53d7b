"""Reports: on disk, compared, as a page; and the report of what compilers make of the kernels."""

from __future__ import annotations

import json
import math
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from steepest.conformance import Figure, Result, aot, difference, page, records, report, validate
from steepest.conformance.page import plots
from steepest.conformance.runner import FAIL, OK, SKIPPED, UNSUPPORTED


def result(backend="cpu", dtype="float32", case="one step", status=OK, reason="", share=0.25, op="adamw"):
    figures = [
        Figure("params error/bound", share, 1.0, "of bound"),
        Figure("params ulp", 1.234567, None, "ulp"),
        Figure("bits", 0 if status == OK else 3, 0, "elements", "against the reference"),
    ]
    return Result(op, backend, dtype, case, status, reason, figures if status in (OK, FAIL) else [], ms=12.3456)


RESULTS = [
    result("reference"),
    result(),
    result(case="tails", share=math.inf, status=FAIL, reason="params error/bound inf > 1 <of bound> & bits 3 > 0"),
    result(dtype="bfloat16", share=math.nan, status=FAIL, reason="params error/bound nan > 1"),
    result("triton", status=SKIPPED, reason="no CUDA device"),
    result("cuda", status=UNSUPPORTED, reason="adamw_: no kernel"),
    result("a subject's", case="first step", op="polar"),
]


def written(results=RESULTS, **changes) -> dict:
    made = report.to_json(results, seed=3, quick=True, seconds=1.5)
    return {**made, **changes}


def save(path, results=RESULTS, **changes):
    path.write_text(report.json_text(written(results, **changes)))
    return str(path)


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_a_report_comes_back_as_it_was_written(tmp_path):
    text = report.json_text(written())
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    read = records.read(save(tmp_path / "report.json"))
    assert read["kind"] == "steepest-validate" and read["seed"] == 3 and read["quick"] is True
    assert read["totals"] == {OK: 3, FAIL: 2, SKIPPED: 1, UNSUPPORTED: 1}
    assert (
        "running error analysis" in read["ops"]["adamw"]["bound"] and read["cases"]["adamw"]["one step"]["lr"] == 1e-3
    )
    back = records.unpack(read)
    for before, after in zip(RESULTS, back):
        assert (before.op, before.backend, before.dtype, before.case) == (
            after.op,
            after.backend,
            after.dtype,
            after.case,
        )
        assert (before.status, before.reason, after.seed) == (after.status, after.reason, 3)
        assert after.ms == 12.35
        assert [(f.name, f.bound, f.unit, f.note) for f in before.figures] == [
            (f.name, f.bound, f.unit, f.note) for f in after.figures
        ]
    assert [f.value for f in back[0].figures] == [0.25, 1.235, 0]
    assert back[2].figures[0].value == math.inf and math.isnan(back[3].figures[0].value)
    assert all(f.ok for f in back[0].figures) and not back[3].figures[0].ok


def test_a_report_of_1200_cells_takes_less_than_300_kilobytes():
    figures = [Figure(f"figure {i}", 0.123456 * i, 1.0, "of bound", "a note") for i in range(9)]
    figures += [Figure(f"exact {i}", 0, 0, "elements") for i in range(5)]
    cells = [
        Result("polar", backend, dtype, f"a case with a name, {i} x 48", OK, "", figures, ms=321.987)
        for backend in ("reference", "cpu", "triton-interpreted", "triton", "cuda")
        for dtype in ("float32", "bfloat16", "float16")
        for i in range(80)
    ]
    assert len(report.json_text(written(cells)).encode()) < 300_000


@pytest.mark.parametrize("text, complaint", [
    ("{", "is not JSON"),
    ("[]", "is not a report"),
    ('{"kind": "steepest-aot", "schema": 1}', "is not a report"),
    ('{"kind": "steepest-validate", "schema": 1}', "has schema 1, this version reads schema 2"),
])  # fmt: skip
def test_other_files_are_refused(tmp_path, text, complaint, capsys):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        records.read(path)
    assert validate.main(["--html", str(tmp_path / "page.html"), "--from", str(path)]) == 2
    assert complaint in capsys.readouterr().err and not (tmp_path / "page.html").exists()


# --- compared ---------------------------------------------------------------------------------------------------------


def test_a_report_does_not_differ_from_itself(tmp_path, capsys):
    path = save(tmp_path / "a.json")
    assert validate.main(["--compare", path, path]) == 0
    assert capsys.readouterr().out == "no difference in 7 cells\n"


def test_what_was_ok_and_fails_is_named_and_is_the_exit_status(tmp_path, capsys):
    later = [*RESULTS[:1], result(status=FAIL, reason="bits 3 > 0 elements"), *RESULTS[2:]]
    paths = save(tmp_path / "a.json"), save(tmp_path / "b.json", later)
    assert validate.main(["--compare", *paths]) == 1
    out = capsys.readouterr().out
    assert "ok -> FAIL  adamw · cpu · float32 · one step: bits 3 > 0 elements" in out
    assert "1 of 7 common cells were ok and FAIL now" in out
    assert validate.main(["--compare", *reversed(paths)]) == 0
    assert "FAIL -> ok  adamw · cpu · float32 · one step" in capsys.readouterr().out


def test_a_fail_that_was_none_before_is_listed_but_breaks_nothing():
    found = difference.difference(written(RESULTS[:2]), written(RESULTS[:1] + RESULTS[2:4]))
    assert [r.case for r in found.removed] == ["one step"] and [r.status for r in found.added] == [FAIL, FAIL]
    assert found.broken == [] and found.common == 1
    text = "\n".join(line for line, _ in difference.lines(found))
    assert "only in the first, 1 cells\n  adamw cpu 1 ok" in text
    assert "only in the second, 2 cells\n  adamw cpu 2 FAIL" in text


def test_growth_of_a_share_is_listed_from_a_tenth_of_the_bound_on():
    before = written([result(case=name) for name in ("a", "b", "c")])
    after = written([result(case=name, share=s) for name, s in (("a", 0.34), ("b", 0.36), ("c", 0.9))])
    found = difference.difference(before, after)
    assert [(cell[3], name, a, b) for cell, name, a, b in found.grown] == [
        ("c", "params error/bound", 0.25, 0.9),
        ("b", "params error/bound", 0.25, 0.36),
    ]
    assert difference.difference(after, before).grown == []
    assert " 25% ->  90%  adamw · cpu · float32 · c, params error/bound" in "\n".join(
        text.strip() if "90%" not in text else text[1:] for text, _ in difference.lines(found)
    )


def test_other_environments_and_settings_are_named():
    info = written()["info"]
    there = {**info, "torch": "2.9.0", "cpu": {**info["cpu"], "cores": 9999}, "cuda": {"available": True}}
    changed = difference.difference(written(), written(info=there, seed=4)).environment
    found = {name: (a, b) for name, a, b in changed}
    assert found["torch"] == (info["torch"], "2.9.0") and found["cpu.cores"] == (info["cpu"]["cores"], 9999)
    assert found["seed"] == (3, 4) and "numpy" not in found and "date" not in found


def test_comparing_works_without_rich(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    path = save(tmp_path / "a.json")
    assert difference.main(path, path) == 0 and difference.main(path, str(tmp_path / "none.json")) == 2
    assert "no difference" in capsys.readouterr().out


# --- as a page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags nest, and keeps texts and attributes."""

    VOID = ("meta", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_shows_everything():
    html = page.render(written())
    shown = Page(html)
    assert not {"script", "link", "img", "iframe"} & set(shown.tags)
    assert not [value for name, value in shown.attributes if name in ("src", "xlink:href", "data")]
    assert all(value.startswith("#") for name, value in shown.attributes if name == "href")
    assert "url(" not in html and "@import" not in html and "http" not in html.replace("xmlns", "")
    for text in (
        "2 FAIL",
        "3 ok",
        "1 unsupported",
        "no CUDA device",
        "adamw_: no kernel",
        "a subject's",
        "running error",
    ):
        assert text in shown.text, text
    assert "inf > 1 <of bound> & bits" in shown.text  # as text, not as a tag
    assert shown.tags.count("details") == 3  # one step, tails; first step
    assert shown.text.count("params error/bound") >= 3 and "lr 0.001" in shown.text


def test_every_cell_says_its_verdict_in_words():
    html = page.render(written())
    assert '<span class="FAIL"' in html and '<span class="ok">ok 25%</span>' in html
    assert '<span class="unsupported" title="adamw_: no kernel">unsup.</span>' in html


def test_plots_are_well_formed_and_broken_bounds_lie_right_of_the_line():
    marks = [
        plots.Mark(share, i, plots.SHAPES[i % 3], f"<{share}>") for i, share in enumerate((0, 0.5, 1, 1.01, math.inf))
    ]
    drawing = ElementTree.fromstring(plots.scatter([("a & b", marks)], "shares"))
    assert [t.text for t in drawing.iter("title")] == ["<0>", "<0.5>", "<1>", "<1.01>", "<inf>"]
    line = float(next(e.get("x1") for e in drawing.iter("line") if e.get("class") == "bound"))
    places = [plots.across(mark.share) for mark in marks]
    assert places == sorted(places) and places[2] == pytest.approx(line, abs=0.05)
    assert places[1] < line < places[3] and plots.across(math.nan) == places[4] <= plots.WIDTH


def test_a_page_is_written_from_a_report_and_from_a_run(tmp_path, capsys):
    target, source = tmp_path / "page.html", save(tmp_path / "a.json")
    assert validate.main(["--html", str(target), "--from", source]) == 0
    assert "2 FAIL" in Page(target.read_text()).text
    arguments = ["--op", "adamw/one step", "--dtype", "float32", "--backend", "reference", "--html", str(target)]
    assert validate.main(arguments) == 0
    assert "1 ok" in Page(target.read_text()).text and "1 ok" in capsys.readouterr().out
    assert validate.main(["--from", source]) == 2 and "--from needs --html" in capsys.readouterr().err


# --- what the compilers make ------------------------------------------------------------------------------------------


def compiled(arch, **changes):
    known = {"status": OK, "reason": "", "registers": 72, "spills": 0, "shared": 65536, "loads": 24, "stores": None}
    return aot.Compiled("triton", "symmetric_kernel", "float16", arch, **{**known, "tensor_core": "HMMA", **changes})


@pytest.fixture
def compilers(monkeypatch):
    """Pretends that both compilers are there; returns the rows that Triton is to give."""
    rows = []
    monkeypatch.setattr(aot, "triton_missing", str)
    monkeypatch.setattr(aot.cuda, "missing", lambda: "no nvcc here")
    monkeypatch.setattr(aot, "compile_triton", lambda archs: (row for row in rows if row.arch in archs))
    return rows


def test_compiled_kernels_are_shown_by_architecture(compilers, capsys, tmp_path):
    compilers += [compiled("sm_80"), compiled("sm_90", tensor_core="HGMMA", shared=0), compiled("sm_120")]
    file = tmp_path / "aot.json"
    assert validate.main(["--aot", "sm_80,sm_90", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "sm_80" in out and "sm_120" not in out
    assert "72 r, 24 x 16 B, 64 K, HMMA" in out and "72 r, 24 x 16 B, HGMMA" in out
    assert "skipped  cuda: no nvcc here" in out and out.endswith("2 ok, 0 FAIL\n")
    kept = json.loads(file.read_text())
    assert kept["kind"] == "steepest-aot" and kept["archs"] == ["sm_80", "sm_90"]
    assert [row["registers"] for row in kept["kernels"]] == [72, 72]


def test_a_spill_fails(compilers, capsys):
    compilers += [compiled("sm_90", status=FAIL, reason="8 bytes of stack, 2 spill instructions", spills=2, loads=0)]
    assert validate.main(["--aot", "sm_90"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  triton · symmetric_kernel · float16 · sm_90: 8 bytes of stack, 2 spill instructions" in out
    assert "FAIL, 72 r, narrow, 2 spills" in out
    assert validate.main(["--aot", "sm_90", "--json", "-"]) == 1
    assert json.loads(capsys.readouterr().out)["totals"] == {FAIL: 1}


def test_aot_explains_what_it_cannot_do(compilers, capsys, monkeypatch):
    for wrong in ("sm_1", "sm_90,hopper", ","):
        assert validate.main(["--aot", wrong]) == 2
        assert "expected names among sm_80" in capsys.readouterr().err

    def broken(archs):
        raise RuntimeError("ptxas fatal: no such architecture")

    monkeypatch.setattr(aot, "compile_triton", broken)
    assert validate.main(["--aot", "sm_90"]) == 2 and "ptxas fatal" in capsys.readouterr().err
    monkeypatch.setattr(aot, "triton_missing", lambda: "no Triton here")
    assert validate.main(["--aot", "sm_90"]) == 2
    assert "no Triton here" in capsys.readouterr().err


def test_register_and_spill_figures_are_read_from_ptxas():
    mangled = "_ZN8steepest4cuda11step_kernelIfffNS_4AdamILb1EEEEEvNS0_9ArgumentsE"
    log = f"""ptxas info    : Compiling entry function '{mangled}' for 'sm_90'
ptxas info    : Function properties for {mangled}
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 88 bytes smem
"""
    ((name, kernel),) = aot.cuda.read_resources(log)["90"].items()
    assert name == (("float32", "float32", "float32"), "Adam<true>")
    assert (kernel.registers, kernel.stack, kernel.spills, kernel.shared) == (40, 16, 12, 88)
    assert "16 bytes of stack, 12 bytes spilled" in aot.cuda.resource_faults(name, kernel)
