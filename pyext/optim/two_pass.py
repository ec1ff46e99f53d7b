"""What SAM and its variants share: two passes around any optimizer, and the way back."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from steepest import _native, check, norms, sam_ops
from steepest.distributed.shards import reaches_of
from steepest.optim.away import Away
from steepest.optim.freeze import frozen_batchnorm
from steepest.optim.hooks import hooked
from steepest.sam_ops import Weighing
from steepest.storage import whole

OPTIONS = ("rho", "adaptive", "eta")  # of a param group


class TwoPass(torch.optim.Optimizer):
    """What SAM and its variants share: go up, take the gradient there, come back, let the base optimizer step.

    Param groups, state, learning rates and checkpoints are the base optimizer's own; a group may have its own `rho`,
    `adaptive` and `eta`.  Subclasses say along which vectors to climb (`vectors`) and which gradient the base optimizer
    gets (`combine`).
    """

    # torch.amp.GradScaler leaves unscaling and skipping to the step, which handles both for every base optimizer.
    _step_supports_amp_scaling = True
    profile_hook_step = staticmethod(hooked)
    keeps_first = False  # whether the gradients of the first pass are needed after the second
    needs_scale = False  # whether vectors of different steps are added, so that a GradScaler's scale matters
    down = False  # whether the weights move against their vectors

    def __init__(
        self, base_optimizer: torch.optim.Optimizer, rho: float = 0.05, p: float = 2.0, adaptive: bool = False, *,
        eta: float = 0.01, model: torch.nn.Module | None = None, per_rank: bool | None = None,
        reduce_norm: Callable[[Tensor, float], Tensor] | None = None, skip_nonfinite: bool = False, seed: int = 0,
    ):  # fmt: skip
        name = type(self).__name__
        if not isinstance(base_optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"{name}: base_optimizer is {base_optimizer!r}, expected an instance of an optimizer, "
                f"as in {name}(steepest.optim.AdamW(model.parameters()))"
            )
        self.base_optimizer = base_optimizer
        self.own_defaults = {"rho": rho, "adaptive": adaptive, "eta": eta}
        self.p, self.q = p, sam_ops.dual(name, p)
        self.model, self.per_rank = model, _checked_per_rank(name, model, per_rank)
        self.reduce_norm, self.skip_nonfinite = reduce_norm, skip_nonfinite
        self.seed, self.passes = whole(name, "seed", seed), 0  # of stochastic rounding
        self.__setstate__({})
        self._fill_groups()

    @property
    def param_groups(self) -> list[dict]:
        return self.base_optimizer.param_groups

    @property
    def state(self):
        return self.base_optimizer.state

    @property
    def defaults(self) -> dict:
        return self.base_optimizer.defaults

    def add_param_group(self, param_group: dict) -> None:
        self._require_home("add_param_group")
        self.base_optimizer.add_param_group(param_group)
        self._fill_groups()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base_optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """The base optimizer's, with what a variant keeps under "two_pass"; never copies of weights, at any time."""
        packed = self.base_optimizer.state_dict()
        return packed | {"two_pass": self.kept_state() | {"passes": self.passes}}

    def load_state_dict(self, state_dict: dict) -> None:
        self._require_home("load_state_dict")
        self.base_optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != "two_pass"})
        self._fill_groups()
        kept = state_dict.get("two_pass", {})
        self.passes = kept.get("passes", 0)
        self.load_kept_state(kept)

    def __getstate__(self) -> dict:
        self._require_home("pickling or copying")
        # `step` is there when a learning-rate scheduler has wrapped it, for itself.
        return {name: value for name, value in self.__dict__.items() if name[0] != "_" and name != "step"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # torch adds hooks and profiling; groups and state are the base optimizer's
        self.steepness: sam_ops.Steepness | None = None  # of the last first pass
        self._between = False  # the first pass is done, the second is not
        self._away = Away(self.base_optimizer, self.seed)
        self._first: dict[Tensor, Tensor] = {}  # gradients of the first pass

    def __repr__(self) -> str:
        return f"{type(self).__name__}(p={self.p}, {self.own_defaults}, {self.base_optimizer!r})"

    def _fill_groups(self) -> None:
        for number, group in enumerate(self.param_groups):
            for option, value in self.own_defaults.items():
                group.setdefault(option, value)
            self._hyper_row(number, group)

    def _hyper_row(self, number: int, group: dict) -> tuple:
        where = f"{type(self).__name__}: param group {number}"
        rho, eta = (check.number(where, name, group[name], 0) for name in ("rho", "eta"))
        return sam_ops.row(where, rho, Weighing.of(group["adaptive"], eta), self.q, self.passes + 1)

    def vectors(self, scale: float) -> list[tuple[int, Tensor, Tensor]]:
        """Group number, parameter, and the vector whose steepest ascent it follows, of all that are to move.

        scale: what a GradScaler multiplied the gradients by.
        """
        groups = enumerate(self.param_groups)
        return [(i, p, p.grad) for i, group in groups for p in group["params"] if p.grad is not None]

    def combine(self, scale: Tensor | None) -> None:
        """Turns the gradients of the second pass into what the base optimizer gets; first ones are in self._first.

        scale: what a GradScaler multiplied both by.
        """

    def kept_state(self) -> dict:
        return {}

    def load_kept_state(self, kept: dict) -> None:
        pass

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, scale: float = 1.0) -> None:
        """After the first backward pass: moves the weights to where the loss is highest nearby.

        zero_grad: also clear the gradients, for the second pass.  scale: what a GradScaler multiplied the loss by;
        only FriendlySAM, which averages gradients over steps, needs it.
        """
        self._require_home("first_step")
        op = f"{type(self).__name__}.first_step"
        hyper = [self._hyper_row(i, group) for i, group in enumerate(self.param_groups)]
        weighing = [Weighing.of(group["adaptive"], float(group["eta"])) for group in self.param_groups]
        self.passes += 1
        usual = type(self).vectors is TwoPass.vectors and len(set(weighing)) == 1
        kept = self._away.kept_climb(op, self.param_groups) if usual else None
        if kept is not None:
            part = kept.part(weighing[0])
            device = kept.params[0].device
            self.steepness = sam_ops.measure_parts([part], self.q, device, self.reduce_norm, kept.reaches)
            kept.run(op, hyper, self.q, self.steepness, maximize=self.down)
            self._away.params, self._away.homes = kept.params, kept.homes
        else:
            self._climb(op, hyper, weighing, scale)
        self._between = True
        if self.keeps_first:
            self._keep_first()
        if zero_grad:
            self.zero_grad()

    def _climb(self, op: str, hyper: list[tuple], weighing: list[Weighing], scale: float) -> None:
        """Any climb: along other vectors than the gradients, of weights kept in different ways."""
        _check_gradients(type(self).__name__, self.param_groups)
        rows = self.vectors(scale)
        groups, params, vectors = ([row[k] for row in rows] for k in range(3))
        kinds, homes = self._away.homes_of([(self.param_groups[i], p) for i, p, _ in rows])
        weights = [home if kind == "masters" else p for kind, p, home in zip(kinds, params, homes)]
        reaches = reaches_of(p for group in self.param_groups for p in group["params"])
        weighed = [weighing[i] for i in groups]
        self.steepness = sam_ops.measure(vectors, weights, weighed, self.q, self.reduce_norm, reaches)
        self._away.climb(
            op, params, vectors, kinds, homes, hyper, groups, self.q, self.steepness, maximize=self.down
        )  # fmt: skip

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """After the second backward pass: back to the weights before `first_step`, bit for bit, and the base step."""
        if not self._between:
            raise RuntimeError(
                f"{type(self).__name__}.second_step: the weights are not perturbed; call first_step() after the first "
                "backward pass, or step(closure)"
            )
        self._finish(self.combine)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Gives a step up between its passes: puts weights back, bit for bit.  Does nothing at other times."""
        self._away.come_home()
        self._between, self._first = False, {}

    @property
    def perturbed(self) -> bool:
        """Whether the optimizer is between the two passes, with weights away from where the last step left them."""
        return self._between

    def step(self, closure: Callable | None = None, *, scaler=None):
        """Both passes: calls the closure twice and returns its first loss; after first_step() without one, the rest.

        closure: as torch.optim has it: clears the gradients, computes the loss, calls backward, returns the loss.
        scaler: a torch.amp.GradScaler whose scale() the closure applies to the loss; it then drives the base step.

        An exception in the closure leaves the weights as they were before the step.
        """
        if closure is None:
            return self.second_step()
        self._require_home("step")
        with self.first_pass(), torch.enable_grad():
            loss = closure()
        self.first_step(scale=scaler.get_scale() if scaler is not None and self.needs_scale else 1.0)
        with self.descent(scaler=scaler), torch.enable_grad():
            closure()
        return loss

    @contextmanager
    def ascent(self, *, scale: float = 1.0):
        """with optimizer.ascent(): first forward and backward pass.  On leaving, the weights are perturbed and the
        gradients cleared; an exception inside leaves the weights alone."""
        self._require_home("ascent")
        with self.first_pass():
            yield
        self.first_step(zero_grad=True, scale=scale)

    @contextmanager
    def descent(self, *, scaler=None):
        """with optimizer.descent(): second forward and backward pass.  On leaving, the weights are restored and
        stepped; an exception inside restores them.  (Or run the second pass without this and call step().)"""
        try:
            with self.second_pass():
                yield
            self.second_step() if scaler is None else scaler.step(self)
        finally:
            self.restore()

    @contextmanager
    def first_pass(self):
        """What the first pass runs in: without gradient averaging where ranks perturb on their own."""
        with ExitStack() as stack:
            if self.per_rank:
                stack.enter_context(self.model.no_sync())
            yield

    @contextmanager
    def second_pass(self):
        """What the second pass runs in: with running statistics frozen."""
        with ExitStack() as stack:
            if self.model is not None:
                stack.enter_context(frozen_batchnorm(self.model))
            yield

    def _finish(self, combine: Callable[[Tensor | None], None]) -> None:
        scale, found = getattr(self, "grad_scale", None), self._found_inf(getattr(self, "found_inf", None))
        try:
            if found is not None and not self._decides_there(found.device):
                if bool(found):
                    return
                found = None
            combine(scale)
            self._base_step(scale, found)
        finally:
            self.restore()

    def _decides_there(self, device: torch.device) -> bool:
        """Whether the base optimizer can find out by itself, on a device, that its step is to be skipped."""
        # A combination of both passes' gradients would be made of inf and NaN, and be remembered.
        combines = type(self).combine is not TwoPass.combine or self.keeps_first
        supports = getattr(self.base_optimizer, "_step_supports_amp_scaling", False)
        return _native.asynchronous(device) and supports and not combines

    def _base_step(self, scale: Tensor | None, found: Tensor | None = None) -> None:
        """One step of the base optimizer from the weights' homes, with gradients that a GradScaler has scaled.

        found: whether there was inf or NaN, where only the device knows; the weights then come home there.
        """
        base = self.base_optimizer
        sources = self._away.sources()
        step = base.step if not sources else functools.partial(base.step, sources=sources)
        if scale is None and found is None:
            step()
        elif getattr(base, "_step_supports_amp_scaling", False):
            base.grad_scale = torch.ones((), device=found.device) if scale is None else scale
            base.found_inf = torch.zeros_like(scale) if found is None else found.float()
            try:
                step()
                if found is not None:
                    self._away.come_home(unless=(~found).float())
            finally:
                del base.grad_scale, base.found_inf
        else:
            for grad in self._gradients():
                grad.div_(scale.to(grad.device))
            step()
        self._away.arrived()

    def _found_inf(self, found: Tensor | None) -> Tensor | None:
        """Whether the step must be skipped: a GradScaler found inf or NaN in the second pass, or there was one in the
        first; without a scaler, only if asked to look."""
        if found is None and not self.skip_nonfinite:
            return None
        flags = [] if found is None else [found.reshape(()) != 0]
        if self.steepness is not None:
            flags.append(self.steepness.nonfinite)
        if self.skip_nonfinite:
            flags.append(norms.survey(self._gradients(), q=math.inf).nonfinite)
        if len(flags) == 1:
            return flags[0]
        return torch.stack([flag.to(flags[0].device) for flag in flags]).any()

    def _keep_first(self) -> None:
        """Takes the gradients away from their parameters, so that the second pass makes new ones.  Views into larger
        buffers (DistributedDataParallel's buckets) will be overwritten and are copied."""
        for p in self._parameters():
            if p.grad is None:
                continue
            grad = p.grad
            owned = grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()
            self._first[p] = grad if owned else grad.clone()
            if owned:
                p.grad = None

    def _blend(self, first: float | Tensor, second: float | Tensor) -> None:
        """gradient <- first * (that of the first pass) + second * (that of the second); a missing one counts as 0."""
        params = [p for p in self._parameters() if p.grad is not None or p in self._first]
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in params]
        if grads:
            torch._foreach_mul_(grads, second)
        both = [p for p in params if p in self._first]
        if both:
            torch._foreach_add_([p.grad for p in both], torch._foreach_mul([self._first[p] for p in both], first))

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters() if p.grad is not None]

    def _by_index(self, kept: dict[Tensor, Tensor]) -> dict[int, Tensor]:
        """For checkpoints, as torch.optim numbers parameters."""
        return {i: kept[p] for i, p in enumerate(self._parameters()) if p in kept}

    def _by_parameter(self, kept: dict[int, Tensor]) -> dict[Tensor, Tensor]:
        params = self._parameters()
        return {params[i]: value.to(params[i].device, copy=True) for i, value in kept.items()}

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of both passes, of the parameters that have both."""
        both = [p for p in self._first if p.grad is not None]
        return [self._first[p] for p in both], [p.grad for p in both]

    def _require_home(self, what: str) -> None:
        if self._between:
            raise RuntimeError(
                f"{type(self).__name__}: {what} while the weights are perturbed: call second_step() or restore() first"
            )


def _check_gradients(name: str, groups: list[dict]) -> None:
    for number, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ValueError(f"{name}: param group {number}: gradient {i} is {p.grad.layout}, expected a dense one")


def _checked_per_rank(name: str, model, per_rank: bool | None) -> bool:
    distributed = hasattr(model, "no_sync")
    if per_rank and not distributed:
        raise ValueError(
            f"{name}: per_rank=True needs model=, a DistributedDataParallel module, to leave out its averaging in the "
            f"first pass; found {type(model).__name__}"
        )
    if distributed and per_rank is None:
        raise ValueError(
            f"{name}: model is {type(model).__name__}: say per_rank=True (each rank climbs its own gradient: "
            "m-sharpness, as in the paper) or per_rank=False (all climb the averaged one)"
        )
    return bool(per_rank)
