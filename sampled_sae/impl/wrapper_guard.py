"""What spreads a layer without its knowledge is refused: each process would score and select in its own batch."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

INSTEAD = "use sampled_sae.distributed.parallelize(sae, mesh), which computes one rule over all tokens"


def guard_rule(layer: object) -> None:
    """To be called where a step of `layer` is going to be trained.

    Raises:
        RuntimeError: inside DistributedDataParallel or FullyShardedDataParallel of more than one process.
            (`fully_shard` refuses the layer itself.)
    """
    wrapped: nn.Module | None = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if wrapped is not None and dist.get_world_size(wrapped.process_group) > 1:  # type: ignore[arg-type]
        raise RuntimeError(f"DistributedDataParallel: each process would select in its own batch; {INSTEAD}")
    if getattr(layer, "_is_fsdp_managed_module", False) and dist.get_world_size() > 1:
        raise RuntimeError(f"FullyShardedDataParallel: each process would select in its own batch; {INSTEAD}")
