"""Every example in its tiny size, twice; the statistics behind verdicts; the gallery's page."""

from __future__ import annotations

import importlib
import json
import math

import common
import gallery
import pytest
import torch


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def without_times(content: dict) -> dict:
    tables = [table for table in content["tables"] if not table.get("measured")]
    return {**content, "tables": tables, "seconds": None}


@pytest.mark.parametrize("name", gallery.names())
def test_tiny_size_runs_and_repeats_itself(name, tmp_path):
    module = importlib.import_module(name)
    found = [module.main(["--tiny", "--quiet", "--output", str(tmp_path / str(k))]) for k in range(2)]
    assert without_times(found[0]) == without_times(found[1])
    assert (tmp_path / "0" / f"{name}.png").stat().st_size > 5000
    content = json.loads((tmp_path / "0" / f"{name}.json").read_text(encoding="utf-8"))
    assert content == json.loads(json.dumps(found[0])) and content["claims"] and content["tables"]
    for claim in content["claims"]:
        assert claim["verdict"] in (common.AGREES, common.DIFFERS)
        assert any(digit in claim["numbers"] for digit in "0123456789")
    assert all(len(row) == len(table["columns"]) for table in content["tables"] for row in table["rows"])


def test_another_seed_is_another_run(tmp_path):
    module = importlib.import_module("grokking")
    runs = [module.main(["--tiny", "--quiet", "--output", str(tmp_path), "--seed", seed]) for seed in ("0", "1")]
    assert runs[0]["tables"] != runs[1]["tables"]


def test_verdicts_follow_the_numbers():
    """The judges of one example, on results made up for and against its claims."""
    module = importlib.import_module("memorization")
    sizes = [100, 200, 300, 400]

    def verdicts(generalisation, memorisation):
        report = common.Report("x", common.options("x", [], tiny={}))
        rows = zip(sizes, generalisation, memorisation)
        module.verdicts(report, sizes, {n: {"generalisation": g, 0.1: m, 0.5: 2 * m, "stop": m} for n, g, m in rows})
        return [claim["verdict"] == common.AGREES for claim in report.claims]

    assert all(verdicts([5, 5, 6, 5], [100, 205, 300, 395]))
    assert verdicts([5, 5, 9, 5], [100, 205, 300, 395]) == [True] * 4 + [False, True]
    # R² of the four times is 0.8, their exponent 0.6.
    assert verdicts([5, 5, 6, 5], [100, 205, 210, 220]) == [False] * 4 + [True, True]


def test_statistics():
    slope, start, r2 = common.line([1, 2, 3, 4], [3, 5, 7, 9])
    assert (slope, start, r2) == pytest.approx((2, 1, 1))
    assert common.line([1, 2, 3, 4], [1, -1, -1, 1])[2] == pytest.approx(0)
    assert common.spread([4, 5, 6]) == pytest.approx(0.4)
    assert common.first([False, True, True]) == 1 and common.first([False]) is None
    mean, error = common.differs([3, 5, 4], [1, 2, 3])
    assert mean == 2 and error == pytest.approx(1 / math.sqrt(3))


def test_sizes_from_the_command_line():
    def parse(*argv):
        return common.options("x", argv, steps=100, rate=0.5, tiny={"steps": 2})

    assert (parse().steps, parse("--tiny").steps, parse("--tiny", "--steps", "7").steps) == (100, 2, 7)
    assert parse("--rate", "0.25").rate == 0.25 and parse().rate == 0.5


def test_page_is_up_to_date():
    page = gallery.HERE / "README.md"
    assert gallery.render() == page.read_text(encoding="utf-8"), (
        "run: make gallery, or python examples/gallery.py write"
    )
    assert all((gallery.KEPT / f"{name}.png").exists() for name in gallery.names())


def test_unknown_examples_are_refused():
    with pytest.raises(SystemExit, match="unknown examples"):
        gallery.run(["nothing"])
