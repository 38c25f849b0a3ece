"""The logit lens: which tokens a direction in the residual stream raises and lowers; tokens as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sampled_sae.lm.models import device_of, predicts_next_token
from sampled_sae.residual_stream.blocks import text_config, transformer_blocks

_LOGIT_BYTES = 1 << 28  # float32 logits held at a time
# how vocabularies write the space before a word
_SPACES = ("▁", "Ġ")
_NO_TEXT = "\ufffd"


class LensTokens(NamedTuple):
    """Of P directions, by row: logits [P, n] of the n tokens raised and lowered most, and their ids int64 [P, n]."""

    raised: Tensor
    raised_ids: Tensor
    lowered: Tensor
    lowered_ids: Tensor


@torch.no_grad()
def logit_lens(model: Any, directions: Tensor, n: int = 10) -> LensTokens:
    """Reads directions [P, d] of the residual stream by the model's final norm and unembedding.

    Equivalent to `(head(norm(directions)) - head(norm(0))).topk(n)`: what is the same for all directions is taken off.
    The method is nostalgebraist's, "interpreting GPT: the logit lens" (2020).

    Raises:
        ValueError: a model without a head for the next token, another width, a final norm that cannot be told.
    """
    if not predicts_next_token(model):
        raise ValueError(f"model must predict the next token: {type(model).__name__} has no head to do it with")
    width = getattr(text_config(model), "hidden_size", None)
    if directions.dim() != 2 or (width is not None and directions.shape[1] != width):
        raise ValueError(
            f"directions={list(directions.shape)}: must be [P, {width}], directions of the residual stream"
        )
    head, norm, device = model.get_output_embeddings(), final_norm(model), device_of(model)
    dtype = next(head.parameters()).dtype

    def logits(x: Tensor) -> Tensor:
        return head(norm(x.to(device, dtype))).float()

    base = logits(torch.zeros_like(directions[:1]))
    n = min(n, base.shape[1])
    empty, no_ids = torch.empty(0, n), torch.empty(0, n, dtype=torch.int64)
    found = [LensTokens(empty, no_ids, empty, no_ids)]
    for part in directions.split(max(1, _LOGIT_BYTES // (4 * base.shape[1]))):
        effect = logits(part) - base
        most, least = effect.topk(n), effect.topk(n, largest=False)
        found.append(LensTokens(most.values.cpu(), most.indices.cpu(), least.values.cpu(), least.indices.cpu()))
    return LensTokens(*(torch.cat(parts) for parts in zip(*found)))


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the unembedding; the identity in a model without one.

    Raises:
        ValueError: several that it could be.
    """
    blocks = transformer_blocks(model)
    inside = {id(module) for module in blocks.modules()}
    behind, found = False, {}
    for path, module in model.named_modules():
        if module is blocks:
            behind = True
        elif behind and id(module) not in inside and "norm" in type(module).__name__.lower():
            found[path] = module
    if len(found) > 1:
        raise ValueError(f"{type(model).__name__} has several norms behind its blocks: {', '.join(found)}")
    return next(iter(found.values()), nn.Identity())


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token alone, its leading space included.

    Part of a character is written as the vocabulary has it, an id without a token as `#id`.
    """
    raw = tokenizer.convert_ids_to_tokens(list(ids))
    decoded = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    return [_text(*one) for one in zip(ids, raw, decoded)]


def _text(i: int, raw: str | None, decoded: str) -> str:
    if raw is None:
        return f"#{i}"
    if not decoded or _NO_TEXT in decoded:
        return str(raw)
    return f" {decoded}" if raw.startswith(_SPACES) and not decoded[0].isspace() else decoded
