"""A monitor's cost: a step that `steepest.dynamics.Monitor` records, of the demo's model, against one that it does not.

With t and t' their times, recording every N-th step costs (t / t' - 1) / N of the time of all steps.  AdamW is recorded
as by default, norms alone; Muon and Shampoo also with the spectra of all gradients and factors.
"""

from __future__ import annotations

import pytest
import torch

import steepest
from steepest.demo.model import Transformer
from steepest.demo.text import VOCABULARY_SIZE

BUILDERS = {
    "adamw": lambda model: steepest.optim.AdamW(model.parameters(), lr=1e-5),
    "muon": lambda model: steepest.optim.Muon(model.named_parameters(), lr=1e-5),
    "shampoo": lambda model: steepest.optim.Shampoo(model.named_parameters(), lr=1e-5, block_size=128),
}


def build(name: str, device: str) -> torch.optim.Optimizer:
    model = Transformer(VOCABULARY_SIZE, 128, 128, 5, 4, seed=0).to(device)
    generator = torch.Generator(device).manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, device=device)
    return BUILDERS[name](model)


@pytest.mark.cases(quick={"adamw": "adamw"}, full={"adamw": "adamw", "muon": "muon", "shampoo": "shampoo"})
def bench_monitor(race, device, case):
    recorded, idle = build(case, device), build(case, device)
    spectra = None if case == "adamw" else 1
    monitor = steepest.dynamics.Monitor(recorded, every=1, spectra_every=spectra)
    steepest.dynamics.Monitor(idle, every=10**9).steps = 1  # attached, and never due again
    what = "norms" if spectra is None else "norms and spectra"
    race(recorded.step, {"not recorded": idle.step}, op="monitor", case=f"{case} step of the demo model, {what}")
    found = monitor.history()
    assert len(found["update_norm"]) >= 1 and ("dimension" in found) == (spectra is not None)
