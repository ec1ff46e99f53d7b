"""The oracles: every op once, readable, in plain PyTorch, float64-capable, independent of all kernels.

Each file holds one op under the name and the signature of the fast one.
"""

from __future__ import annotations

from .adamw import adamw_
from .polar import polar, polar_svd

__all__ = ["adamw_", "polar", "polar_svd"]
