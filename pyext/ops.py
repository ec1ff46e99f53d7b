"""What torch.compile sees: torch.library ops with schemas, fakes and mutation annotations.

Eager code calls the functions directly; a registered op costs some microseconds more.  While a graph is traced, the
public names put the op into it.  Ops are opaque: nothing is fused into them, and their results have eager's bits.

lr and step are tensors in the schemas: a compiled function that is given tensors for them is not compiled anew when
they change; one that is given numbers is, as for any other number that a graph depends on.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from steepest.matrix import polar as _polar_module
from steepest.matrix import roots as _roots_module

LIBRARY = torch.library.Library("steepest", "DEF")


def define(name: str, schema: str, function, fake) -> None:
    """An op of this library, for all devices."""
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"steepest::{name}", fake, lib=LIBRARY)


def traceable(function, traced):
    """`function`, for which `traced` stands in while a graph is traced."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling():
            return traced(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def _polar(x, schedule, steps, lower, tol, dtype, backend):
    options = dict(schedule=schedule, steps=steps, lower=lower, tol=tol, dtype=dtype, backend=backend)
    # An op's result may not share memory with its input, and has the strides that its fake has.
    return _polar_module.polar(x, **options).contiguous()


def _traced_polar(x, *, schedule="polar-express", steps=5, lower=1e-3, tol=None, dtype=None, backend="auto"):
    if not isinstance(schedule, str):
        raise TypeError("polar: in a compiled function schedule must be a name")
    with torch.no_grad():
        return torch.ops.steepest.polar(x, schedule, steps, lower, tol, dtype, backend)


def _root(a, p, ridge, absolute, tol, method):
    found = _roots_module.inverse_root(a, p, ridge=ridge, absolute=absolute, tol=tol, method=method)
    return found.contiguous()


def _traced_root(a, p=4, *, ridge=1e-6, absolute=False, tol=1e-3, method="auto", return_status=False, **others):
    if return_status or others:
        raise TypeError(
            "inverse_root: in a compiled function return_status, previous, precision and backend are unknown"
        )
    with torch.no_grad():
        return torch.ops.steepest.inverse_root(a, p, ridge, absolute, tol, method)


def _like(x: Tensor, *_) -> Tensor:
    return x.new_empty(x.shape)


define(
    "polar",
    "(Tensor x, str schedule, int steps, float lower, float? tol, ScalarType? dtype, str backend) -> Tensor",
    _polar, _like,
)  # fmt: skip
define("inverse_root", "(Tensor a, int p, float ridge, bool absolute, float tol, str method) -> Tensor", _root, _like)

polar = traceable(_polar_module.polar, _traced_polar)
inverse_root = traceable(_roots_module.inverse_root, _traced_root)


def number_tensor(value) -> Tensor:
    """A number, or numbers, as the op takes them."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def number(value: Tensor) -> float | list[float]:
    return value.item() if value.ndim == 0 else value.tolist()
