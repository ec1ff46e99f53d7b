"""The matrix verbs on CUDA devices: symmetric products by Triton, the rest by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.kernels import symmetric
from steepest.matrix import tape
from steepest.matrix.verbs import TensorVerbs, general_product, rounded_once


class TritonVerbs(TensorVerbs):
    """Verbs over (..., m, n) float32, float16 or bfloat16 tensors on a CUDA device; results in the operands' dtype.

    `gram` and `symmetric_product` compute one triangle and mirror it: half the FLOPs of a general product, and exactly
    symmetric.  `input_precision` says what they multiply float32 operands as: "ieee", "tf32x3" or "tf32".
    """

    def __init__(self, input_precision: str = "ieee"):
        if input_precision not in symmetric.PRECISIONS:
            expected = ", ".join(symmetric.PRECISIONS)
            raise ValueError(f"TritonVerbs: input_precision is {input_precision!r}, expected one of {expected}")
        self.input_precision = input_precision

    def gram(self, x: Tensor) -> Tensor:
        """X Xᵀ, (..., m, m); gram(x.mT) is XᵀX without a copy."""
        return symmetric.gram(x, input_precision=self.input_precision)

    def symmetric_product(
        self,
        a: Tensor,
        b: Tensor,
        *,
        alpha: float = 1.0,
        beta: float = 0.0,
        c: Tensor | None = None,
        diagonal: float = 0.0,
    ) -> Tensor:
        """alpha A B + beta C + diagonal I for commuting symmetric A, B and symmetric C."""
        return symmetric.symmetric_product(
            a, b, alpha=alpha, beta=beta, c=c, diagonal=diagonal, input_precision=self.input_precision
        )

    def commuting_product(self, a: Tensor, b: Tensor, *, beta: float = 0.0, c: Tensor | None = None) -> Tensor:
        """A B + beta C by cuBLAS, operands rounded to tf32 where `input_precision` says so."""
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32" if self.input_precision == "tf32" else before
        try:
            return general_product(a, b, beta, c)
        finally:
            matmul.fp32_precision = before

    def long_product(self, q: Tensor, x: Tensor, *, alpha: float = 1.0, shift: float = 0.0) -> Tensor:
        """alpha Q X + shift X with square Q and long X: no symmetry to use."""
        return torch.matmul(q, x) if alpha == 1 and shift == 0 else rounded_once(q, x, alpha, shift)

    def chain(self, chain: tape.Chain, x: Tensor) -> Tensor:
        """The result of a recorded chain for every matrix of x, by one program each."""
        return tape.run(chain, x, self.input_precision)
