"""Steps over tensors that are spread over ranks: DTensor (FSDP2, HSDP, tensor parallel) and replicas (DDP).

`local` and `reduce_norm` are for whoever writes a rule of their own; the optimizers use the rest.
"""

from steepest.distributed.norms import reduce_norm
from steepest.distributed.shards import local

__all__ = ["local", "reduce_norm"]
