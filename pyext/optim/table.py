"""The rows of one kernel call, kept between steps.

Data flow of a step: every parameter of every group that has a gradient becomes a row (parameter, gradient, states) of
a `Table`; rows with the same device, dtypes and flags go to the kernel in one call, each with the number of its
hyper-parameter row.  The table is kept between steps and proven still right by object identity, which costs a few
nanoseconds per tensor; addresses, shapes and strides of parameters and gradients are read afresh in every call (see
rows.cpp), those of states whenever somebody may have reached them (see state.py).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steepest import _native, norms
from steepest._native import lib, num_threads, reader
from steepest.distributed.shards import check_8bit, first_element, local, local_lists, reach_of, reaches_of, reading
from steepest.engine import SCALARS, Call, check_rows, step_checked, step_native
from steepest.optim.options import KEYS, Precision
from steepest.optim.state import ParamState, counter_untouched, untouched
from steepest.reference import storage as codec
from steepest.rules import Rule
from steepest.storage import LISTS, follow, num_blocks


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


@dataclass(frozen=True)
class GroupPlan:
    """What a param group asks for: its rule, and how its tensors are kept."""

    rule: Rule
    precision: Precision
    capturable: bool = False


@dataclass(frozen=True)
class Numbers:
    """A group's hyper-parameters: as numbers, and those that tensors hold, which a step counted there reads itself."""

    fields: tuple[float, ...]
    tensors: tuple[tuple[int, Tensor], ...] = ()  # place among the fields, one-element tensor


# States that are never negative, by the names of rules.py; they have a code of their own in 8 bits.
MAGNITUDES = dict.fromkeys(("exp_avg_sqs", "max_exp_avg_sqs", "square_avgs", "state_sums"), True)


def stored_keys(rule: Rule, keys: tuple[str, ...]) -> tuple[str, ...]:
    """Keys of optimizer.state[p] for the lists that follow the states."""
    return (*(KEYS[name] for name in rule.storage.lists), *(f"{key}_exponents" for key in keys if rule.storage.block8))


def _initial_list(name: str, p: Tensor, precision: Precision) -> Tensor:
    if name == "residuals":
        dtype = torch.int16 if precision.correction_bits == 16 else torch.int8
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
    return p.detach().to(torch.float32, copy=True)


def _convert(entry: dict, name: str, p: Tensor, wanted: torch.dtype | None, magnitude: bool) -> None:
    """Brings a state, new or from a checkpoint that kept it otherwise, to the dtype wanted."""
    state = entry[name]
    if wanted is None or state.dtype == wanted:
        return
    exponents = f"{name}_exponents"
    if state.dtype == torch.uint8:
        state = decoded(state, entry.pop(exponents), p, magnitude)
    if wanted == torch.uint8:
        entry[name], entry[exponents] = encoded(state, p, magnitude)
    else:
        entry[name] = state.to(wanted)


def decoded(codes: Tensor, exponents: Tensor, p: Tensor, magnitude: bool) -> Tensor:
    """A float32 state from its 8-bit form."""
    value = codec.block8_decode(codes.cpu(), exponents.cpu(), codec.memory_index(p), magnitude)
    return torch.zeros_like(p, dtype=torch.float32, memory_format=torch.preserve_format).copy_(value)


def encoded(state: Tensor, p: Tensor, magnitude: bool) -> tuple[Tensor, Tensor]:
    """The 8-bit form of a state, rounded to nearest (once, so that this loses less than rounding at random)."""
    codes = torch.zeros_like(p, dtype=torch.uint8, memory_format=torch.preserve_format)
    if not state.count_nonzero():
        return codes, torch.zeros(num_blocks(p.numel()), dtype=torch.uint8, device=p.device)
    index, value = codec.memory_index(p), state.detach().float().cpu()
    exponents = codec.block8_exponents(value, index, magnitude)
    half = torch.full_like(index, 0x7FFF)
    codes.copy_(codec.block8_encode(value, exponents, index, magnitude, half))
    return codes, exponents.to(p.device)


