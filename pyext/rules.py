"""The update rules of the elementwise engine as Python names them: what the C interface calls a rule, flags and hyper.

One `Rule` says everything that a kernel call cannot mix: tensors that differ in it go to different calls.  Numbers that
differ from group to group (learning rates, decays, step counts) are rows of hyper-parameters, and tensors of one call
may refer to different rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from steepest import check
from steepest._native import lib
from steepest.storage import PLAIN, Storage

# Fields of the C struct steepest_hyper before its last one, the step.
HYPER = (
    "lr", "weight_decay", "l1", "beta1", "beta2", "eps", "momentum", "dampening", "alpha", "lr_decay", "noise_eta",
    "noise_gamma", "average_decay", "q",
)  # fmt: skip


@dataclass(frozen=True)
class Rule:
    name: str
    number: int
    flags: int
    states: tuple[str, ...]  # names of the lists of states, in the kernel's order
    clip_value: float = 0.0  # gradients are clamped to +-clip_value; 0: they are not
    storage: Storage = PLAIN

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all lists: parameters, gradients, states, and what the storage adds."""
        return ("params", "grads", *self.states, *self.storage.names(self.states))

    @property
    def written(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in ("grads", "sources"))

    def moved(self, sizes: Sequence[int]) -> int:
        """Bytes that a row moves, whose tensors have these sizes in the order of `names`.

        Everything is read once, but parameters that a master or source stands for, and `written` is written once.
        """
        unread = ("params",) if set(self.storage.lists) & {"masters", "sources"} else ()
        passes = [(name not in unread) + (name in self.written) for name in self.names]
        return sum(size * count for size, count in zip(sizes, passes))

    def dtypes(self, name: str) -> tuple:
        """What tensors of a list may be."""
        return self.storage.dtypes(name, self.states)


def _rule(name, number, states, flags, *, maximize=False, decoupled=False, cautious=False, clip_value=None) -> Rule:
    if cautious and not decoupled:
        raise ValueError(f"{name}: cautious=True is a form of decoupled weight decay, expected decoupled decay with it")
    for wanted, flag in ((maximize, lib.MAXIMIZE), (decoupled, lib.DECOUPLED), (cautious, lib.CAUTIOUS)):
        flags |= flag if wanted else 0
    limit = 0.0 if clip_value is None else check.number(name, "clip_value", clip_value, 0)
    if clip_value is not None and limit == 0:
        raise ValueError(f"{name}: clip_value is 0, expected a number > 0, or None for no clipping")
    return Rule(name, number, flags, tuple(state for state in states if state), limit)


def sgd(name: str, *, momentum: bool, nesterov: bool = False, **options) -> Rule:
    flags = (lib.MOMENTUM if momentum else 0) | (lib.NESTEROV if nesterov else 0)
    return _rule(name, lib.SGD, (momentum and "momentum_buffers",), flags, **options)


def adagrad(name: str, **options) -> Rule:
    return _rule(name, lib.ADAGRAD, ("state_sums",), 0, **options)


def rmsprop(name: str, *, centered: bool, momentum: bool, **options) -> Rule:
    flags = (lib.CENTERED if centered else 0) | (lib.MOMENTUM if momentum else 0)
    states = ("square_avgs", centered and "grad_avgs", momentum and "momentum_buffers")
    return _rule(name, lib.RMSPROP, states, flags, **options)


def adam(name: str, *, amsgrad: bool, **options) -> Rule:
    states = ("exp_avgs", "exp_avg_sqs", amsgrad and "max_exp_avg_sqs")
    return _rule(name, lib.ADAM, states, lib.AMSGRAD if amsgrad else 0, **options)


def lion(name: str, **options) -> Rule:
    return _rule(name, lib.LION, ("exp_avgs",), 0, **options)


def sign(name: str, **options) -> Rule:
    return _rule(name, lib.SIGN, (), 0, **options)


def perturb(name: str, *, q: float, backup: bool, maximize: bool = False) -> Rule:
    """Steepest ascent in the norm whose dual has order q; q is also a hyper-parameter of every row."""
    flags = (lib.BACKUP if backup else 0) | (0 if q in (1.0, 2.0, float("inf")) else lib.POWER)
    return _rule(name, lib.PERTURB, (backup and "backups",), flags, maximize=maximize)


def restore(name: str) -> Rule:
    return _rule(name, lib.RESTORE, (), 0)


def numbers(where: str, *, betas=None, **values) -> dict[str, float]:
    """Hyper-parameters as floats; raises for what no rule accepts.

    lr, weight_decay, l1, eps, momentum, lr_decay >= 0, alpha in [0, 1], betas in [0, 1), dampening any finite number.
    """
    found = {}
    if betas is not None:
        try:
            beta1, beta2 = betas
        except (TypeError, ValueError):
            raise ValueError(f"{where}: betas is {betas!r}, expected two numbers in [0, 1)") from None
        found["beta1"] = check.number(where, "betas[0]", beta1, 0, 1)
        found["beta2"] = check.number(where, "betas[1]", beta2, 0, 1)
    for name, value in values.items():
        found[name] = check.number(where, name, value, float("-inf") if name == "dampening" else 0)
    if found.get("alpha", 0) > 1:
        raise ValueError(f"{where}: alpha is {found['alpha']}, expected a number in [0, 1]")
    return found


def live_number(value, live: bool):
    """A group's number for arithmetic on tensors: a float, or a 0-dim float64 tensor where tensors remain."""
    return value.detach().reshape(()).double() if live and isinstance(value, Tensor) else float(value)


def hyper_fields(values: dict[str, float]) -> tuple[float, ...]:
    """`numbers` in the order of HYPER, 0 for what is not given.  A kernel call takes pairs of this and a step count."""
    return tuple([values.get(name, 0.0) for name in HYPER])
