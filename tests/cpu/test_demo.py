"""python -m steepest demo, end to end on a tiny model, and the parts that make its comparison fair."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from argparse import Namespace

import pytest
import torch
from torch import nn

import steepest.demo
from steepest.demo import report, run, text, train
from steepest.demo.model import Transformer
from steepest.demo.optimizers import OPTIMIZERS

TINY = ["--steps", "8", "--batch", "4", "--context", "32", "--width", "32", "--layers", "2", "--heads", "2"]
TINY += ["--eval-every", "3", "--characters", "40000"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """These models are too small for a second thread to pay; on a busy machine they would mostly wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def demo(folder, *arguments) -> dict:
    """The results of a tiny run whose files go to ``folder``."""
    assert steepest.demo.main([*TINY, "--output", str(folder), *arguments]) == 0
    return json.loads((folder / "results.json").read_text())


def tiny_model(seed: int = 0) -> Transformer:
    return Transformer(text.VOCABULARY_SIZE, context=32, width=32, layers=2, heads=2, seed=seed)


def test_whole_run_on_the_standard_library(tmp_path, capsys):
    results = demo(tmp_path, "--optimizers", *OPTIMIZERS)
    printed = capsys.readouterr().out
    for choice in OPTIMIZERS.values():
        assert choice.name in printed
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert results["settings"]["text"] == "Python standard library"
    assert list(results["runs"]) == list(OPTIMIZERS)
    for found in results["runs"].values():
        assert len(found["train_loss"]) == len(found["step_seconds"]) == 8
        assert [step for step, _ in found["validation"]] == [0, 3, 6, 8]
        assert found["validation"][-1][1] == found["final_validation_loss"] < found["validation"][0][1]
        assert 0 < found["optimizer_ms"] < found["step_ms"]
    starts = {found["validation"][0][1] for found in results["runs"].values()}
    assert len(starts) == 1, "every optimizer starts from the same weights"
    assert abs(starts.pop() - math.log(text.VOCABULARY_SIZE)) < 0.1  # weights near zero: all characters alike


def test_same_seed_same_losses(tmp_path):
    first, second = demo(tmp_path / "a", "--no-plot"), demo(tmp_path / "b", "--no-plot")
    other = demo(tmp_path / "c", "--no-plot", "--seed", "1")
    for key in first["runs"].keys() | {"adamw", "muon", "shampoo"}:
        for record in ("train_loss", "validation"):
            assert first["runs"][key][record] == second["runs"][key][record]
            assert first["runs"][key][record] != other["runs"][key][record]
    assert not (tmp_path / "a" / "curves.png").exists()


def test_json_is_all_that_is_printed(tmp_path, capsys):
    results = demo(tmp_path, "--json", "--no-plot", "--optimizers", "adamw")
    assert json.loads(capsys.readouterr().out) == results
    assert results["runs"]["adamw"]["max_train_loss_difference_to_twin"] is None  # its twin did not run


def test_text_from_a_file(tmp_path):
    path = tmp_path / "sea.txt"
    path.write_text("The sea, the sea, the open sea!\n" * 100)
    results = demo(tmp_path / "out", "--text", str(path), "--no-plot", "--optimizers", "torch-adamw")
    assert results["settings"]["text"] == str(path)
    assert (results["settings"]["train_characters"], results["settings"]["validation_characters"]) == (2880, 320)


def test_text_from_a_folder_is_in_order_and_leaves_out_what_is_not_text(tmp_path):
    (tmp_path / "b.txt").write_text("b" * 500)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.txt").write_text("a" * 500)
    (tmp_path / "image").write_bytes(b"\xff\xd8" * 100)
    (tmp_path / ".hidden").write_text("h" * 500)
    found = text.load_text(tmp_path, characters=900, context=32)
    assert torch.equal(torch.cat([found.train, found.validation]), text.encode("a" * 500 + "b" * 400))
    assert len(found.train) == 810


def test_characters_outside_the_vocabulary_share_one_id():
    ids = text.encode("\n\t ~é→")
    assert ids[4] == ids[5] == text.VOCABULARY_SIZE - 1
    assert len(set(ids[:5].tolist())) == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--text", "{tmp}/absent.txt"], "--text {tmp}/absent.txt is neither a file nor a folder"),
        (["--text", "{tmp}/short.txt"], "short.txt gives 329 characters, a context of 32 needs at least 330"),
        (["--text", "{tmp}/latin.txt"], "latin.txt is not UTF-8 text"),
        (["--heads", "3"], "width 32 is not a multiple of 3 heads"),
        (["--output", "{tmp}/short.txt"], "File exists"),
    ],
)
def test_errors_say_what_is_wrong_before_any_training(tmp_path, capsys, arguments, message):
    (tmp_path / "short.txt").write_text("x" * 329)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 1000)
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        steepest.demo.main([*TINY, "--output", str(tmp_path / "out"), *arguments])
    assert message.format(tmp=tmp_path) in str(stop.value)
    assert "loss" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--device", "nowhere"], ["--optimizers", "adam-who"]])
