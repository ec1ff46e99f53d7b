"""Bytes that kernel calls read and write, counted from their work plans."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from steepest._native import lib


class Traffic:
    """`bytes`: what the calls inside the context read and wrote; set when it ends."""

    bytes: int | None = None


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """with counted_traffic() as traffic: steps;  then traffic.bytes.

    Counts elementwise steps and surveys of the compiled library, of all threads, by what their plans move: each tensor
    once per read and per write, in its own dtype.  What caches fetch besides (a CPU reads a line before it writes a
    part of it) is not counted, nor what torch or Triton does.  Not to be nested.
    """
    traffic = Traffic()
    lib.count_traffic(True)
    try:
        yield traffic
    finally:
        traffic.bytes = lib.count_traffic(False)
