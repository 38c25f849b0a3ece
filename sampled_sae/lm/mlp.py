"""The MLP of a block: its input and output, stored in one pass, and a transcoder in its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from sampled_sae.lm.dropped import check_drop_tokens, dropped
from sampled_sae.lm.harvest import check_holdout
from sampled_sae.lm.models import check_rows, device_of, name_of, predicts_next_token, weights_digest
from sampled_sae.residual_stream.blocks import check_layer
from sampled_sae.support.argument_checks import check_integer, check_number
from sampled_sae.support.output_folder import check_output_folder, locked
from sampled_sae.training.paired_activations import PairedActivations
from sampled_sae.training.store_writer import StoreWriter, as_stored, new_manifest

NAMES = ("mlp", "feed_forward", "ffn", "ff")
PARTS = ("inputs", "outputs")
Transcode = Callable[[Tensor], Tensor]


def mlp_of(model: nn.Module, layer: int) -> nn.Module:
    """The MLP of block `layer`: a module of the block that is named as one, from one tensor [B, T, d] to another.

    Raises:
        ValueError: no such block, or no such module in it.
    """
    block = check_layer(model, layer)
    found = [child for name, child in block.named_children() if name in NAMES]
    if len(found) != 1:
        held = ", ".join(name for name, _ in block.named_children())
        raise ValueError(f"layer={layer}: its block has no MLP by the name of {', '.join(NAMES)}, but {held}")
    return found[0]


class _Reached(Exception):
    """Ends a forward pass of which nobody needs the rest."""


def mlp_activations(model: Any, rows: Tensor, layer: int, batch_size: int = 8) -> Iterator[tuple[Tensor, ...]]:
    """(rows [b, T], input [b, T, d], output [b, T, d_out]) of the MLP of block `layer`, float32 on the model's device.

    Raises:
        ValueError: values that are not finite, with their rows; a module that takes or gives something else.
    """
    mlp = mlp_of(model, layer)
    found: list[Any] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        found[:] = [args[0] if args else None, output]
        raise _Reached

    handle = mlp.register_forward_hook(stop)
    try:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size].to(device_of(model))
            try:
                with torch.inference_mode():
                    model(input_ids=batch, use_cache=False)
            except _Reached:
                pass
            for name, t in zip(PARTS, found):
                if not isinstance(t, Tensor) or t.shape[:2] != batch.shape:
                    shape = list(t.shape) if isinstance(t, Tensor) else type(t).__name__
                    raise ValueError(f"layer={layer}: {name} of its MLP are {shape}, must be [{list(batch.shape)}, d]")
                if not t.isfinite().all():
                    raise ValueError(f"layer={layer}: {name} of its MLP are not finite in rows from {start} on")
            yield batch, *(t.float().clone() for t in found)
    finally:
        handle.remove()


def harvest_mlp(
    model: Any,
    rows: Tensor,
    layer: int,
    folder: str | Path,
    *,
    holdout_rows: int = 0,
    source: str = "",
    batch_size: int = 8,
    rows_per_shard: int = 128,
    drop_first: bool = True,
    drop_tokens: Iterable[int] | None = None,
    max_norm_ratio: float = 10.0,
) -> PairedActivations:
    """Writes input and output of the MLP of block `layer` to the stores `folder`/inputs and `folder`/outputs.

    Both in one pass, of the same tokens in the same order. What fails leaves no store behind; it is not resumed.

    Args:
        model, rows, layer: as in `harvest`; rows int64 [N, context].
        folder: `inputs` and `outputs` in it must be new or empty.
        holdout_rows: the last rows, whose tokens are kept for evaluation.
        source: where the texts come from, as recorded.
        batch_size, rows_per_shard, drop_first, drop_tokens: as in `harvest`.
        max_norm_ratio: leave out tokens whose output has a norm above this multiple of the first batch's median.

    Raises:
        ValueError: naming the argument; activations that are not finite.
    """
    check_rows(model, rows)
    batch_size, rows_per_shard = (
        check_integer("batch_size", batch_size, 1),
        check_integer("rows_per_shard", rows_per_shard, 1),
    )
    holdout_rows = check_holdout(holdout_rows, len(rows))
    ratio, special = check_number("max_norm_ratio", max_norm_ratio, 1, None), check_drop_tokens(model, drop_tokens)
    folders = [Path(folder) / part for part in PARTS]
    for each in folders:
        check_output_folder(each)
        if each.exists() and any(each.iterdir()):
            raise ValueError(f"{each}: must be new or empty")
    model.eval()
    batch, _, y = next(mlp_activations(model, rows[:batch_size], layer, batch_size))
    stay = ~dropped(batch, y, drop_first, special, math.inf)[0]
    most = ratio * float(y[stay].norm(dim=-1).median())

    def kept(part: Tensor) -> list[Tensor]:
        found: list[list[Tensor]] = [[], []]
        for batch, *both in mlp_activations(model, part, layer, batch_size):
            stays = ~dropped(batch, both[1], drop_first, special, most)[0]
            for parts, t in zip(found, both):
                parts.append(as_stored(t[stays], "float32"))
        return [torch.cat(parts) for parts in found]

    def manifest(part: str, width: int) -> dict[str, Any]:
        settings = {"weights_sha256": weights_digest(model), "max_norm": most, "drop_first": drop_first}
        where = f"{source or 'texts'}: {part} of the MLP of block {layer} of {name_of(model)}"
        return new_manifest(width, "float32", settings, source=where)

    writers: list[StoreWriter] = []
    with locked(Path(folder), "a harvest"):
        try:
            trained = len(rows) - holdout_rows
            for i, start in enumerate(range(0, trained, rows_per_shard)):
                both = kept(rows[start : min(start + rows_per_shard, trained)])
                if not writers:
                    writers = [StoreWriter(f, manifest(p, t.shape[1])) for f, p, t in zip(folders, PARTS, both)]
                for writer, t in zip(writers, both):
                    writer.write_shard(i, t)
            if holdout_rows:
                for writer, t in zip(writers, kept(rows[trained:])):
                    writer.write_holdout(t)
            for writer in writers:
                writer.write_manifest(complete=True)
        except BaseException:
            for writer in writers:
                writer.delete_files()
            raise
    return PairedActivations(folders[0], folders[1])


@contextmanager
def mlp_replaced(model: nn.Module, layer: int, fn: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Within the context the MLP of block `layer` gives fn(input, output), of the shape and dtype of its output."""

    def substitute(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        after = fn(args[0], output)
        if after.shape != output.shape or after.dtype != output.dtype:
            raise ValueError(f"fn returned {after.dtype} {list(after.shape)} for {output.dtype} {list(output.shape)}")
        return after

    handle = mlp_of(model, layer).register_forward_hook(substitute)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def transcoded_cross_entropy(
    model: Any, rows: Tensor, layer: int, transcode: Transcode, batch_size: int = 8, drop_first: bool = True
) -> dict[str, float]:
    """Cross-entropy of the next token, in nats, with the MLP of block `layer` replaced by `transcode`.

    Args:
        model: causal language model; put in eval mode.
        rows: int64 [N, context].
        transcode: inputs [n, d] of the MLP to its outputs [n, d_out], as `transcode_with(sae)`.
        drop_first: leave position 0 of each row as it is.

    Returns:
        ce_clean, ce_zero and ce_mean (the MLP's output is 0, or its mean over the replaced tokens), ce_spliced, and
        loss_recovered_zero and loss_recovered_mean, 1 where nothing is lost and 0 where all is that the MLP gives.
    """
    check_rows(model, rows)
    if not predicts_next_token(model):
        raise ValueError(f"{type(model).__name__}: predicts no next token; give a causal language model")
    batch_size, first = check_integer("batch_size", batch_size, 1), int(drop_first)
    model.eval()
    outputs = [y[:, first:].flatten(0, 1) for _, _, y in mlp_activations(model, rows, layer, batch_size)]
    mean = torch.cat(outputs).double().mean(0)

    def loss(fn: Callable[[Tensor, Tensor], Tensor] | None) -> float:
        def spliced(x: Tensor, y: Tensor) -> Tensor:
            after = y.clone()
            after[:, first:] = y[:, first:] if fn is None else fn(x[:, first:], y[:, first:]).to(y)
            return after

        total, count = 0.0, 0
        with mlp_replaced(model, layer, spliced):
            for batch in rows.split(batch_size):
                batch = batch.to(device_of(model))
                logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
                total += float(nnf.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
                count += batch[:, 1:].numel()
        return total / count

    def transcoded(x: Tensor, y: Tensor) -> Tensor:
        return transcode(x.flatten(0, 1).float()).view(y.shape)

    found = {"ce_clean": loss(None), "ce_zero": loss(lambda x, y: torch.zeros_like(y))}
    found |= {"ce_mean": loss(lambda x, y: mean.expand_as(y)), "ce_spliced": loss(transcoded)}
    for ablation in ("zero", "mean"):
        lost = found[f"ce_{ablation}"] - found["ce_clean"]
        gained = found[f"ce_{ablation}"] - found["ce_spliced"]
        found[f"loss_recovered_{ablation}"] = gained / lost if lost else math.nan
    return found


def transcode_with(sae: Any) -> Transcode:
    """x [n, d_in] to the reconstruction [n, d_out] of a transcoder, skip included, in the mode it is in."""
    if not sae.cfg.is_transcoder:
        raise ValueError("sae: is no transcoder (d_out=None); an SAE is spliced by SpliceEvaluator")

    def transcode(x: Tensor) -> Tensor:
        given = x.to(sae.W_enc)
        return sae.decode(sae.encode_sparse(given), given)

    return transcode
