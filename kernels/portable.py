"""Helpers that give the same bits in Triton's interpreter and in compiled code, so that what is tested is what runs.

The interpreter keeps bfloat16 as raw 16-bit integers: it truncates when it narrows, widens subnormals wrongly, and
`tl.dot` multiplies the bit patterns.  Kernels therefore `widen` right after a load, do arithmetic on float32 alone,
multiply matrices with `dot` and `narrow` right before a store.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

# Triton picks interpreter or compiler when a kernel is decorated, that is while this package is imported.
INTERPRETING = bool(triton.knobs.runtime.interpret)

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def widen(x):
    """float32, float16 or bfloat16 to float32, exactly."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


if INTERPRETING:

    @triton.jit
    def narrow(x, dtype: tl.constexpr):
        """float32 to `dtype` (float32, float16 or bfloat16), nearest even; a NaN stays a NaN."""
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            is_nan = (bits & 0x7FFFFFFF) > 0x7F800000  # a payload in the low half alone must not become inf
            narrowed = tl.where(is_nan, (bits >> 16) | 0x40, rounded)
            return narrowed.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            return x.to(dtype)

    def dot(a, b, acc, input_precision):
        """acc + a b; the interpreter multiplies in float32 whatever `input_precision` says."""
        return tl.dot(widen(a), widen(b), acc, input_precision="ieee")

    def trip_count(n):
        """A run-time loop bound; the interpreter of Triton 3.6 cannot turn it into an int under numpy 2 by itself."""
        return int(n.handle.data.item())

else:

    @triton.jit
    def narrow(x, dtype: tl.constexpr):
        """float32 to `dtype` (float32, float16 or bfloat16), nearest even; a NaN stays a NaN.

        One instruction (cvt.rn) per two elements.  The same in integer arithmetic made symmetric_kernel spill.
        """
        return x.to(dtype)

    @triton.jit
    def dot(a, b, acc, input_precision: tl.constexpr):
        """acc + a b, accumulated in float32; `input_precision` says what float32 operands are rounded to."""
        return tl.dot(a, b, acc, input_precision=input_precision)

    @triton.jit
    def trip_count(n):
        """A run-time loop bound."""
        return n


def on_device(tensor: torch.Tensor):
    """A context in which kernels are launched on the device of `tensor`, a CUDA tensor unless interpreting."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def require_device(op: str, tensor: torch.Tensor) -> None:
    """Raises unless kernels can run where `tensor` lives."""
    if not tensor.is_cuda and not INTERPRETING:
        raise ValueError(f"{op}: the tensors are on {tensor.device}; Triton kernels need a CUDA device")
