"""The polar factor and Muon on a real GPU, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

import steepest
from steepest.matrix.triton_verbs import TritonVerbs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(128, 128), (3, 200, 331), (1024, 256), (1, 77), (513, 1025)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_symmetric_verbs_against_float64(shape, dtype):
    x = torch.randn(shape, device="cuda").to(dtype)
    got = TritonVerbs().gram(x)
    exact = x.double() @ x.double().mT
    assert torch.equal(got, got.mT)
    # K products summed in float32 (2^-24 each, in any order), rounded once to the dtype.
    size = x.double().abs() @ x.double().abs().mT
    unit = torch.finfo(dtype).eps / 2 + shape[-1] * 2**-24
    assert ((got.double() - exact).abs() <= unit * size + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256), (300, 300), (4, 64, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_polar_directions_and_orthogonality(shape, dtype):
    x = torch.randn(shape, device="cuda").to(dtype)
    u = steepest.polar(x, steps=8)
    exact = steepest.reference.polar(x.double().cpu(), steps=8)
    # Half-precision working accuracy measured in emulation for these spectra: 1e-2 relative; float32: 1e-5.
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert (u.double().cpu() - exact).norm() / exact.norm() <= bound
    assert ((x.double() * u.double()).sum((-2, -1)) > 0).all()


def test_muon_step_runs_on_the_device_without_touching_gradients():
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)).cuda()
    optimizer = steepest.optim.Muon(model.named_parameters(), lr=1e-2)
    model(torch.randn(8, 64, device="cuda")).square().mean().backward()
    before = [p.grad.clone() for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before))
    assert all(not torch.equal(p, w) for p, w in zip(model.parameters(), weights))
