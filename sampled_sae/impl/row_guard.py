"""What would train an SAE otherwise than it looks is refused: what does not see gradients that are left as rows, and
what spreads a layer without its knowledge, so that each process would score and select in its own batch."""

from __future__ import annotations

import functools
import sys
import weakref
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .row_gradients import RowGradient


class LeavesRows(Protocol):
    """A module with the weights W_enc, b_enc and W_dec, that leaves their gradients as rows, and b_dec."""

    row_grads: list[RowGradient]

    @property
    def b_dec(self) -> Tensor: ...


ROWS = ("W_enc", "b_enc", "W_dec")
INSTEAD = "use sampled_sae.distributed.parallelize(sae, mesh), which computes one rule over all tokens"
# layers that have left rows in this process
LAYERS: weakref.WeakSet[LeavesRows] = weakref.WeakSet()


def guard_rows(sae: LeavesRows) -> None:
    """To be called where a step of `sae` is going to leave its gradients in `sae.row_grads`.

    Raises:
        RuntimeError: under DistributedDataParallel; where a weight has gradient hooks, or is no parameter of the module
            itself, as with torch.func.functional_call, a parametrization, FSDP or DataParallel.
    """
    if getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
        raise RuntimeError("row_grads=True: DistributedDataParallel does not reduce row gradients; set row_grads=False")
    for name in ROWS:
        weight = getattr(sae, name)
        if not isinstance(weight, nn.Parameter):
            raise RuntimeError(
                f"row_grads=True: {name} is no parameter of the module here (functional_call, a parametrization, FSDP, "
                "DataParallel), so that row gradients would not reach it; set row_grads=False"
            )
        if weight._backward_hooks or weight._post_accumulate_grad_hooks:
            raise RuntimeError(f"row_grads=True: row gradients do not call the hooks on {name}; set row_grads=False")
    LAYERS.add(sae)
    watch_optimizers()


@functools.cache
def watch_optimizers() -> None:
    # after a step too: LBFGS and others with a closure go forward and backward inside it
    register_optimizer_step_pre_hook(refuse_other_optimizers)
    register_optimizer_step_post_hook(refuse_other_optimizers)


def refuse_other_optimizers(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Raises a RuntimeError where `optimizer` holds a weight whose gradient lies in rows; RowAdam takes them."""
    if getattr(optimizer, "takes_rows", False):
        return
    left = [(sae, name) for sae in LAYERS for name in names_of_rows(sae)]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]} if left else set()
    for sae, name in left:
        if id(getattr(sae, name)) in held:
            raise RuntimeError(
                f"row_grads=True: {type(optimizer).__name__} does not see the gradient of {name}, which lies in "
                "sae.row_grads; set row_grads=False, or use sampled_sae.RowAdam(sae)"
            )


def names_of_rows(sae: LeavesRows) -> list[str]:
    """The weights whose gradient lies, or was dropped by a `zero_grad` before `backward`, in rows."""
    if sae.row_grads:
        return [part.name for part in sae.row_grads if part.rows.grad is not None]
    dropped = sae.b_dec.grad is not None and all(getattr(sae, name).grad is None for name in ROWS)
    return [name for name in ROWS if dropped and getattr(sae, name).requires_grad]


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
