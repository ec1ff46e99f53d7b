"""What all elementwise optimizers share: torch's bookkeeping outside, one kernel call for all groups inside.

Data flow of a step: every parameter of every group that has a gradient becomes a row (parameter, gradient, states) of
a `Table`; rows with the same device, dtypes and flags go to the kernel in one call, each with the number of its
hyper-parameter row.  The table is kept between steps and proven still right by object identity, which costs a few
nanoseconds per tensor; addresses, shapes and strides of parameters and gradients are read afresh in every call (see
rows.cpp), those of states whenever somebody may have reached them (see state.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from steepest._native import lib
from steepest.optim.state import ParamState, counter_untouched, untouched


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

    def gather(self, rows, guard, open_rows: list[int]) -> str | None:
        """None when the StateRows `rows` are ready for `run`, otherwise the reason why not."""
        raise NotImplementedError

    def run(self, rows, hyper: list[tuple], index: list[int] | None, flags: tuple) -> None:
        """The step over rows that `gather` approved."""
        raise NotImplementedError

    def check(self, roles: list[list[Tensor]]) -> None:
        """Raises if the lists (parameters, gradients, states) cannot be stepped at all."""
        raise NotImplementedError

    def step(self, roles: list[list[Tensor]], hyper: list[tuple], index: list[int] | None, flags: tuple) -> None:
        """The step over lists that `check` approved, whatever their layouts and dtypes."""
        raise NotImplementedError


class Table:
    """Rows of one kernel call, with their states and step counters."""

    def __init__(self, rule: Rule, rows: list[tuple[int, dict, Tensor]], state: dict):
        self.rule = rule
        self.flags = rule.flags(rows[0][1])
        self.names = rule.states(rows[0][1])
        self.params = [p for _, _, p in rows]
        self.entries = [state[p] for p in self.params]
        for entry, p in zip(self.entries, self.params):
            for name in self.names:
                if name not in entry:
                    entry[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        # The counters of all rows are one tensor, so that counting is one operation; each state["step"] is a 0-dim
        # float32 view of it, which is what torch.optim keeps there.
        self.steps = torch.tensor([float(entry.get("step", 0.0)) for entry in self.entries], dtype=torch.float32)
        for entry, counter in zip(self.entries, self.steps.unbind()):
            entry["step"] = counter
        self.counts = self.steps.numpy()  # the same memory: numpy counts in 5 us where torch, called so rarely, takes 70
        self.rows = lib.StateRows(self.params, self.entries, self.names)
        self.guard = lib.OverlapGuard()
        # Rows that somebody has looked at since the last step, and rows whose states must be read in each step.
        self.touched: set[int] = set()
        self.open = set(range(len(self.params)))
        for row, entry in enumerate(self.entries):
            if isinstance(entry, ParamState):
                entry.row, entry.watch = row, self.touched
        self.groups = [number for number, _, _ in rows]
        self.distinct_groups = list(dict.fromkeys(self.groups))
        place = {number: i for i, number in enumerate(self.distinct_groups)}
        self.group_index = None if len(place) == 1 else [place[number] for number in self.groups]

    def prepare(self) -> bool:
        """Gathers and checks everything; raises for mistakes; False when the table no longer fits the optimizer."""
        self.lists = None
        self._settle()
        reason = self.rule.gather(self.rows, self.guard, list(self.open))
        if reason in ("stale", "no grad"):
            return False
        if reason is not None:
            # Layouts that differ, a mix of dtypes, a foreign backend, or a mistake.
            states = [[entry[name] for entry in self.entries] for name in self.names]
            self.lists = [self.params, lib.gradients(self.params), *states]
            self.rule.check(self.lists)
        return True

    def _settle(self) -> None:
        """Opens the rows that were touched; closes, after a step without any, those that nobody can reach."""
        if self.touched:
            self.open |= self.touched
            self.touched.clear()
        elif self.open:
            self.open = {row for row in self.open if not self._closed(row)}

    def _closed(self, row: int) -> bool:
        """True when nothing leads to the states of a row except its entry, which notes who looks, and lib.StateRows."""
        entry = self.entries[row]
        if not isinstance(entry, ParamState) or not all(name in entry for name in ("step", *self.names)):
            return False
        return counter_untouched(entry) and all(untouched(entry, name) for name in self.names)

    def run(self, hyper: dict[int, tuple]) -> None:
        """The step that `prepare` made ready; counters advance only when it has succeeded."""
        rows, index = self._hyper_rows(hyper)
        if self.lists is None:
            self.rule.run(self.rows, rows, index, self.flags)
        else:
            self.rule.step(self.lists, rows, index, self.flags)
            self.lists = None
            torch.autograd.graph.increment_version(self.params)  # lib.StateRows has done it on the other path
        self.counts += 1

    def _hyper_rows(self, hyper: dict[int, tuple]) -> tuple[list[tuple], list[int] | None]:
        first = int(self.counts[0])
        if (self.counts == first).all():
            return [(*hyper[group], first + 1) for group in self.distinct_groups], self.group_index
        keys = list(zip(self.groups, self.counts.tolist()))
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        return [(*hyper[group], int(count) + 1) for group, count in number], [number[key] for key in keys]


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the elementwise optimizers; `step_rule` is also what Muon calls for its AdamW groups."""

    def __init__(self, params, defaults: dict):
        self._tables: dict[str, TableSet] = {}
        super().__init__(params, defaults)
        self.state = defaultdict(ParamState)

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
        self.state = defaultdict(ParamState, {p: ParamState(entry) for p, entry in self.state.items()})

    def state_dict(self) -> dict:
        """As torch's, with plain dictionaries."""
        packed = super().state_dict()
        packed["state"] = {key: dict(entry) for key, entry in packed["state"].items()}
        return packed

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._tables.clear()
        for number, group in enumerate(self.param_groups):
            self._check_group(number, group)

    def step_rule(self, rule: Rule, groups: list[tuple[int, dict]]) -> None:
        """One step of `rule` for the numbered groups, in as few kernel calls as their flags allow.

        All rows of all calls are checked before the first is stepped.
        """
        hyper = {number: rule.hyper(group) for number, group in groups}
        for table in self._prepared_tables(rule, groups):
            table.run(hyper)

    def _prepared_tables(self, rule: Rule, groups: list[tuple[int, dict]]) -> list[Table]:
        key = [(number, rule.flags(group)) for number, group in groups]
        cached = self._tables.get(rule.name)
        if cached is not None and cached.fits(key, groups, self.state) and cached.prepare():
            return cached.tables
        fresh = TableSet(rule, groups, key, self.state)
        self._tables[rule.name] = fresh
        if not fresh.prepare():
            raise RuntimeError(f"{rule.name}: gradients or states changed while the step was being prepared")
        return fresh.tables


