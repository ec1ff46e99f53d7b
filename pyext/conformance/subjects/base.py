"""What every adapter shares: one step of a foreign optimizer with given states, and the polar factor."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.conformance.memory import differing
from steepest.conformance.registry import Backend, Figure


@dataclass(frozen=True)
class Subject(Backend):
    """A column of the table.  `arithmetic` says how it rounds, and so by what bound it is judged: an
    `adamw_judge.Arithmetic` or a `polar_judge.Arithmetic`."""

    exact: bool = False
    op: str = ""
    arithmetic: Any = None


@contextmanager
def refusals(tensors: list[Tensor]):
    """An exception with the tensors unchanged is a refusal ("unsupported"); after a change it stays an error."""
    before = [x.detach().clone() for x in tensors]
    try:
        yield
    except NotImplementedError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if any(differing(x, old) for x, old in zip(tensors, before)):
            raise RuntimeError(f"changed its arguments, then raised {text}") from error
        raise NotImplementedError(f"raises {text}") from error


class AdamWAdapter:
    """`steepest.adamw_` over another library's optimizer.

    As in training, the tensors become `torch.nn.Parameter`s, gradients go in through `.grad`, and one optimizer serves
    all consecutive steps.  The given states are put into its state and taken out again.  A state tensor is used as it
    is when the library would have allocated it with these strides; otherwise it is copied into one that the library
    would have allocated, so that nobody is blamed for a layout that a user cannot produce.
    """

    amsgrad = maximize = scaling = False  # what the library offers
    state_dtype: torch.dtype | None = None  # None: the parameter's

    def __init__(self):
        self.params = None  # the list being stepped

    # --- what a library's file defines ---

    def build(self, parameters: list[Tensor], **hyper):
        """The optimizer; hyper: lr, betas, eps, weight_decay, and amsgrad, maximize where offered."""
        raise NotImplementedError

    def give(self, parameter: Tensor, done: int, m: Tensor, v: Tensor, vmax: Tensor | None) -> None:
        """Make (m, v, vmax) the state of a parameter after `done` steps."""
        raise NotImplementedError

    def take(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """The state's m, v and, where there is one, vmax."""
        raise NotImplementedError

    def scale(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Tell the optimizer what torch.amp.GradScaler would tell it; only called when `scaling`."""

    # --- the op's signature ---

    def __call__(
        self,
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        *,
        lr,
        betas,
        eps,
        weight_decay,
        step,
        max_exp_avg_sqs=None,
        maximize=False,
        grad_scale=None,
        found_inf=None,
    ):
        states = [exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if max_exp_avg_sqs is not None else [])]
        self._refuse(params, grads, states, maximize, grad_scale, found_inf)
        with refusals([x for tensors in (params, *states) for x in tensors]):
            if params is not self.params:
                self.params, self.moved = params, 0
                self.parameters = [torch.nn.Parameter(p) for p in params]
                options = {"amsgrad": max_exp_avg_sqs is not None} if self.amsgrad else {}
                options |= {"maximize": maximize} if self.maximize else {}
                hyper = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
                self.optimizer = self.build(self.parameters, **hyper, **options)
                for i, parameter in enumerate(self.parameters):
                    given = [self._allocated(parameter, tensors[i]) for tensors in states]
                    self.give(parameter, step - 1, *given, *[None] * (3 - len(given)))
            for parameter, grad in zip(self.parameters, grads):
                parameter.grad = grad
            if self.scaling:
                self.scale(grad_scale, found_inf)
            self.optimizer.step()
        self._write_back(params, states)

    def figures(self) -> list[Figure]:
        note = "parameters that the library moved to other memory: views of them no longer follow"
        return [Figure("moved", self.moved, None, "tensors", note)] if self.moved else []

    def _refuse(self, params, grads, states, maximize, grad_scale, found_inf):
        if any(g.dtype != p.dtype for p, g in zip(params, grads)):
            raise NotImplementedError("gradients have their parameter's dtype")
        kept = self.state_dtype or params[0].dtype
        if states[0][0].dtype != kept:
            raise NotImplementedError(f"keeps states in {str(kept).removeprefix('torch.')}")
        if len(states) > 2 and not self.amsgrad:
            raise NotImplementedError("no AMSGrad")
        if maximize and not self.maximize:
            raise NotImplementedError("no maximize")
        if (grad_scale is not None or found_inf is not None) and not self.scaling:
            raise NotImplementedError("no grad_scale and found_inf in the step")

    @staticmethod
    def _allocated(parameter: Tensor, given: Tensor) -> Tensor:
        own = torch.zeros_like(parameter, dtype=given.dtype, requires_grad=False)
        return given if given.stride() == own.stride() else own.copy_(given)

    @torch.no_grad()
    def _write_back(self, params, states):
        """What the library keeps elsewhere goes into the tensors that the op was given."""
        for i, (parameter, p) in enumerate(zip(self.parameters, params)):
            if parameter.data_ptr() != p.data_ptr():
                self.moved += 1
            for given, now in [(p, parameter), *zip((tensors[i] for tensors in states), self.take(parameter))]:
                if now.data_ptr() != given.data_ptr():
                    given.copy_(now)


class PolarAdapter:
    """`steepest.polar` over another library; `schedule` is the one it uses, and what its cases ask for."""

    two_dimensional = False

    def __init__(self, schedule):
        self.schedule = schedule

    def polar(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, x, *, schedule, steps, lower, tol):
        if self.two_dimensional and x.dim() != 2:
            raise NotImplementedError("takes one matrix at a time")
        with refusals([x]):
            return self.polar(x)

    def figures(self) -> list[Figure]:
        return []
