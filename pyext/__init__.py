"""steepest: fused kernels for the optimizer step."""

from steepest._version import __version__
from steepest.multi_tensor import adamw_

from steepest import optim  # isort: skip

__all__ = ["__version__", "adamw_", "optim"]
