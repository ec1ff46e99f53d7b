"""Predictions for ranks that are not there: known totals, bounds, refusals.  tests/dist/checks_plan.py has ranks."""

from __future__ import annotations

import math

import pytest
import torch

from steepest.distributed import gram, muon
from steepest.explain import main
from steepest.planning import Machine, Mesh, inventory, predict
from steepest.planning.command import standard_meshes
from steepest.planning.inventories import gpt2

GPT2 = gpt2()
MATRICES = sum(math.prod(s) for name, s in GPT2.items() if len(s) == 2 and name.startswith("h."))
SQUARES = {f"layers.{i}.q_proj.weight": (64, 64) for i in range(8)}


def test_traffic_is_that_of_the_formulas():
    """Evenly cut: 2 (k - 1) / k of the matrices' bytes; under DDP every result to every other rank."""
    for k in (2, 8, 64):
        assert predict(GPT2, Mesh(shards=k), "muon").traffic == 2 * (k - 1) * MATRICES * 4 // k
        assert predict(GPT2, Mesh(replicas=k), "muon").traffic == (k - 1) * MATRICES * 4
        assert predict(GPT2, Mesh(shards=k), "adamw").traffic == 0
    halved = predict(GPT2, Mesh(shards=8), "muon", dtype=torch.bfloat16)
    assert halved.traffic == 2 * 7 * MATRICES * 2 // 8


def test_gram_matrices_are_added_up_where_asked_and_counted_as_rings():
    long = {"layers.0.up_proj.weight": (1024, 32)}
    owned = predict(long, Mesh(shards=4), "muon-owners")
    added = predict(long, Mesh(shards=4), "muon-grams")
    chosen = predict(long, Mesh(shards=4), "muon")
    assert owned.traffic == 2 * 3 * 1024 * 32 * 4 // 4
    assert added.traffic % (2 * 3 * 32 * 32 * 4) == 0 and 0 < added.traffic < owned.traffic
    assert chosen.traffic == added.traffic
    assert predict(SQUARES, Mesh(shards=4), "muon").traffic == predict(SQUARES, Mesh(shards=4), "muon-owners").traffic


def test_elementwise_time_is_bytes_by_rate_and_shrinks_with_shards():
    elements = sum(map(math.prod, SQUARES.values()))
    alone = predict(SQUARES, Mesh(), "adamw", Machine(copy=1e9))
    assert alone.seconds["step"] == pytest.approx(28 * elements / 1e9)
    assert predict(SQUARES, Mesh(shards=8), "adamw", Machine(copy=1e9)).seconds["step"] * 8 == alone.seconds["step"]
    assert alone.peak() == 16 * elements + 4 * len(SQUARES)  # p, g, m, v and step counters
    assert predict(SQUARES, Mesh(), "lion").peak() == 12 * elements + 4 * len(SQUARES)


def test_messages_hide_behind_products_and_slow_links_show():
    fast = predict(GPT2, Mesh(shards=8), "muon", Machine(bandwidth=1e15, latency=0))
    slow = predict(GPT2, Mesh(shards=8), "muon", Machine(bandwidth=1e9, latency=0))
    alone = fast.seconds["elementwise"] + fast.seconds["products"]
    assert fast.seconds["step"] == pytest.approx(alone, rel=1e-3)
    assert slow.seconds["step"] <= alone + slow.seconds["messages"]
    assert slow.seconds["step"] >= slow.seconds["messages"]
    assert slow.seconds["messages"] == pytest.approx(1e6 * fast.seconds["messages"], rel=1e-3)


def test_ten_thousand_ranks_are_planned():
    shapes = inventory("llama-3-8b").shapes
    found = predict(shapes, Mesh(shards=10000), "muon")
    assert found.sent.shape == (10000,) and found.sent.sum() == found.traffic
    parameters = found.memory["parameters"]
    assert parameters.sum() == 4 * sum(map(math.prod, shapes.values()))
    # 224 matrices keep at most 224 ranks busy.
    assert found.imbalance >= 10000 / 224 - 1


