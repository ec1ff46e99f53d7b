"""Hooks and profiling around `step`, entered only where there is something to enter."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.optim import Optimizer, optimizer


def hooked(step: Callable) -> Callable:
    """What torch's Optimizer.profile_hook_step makes of a step, without the cost where nobody looks.

    torch enters a record for the profiler in every step, which takes 8 us, and 150 when other work has filled the
    caches since the last one.  Here it does so while a profiler is on, when a hook is registered, and when it compiles.
    """
    with_hooks = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self, *args, **kwargs):
        if torch.compiler.is_compiling() or torch.autograd._profiler_enabled() or _has_hooks(self):
            return with_hooks(self, *args, **kwargs)
        result = step(self, *args, **kwargs)
        self._optimizer_step_code()  # where torch's Python tracer looks
        return result

    return wrapper


def _has_hooks(one: Optimizer) -> bool:
    return bool(
        one._optimizer_step_pre_hooks
        or one._optimizer_step_post_hooks
        or optimizer._global_optimizer_pre_hooks
        or optimizer._global_optimizer_post_hooks
    )