NO_SCALARS = (None, None, None)


class Table:
    """Rows of one kernel call, with their states and step counters."""

    def __init__(
        self, kind: GroupRule, rule: Rule, precision: Precision, rows: list[tuple[int, dict, Tensor]], state: dict,
        first_index: list[int] | None, live: bool = False,
    ):  # fmt: skip
        self.kind, self.rule, self.plain = kind, rule, Call(rule, first_index=first_index)
        self.last: Call | None = None  # with the scalars of the last step
        self.live = live  # steps are counted where the parameters live
        keys = kind.keys(rule)
        self.names = (*keys, *stored_keys(rule, keys))
        self.params = [p for _, _, p in rows]
        self.reach, self.reading = reach_of(self.params[0]), reading(self.params)
        if rule.storage.block8:
            check_8bit(self.op, self.params)
        self.entries = [state[p] for p in self.params]
        for entry, (_, group, p) in zip(self.entries, rows):
            if "step" not in entry:
                entry["step"] = kind.started(entry)
            for k, name in enumerate(keys):
                if entry.get(name) is None:
                    entry[name] = kind.initial(name, p, group)
                _convert(entry, name, p, precision.states(p.dtype), MAGNITUDES.get(rule.states[k], False))
            for name in rule.storage.lists:
                if entry.get(KEYS[name]) is None:
                    entry[KEYS[name]] = _initial_list(name, p, precision)
        self.counts = None if live else self._count_here()
        if live:
            counters = counters_there(self.op, self.device, self.entries)
            self.plain = replace(self.plain, counters=lib.Addresses([counter.data_ptr() for counter in counters]))
        self.rows = lib.StateRows(self.params, self.entries, self.names, rule.storage.kinds(rule.states))
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

    def _count_here(self) -> Tensor:
        """The counters of all rows; `self.counters` counts them."""
        # They are one tensor, so that counting is one operation; each state["step"] is a 0-dim float32 view of it,
        # which is what torch.optim keeps there.
        steps = torch.tensor([float(entry["step"]) for entry in self.entries], dtype=torch.float32)
        for entry, counter in zip(self.entries, steps.unbind()):
            entry["step"] = counter
        self.counters = lib.Counters(steps.data_ptr(), len(steps))
        return steps

    def prepare(self) -> bool:
        """Gathers and checks everything; raises for mistakes; False when the table no longer fits the optimizer."""
        self.lists = None
        self._settle()
        with self.reading:
            found = lib.gather(reader, self.guard, self.rows, list(self.open))
        if found is None:
            return True
        if found[0] in ("stale", "no grad"):
            return False
        # Layouts that differ, a mix of dtypes, a foreign backend, or a mistake.
        lists = self._all_lists()
        check_rows(self.op, self.rule, lists, "auto")
        self.lists = lists
        return True

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def survey(self, q: float, scale: float) -> tuple[float, float, bool]:
        """What norms.from_lists adds up, of the gradients that `prepare` found; CPU only."""
        if self.lists is None:
            return lib.survey_states(self.rows, q, scale, num_threads())
        return norms.native(self.lists[1], q, scale)

    def add_to(self, measure: lib.Measure) -> None:
        """The gradients that `prepare` found, for a joint norm whose result stays on the device."""
        if self.lists is None:
            measure.add_states(self.rows, False, 0.0, 1.0)
        else:
            norms.add_lists(measure, self.lists[1])

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

    def run(
        self, hyper: dict[int, Numbers], scalars: tuple[Tensor | None, ...],
        sources: dict[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """The step that `prepare` made ready; counters advance only when it has succeeded.

        Parameters that `sources` has are stepped from the tensor there instead of from their own values.
        """
        rows, index = self._hyper_rows(hyper)
        call = self.plain if scalars is NO_SCALARS else self._scaled(scalars)
        if self.live:
            call = self._counted(call, hyper)
        if self.lists is None and self._gathered(sources):
            lib.step_states_from(reader, self.rows, sources.rows, call.native(rows, index))
        elif sources and "masters" not in self.rule.storage.lists:
            self._run_from(sources, call, rows, index)
        elif self.lists is None:
            lib.step_states(reader, self.rows, call.native(rows, index))
        else:
            step_checked(self.op, call, self.lists, rows, index)
            torch.autograd.graph.increment_version(self.params)  # lib.StateRows has done it on the other path
        self.lists = None
        if not self.live:
            self.counters.advance()

    def _scaled(self, scalars: tuple[Tensor | None, ...]) -> Call:
        """The call with these, which are the same tensors from step to step."""
        if self.last is None or not all(map(operator.is_, self.last.scalars, scalars)):
            self.last = replace(self.plain, **dict(zip(SCALARS, scalars))).on(self.device)  # others are moved each time
        return self.last

    def _counted(self, call: Call, hyper: dict[int, Numbers]) -> Call:
        """The call with what it reads and writes on the device."""
        live = [
            (row, field, tensor.dtype == torch.float64, tensor.data_ptr())
            for row, group in enumerate(self.distinct_groups)
            for field, tensor in hyper[group].tensors
            if tensor.device == self.device  # others were numbers when the step was called
        ]
        rows = None
        if self.device.type != "cpu":
            rows = torch.empty(len(self.params) * lib.DEVICE_ROW_BYTES, dtype=torch.uint8, device=self.device)
        return replace(call, live=tuple(live), device_rows=rows)

    def _gathered(self, sources) -> bool:
        """Whether all sources are in rows of the same parameters (climb.Sources)."""
        return (
            getattr(sources, "rows", None) is not None
            and "masters" not in self.rule.storage.lists
            and lib.same_objects(sources.params, self.params)
        )

    @property
    def op(self) -> str:
        return f"{self.kind.name}.step"

    def _all_lists(self) -> list[list[Tensor]]:
        # Past ParamState, which would take it for somebody who keeps what he finds.
        states = [[dict.__getitem__(entry, name) for entry in self.entries] for name in self.names]
        return local_lists(self.op, self.rule.names, [self.params, lib.gradients(self.params), *states])

    def _run_from(self, sources: dict[Tensor, Tensor], call: Call, hyper: list[tuple], index: list[int] | None) -> None:
        lists = self.lists or self._all_lists()
        found = [sources.get(p) for p in self.params]
        for moved in (True, False):
            part = [i for i, source in enumerate(found) if (source is not None) == moved]
            roles = [[role[i] for i in part] for role in lists]
            mine = call.of_rows(part)
            if moved:
                kept = self.rule.storage
                names = tuple(name for name in LISTS if name in kept.lists or name == "sources")
                mine = replace(mine, rule=replace(self.rule, storage=replace(kept, lists=names)))
                roles.insert(2 + len(self.rule.states) + names.index("sources"), [local(found[i]) for i in part])
            part_index = None if index is None else [index[i] for i in part]
            if part and step_native(roles, mine, hyper, part_index) is not None:
                check_rows(self.op, mine.rule, roles, "auto")
                step_checked(self.op, mine, roles, hyper, part_index)
        torch.autograd.graph.increment_version(self.params)

    def _hyper_rows(self, hyper: dict[int, Numbers]) -> tuple[list[tuple], list[int] | None]:
        common = 0 if self.live else self.counters.common()
        if common is not None:
            return [(hyper[group].fields, common + 1) for group in self.distinct_groups], self.group_index
        keys = list(zip(self.groups, self.counts.tolist()))
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        return [(hyper[group].fields, int(count) + 1) for group, count in number], [number[key] for key in keys]


def counters_there(op: str, device: torch.device, entries: list[dict]) -> list[Tensor]:
    """Each entry's "step" as a one-element float32 tensor on the device, no two in the same place; made where missing.

    Counters that are already there stay the same tensors: CUDA graphs know them by address.
    """
    if not _native.has_kernels(device):
        raise NotImplementedError(f"{op}: steps can be counted on {device} with this library's CUDA kernels only, and "
                                  "this build has none (no nvcc at build time); expected capturable=False")  # fmt: skip
    seen: set[int] = set()
    missing = []
    for entry in entries:
        step = entry["step"]
        there = isinstance(step, Tensor) and step.device == device and step.dtype == torch.float32
        if there and step.numel() == 1 and step.data_ptr() not in seen:
            seen.add(step.data_ptr())
        else:
            missing.append(entry)
    if missing:
        counts = [float(entry["step"]) for entry in missing]
        zeros = torch.zeros(len(counts), dtype=torch.float32, device=device)  # allowed while a graph is captured
        steps = zeros.copy_(torch.tensor(counts)) if any(counts) else zeros
        for entry, counter in zip(missing, steps.unbind()):
            entry["step"] = counter
    return [entry["step"] for entry in entries]


def counts_there(device: torch.device, entry: dict | None, scaled: bool) -> bool:
    """Whether steps of parameters on a device are counted there without being asked to.

    Else the host would have to wait for the decision to skip one, or for a counter that is there already (from a
    checkpoint, or since the first scaled step).
    """
    if not (_native.asynchronous(device) and _native.has_kernels(device)):
        return False
    step = None if entry is None else dict.get(entry, "step")
    return scaled or (isinstance(step, Tensor) and step.device == device)


class TableSet:
    """All tables of one rule, with what proves that they still describe the optimizer."""

    def __init__(
        self, kind: GroupRule, groups: list[tuple[int, dict]], rules: dict[int, GroupPlan], state: dict,
        scaled: bool = False,
    ):  # fmt: skip
        self.rules, self.state = rules, state
        # Elements are numbered through all parameters of these groups, whether they have gradients or not.
        every = [p for _, group in groups for p in group["params"]]
        first = dict(zip(map(id, every), follow([p.numel() for p in every])))
        self.params = [list(group["params"]) for _, group in groups]
        grads = iter(lib.gradients([p for params in self.params for p in params]))
        buckets: dict[tuple, list[tuple[int, dict, Tensor]]] = {}
        self.idle = []
        for number, group in groups:
            for p in group["params"]:
                if next(grads) is None:
                    self.idle.append(p)
                else:
                    plan = rules[number]
                    rule = plan.precision.applied(plan.rule, p.dtype)
                    live = plan.capturable or counts_there(p.device, state.get(p), scaled)
                    key = (p.device, p.dtype, rule, plan.precision, reach_of(p), live)
                    buckets.setdefault(key, []).append((number, group, p))
        # Every rank takes part in a joint norm, also one whose parameters have no gradients.
        self.reaches = reaches_of(every)
        self.tables = []
        for (_, _, rule, precision, _, live), rows in buckets.items():
            index = [first[id(p)] + first_element(p) for _, _, p in rows] if precision.draws(rule) else None
            self.tables.append(Table(kind, rule, precision, rows, state, index, live))
        self.entries = list(state.values())

    def fits(self, groups: list[tuple[int, dict]], rules: dict[int, GroupPlan], state: dict, scaled: bool) -> bool:
        """Same groups, same parameters, same state dictionaries: by identity, without touching a tensor."""
        return (
            self.rules == rules
            and not (scaled and any(not t.live and counts_there(t.device, None, True) for t in self.tables))
            and self.state is state
            and all(lib.same_objects(old, group["params"]) for old, (_, group) in zip(self.params, groups))
            and lib.same_values(self.entries, state)
        )

    def prepare(self) -> bool:
        if any(grad is not None for grad in lib.gradients(self.idle)):
            return False
        return all(table.prepare() for table in self.tables)
