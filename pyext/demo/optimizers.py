"""The optimizers that the demo compares. A further one is one more entry in OPTIMIZERS."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import steepest.optim


@dataclass(frozen=True)
class Choice:
    """``twin`` names the entry whose loss curve this one has to reproduce, if any."""

    name: str
    build: Callable[[nn.Module, Namespace], torch.optim.Optimizer]
    twin: str | None = None


def _torch_adamw(model: nn.Module, options: Namespace) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **_adamw_arguments(options))


def _adamw(model: nn.Module, options: Namespace) -> torch.optim.Optimizer:
    return steepest.optim.AdamW(model.parameters(), **_adamw_arguments(options))


def _muon(model: nn.Module, options: Namespace) -> torch.optim.Optimizer:
    return steepest.optim.Muon(
        model.named_parameters(),
        lr=options.muon_lr,
        momentum=0.95,
        nesterov=True,
        weight_decay=options.weight_decay,
        adamw=_adamw_arguments(options),
    )


def _sam(model: nn.Module, options: Namespace) -> torch.optim.Optimizer:
    return steepest.optim.SAM(_adamw(model, options), rho=0.05, model=model)


def _shampoo(frequency: int) -> Callable[[nn.Module, Namespace], torch.optim.Optimizer]:
    def build(model: nn.Module, options: Namespace) -> torch.optim.Optimizer:
        return steepest.optim.Shampoo(
            model.named_parameters(),
            lr=options.shampoo_lr,
            betas=(0.9, 0.95),
            block_size=options.block_size,
            precondition_frequency=frequency,
            weight_decay=options.weight_decay,
            adamw=_adamw_arguments(options),
        )

    return build


def _adamw_arguments(options: Namespace) -> dict:
    return {"lr": options.lr, "betas": (0.9, 0.95), "weight_decay": options.weight_decay}


OPTIMIZERS = {
    "torch-adamw": Choice("torch AdamW", _torch_adamw),
    "adamw": Choice("steepest AdamW", _adamw, twin="torch-adamw"),
    "sam": Choice("steepest SAM + AdamW, two passes", _sam),
    "muon": Choice("steepest Muon + AdamW", _muon),
    "shampoo": Choice("steepest Shampoo, roots every 10 steps", _shampoo(10)),
    "shampoo-1": Choice("steepest Shampoo, roots every step", _shampoo(1)),
}
