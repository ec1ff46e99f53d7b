"""Options that all elementwise optimizers share.

decoupled_weight_decay: p (1 - lr weight_decay) before the rule instead of weight_decay p added to the gradient.
cautious: decoupled decay only where the step moves towards zero (Chen et al. 2025, "Cautious Weight Decay").
l1: decoupled l1 decay, p = sign(p) max(|p| - lr l1, 0) after the rule: weights become exactly zero.
clip_value: gradients are clamped to +-clip_value inside the step, and not written.
maximize: ascend.
max_grad_norm: gradients are clipped by their joint norm over all groups inside the step, as by clip_grad_norm_, and
    not written; `optimizer.grad_norm` is the norm of the last step.
foreach, fused: accepted for compatibility with torch.optim and without effect; the step is always fused.
capturable: steps are counted where the parameters live, state["step"] being there too, and lr, weight_decay and betas
    may be one-element float32 or float64 tensors there, which each step reads: a CUDA graph of the step, replayed,
    does what calling it would.  Take a step or two before the capture, so that states exist; numbers that are not
    tensors are part of the graph.  Also allowed on the CPU, where torch's optimizers refuse it at the first step.
    (Under torch.amp.GradScaler steps of parameters on a GPU are counted there in any case, because only it knows which
    are skipped.)
differentiable: must be False.

How parameters and states are kept (keyword arguments of every elementwise optimizer and options of its param groups;
what they mean exactly: steepest.storage)::

    master_weights       16-bit parameters have a float32 master, state "master"; the step works on it and the parameter
                         gets its rounded copy.  float32 parameters in the same group are their own masters
    correction_bits      16 or 8: bfloat16 parameters keep what they lack of a float32 in an int16 (state "residual",
                         exact) or an int8 (24 bits in all)
    stochastic_rounding  bfloat16 parameters and bfloat16 states are rounded at random, without bias
    state_dtype          of the states: torch.float32, bfloat16 or float16, or "block8", 8-bit floating point in blocks
                         of 128 with a common exponent.  None: float32 beside a master or correction bits, otherwise
                         the parameter's (states that a checkpoint brings are then taken as they are)
    ema_decay            keep a float32 average of the weights, state "ema", ema = ema + (1 - ema_decay) (p - ema), in
                         the same pass; see FusedOptimizer.ema_weights
    gradient_noise       (eta, gamma): gradients get normal noise of variance eta / (1 + t)^gamma
    seed                 of noise, stochastic rounding and 8-bit states: with step and element number all that random
                         numbers depend on, so that a run repeats itself and checkpoints need no generator state

Memory and traffic of AdamW, bytes per parameter with its gradient: float32 16 and 28; bfloat16 with master 16 and 28;
with correction_bits=16 14 and 26, 8: 13 and 24; with correction_bits=8 and state_dtype="block8" 7.02 and 12.03.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steepest import _native, check, storage
from steepest.rules import Rule
from steepest.storage import Storage

SHARED = ("maximize", "cautious", "l1", "clip_value", "decoupled_weight_decay")
CAPTURABLE = dict(capturable=False)  # of optimizers that torch's take no such argument for
TORCH = dict(foreach=None, fused=None, capturable=False, differentiable=False)


def shared_defaults(maximize, cautious, l1, clip_value, decoupled_weight_decay) -> dict:
    return dict(
        maximize=maximize, cautious=cautious, l1=l1, clip_value=clip_value,
        decoupled_weight_decay=decoupled_weight_decay,
    )  # fmt: skip


def of_rule(group: dict) -> dict:
    """The shared options as the constructors of rules.py take them."""
    return dict(
        maximize=group["maximize"], decoupled=group["decoupled_weight_decay"], cautious=group["cautious"],
        clip_value=group["clip_value"],
    )  # fmt: skip


PRECISION = dict(
    master_weights=False, correction_bits=0, stochastic_rounding=False, state_dtype=None, ema_decay=None,
    gradient_noise=None, seed=0,
)  # fmt: skip
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
# Keys of optimizer.state[p] that hold a call's lists.
KEYS = {"masters": "master", "residuals": "residual", "averages": "ema"}


def precision_defaults(name: str, given: dict) -> dict:
    """What was given of the options above (checkpoints stay torch's where nothing was); raises for unknown names."""
    known = (*PRECISION, *CAPTURABLE)
    for option in given:
        if option not in known:
            raise TypeError(f"{name}: unknown argument {option!r}; known besides the rule's: {', '.join(known)}")
    return given


# Options of a capturable group that may be tensors, by their places in rules.HYPER.
LIVE = {"lr": (0,), "weight_decay": (1,), "betas": (3, 4)}


def without_tensors(where: str, group: dict) -> tuple[dict, tuple[tuple[int, Tensor], ...]]:
    """A capturable group with numbers in the place of its tensors, and these with their places in rules.HYPER.

    The number is the tensor's on the CPU; on a device it is 0: the step reads it there, and the host must not wait.
    """
    if not group.get("capturable"):
        return group, ()
    known, tensors = dict(group), []
    for name, places in LIVE.items():
        value = group.get(name)
        several = isinstance(value, (tuple, list))
        values = list(value) if several else [value]
        if not any(isinstance(one, Tensor) for one in values) or len(values) != len(places):
            continue
        for k, one in enumerate(values):
            if not isinstance(one, Tensor):
                continue
            if one.numel() != 1 or one.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{where}: {name} is a {one.dtype} tensor of shape {tuple(one.shape)}, expected one float32 or "
                    "float64 element"
                )
            tensors.append((places[k], one))
            values[k] = 0.0 if _native.asynchronous(one.device) else one.item()
        known[name] = tuple(values) if several else values[0]
    return known, tuple(tensors)


