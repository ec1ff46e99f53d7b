"""Sharpness-aware minimisation."""

from __future__ import annotations

from steepest.optim.two_pass import TwoPass


class SAM(TwoPass):
    """Sharpness-aware minimisation: minimises the loss at the worst point within rho, by two passes per step.

        e = argmax of <g, e> over ‖e‖_p <= rho;    the base optimizer steps from w with the gradient at w + e

    e, its adaptive form, rounding order and cost are those of `steepest.perturb_`.  Around elementwise optimizers of
    this library the way back is part of the step.  Restoring is exact, bit for bit: for parameters whose gradient
    appears in only one of the two passes, after inf or NaN, and after an exception in the closure.

    Three ways to write a step::

        loss = optimizer.step(closure)                          # the closure is called twice

        with optimizer.ascent():                                # or any number of backward passes (accumulation):
            loss_function(model(x), y).backward()               # all of them climb together
        loss_function(model(x), y).backward()                   # or inside `with optimizer.descent():`
        optimizer.step()

        first_loss.backward(); optimizer.first_step(zero_grad=True); second_loss.backward(); optimizer.second_step()

    With torch.amp.GradScaler: closure with scaler.scale(loss).backward(), then optimizer.step(closure, scaler=scaler)
    and scaler.update(); or, in the other forms, scaler.step(optimizer) for the last call.  The direction does not
    depend on the scale.  Inf or NaN in either pass skips the base step.

    Args:
        base_optimizer: an optimizer; its param groups, state and checkpoints are used as they are.
        rho: length of the ascent, >= 0; group["rho"] overrides it and may be scheduled.
        p: the norm, >= 1 or inf, jointly over all parameters of all groups.
        adaptive: ASAM: relative to |w| + eta; group["adaptive"] and group["eta"] override.
        model: if given, running statistics of its BatchNorm layers are frozen in the second pass of `step(closure)`
            and in `descent()` (elsewhere: `steepest.optim.frozen_batchnorm`).
        per_rank: for a DistributedDataParallel model, must be given: True: each rank climbs the gradient of its own
            batch (no communication in the first pass); False: all climb the averaged gradient.
        reduce_norm: where shards are plain tensors: reduce_norm(norm, q) returns the norm over all ranks of the 0-dim
            float64 norm of order q of this rank's shards. DTensors need none: their norm is that of all shards.
        skip_nonfinite: look for inf and NaN in both passes without a GradScaler too, and skip the base step.

    Raises TypeError and ValueError for wrong arguments, RuntimeError for passes in the wrong order.
    Source: Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving Generalization"; Kwon et al.
    2021 (adaptive).
    """
