"""What all elementwise optimizers share: torch's bookkeeping outside, one kernel call for all groups inside."""

from __future__ import annotations

import contextlib
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from steepest import _native, check, norms, storage
from steepest._native import lib
from steepest.distributed.norms import reduce_parts
from steepest.distributed.shards import check_parameters
from steepest.ops_steps import enlist, traced_step
from steepest.optim import options
from steepest.optim.hooks import hooked
from steepest.optim.options import KEYS, PRECISION, Precision
from steepest.optim.state import ParamState
from steepest.optim.table import MAGNITUDES, NO_SCALARS, GroupPlan, GroupRule, Numbers, Table, TableSet, decoded
from steepest.rules import hyper_fields


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the elementwise optimizers; `step_rule` is also what Muon calls for its AdamW groups.

    max_grad_norm: clip all gradients by their joint norm inside the step, as clip_grad_norm_(parameters, max_grad_norm)
        before it would, without writing them; the norm of the last step is in `grad_norm`.
    """

    # torch.amp.GradScaler leaves unscaling and skipping to the step.
    _step_supports_amp_scaling = True
    # SAM asks whether step() takes `sources`; a class with a step of its own says False unless it does.
    _step_takes_sources = True
    kind: GroupRule  # of optimizers with one rule for all groups
    profile_hook_step = staticmethod(hooked)
    # Options that cannot have another value.
    fixed: ClassVar[dict[str, object]] = {"differentiable": False}

    def __init__(self, params, defaults: dict, *, max_grad_norm: float | None = None):
        self._tables: dict[str, TableSet] = {}
        self._known: dict[int, tuple] = {}
        if max_grad_norm is not None:
            max_grad_norm = check.number(type(self).__name__, "max_grad_norm", max_grad_norm, 0)
        self.max_grad_norm, self._grad_norm, self._coefficient = max_grad_norm, None, Scalar()
        self.number_in_graphs = enlist(self)
        super().__init__(params, defaults)
        self.state = defaultdict(ParamState)

    def _check_group(self, number: int, group: dict) -> None:
        """Raises for a group whose options are wrong; called at construction, add_param_group and loading."""
        where = f"{type(self).__name__}: param group {number}"
        known, _ = options.without_tensors(where, group)
        self.kind.numbers(where, known)
        self.kind.rule(known)
        Precision.of(where, group)
        for option, value in self.fixed.items():
            if option in group and group[option] != value:
                raise ValueError(f"{where}: {option}={group[option]!r} is not supported, expected {value!r}")

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(len(self.param_groups) - 1, self.param_groups[-1])
            check_parameters(type(self).__name__, self.param_groups[-1]["params"])
        except Exception:
            self.param_groups.pop()
            raise
        self._tables.clear()
        # What torch.compile reads instead of param_groups, which would make it compile anew for each learning rate.
        self.listed_params = [p for group in self.param_groups for p in group["params"]]

    def __getstate__(self) -> dict:
        kept = {key: value for key, value in super().__getstate__().items() if key not in ("_tables", "_known")}
        return kept | {"max_grad_norm": self.max_grad_norm}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._tables, self._known = {}, {}
        self.number_in_graphs = enlist(self)
        self.listed_params = [p for group in self.param_groups for p in group["params"]]
        self.__dict__.setdefault("max_grad_norm", None)
        self._grad_norm, self._coefficient = None, Scalar()
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
        """As torch's, but states keep the dtype that they were saved in: torch rounds them to the parameter's."""
        super().load_state_dict(state_dict)
        _restore_dtypes(self, state_dict)
        self._tables.clear()
        for number, group in enumerate(self.param_groups):
            self._check_group(number, group)

    @torch.no_grad()
    def step(self, closure=None, *, sources: dict[Tensor, Tensor] | None = None):
        """One step; returns the closure's loss, if there is a closure.  `sources`: see Table.run."""
        if torch.compiler.is_compiling():
            return traced_step(self, closure)
        loss = run_closure(closure)
        self.step_rule(self.kind, list(enumerate(self.param_groups)), sources)
        return loss

    def step_rule(
        self, kind: GroupRule, groups: list[tuple[int, dict]], sources: dict[Tensor, Tensor] | None = None
    ) -> None:
        """One step for the numbered groups, in as few kernel calls as their rules allow.

        All rows of all calls are checked before the first is stepped.  A step that a GradScaler found inf or NaN in
        changes nothing and is not counted.  `sources`: see Table.run.
        """
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        rules, hyper = self._rules_and_numbers(kind, groups)
        tables = self._prepared_tables(kind, groups, rules, found_inf is not None)
        if found_inf is not None and not all(table.live for table in tables):
            if bool(found_inf != 0):
                return
            found_inf = None
        if hasattr(sources, "settle"):
            sources.settle([table.params for table in tables])
        coefficient = None
        if self.max_grad_norm is not None:
            coefficient = self._clip(self._tables[kind.name], grad_scale)
        scalars = (grad_scale, coefficient, found_inf)
        for table in tables:
            table.run(hyper, NO_SCALARS if all(scalar is None for scalar in scalars) else scalars, sources)

    def steps_all(self, params: list[Tensor]) -> bool:
        """Whether the coming step will be one kernel call for these parameters, all of which have been stepped before,
        if all have gradients now; one that has come since the last step turns up in the step itself."""
        cached = self._tables.get(self.kind.name)
        return cached is not None and len(cached.tables) == 1 and lib.same_objects(cached.tables[0].params, params)

    @property
    def grad_norm(self) -> Tensor | None:
        """The gradients' joint norm before the last step clipped them, 0-dim float32; None before the first."""
        if isinstance(self._grad_norm, float):
            self._grad_norm = torch.tensor(self._grad_norm, dtype=torch.float32)
        return self._grad_norm

    def _clip(self, found_tables: TableSet, grad_scale: Tensor | None) -> Tensor | None:
        tables, reaches = found_tables.tables, found_tables.reaches
        if not tables and not reaches:
            return None
        op = f"{type(self).__name__}.step"
        device = next((p.device for params in found_tables.params for p in params), torch.device("cpu"))
        if _native.asynchronous(device):
            return self._clip_there(found_tables, device, grad_scale)
        norm, _ = norms.numbers(
            lambda q, scale: reduce_parts(op, [(t.reach, t.survey(q, scale)) for t in tables], reaches), 2.0
        )
        scale = 1.0 if grad_scale is None else grad_scale.item()
        # Numbers until somebody looks: torch's small operations take 0.2 of 6 ms where their code has left the caches.
        self._grad_norm, coefficient = lib.clip(norm, self.max_grad_norm, scale)
        return self._coefficient.put(coefficient)

    def _clip_there(self, found_tables: TableSet, device: torch.device, grad_scale: Tensor | None) -> Tensor:
        """The same without waiting for a device."""
        scale = None if grad_scale is None else grad_scale.to(device)
        if found_tables.reaches or not _native.has_kernels(device):
            found = norms.of_gradients([p for params in found_tables.params for p in params])
            found = found if scale is None else replace(found, norm=found.norm / scale)
            self._grad_norm = found.norm
            return found.clip_coefficient(self.max_grad_norm)
        measure = norms.new_measure(2.0)
        for table in found_tables.tables:
            table.add_to(measure)
        found = norms.run_measure(measure, device, max_norm=self.max_grad_norm, grad_scale=scale)
        self._grad_norm = found.norm32
        return found.clip_coefficient

    def _rules_and_numbers(self, kind: GroupRule, groups) -> tuple[dict[int, GroupPlan], dict[int, Numbers]]:
        """Each group's rule and checked hyper-parameters, anew only where an option has changed."""
        rules, numbers = {}, {}
        for number, group in groups:
            known = self._known.get(number)
            if known is not None and known[0] is kind and known[4].is_of(group):
                rules[number], numbers[number] = known[2], known[3]
                continue
            tensors, snapshot = (), Snapshot(group)
            if group.get("capturable"):
                group, tensors = options.without_tensors(f"{kind.name}: param group {number}", group)
            given = (*[group[name] for name in kind.options], *[group.get(name) for name in KEPT])
            given = tuple(tuple(value) if isinstance(value, list) else value for value in given)  # lists may change
            if tensors:
                given = (*given, tuple(id(tensor) for _, tensor in tensors))
            if known is None or known[0] is not kind or not _same_options(known[1], given):
                where = f"{kind.name}: param group {number}"
                plan = GroupPlan(kind.rule(group), Precision.of(where, group), bool(group.get("capturable")))
                values = kind.numbers(where, group)
                values |= storage.numbers(where, group.get("gradient_noise"), group.get("ema_decay"))
                known = (kind, given, plan, Numbers(hyper_fields(values), tensors))
            else:
                known = known[:4]
            self._known[number] = (*known, snapshot)
            rules[number], numbers[number] = known[2], known[3]
        return rules, numbers

    def _prepared_tables(
        self, kind: GroupRule, groups: list[tuple[int, dict]], rules: dict[int, GroupPlan], scaled: bool = False
    ) -> list[Table]:
        """`scaled`: under a GradScaler, which may have found that the step must be skipped."""
        cached = self._tables.get(kind.name)
        if cached is not None and cached.fits(groups, rules, self.state, scaled) and cached.prepare():
            return cached.tables
        fresh = TableSet(kind, groups, rules, self.state, scaled)
        self._tables[kind.name] = fresh
        if not fresh.prepare():
            raise RuntimeError(f"{kind.name}: gradients or states changed while the step was being prepared")
        return fresh.tables

    def torch_state_dict(self) -> dict:
        """A checkpoint for the torch.optim class of the same name: states in the parameters' dtypes, nothing else.

        What only this library keeps (masters, correction bits, averages, 8-bit codes) is decoded or left out.
        """
        packed = self.state_dict()
        params = dict(enumerate(p for group in self.param_groups for p in group["params"]))
        for number, entry in packed["state"].items():
            p, plain = params[number], {}
            for key, value in entry.items():
                if key in KEYS.values() or key.endswith("_exponents"):
                    continue
                if isinstance(value, Tensor) and value.dtype == torch.uint8:
                    value = decoded(value, entry[f"{key}_exponents"], p, f"{key}s" in MAGNITUDES)
                plain[key] = value if key == "step" or not isinstance(value, Tensor) else value.to(p.dtype)
            packed["state"][number] = plain
        for group in packed["param_groups"]:
            for name in PRECISION:
                group.pop(name, None)
            if all(params[number].device.type == "cpu" for number in group["params"]) and "capturable" in group:
                group["capturable"] = False  # torch refuses it on the CPU
        return packed

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within the context parameters have the values of their averages; afterwards their own, bit for bit.

        Raises ValueError if no group has ema_decay, or if no step has been taken.
        """
        kept = [
            (p, self.state[p]["ema"]) for group in self.param_groups for p in group["params"] if "ema" in self.state[p]
        ]
        if not kept:
            raise ValueError(f"{type(self).__name__}.ema_weights: no averages yet; set ema_decay and take a step")
        own = [p.detach().clone() for p, _ in kept]
        with torch.no_grad():
            for p, ema in kept:
                p.copy_(ema)
        try:
            yield
        finally:
            with torch.no_grad():
                for (p, _), value in zip(kept, own):
                    p.copy_(value)

    @torch.no_grad()
    def reset_masters(self) -> None:
        """Takes masters and correction bits anew from the parameters, after somebody else has written these."""
        for p, entry in self.state.items():
            if "master" in entry:
                entry["master"].copy_(p)
            if "residual" in entry:
                entry["residual"].zero_()


def _restore_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict) -> None:
    """Puts saved values in the place of those that torch's load_state_dict has rounded."""
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in zip(numbers, params):
        for key, saved in state_dict["state"].get(number, {}).items():
            loaded = optimizer.state[p].get(key)
            if not isinstance(saved, Tensor) or not isinstance(loaded, Tensor) or saved.dtype == loaded.dtype:
                continue
            rounded = saved.to(device=loaded.device, dtype=loaded.dtype)
            # Otherwise a load hook has put something else there.
            if torch.equal(rounded.nan_to_num(), loaded.nan_to_num()):
                optimizer.state[p][key] = saved.to(device=loaded.device, copy=True)


