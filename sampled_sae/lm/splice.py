"""What a reconstruction costs the language model: cross-entropy with the residual stream replaced by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sampled_sae.lm.dropped import check_drop_tokens, dropped
from sampled_sae.lm.models import device_of, identity_of
from sampled_sae.lm.splice_figures import (
    check_has_loss,
    check_one_place,
    checked_reconstruction,
    dropped_by_harvest,
    figures,
    harvested_place,
    next_token_loss,
)
from sampled_sae.residual_stream.blocks import check_layer, text_config, transformer_blocks
from sampled_sae.residual_stream.hooks import replace
from sampled_sae.support.all_ranks import ranks_of
from sampled_sae.support.argument_checks import check_integer, check_positive
from sampled_sae.support.even_slices import part_of
from sampled_sae.training.evaluation import Reconstruction
from sampled_sae.training.same_settings import identity, in_words

Reconstruct = Callable[[Tensor], Tensor]
# which splice is for what is no SAE of one layer
ELSEWHERE = {"a transcoder": "PointSplice", "a crosscoder": "LayersSplice"}
_LOGIT_BYTES = 1 << 28  # float32 logits held at a time


def spliced_cross_entropy(
    model: Any, rows: Tensor, layer: int, reconstruct: Reconstruct, **options: Any
) -> dict[str, float]:
    """`SpliceEvaluator(model, rows, layer, ...).evaluate(reconstruct)`, for a single reconstruction."""
    return SpliceEvaluator(model, rows, layer, **options).evaluate(reconstruct)


class SpliceEvaluator:
    """Runs the clean and the ablated model once, then only the blocks after `layer` for each reconstruction.

    A spliced run replaces the residual stream after block `layer`, except where the harvest drops it too: at
    position 0, at `drop_tokens` and at vectors whose norm exceeds `max_norm`. `of_harvest` takes all of them from
    a manifest.

    Args:
        model: causal language model; put in eval mode.
        rows: int64 [N, context] token ids.
        layer: index of the block, from 0.
        scale: what reconstructions are given the activations times; 1 for those that scale by themselves, as
            `reconstruct_with(sae)` does.
        max_norm: largest norm of a raw vector that is replaced, the manifest's `max_norm`.
        drop_first: leave position 0 of each row as it is; the manifest's `settings` have it.
        drop_tokens: ids left as they are wherever they stand; likewise.
        batch_size: rows a forward pass, at most; fewer where their logits would take more than 256 MiB.
        mesh: of all processes, which call with the same arguments: each runs the model on its part of every
            `batch_size` rows, at least one row each, and all have the figures of all rows.
        mean: float [d], raw, for the mean ablation; default the mean of the replaced vectors of these rows.

    Attributes:
        ce_clean, ce_zero, ce_mean: cross-entropy of the next token in nats a token, of the model as it is and
            with the replaced vectors all zero, or all their mean.
        spliced_tokens: how many vectors are replaced.
        about: name, fingerprint and layer of the model, and number of rows, which a sweep records.

    Raises:
        ValueError: for bad arguments (an encoder, which predicts no next token, among them), or rows of which
            nothing would be replaced.
    """

    def __init__(
        self,
        model: Any,
        rows: Tensor,
        layer: int,
        *,
        scale: float = 1.0,
        max_norm: float = math.inf,
        drop_first: bool = True,
        drop_tokens: Iterable[int] = (),
        batch_size: int = 4,
        mesh: DeviceMesh | None = None,
        mean: Tensor | None = None,
    ) -> None:
        check_layer(model, layer)
        check_has_loss(model, rows)
        scale = check_positive("scale", scale)
        if not max_norm > 0:
            raise ValueError(f"max_norm={max_norm} must be above 0")
        batch_size = check_integer("batch_size", batch_size, 1)
        model.eval()
        self._model, self._layer, self._scale = model, layer, scale
        self.about = {**identity_of(model), "layer": int(layer), "rows": len(rows)}
        vocabulary = text_config(model).vocab_size
        size = min(batch_size, max(1, _LOGIT_BYTES // (4 * rows.shape[1] * vocabulary)))
        self._ranks = ranks = ranks_of(mesh)
        # of every batch the rows here, which may be none; ranks of one dictionary share too
        batches = rows.to(device_of(model)).split(max(size, ranks.size))
        self._batches = [part_of(batch, ranks.rank, ranks.size) for batch in batches]
        self._first = next((batch for batch in self._batches if len(batch)), rows[:1].to(device_of(model)))[:1]
        self._predicted = rows[:, 1:].numel()
        self._residuals: list[Tensor] = []  # [b, T, d] each
        self._replaced: list[Tensor] = []  # bool [b, T] each
        # of what blocks 0 to layer return; 0: a bare tensor, None: neither that nor a tuple or list
        self._tuple_sizes: list[int | None] = []
        self.ce_clean = self._run_clean(drop_first, check_drop_tokens(model, drop_tokens), max_norm)
        self.spliced_tokens = int(ranks.total(sum(int(replaced.sum()) for replaced in self._replaced)))
        if self.spliced_tokens == 0:
            raise ValueError(f"no token would be replaced: all are dropped, or exceed max_norm={max_norm}")
        self._skips_prefix = self._suffix_equals_whole_model()
        width = self._residuals[0].shape[-1]
        if mean is not None and (not isinstance(mean, Tensor) or mean.shape != (width,)):
            raise ValueError(f"mean={mean!r}: must be a tensor of shape [{width}]")
        self.ce_zero = self._run_spliced(torch.zeros_like)
        ablation = self._mean() if mean is None else mean.to(device_of(model), torch.float32)
        self.ce_mean = self._run_spliced(lambda x: ablation.expand_as(x))

    @classmethod
    def of_harvest(
        cls, model: Any, rows: Tensor, manifest: dict[str, Any], *, insist: bool = False, **options: Any
    ) -> SpliceEvaluator:
        """The evaluator for a harvest: its layer, and just the vectors that it keeps are replaced.

        Args:
            model, rows: as for the class; rows usually those held out.
            manifest: of the harvest.
            insist: take a model with other weights than the one that was harvested.
            options: further arguments of the class.

        Raises:
            ValueError: as the class; other weights, naming both models; a manifest of activations without a model.
        """
        check_one_place(manifest)
        harvested = identity(manifest)
        layer = harvested_place(harvested)
        if not isinstance(layer, int):
            raise ValueError(
                f"manifest is of {in_words(harvested)}, which is no residual stream: PointSplice is for it"
            )
        dropping = dropped_by_harvest(model, manifest, insist)
        return cls(model, rows, layer, max_norm=manifest["max_norm"], **dropping, **options)

    def evaluate(self, reconstruct: Reconstruct) -> dict[str, float]:
        """Splice one reconstruction in.

        Args:
            reconstruct: takes float32 [n, d], activations times `scale`, and returns the same shape in the same units.

        Returns:
            ce_clean, ce_spliced, ce_zero, ce_mean in nats a token; loss_recovered_zero and
            loss_recovered_mean, (ce_ablated - ce_spliced) / (ce_ablated - ce_clean): 1 for a perfect
            reconstruction, 0 for one no better than the ablation, NaN where the ablation changes nothing;
            predicted_tokens, and spliced_tokens replaced.

        Raises:
            ValueError: if `reconstruct` returns another shape or values that are not finite, or scales by itself where
                `scale` is not 1; a transcoder's.
        """
        if isinstance(reconstruct, Reconstruction) and reconstruct.kind in ELSEWHERE:
            kind, other = reconstruct.kind, ELSEWHERE[reconstruct.kind]
            raise ValueError(
                f"reconstruct: is of {kind}, which makes no residual stream of one layer: {other} is for it"
            )
        if self._scale != 1 and getattr(reconstruct, "scales", False):
            raise ValueError(f"scale={self._scale}: the SAE multiplies by its own input_scale; leave scale= out")
        ce = self._run_spliced(lambda x: checked_reconstruction(reconstruct(x * self._scale), x.shape) / self._scale)
        return figures(self, ce, self._predicted)

    def _run_clean(self, drop_first: bool, drop_tokens: list[int], max_norm: float) -> float:
        found = []

        def record(x: Tensor) -> Tensor:
            found.append(x)
            return x

        with self._recorded_structure(), replace(self._model, self._layer, record):
            if not any(map(len, self._batches)):  # the structure and the widths are learnt all the same
                self._logits(self._first, None)
            ce = self._cross_entropy()
        residuals = iter(found)
        for rows in self._batches:
            x = next(residuals) if len(rows) else found[0][:0]
            self._residuals.append(x)
            self._replaced.append(~dropped(rows, x, drop_first, drop_tokens, max_norm)[0])
        return ce

    def _run_spliced(self, fn: Reconstruct) -> float:
        """Cross-entropy with fn of the raw float32 vectors [n, d] in their place."""
        return self._cross_entropy(self._spliced(i, fn) for i in range(len(self._batches)))

    @torch.no_grad()
    def _spliced(self, index: int, fn: Reconstruct) -> Tensor:
        x, replaced = self._residuals[index].clone(), self._replaced[index]
        x[replaced] = fn(x[replaced].float()).to(x.dtype)
        return x

    @torch.no_grad()
    def _cross_entropy(self, residuals: Iterator[Tensor] | None = None) -> float:
        """Mean over all predicted tokens, in nats; from the given residual streams where there are any."""
        total, tokens = 0.0, 0
        for batch in self._batches:
            residual = None if residuals is None else next(residuals)
            if len(batch):
                total += next_token_loss(self._logits(batch, residual), batch)
                tokens += batch[:, 1:].numel()
        return self._ranks.total(total) / self._ranks.total(tokens)

    def _logits(self, batch: Tensor, residual: Tensor | None) -> Tensor:
        """Logits [b, T, V] of the model, which continues from `residual` after the layer if there is one."""
        if residual is None:
            return self._model(input_ids=batch, use_cache=False).logits
        whole = replace(self._model, self._layer, lambda x: residual)
        with self._without_prefix(residual) if self._skips_prefix else whole:
            return self._model(input_ids=batch, use_cache=False).logits

    @torch.no_grad()
    def _suffix_equals_whole_model(self) -> bool:
        """Whether the first row gives the same logits when blocks 0 to layer are skipped.

        A model whose later blocks use more of the earlier ones than the residual stream (shared keys and
        values, say) fails this, and then runs whole.
        """
        if None in self._tuple_sizes:
            return False
        row, residual = self._first, next((x for x in self._residuals if len(x)), self._residuals[0])[:1]
        if len(residual) == 0:
            return False
        self._skips_prefix = False
        whole = self._logits(row, residual)
        self._skips_prefix = True
        try:
            return torch.equal(self._logits(row, residual), whole)
        except (TypeError, AttributeError, RuntimeError, ValueError, LookupError):
            return False

    @contextmanager
    def _recorded_structure(self) -> Iterator[None]:
        def note(module: Any, args: Any, output: Any) -> None:
            if len(self._tuple_sizes) <= self._layer:
                several = isinstance(output, (tuple, list))
                self._tuple_sizes.append(len(output) if several else 0 if isinstance(output, Tensor) else None)

        handles = [block.register_forward_hook(note) for block in self._prefix()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _without_prefix(self, residual: Tensor) -> Iterator[None]:
        """Blocks 0 to layer return `residual` at once, in the structure of their real output."""
        saved = [(block, block.__dict__.get("forward")) for block in self._prefix()]
        for (block, _), size in zip(saved, self._tuple_sizes, strict=True):
            output = (residual, *[None] * (size - 1)) if size else residual
            block.forward = lambda *args, _output=output, **kwargs: _output
        try:
            yield
        finally:
            for block, forward in saved:
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

    def _prefix(self) -> list[Any]:
        return list(transformer_blocks(self._model))[: self._layer + 1]

    def _mean(self) -> Tensor:
        pairs = zip(self._residuals, self._replaced, strict=True)
        total = torch.stack([x[where].double().sum(dim=0) for x, where in pairs]).sum(dim=0)
        total = sum(self._ranks.gather(total.cpu()), torch.zeros(())).to(total.device)
        return (total / self.spliced_tokens).float()
