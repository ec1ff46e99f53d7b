"""What all elementwise optimizers share: torch's bookkeeping outside, one kernel call for all groups inside.

Data flow of a step: every parameter of every group that has a gradient becomes a row (parameter, gradient, states) of
a `Table`; rows with the same device, dtypes and flags go to the kernel in one call, each with the number of its
hyper-parameter row.  The table is kept between steps and proven still right by object identity, which costs a few
nanoseconds per tensor; addresses, shapes and strides are read afresh in every call (see rows.cpp).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steepest._native import lib


class Rule:
    """An elementwise update rule, as the optimizer classes see it."""

    name: str

    def states(self, group: dict) -> tuple[str, ...]:
        """Names of the state tensors, in the order that `step` takes them."""
        raise NotImplementedError

    def flags(self, group: dict) -> tuple:
        """Options that a kernel call cannot mix: rows that differ here go to different calls."""
        raise NotImplementedError

    def hyper(self, group: dict) -> tuple:
        """The group's hyper-parameters, checked, as the kernel takes them, without the step number."""
        raise NotImplementedError

    def step(self, roles: list[list[Tensor]], hyper: list[tuple], index: list[int] | None, flags: tuple, guard) -> None:
        """Take the step; roles are parameters, gradients, then the states."""
        raise NotImplementedError


class Table:
    """Rows of one kernel call, with their states and step counters."""

    def __init__(self, rule: Rule, rows: list[tuple[int, dict, Tensor]], optimizer: torch.optim.Optimizer):
        self.rule = rule
        self.flags = rule.flags(rows[0][1])
        self.names = rule.states(rows[0][1])
        self.groups = [number for number, _, _ in rows]
        self.params = [p for _, _, p in rows]
        self.entries = [optimizer.state[p] for p in self.params]
        for entry, p in zip(self.entries, self.params):
            if "step" not in entry:
                entry["step"] = torch.tensor(0.0)
            for name in self.names:
                if name not in entry:
                    entry[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        # The counters of all rows are one tensor, so that counting is one operation; each state["step"] is a 0-dim
        # float32 view of it, which is what torch.optim keeps there.
        self.steps = torch.tensor([float(entry["step"]) for entry in self.entries], dtype=torch.float32)
        self.step_views = list(self.steps.unbind())
        for entry, view in zip(self.entries, self.step_views):
            entry["step"] = view
        self.guard = lib.OverlapGuard()

    def step(self, grads: list[Tensor], hyper: dict[int, tuple]) -> None:
        """Takes the step for the rows' gradients; counters advance only when the kernel call has succeeded."""
        roles = [self.params, grads, *(lib.column(self.entries, name) for name in self.names)]
        rows, index = self._hyper_rows(hyper)
        self.rule.step(roles, rows, index, self.flags, self.guard)
        self.steps += 1

    def valid(self) -> bool:
        """Whether the states are still those that the table holds (they may have been replaced from outside)."""
        steps = lib.column(self.entries, "step")
        return (
            steps is not None
            and lib.same_objects(steps, self.step_views)
            and all(lib.column(self.entries, name) is not None for name in self.names)
        )

    def _hyper_rows(self, hyper: dict[int, tuple]) -> tuple[list[tuple], list[int] | None]:
        counts = self.steps.tolist()
        keys = list(zip(self.groups, counts))
        distinct = dict.fromkeys(keys)
        rows = [(*hyper[group], int(count) + 1) for group, count in distinct]
        if len(rows) == 1:
            return rows, None
        number = {key: i for i, key in enumerate(distinct)}
        return rows, [number[key] for key in keys]


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the elementwise optimizers; `step_rule` is also what Muon calls for its AdamW groups."""

    def __init__(self, params, defaults: dict):
        self._tables: dict[str, tuple] = {}
        super().__init__(params, defaults)
        for number, group in enumerate(self.param_groups):
            self._check_group(number, group)

    def _check_group(self, number: int, group: dict) -> None:
        """Raises for a group whose options are wrong; called at construction, add_param_group and loading."""

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(len(self.param_groups) - 1, self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise
        self._tables.clear()

    def __getstate__(self) -> dict:
        return {key: value for key, value in super().__getstate__().items() if key != "_tables"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._tables = {}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._tables.clear()

    def step_rule(self, rule: Rule, groups: list[tuple[int, dict]]) -> None:
        """One step of `rule` for the numbered groups, in as few kernel calls as their flags allow."""
        params = [p for _, group in groups for p in group["params"]]
        grads = lib.gradients(params)
        hyper = {number: rule.hyper(group) for number, group in groups}
        tables = self._cached_tables(rule, groups, params, grads)
        for table, positions in tables:
            table.step(grads if positions is None else [grads[i] for i in positions], hyper)

    def _cached_tables(self, rule, groups, params, grads) -> list[tuple[Table, list[int] | None]]:
        present = [grad is not None for grad in grads]
        key = ([(number, len(group["params"]), rule.flags(group)) for number, group in groups], present)
        cached = self._tables.get(rule.name)
        if cached is not None:
            old_key, old_params, state, tables = cached
            same = old_key == key and lib.same_objects(old_params, params) and state is self.state
            if same and self._same_entries(tables) and all(table.valid() for table, _ in tables):
                return tables
        tables = self._build_tables(rule, groups, present)
        self._tables[rule.name] = (key, params, self.state, tables)
        return tables

    def _same_entries(self, tables) -> bool:
        # Entries are compared in the order in which self.state holds them, which needs no hashing of tensors.
        current = list(self.state.values())
        if len(tables) == 1 and lib.same_objects(current, tables[0][0].entries):
            return True
        return all(self.state.get(p) is e for table, _ in tables for p, e in zip(table.params, table.entries))

    def _build_tables(self, rule, groups, present) -> list[tuple[Table, list[int] | None]]:
        buckets: dict[tuple, list[tuple[int, tuple[int, dict, Tensor]]]] = {}
        position = 0
        for number, group in groups:
            for p in group["params"]:
                if present[position]:
                    bucket = (p.device, p.dtype, rule.flags(group))
                    buckets.setdefault(bucket, []).append((position, (number, group, p)))
                position += 1
        tables = []
        for members in buckets.values():
            table = Table(rule, [row for _, row in members], self)
            positions = [i for i, _ in members]
            tables.append((table, None if len(positions) == position else positions))
        return tables


def run_closure(closure: Callable | None):
    """The closure's loss, with gradients enabled, as torch.optim does it; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
