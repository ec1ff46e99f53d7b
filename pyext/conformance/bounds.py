"""Error bounds by running error analysis (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.3).

A `Tracked` number carries the exact value (in float64) and a bound on what any implementation, rounding each operation
to nearest in a given format, may be away from it.  Running an op's own reference formula on tracked numbers therefore
*is* the derivation of its bound: element by element, for any number of steps, with no constant to choose.  Writing x'
for a computed x, with |a' - a| <= ea, |b' - b| <= eb:

    a' + b'   within ea + eb                             a' * b'    within |a| eb + |b| ea + ea eb
    a' / b'   within (|b| ea + |a| eb) / (|b| (|b| - eb))  (no claim when eb >= |b|)
    sqrt(a')  within ea / (sqrt(a) + sqrt(max(a - ea, 0)))
    max       within max(ea, eb)

and rounding the result x to nearest adds u (|x| + e) + tiny / 2, with u the unit roundoff and tiny the smallest
subnormal; a result that might overflow makes the bound infinite, that is, no claim.  u is enlarged by 2^-20 of itself,
which covers the float64 evaluation of the value (2^-53 of the same quantities).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    unit: float  # unit roundoff: half the distance from 1 to the next number
    tiny: float  # smallest subnormal
    largest: float


def number_format(dtype: torch.dtype) -> Format:
    info = torch.finfo(dtype)
    return Format(unit=info.eps / 2, tiny=info.smallest_normal * info.eps, largest=info.max)


class Tracked:
    """value +- error, both float64 tensors; arithmetic rounds to `dtype`."""

    def __init__(self, value: torch.Tensor, error: torch.Tensor, dtype: torch.dtype):
        self.value, self.error, self.dtype = value, error, dtype

    @classmethod
    def exact(cls, value: torch.Tensor, dtype: torch.dtype) -> Tracked:
        """A number that implementations receive as it is."""
        value = value.double()
        return cls(value, torch.zeros_like(value), dtype)

    @classmethod
    def constant(cls, value: float, dtype: torch.dtype) -> Tracked:
        """A number known in float64 and rounded once to `dtype`."""
        return cls.exact(torch.tensor(value, dtype=torch.float64), dtype).stored(dtype)

    def stored(self, dtype: torch.dtype) -> Tracked:
        """The same number after rounding to `dtype`; later arithmetic is again in the working format."""
        f = number_format(dtype)
        size = self.value.abs() + self.error
        error = self.error + f.unit * (1 + 2**-20) * size + f.tiny / 2
        return Tracked(self.value, torch.where(size > f.largest, torch.inf, error), self.dtype)

    def _result(self, value, error) -> Tracked:
        return Tracked(value, error, self.dtype).stored(self.dtype)

    def _other(self, x) -> Tracked:
        return x if isinstance(x, Tracked) else Tracked.exact(torch.tensor(x, dtype=torch.float64), self.dtype)

    def __neg__(self):
        return Tracked(-self.value, self.error, self.dtype)

    def __add__(self, x):
        x = self._other(x)
        return self._result(self.value + x.value, self.error + x.error)

    def __sub__(self, x):
        return self + (-self._other(x))

    def __rsub__(self, x):
        return self._other(x) - self

    def __mul__(self, x):
        x = self._other(x)
        a, b = self.value.abs(), x.value.abs()
        return self._result(self.value * x.value, a * x.error + b * self.error + self.error * x.error)

    def __truediv__(self, x):
        x = self._other(x)
        a, b = self.value.abs(), x.value.abs()
        error = (b * self.error + a * x.error) / (b * (b - x.error))
        return self._result(self.value / x.value, torch.where(x.error >= b, torch.inf, error))

    def sqrt(self):
        root = self.value.sqrt()
        below = (self.value - self.error).clamp(min=0).sqrt()
        # 0 / 0 of an exact zero is no error.
        error = torch.where(self.error == 0, 0.0, self.error / (root + below))
        return self._result(root, error)

    def maximum(self, x):
        return Tracked(self.value.maximum(x.value), self.error.maximum(x.error), self.dtype)

    def __lt__(self, x):
        return bool(self.value < x)
