"""What spreads a layer without its knowledge is refused: each process would score and select in its own batch."""

from __future__ import annotations

import sys

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

INSTEAD = "use sampled_sae.distributed.parallelize(sae, mesh), which computes one rule over all tokens"


def guard_rule(layer: object) -> None:
    """To be called where a step of `layer` is going to be trained.

    Raises:
        RuntimeError: inside DistributedDataParallel, FullyShardedDataParallel or `fully_shard` of several processes.
    """
    if (wrapper := wrapper_of(layer)) is not None:
        raise RuntimeError(f"{wrapper}: each process would select in its own batch; {INSTEAD}")


def wrapper_of(layer: object) -> str | None:
    """What of torch.distributed trains `layer` on several processes; None for nothing.

    (`fully_shard` refuses the layer itself, but for one of whose parameters W_enc is to be ignored.)
    """
    wrapped: nn.Module | None = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if wrapped is not None and dist.get_world_size(wrapped.process_group) > 1:  # type: ignore[arg-type]
        return "DistributedDataParallel"
    # no module is an FSDPModule before that is loaded, which takes seconds
    fsdp = sys.modules.get("torch.distributed.fsdp")
    fully_sharded = fsdp is not None and isinstance(layer, fsdp.FSDPModule)
    # torch's own mark, of both kinds, also of a layer inside the module that was wrapped
    managed = fully_sharded or getattr(layer, "_is_fsdp_managed_module", False)
    if not managed or dist.get_world_size() == 1:
        return None
    return "fully_shard" if fully_sharded else "FullyShardedDataParallel or fully_shard"
