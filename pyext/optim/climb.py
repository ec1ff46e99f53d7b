"""The usual climb, every weight float32 and along its own gradient, with what can be kept from step to step.

Finding 2,000 weights, gradients and backups in Python takes longer than moving them; the compiled gatherer proves in a
few nanoseconds per tensor that they are the same as last time (see table.py, which does this for optimizers' steps).
"""

from __future__ import annotations

import torch
from torch import Tensor

from steepest import check, rules, sam_ops
from steepest._native import lib, num_threads, reader
from steepest.distributed.shards import reach_of, reaches_of
from steepest.engine import Call


class Sources(dict):
    """Parameter -> backup, and the rows that have the backups' addresses; for Table.run."""

    def __init__(self, climb: KeptClimb):
        super().__init__(zip(climb.params, climb.homes))
        self.params, self.rows = climb.params, climb.rows

    def settle(self, stepped: list[list[Tensor]]) -> None:
        """Brings home what the coming step will not reach, those whose gradients have gone since the climb."""
        if len(stepped) == 1 and lib.same_objects(stepped[0], self.params):
            return
        reached = {id(p) for params in stepped for p in params}
        lost = [p for p in self.params if id(p) not in reached]
        if lost:
            sam_ops.restore_(lost, [self[p] for p in lost])


class KeptClimb:
    """Rows (parameter, gradient, backup) of all parameters that have gradients."""

    def __init__(self, op: str, groups: list[dict], backup):
        self.groups = [list(group["params"]) for group in groups]
        numbered = [(number, p) for number, params in enumerate(self.groups) for p in params]
        grads = lib.gradients([p for _, p in numbered])
        self.params = [p for (_, p), grad in zip(numbered, grads) if grad is not None]
        self.idle = [p for (_, p), grad in zip(numbered, grads) if grad is None]
        self.index = [number for (number, _), grad in zip(numbered, grads) if grad is not None]
        check.leaves(op, self.params)
        self.reaches = reaches_of(p for params in self.groups for p in params)
        self.homes = [backup(p) for p in self.params]
        counter = torch.zeros(())  # StateRows watches one
        entries = [{"step": counter, "backup": home} for home in self.homes]
        self.rows, self.guard = lib.StateRows(self.params, entries, ("backup",), []), lib.OverlapGuard()
        self.open = list(range(len(self.params)))
        self.sources = Sources(self)

    @staticmethod
    def possible(groups: list[dict]) -> bool:
        every = [p for group in groups for p in group["params"]]
        # Rows are surveyed together, which shards and whole tensors cannot be.
        return bool(every) and all(p.dtype == torch.float32 for p in every) and len(set(map(reach_of, every))) == 1

    def fits(self, groups: list[dict]) -> bool:
        """The same parameters, none with a gradient that had none."""
        return (
            len(groups) == len(self.groups)
            and all(lib.same_objects(old, group["params"]) for old, group in zip(self.groups, groups))
            and not any(grad is not None for grad in lib.gradients(self.idle))
        )

    def gather(self) -> bool:
        """Finds all rows; False when one is not plain or has no gradient."""
        if not self.params or lib.gather(reader, self.guard, self.rows, self.open) is not None:
            return False
        self.open = []  # nobody else has the backups
        return True

    def part(self, weigh: sam_ops.Weighing) -> RowsPart:
        return RowsPart(self, weigh)

    def run(self, op: str, hyper: list[tuple], q: float, steepness, *, maximize: bool) -> None:
        """Moves what `gather` has found."""
        scalars = () if steepness is None else (steepness.largest, steepness.coefficient)
        call = Call(rules.perturb(op, q=q, backup=True, maximize=maximize), *scalars)
        index = self.index if len(hyper) > 1 else None
        lib.step_states(reader, self.rows, call.native(hyper, index))


class RowsPart:
    """Gradients of gathered rows, for sam_ops.measure_parts."""

    def __init__(self, climb: KeptClimb, weigh: sam_ops.Weighing):
        self.climb, self.weigh = climb, weigh
        self.reach = climb.reaches[0] if climb.reaches else None

    def read(self, q: float, scale: float) -> tuple[float, float, bool]:
        if not self.weigh.alpha:
            return lib.survey_states(self.climb.rows, q, scale, num_threads())
        return lib.survey_states_weighed(self.climb.rows, self.weigh.alpha, self.weigh.eps, q, scale, num_threads())

    def add_to(self, measure: lib.Measure) -> None:
        measure.add_states(self.climb.rows, bool(self.weigh.alpha), self.weigh.alpha, self.weigh.eps)

    def weighed(self) -> list[Tensor]:
        grads = lib.gradients(self.climb.params)
        weights = self.climb.params if self.weigh.alpha else None
        return sam_ops.Bucket(grads, weights, self.weigh, self.reach).weighed()
