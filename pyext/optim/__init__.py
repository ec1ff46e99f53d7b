"""Optimizers with torch.optim's interface, one class per file."""

from steepest.optim.adamw import AdamW

__all__ = ["AdamW"]
