"""The oracles: every op once, readable, in plain PyTorch, float64-capable, independent of all kernels.

Each file holds one op under the name and the signature of the fast one.
"""

from __future__ import annotations

from .normalize import path_normalize_, weight_norm
from .normed_descent import normed_descent_
from .polar import polar, polar_svd
from .roots import effective_dimension, inverse_root
from .rules import adagrad_, adam_, adamw_, lion_, rmsprop_, sgd_, sign_
from .sam import perturb_, restore_

__all__ = [
    "adagrad_",
    "adam_",
    "adamw_",
    "effective_dimension",
    "inverse_root",
    "lion_",
    "normed_descent_",
    "path_normalize_",
    "perturb_",
    "polar",
    "polar_svd",
    "restore_",
    "rmsprop_",
    "sgd_",
    "sign_",
    "weight_norm",
]
