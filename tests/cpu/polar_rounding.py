"""What rounding may do to a plan of the polar factor on a given input, found by letting the verbs err on purpose."""

import torch

from steepest.matrix.polar import UNIT_ROUNDOFF, iterate, normalised
from steepest.matrix.verbs import TorchVerbs
from steepest.schedules import NORM_MARGIN

F64 = torch.float64


def scaled_singular_values(x):
    """Of X / ((1 + margin)·‖X‖_F), zeros for a zero matrix."""
    x = x.double() / x.double().abs().amax((-2, -1), keepdim=True).clamp(min=1e-300)
    s = torch.linalg.svdvals(x)
    return s / (s.norm(dim=-1, keepdim=True).clamp(min=1e-300) * (1 + NORM_MARGIN))


class NoisyVerbs(TorchVerbs):
    """Float64 verbs that err as verbs of unit roundoff u may, each matrix of a batch independently.

    Elements of a result err by up to 2u·(|A||B| and the like): the standard model bounds the error of a sum of k
    products by k·u·|A||B|, but roundings go either way and partial sums themselves grow like √j. Coefficients err by up
    to u, which all elements share. After a long product the algorithm adds c₀·X, so c₀ and that sum err here too.
    """

    def __init__(self, u, largest_c0, mirrored, seed=0):
        self.u, self.largest_c0, self.generator = u, largest_c0, torch.Generator().manual_seed(seed)
        self.mirrored = mirrored

    def noise(self, *shape):
        return self.u * (2 * torch.rand(shape, generator=self.generator, dtype=F64) - 1)

    def noisy(self, y, size):
        return y + 2 * size * self.noise(*y.shape)

    def symmetric(self, y):
        """Verbs that do half the work err alike in both triangles, which has up to twice the effect."""
        return y.tril() + y.tril(-1).mT if self.mirrored else y

    def gram(self, x):
        y = self.noisy(super().gram(x), x.abs() @ x.abs().mT)
        return self.symmetric(y) if self.mirrored else (y + y.mT) / 2

    def symmetric_product(self, a, b, *, alpha=1.0, beta=0.0, c=None):
        product = alpha * super().symmetric_product(a, b)
        addend = torch.zeros_like(product) if c is None else beta * c
        size = abs(alpha) * (a.abs() @ b.abs()) + addend.abs()
        coefficients = self.noise(len(a), 1, 1) * product + self.noise(len(a), 1, 1) * addend
        return self.symmetric(self.noisy(product + addend + coefficients, size))

    def long_product(self, q, x, *, alpha=1.0, shift=0.0):
        size = abs(alpha) * (q.abs() @ x.abs()) + self.largest_c0 * x.abs()
        coefficient = self.noise(len(x), 1, 1) * self.largest_c0 * x
        return self.noisy(super().long_product(q, x, alpha=alpha, shift=shift) + coefficient, size)


def rounding_bound(todo, x):
    """Bound on ‖computed - exact‖_F for the rounding errors of one plan on one matrix x (m, n).

    Running error analysis by experiment: eight float64 executions of the plan, each verb erring at random as it may in
    the plan's precision and the input by its two roundings. Conditioning, restarts and amplification are then those of
    this very input. Three times the largest deviation of the eight, which vary by far less than that (their norms sum
    squares over many elements), plus the final rounding of the result.
    """
    u = UNIT_ROUNDOFF[todo.dtype]
    clean = normalised(x[None], F64)
    exact = iterate(clean, todo, TorchVerbs())
    noisy = NoisyVerbs(u, max(row[0] for row in todo.schedule.coefficients), todo.backend != "torch")
    start = noisy.noisy(clean.expand(8, *x.shape).contiguous(), clean.abs())
    deviation = (iterate(start, todo, noisy) - exact).norm(dim=(-2, -1)).max()
    return 3 * deviation + u * exact.norm()


class CountingVerbs(TorchVerbs):
    """Counts calls, and rounds float16 operands' results as a device with a float32 accumulator does."""

    def __init__(self):
        self.calls = {"grams": 0, "symmetric_products": 0, "long_products": 0}

    def _wide(self, name, function, *tensors, **options):
        self.calls[name] += 1
        dtype = tensors[0].dtype
        if dtype is torch.float16:
            options = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            tensors = [t.float() for t in tensors]
        return function(*tensors, **options).to(dtype)

    def gram(self, x):
        return self._wide("grams", super().gram, x)

    def symmetric_product(self, a, b, **options):
        return self._wide("symmetric_products", super().symmetric_product, a, b, **options)

    def long_product(self, q, x, **options):
        return self._wide("long_products", super().long_product, q, x, **options)