def test_shampoo_owners_hold_every_state_once():
    together = predict(SQUARES, Mesh(), "shampoo", block_size=32).memory["states"]
    spread = predict(SQUARES, Mesh(shards=4), "shampoo", block_size=32).memory["states"]
    counters = 4 * len(SQUARES)
    assert spread.sum() - 4 * counters == together.sum() - counters


def test_meshes_and_what_they_refuse():
    assert [str(m) for m in standard_meshes(64)] == ["FSDP2 64", "HSDP 8 x 8", "FSDP2 8 x TP 8"]
    assert [str(m) for m in standard_meshes(1)] == ["1"] and str(Mesh(2, 3, 4)) == "HSDP 2 x 3 x TP 4"
    assert Mesh(1, 2, 4).cut("layers.0.q_proj.weight", (64, 64)) == 0
    assert Mesh(1, 2, 4).cut("layers.0.o_proj.weight", (64, 64)) == 1
    assert Mesh(1, 2, 4).cut("layers.0.q_proj.weight", (63, 64)) is None
    assert Mesh(1, 2, 4).cut("h.0.mlp.c_proj.bias", (64,)) is None
    with pytest.raises(ValueError, match="expected numbers >= 1"):
        Mesh(shards=0)
    with pytest.raises(ValueError, match="need shards > 1"):
        Mesh(replicas=2, tensor=2)
    with pytest.raises(ValueError, match="expected one of sgd, "):
        predict(SQUARES, Mesh(), "adamx")
    with pytest.raises(ValueError, match="bandwidth is 0"):
        Machine(bandwidth=0)
    with pytest.raises(ValueError, match="latency is -1"):
        Machine(latency=-1)


def test_a_gram_form_over_parts_costs_less_than_the_whole_and_more_than_its_share():
    layout = Mesh(shards=4).layout("a.weight", (1024, 64))
    options = dict(schedule="polar-express", steps=5, norm="auto")
    whole = gram.gram_plan((1024, 64), torch.device("cpu"), options, None).flops
    part = gram.local_flops(layout, options, torch.device("cpu"), None)
    assert whole / 4 < part < whole
    assert gram.local_flops(Mesh().layout("a.weight", (1024, 64)), options, torch.device("cpu"), None) == whole


def test_command(capsys):
    small = ["--plan", "--shapes", "a.weight=64x32,a.bias=64", "--optimizer", "adamw", "muon"]
    assert main([*small, "--gpus", "1", "8"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| 1"] * 2 + ["| DDP 8"] * 2 + ["| FSDP2 8"] * 2
    assert main([*small, "--mesh", "shards=2,tensor=4", "--dtype", "bfloat16", "--copy", "100"]) == 0
    assert "copy 100 GB/s" in capsys.readouterr().out
    assert main(["--plan", "--copy", "0"]) == 2 and "copy is 0" in capsys.readouterr().err
    assert main(["--plan", "--gpus", "0"]) == 2 and "--gpus is 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--plan", "--mesh", "shard=2"])
    assert "is not a mesh like" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--plan", "--shapes", "a=2xb"])
    assert "is not a list like" in capsys.readouterr().err


def test_the_optimizers_own_choice_is_between_the_two_forms():
    """One formula: what make_plan compares is what it reports."""
    entry = muon.Entry(0, torch.empty(1024, 32, device="meta"), Mesh(shards=4).layout("a", (1024, 32)), (4,))
    group = dict(schedule="polar-express", steps=5, norm="auto", matrices="whole")
    made = muon.make_plan([entry], {0: group})
    assert made.grams == [0] and made.gram_bytes == muon.make_plan([entry], {0: group}, True).gram_bytes
    assert muon.make_plan([entry], {0: group}, False).grams == []
