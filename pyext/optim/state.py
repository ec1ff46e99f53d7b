"""Proof, without reading them, that an optimizer's states are where they were.

A step needs the address of every state.  Reading all of them costs more than the step itself where tensors are small:
5.3 of 6.6 ms for 10,000 tensors of 16.  But a state that nobody could reach since its address was last read cannot
have moved.  `ParamState`, the dictionary behind `optimizer.state[p]`, notes each access, and `untouched` says when
nothing outside it refers to a state any more.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import ItemsView, ValuesView

import torch

from steepest.distributed.shards import is_dtensor


class ParamState(dict):
    """The states of one parameter: a dict in every respect, which tells its table when somebody looks inside."""

    __slots__ = ("row", "watch")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.row: int = -1
        self.watch: set[int] | None = None  # the table's rows that somebody has looked at

    def note(self) -> None:
        if self.watch is not None:
            self.watch.add(self.row)

    # These views look up by key whenever they are used, so that one that is kept cannot be used unnoticed.
    def items(self):
        return ItemsView(self)

    def values(self):
        return ValuesView(self)

    def __iter__(self):  # overridden at all, or dict(state) and {**state} would copy without a lookup
        return super().__iter__()

    def copy(self) -> dict:
        return dict(self)

    def __reduce_ex__(self, protocol):
        """Pickled and copied as a plain dict."""
        return dict, (), None, None, iter(self.items())


def _noting(name: str):
    plain = getattr(dict, name)

    def method(self, *args, **kwargs):
        self.note()
        return plain(self, *args, **kwargs)

    method.__name__, method.__doc__ = name, plain.__doc__
    return method


for _name in (
    "__getitem__", "__setitem__", "__delitem__", "__or__", "__ror__", "__ior__", "get", "pop", "popitem", "setdefault",
    "update", "clear",
):  # fmt: skip
    setattr(ParamState, _name, _noting(_name))


def owners(entry: dict, name: str) -> tuple[int, ...]:
    """How many references there are to a state, to its tensor in C++, to its storage, and to that in C++.

    Of a DTensor the shard's, counted as the DTensor's own if that is less alone.
    """
    state = dict.__getitem__(entry, name)
    if type(state) is not torch.Tensor and is_dtensor(state):
        outer = sys.getrefcount(state), state._use_count()
        state = state._local_tensor
        storage = state.untyped_storage()
        # The shard has one owner, the DTensor, where a plain state has two, its entry and a list.
        counts = max(outer[0], sys.getrefcount(state) + 1), max(outer[1], state._use_count())
        return (*counts, sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata))
    storage = state.untyped_storage()
    counts = sys.getrefcount(state), state._use_count(), sys.getrefcount(storage)
    return (*counts, torch._C._storage_Use_Count(storage._cdata))


@functools.cache
def sole_owners() -> tuple[int, ...]:
    """`owners` of a state that only its entry and one list lead to, in this version of torch."""
    entry = {"state": torch.zeros(1)}
    entry["list"] = [entry["state"]]
    return owners(entry, "state")


def untouched(entry: ParamState, name: str) -> bool:
    """True when nothing leads to the state or its memory but its entry and one more reference, that of its table.

    Views, detached aliases and storages that somebody keeps all count as owners.
    """
    return owners(entry, name) == sole_owners()


def counter_untouched(entry: ParamState) -> bool:
    """The same for state["step"], whose storage all rows share."""
    return owners(entry, "step")[:2] == sole_owners()[:2]
