"""The memorisation gap, with a signal to stop while the model still generalises."""

from __future__ import annotations

import torch
from torch import Tensor


class MemorizationGap:
    """Follows training and held-out loss; says when the second has left its minimum for good.

    With every `update(train, test)`::

        gap   = test - train
        best  = min(best, test)
        above = above + 1  if not test <= (1 + tolerance) best  else  0
        stop  = stop or above >= patience

    so NaN counts as above.  Losses may be numbers or 0-dim tensors; tensors stay on their device, and nothing waits for
    it until somebody reads a value (`if gap.stop:` does).

    Args:
        patience: updates in a row, >= 1.
        tolerance: relative, >= 0; losses must be positive for it to make sense.

    Attributes: gap, best, above, stop, 0-dim tensors; `updates`; `best_update`, the number of the update (from 0) that
    had the lowest test loss, a tensor.
    """

    def __init__(self, patience: int = 3, tolerance: float = 0.05):
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"MemorizationGap: patience is {patience!r}, expected a positive integer")
        if not 0 <= tolerance < float("inf"):
            raise ValueError(f"MemorizationGap: tolerance is {tolerance!r}, expected a number >= 0")
        self.patience, self.tolerance, self.updates = patience, tolerance, 0
        self.gap = torch.tensor(0.0)
        self.best = torch.tensor(float("inf"))
        self.above, self.best_update = torch.tensor(0), torch.tensor(-1)
        self.stop = torch.tensor(False)

    @torch.no_grad()
    def update(self, train: float | Tensor, test: float | Tensor) -> Tensor:
        """Takes in one pair of losses; returns `stop`."""
        test = _scalar("test", test)
        train = _scalar("train", train).to(test.device)
        if test.device != self.best.device:
            for name in ("best", "above", "best_update", "stop"):
                setattr(self, name, getattr(self, name).to(test.device))
        better = test < self.best
        self.best = torch.where(better, test, self.best.to(test.dtype))
        self.best_update = torch.where(better, self.updates, self.best_update)
        fine = test <= (1 + self.tolerance) * self.best
        self.above = torch.where(fine, 0, self.above + 1)
        self.stop = self.stop | (self.above >= self.patience)
        self.gap = test - train
        self.updates += 1
        return self.stop


def _scalar(name: str, value: float | Tensor) -> Tensor:
    value = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
    if value.dim():
        raise ValueError(f"MemorizationGap: {name} has shape {tuple(value.shape)}, expected a number or a 0-dim tensor")
    return value
