"""Optimizers with torch.optim's interface, one class per file."""

from steepest.optim.adamw import AdamW
from steepest.optim.muon import Muon

__all__ = ["AdamW", "Muon"]