def test_wrong_options_are_refused_by_name(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        steepest.demo.main(arguments)
    assert stop.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_a_missing_package_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(SystemExit, match=r"demo: needs matplotlib: pip install steepest\[cli\]"):
        steepest.demo.main(TINY)


def test_batches_depend_on_the_seed_alone_and_targets_follow_inputs():
    ids = torch.arange(500)
    batches = list(text.training_batches(ids, steps=50, batch=4, context=32, seed=3))
    again = text.training_batches(ids, steps=50, batch=4, context=32, seed=3)
    for (inputs, targets), (same, _) in zip(batches, again):
        assert torch.equal(inputs, same)
        assert torch.equal(inputs + 1, targets) and inputs.shape == (4, 32)
    assert max(int(targets.max()) for _, targets in batches) <= 499
    shortest = text.training_batches(ids[:33], steps=5, batch=2, context=32, seed=3)
    assert all(torch.equal(targets, ids[1:33].expand(2, -1)) for _, targets in shortest)


def test_validation_windows_neither_overlap_nor_leave_the_text():
    windows = text.validation_windows(torch.arange(1000), context=32, most=7)
    assert windows.shape == (7, 33)
    assert windows.unique().numel() == windows.numel()
    assert text.validation_windows(torch.arange(100), context=32).tolist()[-1][-1] < 100


def test_muon_gets_the_hidden_matrices_and_adamw_the_rest():
    options = run.parse([])
    optimizer = OPTIMIZERS["muon"].build(tiny_model(), options)
    mine = {place.name for place in optimizer.split if place.algorithm == "muon"}
    inside = ("attention.query", "attention.key", "attention.value", "attention.output", "up", "down")
    assert mine == {f"blocks.{block}.{name}.weight" for block in range(2) for name in inside}
    assert len(optimizer.split) == len(list(tiny_model().parameters()))


def test_learning_rate_warms_up_to_one_and_ends_at_a_tenth():
    factors = [train.learning_rate_factor(step, 300) for step in range(301)]
    assert factors[0] == 1 / 20 and max(factors) == factors[19] == factors[20] == 1
    assert factors[-1] == pytest.approx(0.1)
    assert train.learning_rate_factor(0, steps=1) == 1


class TwoPasses(torch.optim.SGD):
    """Calls its closure twice, as SAM does, and takes 20 ms of its own."""

    def step(self, closure):
        loss = closure()
        closure()
        super().step()
        time.sleep(0.02)
        return loss


class Slow(nn.Module):
    """Needs at least 10 ms forward."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Embedding(text.VOCABULARY_SIZE, text.VOCABULARY_SIZE)

    def forward(self, tokens):
        time.sleep(0.01)
        return self.logits(tokens)


def test_an_optimizer_of_two_passes_is_timed_without_them():
    model = Slow()
    ids = text.encode("abcdefgh" * 100)
    batches = text.training_batches(ids, steps=5, batch=2, context=32, seed=0)
    found = train.train(model, TwoPasses(model.parameters(), lr=0.1), batches, ids[None, :33], 5, evaluate_every=5)
    assert found.optimizer_ms >= 20
    assert found.step_ms - found.optimizer_ms >= 20


def test_a_diverged_run_is_reported_as_such():
    runs = {
        "torch-adamw": train.Run([1.0, 2.0], [(0, 4.5), (2, 2.0)], [0.1, 0.1], [0.2, 0.2]),
        "adamw": train.Run([1.0, math.nan], [(0, 4.5), (2, math.inf)], [0.1, 0.1], [0.2, 0.2]),
    }
    found = report.results(runs, {})["runs"]["adamw"]
    assert found["train_loss"] == [1.0, None] and found["final_validation_loss"] is None
    assert found["max_train_loss_difference_to_twin"] is None
    json.dumps(found, allow_nan=False)


def curve(build, steps: int, nudge: int | None = None) -> train.Run:
    """Losses of the tiny model under ``build``; ``nudge`` seeds a random rounding error in its initial weights."""
    model = tiny_model()
    if nudge is not None:
        generator = torch.Generator().manual_seed(nudge)
        with torch.no_grad():
            for p in model.parameters():
                # +-8 units in the last place of the larger of the element and 0.1
                size = 8 * 2.0**-23 * 2 ** p.abs().clamp(min=0.1).log2().floor()
                p.add_(size * (2 * torch.randint(0, 2, p.shape, generator=generator) - 1))
    options = Namespace(lr=2e-3, weight_decay=0.1)
    found = text.load_text(None, 40_000, 32)
    batches = text.training_batches(found.train, steps, 4, 32, seed=0)
    windows = text.validation_windows(found.validation, 32, most=1)
    return train.train(model, build(model, options), batches, windows, steps, evaluate_every=steps)


def test_adamw_follows_torch():
    """The bound is measured on torch itself, whose own curve moves when its weights carry a rounding error.

    AdamW's kernel is held elsewhere to 8 ulp of max(|p|, 0.1) against torch on given gradients. Training feeds that
    error back through the gradients, by a factor that no formula gives. So torch's run is repeated three times with
    8 ulp of random sign added to every initial weight; ours, whose errors are no larger and arrive no earlier, may
    leave torch's curve by at most twice the largest of those departures.
    """
    steps = 20
    theirs = curve(OPTIMIZERS["torch-adamw"].build, steps)
    ours = curve(OPTIMIZERS["adamw"].build, steps)
    assert ours.train_loss[0] == theirs.train_loss[0]
    allowed = 2 * max(
        curve(OPTIMIZERS["torch-adamw"].build, steps, nudge).largest_difference(theirs) for nudge in (1, 2, 3)
    )
    assert 0 < allowed < 1e-4, "a nudge of 8 ulp must be seen and must stay small, or the bound says nothing"
    assert ours.largest_difference(theirs) <= allowed
    apart = Namespace(lr=2e-3 * (1 + 1e-3), weight_decay=0.1)
    wrong = curve(lambda model, options: OPTIMIZERS["adamw"].build(model, apart), steps)
    assert wrong.largest_difference(theirs) > allowed, "the bound must notice a learning rate 0.1 % off"
