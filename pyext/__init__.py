"""steepest: fused kernels for the optimizer step."""

from __future__ import annotations

import importlib

from steepest import reference, schedules
from steepest._version import __version__
from steepest.curvature import hessian_diagonal, hessian_trace
from steepest.explain import explain
from steepest.info import info
from steepest.matrix.roots import effective_dimension
from steepest.ops import inverse_root, polar

# What needs the compiled module is imported when it is first asked for, so that `info` can say what is wrong with an
# installation whose compiled module is missing.
_STEPS = ("adagrad_", "adam_", "adamw_", "lion_", "rmsprop_", "sgd_", "sign_")
_COMPILED = {
    **dict.fromkeys(_STEPS, "steepest.ops_steps"),
    "clip_grad_norm_": "steepest.norms",
    "normed_descent_": "steepest.optim.normed_descent",
    "survey": "steepest.ops_steps",
    "distributed": None,
    "path_normalize_": "steepest.normalize",
    "weight_norm": "steepest.normalize",
    "dynamics": None,
    "perturb_": "steepest.sam_ops",
    "restore_": "steepest.sam_ops",
    "optim": None,
}

__all__ = [
    "__version__",
    *_STEPS,
    "clip_grad_norm_",
    "distributed",
    "dynamics",
    "normed_descent_",
    "effective_dimension",
    "explain",
    "hessian_diagonal",
    "hessian_trace",
    "info",
    "inverse_root",
    "optim",
    "path_normalize_",
    "perturb_",
    "polar",
    "reference",
    "restore_",
    "schedules",
    "survey",
    "weight_norm",
]


def __getattr__(name: str):
    if name not in _COMPILED:
        raise AttributeError(f"module 'steepest' has no attribute {name!r}")
    module = importlib.import_module(_COMPILED[name] or f"steepest.{name}")
    value = getattr(module, name) if _COMPILED[name] else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
