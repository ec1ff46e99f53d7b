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
from typing import ClassVar

import torch
from torch import Tensor

from steepest import check, norms
from steepest._native import lib, num_threads, reader
from steepest.engine import Call, check_rows, step_checked
from steepest.optim.state import ParamState, counter_untouched, untouched
from steepest.rules import Rule, hyper_fields


class GroupRule:
    """An update rule as an optimizer class sees it: what it reads from a param group, what it keeps per parameter."""

    name: str
    options: tuple[str, ...]  # of a group: everything that `rule` and `numbers` read

    def rule(self, group: dict) -> Rule:
        raise NotImplementedError

    def keys(self, rule: Rule) -> tuple[str, ...]:
        """Names of the states in optimizer.state[p], in the order of rule.states."""
        raise NotImplementedError

    def numbers(self, where: str, group: dict) -> dict[str, float]:
        """The group's hyper-parameters, checked."""
        raise NotImplementedError

    def initial(self, key: str, p: Tensor, group: dict) -> Tensor:
        return torch.zeros_like(p, memory_format=torch.preserve_format)

    def started(self, entry: dict) -> int:
        """Steps that a state without a counter has behind it, where torch's own optimizer keeps none."""
        return 0


NO_SCALARS = (None, None, None)


class Table:
    """Rows of one kernel call, with their states and step counters."""

    def __init__(self, kind: GroupRule, rule: Rule, rows: list[tuple[int, dict, Tensor]], state: dict):
        self.kind, self.rule, self.plain = kind, rule, Call(rule)
        self.names = kind.keys(rule)
        self.params = [p for _, _, p in rows]
        self.entries = [state[p] for p in self.params]
        for entry, (_, group, p) in zip(self.entries, rows):
            if "step" not in entry:
                entry["step"] = kind.started(entry)
            for name in self.names:
                if entry.get(name) is None:
                    entry[name] = kind.initial(name, p, group)
        # The counters of all rows are one tensor, so that counting is one operation; each state["step"] is a 0-dim
        # float32 view of it, which is what torch.optim keeps there.
        self.steps = torch.tensor([float(entry["step"]) for entry in self.entries], dtype=torch.float32)
        for entry, counter in zip(self.entries, self.steps.unbind()):
            entry["step"] = counter
        self.counts = (
            self.steps.numpy()
        )  # the same memory: numpy counts in 5 us where torch, called so rarely, takes 70
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
        found = lib.gather(reader, self.guard, self.rows, list(self.open))
        if found is None:
            return True
        if found[0] in ("stale", "no grad"):
            return False
        # Layouts that differ, a mix of dtypes, a foreign backend, or a mistake.
        states = [[entry[name] for entry in self.entries] for name in self.names]
        self.lists = [self.params, lib.gradients(self.params), *states]
        check_rows(f"{self.kind.name}.step", self.rule, self.lists, "auto")
        return True

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def survey(self, q: float, scale: float) -> tuple[float, float, bool]:
        """What norms.from_lists adds up, of the gradients that `prepare` found; CPU only."""
        if self.lists is None:
            return lib.survey_states(self.rows, q, scale, num_threads())
        return norms.native(self.lists[1], q, scale)

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

    def run(self, hyper: dict[int, tuple], scalars: tuple[Tensor | None, ...]) -> None:
        """The step that `prepare` made ready; counters advance only when it has succeeded."""
        rows, index = self._hyper_rows(hyper)
        call = self.plain if scalars == NO_SCALARS else Call(self.rule, *scalars).on(self.device)
        if self.lists is None:
            lib.step_states(reader, self.rows, call.native(rows, index))
        else:
            step_checked(f"{self.kind.name}.step", call, self.lists, rows, index)
            self.lists = None
            torch.autograd.graph.increment_version(self.params)  # lib.StateRows has done it on the other path
        self.counts += 1

    def _hyper_rows(self, hyper: dict[int, tuple]) -> tuple[list[tuple], list[int] | None]:
        first = int(self.counts[0])
        if (self.counts == first).all():
            return [(hyper[group], first + 1) for group in self.distinct_groups], self.group_index
        keys = list(zip(self.groups, self.counts.tolist()))
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        return [(hyper[group], int(count) + 1) for group, count in number], [number[key] for key in keys]


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the elementwise optimizers; `step_rule` is also what Muon calls for its AdamW groups.

    max_grad_norm: clip all gradients by their joint norm inside the step, as clip_grad_norm_(parameters, max_grad_norm)
        before it would, without writing them; the norm of the last step is in `grad_norm`.
    """

    # torch.amp.GradScaler leaves unscaling and skipping to the step.
    _step_supports_amp_scaling = True
    kind: GroupRule  # of optimizers with one rule for all groups
    # Options that cannot have another value.
    fixed: ClassVar[dict[str, object]] = {"capturable": False, "differentiable": False}

    def __init__(self, params, defaults: dict, *, max_grad_norm: float | None = None):
        self._tables: dict[str, TableSet] = {}
        self._known: dict[int, tuple] = {}
        if max_grad_norm is not None:
            max_grad_norm = check.number(type(self).__name__, "max_grad_norm", max_grad_norm, 0)
        self.max_grad_norm, self.grad_norm = max_grad_norm, None
        super().__init__(params, defaults)
        self.state = defaultdict(ParamState)

    def _check_group(self, number: int, group: dict) -> None:
        """Raises for a group whose options are wrong; called at construction, add_param_group and loading."""
        where = f"{type(self).__name__}: param group {number}"
        self.kind.numbers(where, group)
        self.kind.rule(group)
        for option, value in self.fixed.items():
            if option in group and group[option] != value:
                raise ValueError(f"{where}: {option}={group[option]!r} is not supported, expected {value!r}")

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(len(self.param_groups) - 1, self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise
        self._tables.clear()

    def __getstate__(self) -> dict:
        kept = {key: value for key, value in super().__getstate__().items() if key not in ("_tables", "_known")}
        return kept | {"max_grad_norm": self.max_grad_norm}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._tables, self._known = {}, {}
        for name in ("max_grad_norm", "grad_norm"):
            self.__dict__.setdefault(name, None)
        self.state = defaultdict(ParamState, {p: ParamState(entry) for p, entry in self.state.items()})
        for group in self.param_groups:  # written by a version of this library, or of torch, that knew fewer options
            for name, value in self.defaults.items():
                group.setdefault(name, value)

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

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss, if there is a closure."""
        loss = run_closure(closure)
        self.step_rule(self.kind, list(enumerate(self.param_groups)))
        return loss

    def step_rule(self, kind: GroupRule, groups: list[tuple[int, dict]]) -> None:
        """One step for the numbered groups, in as few kernel calls as their rules allow.

        All rows of all calls are checked before the first is stepped.  A step that a GradScaler found inf or NaN in
        changes nothing and is not counted.
        """
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        rules, hyper = self._rules_and_numbers(kind, groups)
        tables = self._prepared_tables(kind, groups, rules)
        if found_inf is not None and bool(found_inf != 0):
            return
        coefficient = self._clip(tables, grad_scale) if self.max_grad_norm is not None else None
        for table in tables:
            table.run(hyper, (grad_scale, coefficient, None))

    def _clip(self, tables: list[Table], grad_scale: Tensor | None) -> Tensor | None:
        if not tables:
            return None
        device = tables[0].device
        if device.type == "cpu":
            found = norms.from_lists(lambda q, scale: [table.survey(q, scale) for table in tables], 2.0, device)
        else:
            found = norms.survey([grad for table in tables for grad in lib.gradients(table.params)])
        if grad_scale is not None:
            found = norms.Survey(found.norm / grad_scale.to(device), found.max_abs, found.nonfinite, found.q)
        self.grad_norm = found.norm
        return found.clip_coefficient(self.max_grad_norm)

    def _rules_and_numbers(self, kind: GroupRule, groups) -> tuple[dict[int, Rule], dict[int, tuple]]:
        """Each group's rule and checked hyper-parameters, anew only where an option has changed."""
        rules, numbers = {}, {}
        for number, group in groups:
            options = tuple([group[name] for name in kind.options])
            known = self._known.get(number)
            if known is None or known[0] is not kind or not _same_options(known[1], options):
                where = f"{kind.name}: param group {number}"
                known = (kind, options, kind.rule(group), hyper_fields(kind.numbers(where, group)))
                self._known[number] = known
            rules[number], numbers[number] = known[2], known[3]
        return rules, numbers

    def _prepared_tables(self, kind: GroupRule, groups: list[tuple[int, dict]], rules: dict[int, Rule]) -> list[Table]:
        cached = self._tables.get(kind.name)
        if cached is not None and cached.fits(groups, rules, self.state) and cached.prepare():
            return cached.tables
        fresh = TableSet(kind, groups, rules, self.state)
        self._tables[kind.name] = fresh
        if not fresh.prepare():
            raise RuntimeError(f"{kind.name}: gradients or states changed while the step was being prepared")
        return fresh.tables


def _same_options(old: tuple, new: tuple) -> bool:
    """Tensors never count as the same: they may have been written to."""
    return not any(isinstance(value, Tensor) for value in new) and old == new


class TableSet:
    """All tables of one rule, with what proves that they still describe the optimizer."""

    def __init__(self, kind: GroupRule, groups: list[tuple[int, dict]], rules: dict[int, Rule], state: dict):
        self.rules, self.state = rules, state
        self.params = [list(group["params"]) for _, group in groups]
        grads = iter(lib.gradients([p for params in self.params for p in params]))
        buckets: dict[tuple, list[tuple[int, dict, Tensor]]] = {}
        self.idle = []
        for number, group in groups:
            for p in group["params"]:
                if next(grads) is None:
                    self.idle.append(p)
                else:
                    buckets.setdefault((p.device, p.dtype, rules[number]), []).append((number, group, p))
        self.tables = [Table(kind, rule, rows, state) for (_, _, rule), rows in buckets.items()]
        self.entries = list(state.values())

    def fits(self, groups: list[tuple[int, dict]], rules: dict[int, Rule], state: dict) -> bool:
        """Same groups, same parameters, same state dictionaries: by identity, without touching a tensor."""
        return (
            self.rules == rules
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