@dataclass(frozen=True)
class Precision:
    """A group's options on how tensors are kept, checked."""

    masters: bool
    correction_bits: int
    stochastic: bool
    state_dtype: torch.dtype | str | None
    averages: bool
    noise: bool
    seed: int

    @classmethod
    def of(cls, where: str, group: dict) -> Precision:
        option = {name: group.get(name, default) for name, default in PRECISION.items()}
        bits, dtype = option["correction_bits"], option["state_dtype"]
        if bits not in (0, 8, 16):
            raise ValueError(f"{where}: correction_bits is {bits!r}, expected 0, 8 or 16")
        if dtype not in (None, "block8", *check.DTYPES):
            raise ValueError(
                f"{where}: state_dtype is {dtype!r}, expected None, torch.float32, bfloat16, float16 or 'block8'"
            )
        chosen = [name for name in ("master_weights", "correction_bits", "stochastic_rounding") if option[name]]
        if len(chosen) > 1:
            raise ValueError(f"{where}: {' and '.join(chosen)} exclude each other: each keeps bfloat16 in its own way")
        storage.numbers(where, option["gradient_noise"], option["ema_decay"])
        precision = cls(
            bool(option["master_weights"]), bits, bool(option["stochastic_rounding"]), dtype,
            option["ema_decay"] is not None, option["gradient_noise"] is not None,
            storage.whole(where, "seed", option["seed"]),
        )  # fmt: skip
        for p in group["params"]:
            precision._check(where, p.dtype)
        return precision

    def _check(self, where: str, dtype: torch.dtype) -> None:
        if dtype == torch.float16 and (self.correction_bits or self.stochastic):
            what = "correction_bits" if self.correction_bits else "stochastic_rounding"
            raise ValueError(f"{where}: {what} is for bfloat16 parameters, found float16; master_weights is for both")
        if self.stochastic and self.state_dtype == torch.float16:
            raise ValueError(f"{where}: stochastic_rounding is to bfloat16, expected another state_dtype than float16")

    @property
    def plain(self) -> bool:
        return not (self.masters or self.correction_bits or self.stochastic or self.state_dtype or self.averages)

    def states(self, dtype: torch.dtype) -> torch.dtype | None:
        """What states of a parameter of this type must be; None: as they are."""
        if self.state_dtype == "block8":
            return torch.uint8
        if self.state_dtype is None and (self.masters or self.correction_bits) and dtype in SIXTEEN_BIT:
            return torch.float32
        return self.state_dtype

    def applied(self, rule: Rule, dtype: torch.dtype) -> Rule:
        """The rule as it is for parameters of this type."""
        if self.plain and not self.noise:
            return rule
        lists = []
        if self.masters and dtype in SIXTEEN_BIT:
            lists.append("masters")
        if self.correction_bits and dtype == torch.bfloat16:
            lists.append("residuals")
        if self.averages:
            lists.append("averages")
        block8 = self.state_dtype == "block8" and bool(rule.states)
        stochastic = self.stochastic and torch.bfloat16 in (dtype, self.state_dtype)
        return replace(rule, storage=Storage(tuple(lists), block8, stochastic, self.seed))

    def draws(self, rule: Rule) -> bool:
        """Whether the step needs random numbers."""
        return self.noise or rule.storage.stochastic or rule.storage.block8