# Options of a group that its rule does not read, and its plan does.
KEPT = (*PRECISION, "capturable")


class Snapshot:
    """Whether a param group still holds the very objects that it held: 0.5 us, where comparing its options takes 4.

    Tensors and lists may have been written to, so that a group with one is never known to be the same; that of its
    parameters is compared elsewhere (TableSet.fits).
    """

    def __init__(self, group: dict):
        self.names, self.values = list(group), list(group.values())
        self.settled = not any(isinstance(group[name], (Tensor, list)) for name in self.names if name != "params")

    def is_of(self, group: dict) -> bool:
        return (
            self.settled
            and len(group) == len(self.values)
            and all(map(operator.is_, self.values, group.values()))
            and self.names == list(group)
        )


class Scalar:
    """A 0-dim float32 tensor on the CPU that is written to by numpy, in a tenth of torch's time."""

    def __init__(self):
        self.tensor = torch.zeros((), dtype=torch.float32)
        self.memory = self.tensor.numpy()

    def put(self, value: float) -> Tensor:
        self.memory[...] = value
        return self.tensor


def _same_options(old: tuple, new: tuple) -> bool:
    """Tensors never count as the same: they may have been written to."""
    return not any(isinstance(value, Tensor) for value in new) and old == new


def run_closure(closure: Callable | None):
    """The closure's loss, with gradients enabled, as torch.optim does it; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
