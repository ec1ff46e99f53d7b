"""How a kernel call keeps parameters and states, beyond one number of a type per element.

All functional ops take these keyword arguments; `steepest.optim.options` has the optimizers' names for them::

    masters          float32 tensors: the parameters themselves.  params, bfloat16 or float16, get their rounded copy
    residuals        int16 or int8 tensors: what bfloat16 params lack of a float32, or of its upper 24 bits
    sources          tensors like params: parameters are read from here and written to params
    averages         float32 tensors, with average_decay: a = a + (1 - average_decay) (p - a) after the step
    state_exponents  a list of uint8 tensors per list of states, which then are uint8 codes: 8-bit floating point,
                     blocks of 128 elements in memory order sharing an exponent (ceil(numel / 128) bytes)
    stochastic_rounding  True: bfloat16 params and states are rounded to a neighbour, the nearer the likelier
    gradient_noise   (eta, gamma): gradients get normal noise of variance eta / (1 + step)^gamma, after clipping
    seed             of the last three: an integer
    first_index      number of each tensor's element 0 in the random streams; tensors follow each other unless given.
                     Whoever holds elements [a, b) of a tensor passes its number + a and gets the numbers that are due

Random numbers depend on seed, step and element number (counted in memory order) alone: not on threads, launches,
devices or shards.  Formulas: csrc/formula/storage.h and random.h; sources: Salmon et al. 2011 (Philox), Neelakantan et
al. 2015 (noise), OCP MX 1.0 (shared exponents), Zamirai et al. 2020 (stochastic rounding and correction bits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from steepest import check
from steepest._native import lib

BLOCK = 128  # elements that share an exponent
# Lists after the states, in the order in which calls pass them.
LISTS = ("masters", "residuals", "sources", "averages")
_KINDS = dict(zip(LISTS, (lib.Kind.MASTERS, lib.Kind.RESIDUALS, lib.Kind.SOURCES, lib.Kind.AVERAGES)))
_DTYPES = {
    "masters": (torch.float32,), "residuals": (torch.int16, torch.int8), "averages": (torch.float32,),
}  # fmt: skip
KEYWORDS = (*LISTS, "average_decay", "state_exponents", "stochastic_rounding", "gradient_noise", "seed", "first_index")


def num_blocks(numel: int) -> int:
    return -(-numel // BLOCK)


@dataclass(frozen=True)
class Storage:
    """What all rows of a call have in common."""

    lists: tuple[str, ...] = ()  # of LISTS, in that order
    block8: bool = False
    stochastic: bool = False
    seed: int = 0

    @property
    def plain(self) -> bool:
        return not (self.lists or self.block8 or self.stochastic)

    def names(self, states: Sequence[str]) -> tuple[str, ...]:
        """Names of the lists that follow the states."""
        return (*self.lists, *(f"{state}_exponents" for state in states if self.block8))

    def kinds(self, states: Sequence[str]) -> list:
        """The same as the compiled module names them."""
        return [_KINDS[name] for name in self.lists] + [lib.Kind.EXPONENTS] * (len(states) if self.block8 else 0)

    def dtypes(self, name: str, states: Sequence[str]) -> tuple[torch.dtype, ...]:
        """What tensors of a list may be."""
        if self.block8 and (name in states or name.endswith("_exponents")):
            return (torch.uint8,)
        return _DTYPES.get(name, check.DTYPES)


PLAIN = Storage()


@dataclass(frozen=True)
class Kept:
    """The arguments of one call, checked as far as they can be without looking at tensors."""

    storage: Storage
    lists: list[Sequence[Tensor]]  # as storage.names
    values: dict[str, float]  # hyper-parameters besides the rule's
    first_index: list[int] | None


def parse(op: str, states: Sequence[str], params: Sequence[Tensor], given: dict) -> Kept:
    """Raises for unknown keywords and for combinations that mean nothing."""
    for name in given:
        if name not in KEYWORDS:
            raise TypeError(f"{op}: unknown argument {name!r}; known besides the rule's: {', '.join(KEYWORDS)}")
    lists = tuple(name for name in LISTS if given.get(name) is not None)
    exponents = given.get("state_exponents")
    if exponents is not None and len(exponents) != len(states):
        raise ValueError(f"{op}: state_exponents has {len(exponents)} lists, expected one for each of {states}")
    values = numbers(op, given.get("gradient_noise"), given.get("average_decay"))
    if ("averages" in lists) != (given.get("average_decay") is not None):
        raise ValueError(f"{op}: averages and average_decay go together, found only one of them")
    seed = whole(op, "seed", given.get("seed", 0))
    stochastic = bool(given.get("stochastic_rounding", False))
    storage = Storage(lists, exponents is not None, stochastic, seed)
    first = given.get("first_index")
    if first is not None and len(first) != len(params):
        raise ValueError(f"{op}: first_index has {len(first)} numbers for {len(params)} params")
    if first is None and (stochastic or exponents is not None or values.get("noise_eta")):
        first = follow([p.numel() for p in params])
    extra = [given[name] for name in lists] + [list(role) for role in exponents or ()]
    return Kept(storage, extra, values, None if first is None else [whole(op, "first_index", x) for x in first])


def follow(counts: Sequence[int]) -> list[int]:
    """Numbers of the first elements of tensors that follow each other."""
    return [0, *accumulate(counts)][: len(counts)]


def numbers(op: str, gradient_noise, average_decay) -> dict[str, float]:
    """Hyper-parameters of noise and averages; empty without them."""
    values = {}
    if gradient_noise is not None:
        try:
            eta, gamma = gradient_noise
        except (TypeError, ValueError):
            raise ValueError(f"{op}: gradient_noise is {gradient_noise!r}, expected (eta, gamma)") from None
        values["noise_eta"] = check.number(op, "gradient_noise[0]", eta, 0)
        values["noise_gamma"] = check.number(op, "gradient_noise[1]", gamma, 0)
    if average_decay is not None:
        values["average_decay"] = check.number(op, "average_decay", average_decay, 0)
        if values["average_decay"] > 1:
            raise ValueError(f"{op}: average_decay is {average_decay}, expected a number in [0, 1]")
    return values


def whole(op: str, name: str, value) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(f"{op}: {name} is {value!r}, expected a whole number in [0, 2^63)")
    return value
