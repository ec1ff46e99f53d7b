"""An optimizer container in torchtitan's manner: one optimizer per model part, one checkpoint with parameter names.

torchtitan (and other stacks with pipeline stages) keep several model parts per rank.  Their container steps all of
them and is `Stateful` for torch.distributed.checkpoint, with flattened keys "state.<parameter>.<state>", so that a
checkpoint loads whatever the parallelism.  No part of torchtitan is needed here.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful


class OptimizersContainer(torch.optim.Optimizer, Stateful):
    """Steps the optimizers of all model parts; what schedulers see is one optimizer with all param groups.

    make: from the (name, parameter) pairs of one part to its optimizer, e.g.
        lambda named: steepest.optim.Muon(named, lr=0.02, adamw={"lr": 3e-4})
    """

    def __init__(self, model_parts: Iterable[torch.nn.Module], make: Callable[[list], torch.optim.Optimizer]):
        self.model_parts = list(model_parts)
        self.optimizers = []
        for part in self.model_parts:
            named = [(name, p) for name, p in part.named_parameters() if p.requires_grad]
            self.optimizers.append(make(named))
        super().__init__([p for part in self.model_parts for p in part.parameters() if p.requires_grad], {})
        # The very dictionaries of the parts' optimizers: a scheduler that sets a learning rate sets theirs.
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group in self.param_groups:
            self.defaults.setdefault("lr", group["lr"])

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        out: dict[str, Any] = {}
        for part, optimizer in zip(self.model_parts, self.optimizers):
            out |= get_optimizer_state_dict(part, optimizer, options=options)
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        for part, optimizer in zip(self.model_parts, self.optimizers):
            set_optimizer_state_dict(part, optimizer, optim_state_dict=state_dict, options=options)
