"""Weights that are away for a while: how each is kept, how it is moved, and where it comes home from."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest import sam_ops
from steepest.optim.base import FusedOptimizer
from steepest.optim.climb import KeptClimb
from steepest.storage import PLAIN, Storage, follow


class Away:
    """The weights of one optimizer that are away from home.

    float32 weights, and float16 ones without a master, come home from a backup.  16-bit weights with a float32 master
    are moved to the rounded sum and come home from the master.  bfloat16 weights with correction bits are moved from
    the number that both make up; others are rounded at random, so that small moves are not lost.
    """

    def __init__(self, base: torch.optim.Optimizer, seed: int):
        self.base, self.seed = base, seed
        self.params: list[Tensor] = []
        self.homes: list[Tensor] = []
        self.backups: dict[Tensor, Tensor] = {}  # memory, kept from step to step
        self.kept: KeptClimb | None = None

    def homes_of(self, rows: list[tuple[dict, Tensor]]) -> tuple[list[str], list[Tensor]]:
        """For (group, parameter) pairs: how each is kept, and the tensor that it will be restored from."""
        found = [self._home(group, p) for group, p in rows]
        return [kind for kind, _ in found], [home for _, home in found]

    def _home(self, group: dict, p: Tensor) -> tuple[str, Tensor]:
        if p.dtype == torch.float32:
            return "plain", self._backup(p)
        # Past ParamState, which would take this for somebody who keeps what he finds.
        entry = self.base.state.get(p) if isinstance(self.base, FusedOptimizer) else None
        if entry is not None and group.get("master_weights") and dict.get(entry, "master") is not None:
            return "masters", dict.__getitem__(entry, "master")
        if entry is not None and group.get("correction_bits") and dict.get(entry, "residual") is not None:
            return "residuals", self._backup(p)
        return "stochastic" if p.dtype == torch.bfloat16 else "plain", self._backup(p)

    def _backup(self, p: Tensor) -> Tensor:
        kept = self.backups.get(p)
        if (
            kept is None
            or kept.dtype != p.dtype
            or kept.shape != p.shape
            or kept.device != p.device
            or kept.stride() != p.stride()
        ):
            kept = self.backups[p] = torch.empty_like(p, requires_grad=False, memory_format=torch.preserve_format)
        return kept

    def kept_climb(self, op: str, groups: list[dict]) -> KeptClimb | None:
        """The usual climb, its rows found; None when this one is another."""
        kept = self.kept
        if kept is None or not kept.fits(groups) or not kept.gather():
            kept = KeptClimb(op, groups, self._backup) if KeptClimb.possible(groups) else None
            if kept is not None and not kept.gather():
                kept = None
        self.kept = kept
        return kept

    def climb(
        self, op: str, params: list[Tensor], vectors: list[Tensor], kinds: list[str], homes: list[Tensor],
        hyper: list[tuple], index: list[int], q: float, steepness, *, maximize: bool,
    ) -> None:  # fmt: skip
        """One kernel call for each way of keeping weights; what was moved before an error comes home."""
        try:
            for kind in dict.fromkeys(kinds):
                rows = [i for i, other in enumerate(kinds) if other == kind]
                moved, along, home = ([role[i] for i in rows] for role in (params, vectors, homes))
                kept, first_index, more = self._storage(kind, moved)
                sam_ops.ascend(
                    op, [moved, along, home, *more], hyper, [index[i] for i in rows], q, steepness, maximize=maximize,
                    kept=kept, first_index=first_index,
                )  # fmt: skip
                self.params, self.homes = self.params + moved, self.homes + home
        except BaseException:
            self.come_home()
            raise

    def _storage(self, kind: str, moved: list[Tensor]) -> tuple[Storage, list[int] | None, list[list[Tensor]]]:
        if kind == "masters":
            return Storage(("masters",)), None, []
        if kind == "residuals":
            entries = [self.base.state[p] for p in moved]
            return Storage(("residuals",)), None, [[dict.__getitem__(entry, "residual") for entry in entries]]
        if kind == "stochastic":
            every = [p for group in self.base.param_groups for p in group["params"]]
            number = dict(zip(every, follow([p.numel() for p in every])))
            return Storage(stochastic=True, seed=self.seed), [number[p] for p in moved], []
        return PLAIN, None, []

    def sources(self) -> dict[Tensor, Tensor] | None:
        """Where the base optimizer's step finds the weights that it will put home itself; None if it cannot.

        Those that it will not touch, or from which it would first make masters or averages, come home here.
        """
        if not getattr(self.base, "_step_takes_sources", False):
            self.come_home()
            return None
        kept = self.kept
        if kept is not None and kept.params is self.params and self.base.steps_all(kept.params):
            return kept.sources  # which settles by itself what has lost its gradient since
        stepped, others = {}, []
        for p, home in zip(self.params, self.homes):
            entry = self.base.state.get(p)
            if p.grad is not None and entry is not None and "step" in entry:
                stepped[p] = home
            else:
                others.append((p, home))
        _restore(others)
        self.params, self.homes = list(stepped), list(stepped.values())
        return stepped or None

    def arrived(self) -> None:
        """The base optimizer has put home what was still away."""
        self.params, self.homes = [], []

    def come_home(self, unless: Tensor | None = None) -> None:
        """Every weight as it was, bit for bit; `unless`: see sam_ops.restore_."""
        _restore(list(zip(self.params, self.homes)), unless)
        self.arrived()


def _restore(pairs: list[tuple[Tensor, Tensor]], unless: Tensor | None = None) -> None:
    for dtypes in {(p.dtype, home.dtype): None for p, home in pairs}:
        same = [(p, home) for p, home in pairs if (p.dtype, home.dtype) == dtypes]
        sam_ops.restore_([p for p, _ in same], [home for _, home in same], unless=unless)
