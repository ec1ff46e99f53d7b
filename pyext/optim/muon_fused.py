"""Which of Muon's matrices the fused kernels take, and their workspaces from step to step."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from steepest.matrix import muon_rule
from steepest.matrix.polar import plan
from steepest.optim.muon_matrices import pieces

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def on_device(p: Tensor) -> bool:
    """Where the kernels can run at all."""
    return p.is_cuda and triton_installed()


def takes(group: dict, p: Tensor, buffer: Tensor) -> bool:
    """Contiguous parameters, gradients and buffers; nothing between the polar factor and the parameter but decay."""
    if not on_device(p) or group["normuon"] is not None or group["norm"] not in ("auto", "frobenius"):
        return False
    if group["schedule"] == "tuned" and group["norm"] == "auto":  # which takes a Schatten norm
        return False
    tensors = (p, p.grad, buffer)
    return all(t.is_contiguous() and t.dtype in DTYPES for t in tensors)


class FusedSteps:
    """One workspace per shape and dtypes; `step` takes all parameters of a group that `takes` accepted."""

    def __init__(self):
        self.kept: dict[tuple, object] = {}

    def step(self, number: int, group: dict, params: list[Tensor], buffers: list[Tensor]) -> None:
        from steepest.matrix.fused_muon import FusedMuon

        buckets: dict[tuple, tuple[list, list, list]] = {}
        for p, buffer in zip(params, buffers):
            for piece in pieces(p.shape, group["matrices"]):
                key = (number, piece.rows, piece.columns, p.dtype, p.grad.dtype, buffer.dtype, p.device)
                for role, t in zip(buckets.setdefault(key, ([], [], [])), (p.detach(), p.grad, buffer)):
                    part = t.narrow(0, piece.start, piece.length)
                    role += part.view(piece.batch, piece.rows, piece.columns).unbind()
        for key, roles in buckets.items():
            _, rows, columns, *_, device = key
            found = self.kept.get(key)
            if found is None or not found.fits(*roles):
                options = {name: group[name] for name in ("schedule", "steps", "norm")}
                todo = plan((len(roles[0]), rows, columns), torch.float16, "cuda", backend="triton", **options)
                same = found is not None and len(found.params) == len(roles[0])
                found = FusedMuon(*roles, todo, found.momentum.prescale if same else None)
                self.kept[key] = found
            hyper = torch.empty(2, device=device)
            for place, value in zip(hyper, muon_rule.multipliers(group, rows, columns)):
                place.fill_(value)  # a copy from the host could not be captured in a graph
            found.step(hyper, group["momentum"], group["nesterov"], cautious=group["cautious"])
