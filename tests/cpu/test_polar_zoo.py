"""The polar factor as a call gets it, over all of the zoo: spectra × aspects, odd sizes × dtypes, in batches."""

from __future__ import annotations

import pytest
import torch

from steepest.conformance import zoo
from steepest.conformance.cases.polar import ASPECTS
from steepest.conformance.polar_bounds import measure
from steepest.matrix.native import NativeVerbs
from steepest.matrix.polar import normalised, plan, polar

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((33, 33), (1, 17), *ASPECTS)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("spectrum", zoo.NAMES)
def test_errors_direction_symmetry_repetition_and_neighbours(spectrum, dtype):
    """For a batch of three: every figure of `polar_bounds` (rounding against the polynomial in float64, method against
    the SVD, singular vectors, semidefiniteness and so on), <G, U> > 0, bits of a second run, bits beside a NaN."""
    if dtype == torch.float16 and spectrum in ("huge", "tiny"):
        spectrum = "log-uniform 1e-3"  # of which they are multiples that float16 has not
    for m, n in SHAPES:
        x, _ = zoo.matrix(spectrum, m, n, seed=m + n, batch=(3,), dtype=dtype)
        y = polar(x)
        assert torch.equal(y, polar(x))
        todo = plan(x.shape, dtype)
        for g, u in zip(x[::2], y[::2]):
            wrong = [figure for figure in measure(g, u, todo).figures if not figure.ok]
            assert not wrong, (m, n, wrong)
            g = g.double() / g.double().abs().max().clamp(min=1e-300)
            assert (g * u.double()).sum() > 0 or spectrum == "zero", (m, n)
        bad = x.clone()
        bad[1, m // 2, n // 3] = torch.nan
        beside = polar(bad)
        assert beside[1].isnan().all() and torch.equal(beside[::2], y[::2]), (m, n)


@pytest.mark.parametrize("spectrum", zoo.NAMES)
def test_gram_matrices_are_symmetric_bit_for_bit(spectrum):
    """By the kernels that a CPU with AVX2 uses; tests/interpret has Triton's."""
    for m, n in SHAPES:
        x = normalised(zoo.matrix(spectrum, m, n, seed=m + n, batch=(2,))[0], torch.float32)
        for y in (x, x.mT, x.mT.contiguous()):
            gram = NativeVerbs().gram(y)
            assert torch.equal(gram, gram.mT), (m, n)
