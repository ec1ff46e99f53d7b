"""Normalisation layers whose running statistics stand still for a while."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


@contextmanager
def frozen_batchnorm(model: torch.nn.Module):
    """Inside, BatchNorm layers of `model` normalise by their batch as before but do not update running statistics.

    For the second pass of SAM: statistics of perturbed weights are not those of the model.  Running means and
    variances and the count of batches come out bit for bit as they went in; nesting is allowed.  Instance norms that
    track statistics are frozen likewise.
    """
    layers = [m for m in model.modules() if isinstance(m, (_BatchNorm, _InstanceNorm))]
    tracking = [m.track_running_stats for m in layers]
    kept = [[b.clone() for b in m.buffers(recurse=False)] if isinstance(m, _InstanceNorm) else [] for m in layers]
    try:
        for m in layers:
            # Without tracking a BatchNorm in training takes the batch's statistics and leaves its buffers alone; in
            # evaluation it must go on using the buffers.
            if isinstance(m, _BatchNorm) and m.training:
                m.track_running_stats = False
        yield
    finally:
        with torch.no_grad():
            for m, track, buffers in zip(layers, tracking, kept):
                m.track_running_stats = track
                for buffer, value in zip(m.buffers(recurse=False), buffers):
                    buffer.copy_(value)
