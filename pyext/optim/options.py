"""Options that all elementwise optimizers share.

decoupled_weight_decay: p (1 - lr weight_decay) before the rule instead of weight_decay p added to the gradient.
cautious: decoupled decay only where the step moves towards zero (Chen et al. 2025, "Cautious Weight Decay").
l1: decoupled l1 decay, p = sign(p) max(|p| - lr l1, 0) after the rule: weights become exactly zero.
clip_value: gradients are clamped to +-clip_value inside the step, and not written.
maximize: ascend.
max_grad_norm: gradients are clipped by their joint norm over all groups inside the step, as by clip_grad_norm_, and
    not written; `optimizer.grad_norm` is the norm of the last step.
foreach, fused: accepted for compatibility with torch.optim and without effect; the step is always fused.
capturable, differentiable: must be False.
"""

from __future__ import annotations

SHARED = ("maximize", "cautious", "l1", "clip_value", "decoupled_weight_decay")
TORCH = dict(foreach=None, fused=None, capturable=False, differentiable=False)


def shared_defaults(maximize, cautious, l1, clip_value, decoupled_weight_decay) -> dict:
    return dict(
        maximize=maximize, cautious=cautious, l1=l1, clip_value=clip_value,
        decoupled_weight_decay=decoupled_weight_decay,
    )  # fmt: skip


def of_rule(group: dict) -> dict:
    """The shared options as the constructors of rules.py take them."""
    return dict(
        maximize=group["maximize"], decoupled=group["decoupled_weight_decay"], cautious=group["cautious"],
        clip_value=group["clip_value"],
    )  # fmt: skip