class TableSet:
    """All tables of one rule, with what proves that they still describe the optimizer."""

    def __init__(self, rule: Rule, groups: list[tuple[int, dict]], key: list, state: dict):
        self.key, self.state = key, state
        self.params = [list(group["params"]) for _, group in groups]
        grads = iter(lib.gradients([p for params in self.params for p in params]))
        buckets: dict[tuple, list[tuple[int, dict, Tensor]]] = {}
        self.idle = []
        for number, group in groups:
            for p in group["params"]:
                if next(grads) is None:
                    self.idle.append(p)
                else:
                    buckets.setdefault((p.device, p.dtype, rule.flags(group)), []).append((number, group, p))
        self.tables = [Table(rule, rows, state) for rows in buckets.values()]
        self.entries = list(state.values())

    def fits(self, key: list, groups: list[tuple[int, dict]], state: dict) -> bool:
        """Same groups, same parameters, same state dictionaries: by identity, without touching a tensor."""
        return (
            self.key == key
            and self.state is state
            and all(lib.same_objects(old, group["params"]) for old, (_, group) in zip(self.params, groups))
            and lib.same_values(self.entries, state)
        )

    def prepare(self) -> bool:
        if any(grad is not None for grad in lib.gradients(self.idle)):
            return False
        return all(table.prepare() for table in self.tables)


def run_closure(closure: Callable | None):
    """The closure's loss, with gradients enabled, as torch.optim does it; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
