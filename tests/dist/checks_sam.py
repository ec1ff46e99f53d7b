"""SAM where parameters are DTensors: one norm over all shards, weights that come back, the steps of one process."""

from __future__ import annotations

import math
from unittest.mock import patch

import torch
from checks_elementwise import Network, batch, gradients, meshes, stacks, whole, whole_tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from worlds import check

import steepest
from steepest import sam_ops

STEPS = 3


def train(model, inner, p, record=None):
    options = {"model": model} if isinstance(model, torch.nn.parallel.DistributedDataParallel) else {}
    base = steepest.optim.SGD(inner.parameters(), lr=0.1, momentum=0.9)
    optimizer = steepest.optim.SAM(base, rho=0.3, p=p, **options)
    for step in range(STEPS):
        x, y = batch(step)

        def closure():
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y)  # noqa: B023
            loss.backward()
            if record is not None:
                record.append([whole(q).clone() for q in inner.parameters()])
            return loss

        optimizer.step(closure)


def tensor_parallel(world):
    """Some parameters are cut, by rows or columns, others whole."""
    mesh = init_device_mesh("cpu", (world,))
    return parallelize_module(Network(), mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})


@check(1, 2, 4)
def sam_over_shards_follows_one_process(rank):
    for p in (2.0, 1.0, 3.0, float("inf")):
        alone, seen = Network(), []
        train(alone, alone, p, seen)
        assert max((b - a).abs().max() for a, b in zip(*seen[:2])) > 0.01  # the second pass is elsewhere
        for name, (model, inner) in {**stacks(rank.world), "tp": (tensor_parallel(rank.world),) * 2}.items():
            if name == "ddp":
                continue
            found = []
            train(model, inner, p, found)
            for mine, theirs in zip(found, seen):
                for a, b in zip(mine, theirs):
                    assert torch.allclose(a, b, rtol=0, atol=1e-6), (name, p, (a - b).abs().max())
            for (parameter, a), b in zip(inner.named_parameters(), alone.parameters()):
                assert torch.allclose(whole(a), b, rtol=0, atol=1e-6), (name, p, parameter)


@check(1, 2, 4)
def steepness_of_mixed_layouts_is_that_of_whole_tensors(rank):
    """Rows, columns, replicas and plain tensors together; on the CPU's way and on the device's, of torch's norms."""

    def as_on_device(parts, q, reaches):
        return tuple(x.item() for x in sam_ops._on_device(parts, q, torch.device("cpu"), reaches))

    found = meshes(rank.world)
    names = [*found, "plain"]
    grads, weights = gradients(0), whole_tensors()
    grads[0][6, 4] = grads[5][15, 11] = 9.0  # the largest, twice, in shards of the last rank

    def spread(tensors):
        out = []
        for i, t in enumerate(tensors):
            name = names[i % len(names)]
            out.append(t if name == "plain" else distribute_tensor(t, found[name][0], found[name][1](t.ndim)))
        return out

    mine, beside = spread(grads), spread(weights)
    for weigh in (sam_ops.Weighing(), sam_ops.Weighing(1.0, 0.01)):
        weighing = [weigh] * len(grads)
        for q in (math.inf, 2.0, 3.0, 1.5):
            expected = sam_ops.measure(grads, weights, weighing, q)
            for way in (sam_ops._on_cpu, as_on_device):
                with patch.object(sam_ops, "_on_cpu", way):
                    said = sam_ops.measure(mine, beside, weighing, q)
                # Sums of 300 float64 terms of float32 numbers, on the device's way of float32 powers: 2^-24 per element.
                for a, b in ((said.norm, expected.norm), (said.largest, expected.largest)):
                    assert torch.allclose(a.double(), b.double(), rtol=2.0**-20, atol=0), (q, way.__name__)
                assert torch.allclose(said.coefficient, expected.coefficient, rtol=2.0**-20, atol=0), (q, way.__name__)
    assert torch.allclose(sam_ops.inner(mine, beside), sam_ops.inner(grads, weights), rtol=2.0**-20)


@check(2)
def gradients_that_are_still_to_be_added_up_are_refused(rank):
    mesh = meshes(2)["rows"][0]
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
    optimizer = steepest.optim.SAM(steepest.optim.SGD([p], lr=0.1))
    try:
        optimizer.first_step()
    except ValueError as error:
        assert "expected Shard or Replicate" in str(error), error
    else:
        raise AssertionError("not refused")
    assert (whole(p) == 1).all()


@check(2, 4)
def variants_over_shards_follow_one_process(rank):
    """Inner products of gradients, and a momentum of them, over all shards."""
    kinds = (steepest.optim.GSAM, steepest.optim.LookSAM, steepest.optim.FriendlySAM, steepest.optim.MomentumSAM)
    for kind in kinds:
        results = []
        for model in (Network(), fully_shard(Network())):
            optimizer = kind(steepest.optim.AdamW(model.parameters(), lr=0.01), rho=0.1)
            for step in range(STEPS):
                x, y = batch(step)

                def closure():
                    optimizer.zero_grad()  # noqa: B023
                    loss = torch.nn.functional.mse_loss(model(x), y)  # noqa: B023
                    loss.backward()
                    return loss

                optimizer.step(closure)
            results.append([whole(p) for p in model.parameters()])
        for a, b in zip(*results):
            assert torch.allclose(a, b, rtol=0, atol=1e-5), (kind.__name__, (a - b).abs().max())
