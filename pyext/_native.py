"""The compiled module, loaded once, with a diagnosis instead of a bare ImportError when it is missing."""

from __future__ import annotations

import json

import torch  # first, so that its OpenMP runtime (libgomp.so.1) is the one that libsteepest shares

try:
    from steepest import _C as lib
except ImportError as error:
    raise ImportError(
        "steepest: the compiled module steepest._C is missing or does not load. "
        f"Install the package with `pip install .` (or `pip install -e .`) for this Python. Cause: {error}"
    ) from error

reader = lib.TensorReader()


def build_info() -> dict:
    """How the C library was built: version, compiler, CUDA architectures, SIMD clone chosen on this machine."""
    return json.loads(lib.build_info())


WITH_CUDA: bool = build_info()["cuda"]


def asynchronous(device: torch.device) -> bool:
    """Whether the host would have to wait for what is computed there."""
    return device.type != "cpu"


def has_kernels(device: torch.device) -> bool:
    """Whether the compiled library steps and surveys tensors there."""
    return device.type == "cpu" or (device.type == "cuda" and WITH_CUDA)


def num_threads() -> int:
    """CPU threads that a call may use: torch's own setting, `torch.set_num_threads`."""
    return torch.get_num_threads()
