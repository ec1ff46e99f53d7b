"""Which backends can run here, and if not, why.  The interpreter's switch is read without importing Triton."""

from __future__ import annotations

import importlib.util
import os

import torch


def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Triton decides when a kernel is decorated, so the variable must be set before the first import."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def interpreter_missing() -> str:
    if not triton_installed():
        return "Triton is not installed (pip install triton)"
    return "" if interpreting() else "TRITON_INTERPRET=1 is not set"


def cuda_missing() -> str:
    return "" if torch.cuda.is_available() else "no CUDA device"


def triton_missing() -> str:
    if not triton_installed():
        return "Triton is not installed (pip install triton)"
    return cuda_missing() or ("TRITON_INTERPRET=1 is set: kernels are interpreted" if interpreting() else "")


def native_cuda_missing() -> str:
    from steepest._native import WITH_CUDA

    return cuda_missing() or ("" if WITH_CUDA else "this build has no CUDA kernels (no nvcc at build time)")
