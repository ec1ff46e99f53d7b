"""A monitor's cost: 100 steps of the demo's model with `steepest.dynamics.Monitor` attached, against the same without.

A ratio of 0.97 is an overhead of 3 %.  AdamW is watched for norms alone, Muon and Shampoo also for spectra, each once
the 100 steps: the defaults.
"""

from __future__ import annotations

import pytest
import torch

import steepest
from steepest.demo.model import Transformer
from steepest.demo.text import VOCABULARY_SIZE

STEPS = 100
BUILDERS = {
    "adamw": lambda model: steepest.optim.AdamW(model.parameters(), lr=1e-5),
    "muon": lambda model: steepest.optim.Muon(model.named_parameters(), lr=1e-5),
    "shampoo": lambda model: steepest.optim.Shampoo(model.named_parameters(), lr=1e-5, block_size=128),
}


def stepper(name: str, device: str, watched: bool):
    model = Transformer(VOCABULARY_SIZE, 128, 128, 5, 4, seed=0).to(device)
    generator = torch.Generator(device).manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, device=device)
    optimizer = BUILDERS[name](model)
    monitor = None
    if watched:
        monitor = steepest.dynamics.Monitor(optimizer, every=STEPS, spectra_every=None if name == "adamw" else STEPS)

    def steps():
        for _ in range(STEPS):
            optimizer.step()

    return steps, monitor


@pytest.mark.cases(quick={"adamw": "adamw"}, full={"adamw": "adamw", "muon": "muon", "shampoo": "shampoo"})
def bench_monitor(race, device, case):
    watched, monitor = stepper(case, device, True)
    plain, _ = stepper(case, device, False)
    race(watched, {"not monitored": plain}, op="monitor", case=f"on {STEPS} steps of {case}, demo model")
    assert len(monitor.history()["update_norm"]) >= 1
