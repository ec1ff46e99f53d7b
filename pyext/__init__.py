"""steepest: fused kernels for the optimizer step."""

from steepest import optim, reference, schedules
from steepest._version import __version__
from steepest.explain import explain
from steepest.info import info
from steepest.matrix.polar import polar
from steepest.multi_tensor import adamw_

__all__ = ["__version__", "adamw_", "explain", "info", "optim", "polar", "reference", "schedules"]
