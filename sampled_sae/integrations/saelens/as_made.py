"""Whether a SAELens object still is, in all that its step calls and the sparse one does without, as SAELens made it."""

from __future__ import annotations

import operator
from types import CodeType
from typing import Any

from sae_lens.saes import matryoshka_batchtopk_sae, sae, topk_sae
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.topk_sae import SparseHookPoint, TopK
from torch import nn
from torch.nn.modules import module as nn_module
from transformer_lens.hook_points import HookPoint

from ..replaced import has_other_methods

# methods that SAELens' step calls
DENSE_METHODS = (
    "process_sae_in",
    "encode_with_hidden_pre",
    "decode",
    "calculate_aux_loss",
    "calculate_topk_aux_loss",
    "update_topk_threshold",
    "_iterable_decode",
    "calculate_matryoshka_aux_loss",
)
# functions that those call
FUNCTIONS = [
    (module, name, getattr(module, name))
    for module in (topk_sae, matryoshka_batchtopk_sae)
    for name in ("act_times_W_dec", "calculate_topk_aux_acts", "_sparse_matmul_nd")
]
FORWARDS = {cls: cls.forward for cls in (TopK, BatchTopK, HookPoint, SparseHookPoint, nn.Identity, nn.ReLU)}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = [f"_global{name}" for name in HOOKS]
# the functions that SAELens sets where activations keep their shape
RESHAPES = [c for c in sae.SAE.turn_off_forward_pass_hook_z_reshaping.__code__.co_consts if isinstance(c, CodeType)]
RESHAPING = ("reshape_fn_in", "reshape_fn_out")


def is_as_made(sae: Any, methods: dict[str, Any]) -> bool:
    """Whether the object, its class and SAELens' modules have `methods`, the functions above and nothing else."""
    return (
        not has_other_methods(sae, methods)
        and all(getattr(module, name) is function for module, name, function in FUNCTIONS)
        and all(getattr(vars(sae).get(name), "__code__", None) in RESHAPES for name in RESHAPING)
    )


def is_plain(module: Any, *kinds: type[nn.Module]) -> bool:
    """Whether a call of `module` is the `forward` of one of SAELens' classes `kinds`, and nobody looks on."""
    return (
        type(module) in kinds
        and "forward" not in vars(module)
        and type(module).forward is FORWARDS[type(module)]
        and not any(vars(module)[name] for name in HOOKS)
        and not any(getattr(nn_module, name) for name in GLOBAL_HOOKS)
    )


def plain_budget(activation_fn: Any, n_tokens: int, n_features: int) -> float | None:
    """Entries a token that SAELens' TopK, or on average BatchTopK, keeps; None where it has its own word on k."""
    if not is_plain(activation_fn, TopK, BatchTopK):
        return None
    k = activation_fn.k
    try:
        budget = int(k * n_tokens) / n_tokens if isinstance(activation_fn, BatchTopK) else operator.index(k)
    except (TypeError, ValueError, OverflowError):
        return None
    least = 0 if isinstance(activation_fn, BatchTopK) else 1
    return budget if least <= budget <= n_features and not isinstance(k, bool) else None
