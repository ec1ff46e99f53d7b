"""One training run: the same model, data and schedule whatever the optimizer, timed and recorded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import nn
from torch.nn.functional import cross_entropy


@dataclass
class Run:
    """What one optimizer did: losses per step, validation losses as (steps done, loss), seconds per step."""

    train_loss: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    @property
    def optimizer_ms(self) -> float:
        return 1e3 * median(self.optimizer_seconds)

    @property
    def step_ms(self) -> float:
        return 1e3 * median(self.step_seconds)

    def largest_difference(self, other: Run) -> float:
        """max |train loss - the other's| over the steps; NaN where either curve has one."""
        differences = [abs(a - b) for a, b in zip(self.train_loss, other.train_loss)]
        return math.nan if any(map(math.isnan, differences)) else max(differences)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first fifteenth of the run, then a cosine down to a tenth."""
    warmup = max(1, steps // 15)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    windows: torch.Tensor,
    steps: int,
    evaluate_every: int,
    on_step: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Take ``steps`` steps and validate on ``windows`` before the first, every ``evaluate_every``, after the last.

    Every optimizer gets a closure, so that one that needs several passes per step is trained and timed by the same
    loop: its own time is that of ``step`` less that of the passes.
    """
    device = next(model.parameters()).device
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    run = Run(validation=[(0, validation_loss(model, windows))])
    for step, (inputs, targets) in enumerate(batches, start=1):
        inputs, targets = inputs.to(device), targets.to(device)
        passes = 0.0

        def closure(inputs=inputs, targets=targets):
            nonlocal passes
            begin = _now(device)
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            loss.backward()
            passes += _now(device) - begin
            return loss

        begin = _now(device)
        loss = optimizer.step(closure)
        elapsed = _now(device) - begin
        scheduler.step()
        run.train_loss.append(loss.item())
        run.step_seconds.append(elapsed)
        run.optimizer_seconds.append(elapsed - passes)
        if step % evaluate_every == 0 or step == steps:
            run.validation.append((step, validation_loss(model, windows)))
        on_step(run)
    return run


@torch.no_grad()
def validation_loss(model: nn.Module, windows: torch.Tensor) -> float:
    """Mean cross entropy per character, in nats, over all windows."""
    device = next(model.parameters()).device
    total = 0.0
    for part in windows.to(device).split(16):
        total += cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()).item() * len(part)
    return total / len(windows)


def _now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
