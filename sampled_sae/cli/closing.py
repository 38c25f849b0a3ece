"""What `train` does after the last step: metrics on held-out activations, in the model where it is at hand."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..pretrained import EVALUATION
from ..sae import SampledSAE
from ..support.all_ranks import AllRanks
from ..support.atomic_files import write_json
from ..training.activations import Activations
from ..training.layer_spread import LayerSpread, layer_names, plot_layers
from ..training.sae_group import Opened
from ..training.sweep import Splice, SpliceSource, evaluate
from .arguments import can_plot
from .errors import is_no_memory, sentence
from .identity import say_no_loss, splice_source

Found = TypeVar("Found")


def closing_splice(args: argparse.Namespace, store: Opened) -> SpliceSource | None:
    """The language model that the loss recovered is measured in; None for none. All ranks call it.

    With --splice-rows it has to be there. Without, it is taken where nothing need be fetched for it, on any rank.

    Raises:
        ValueError: as `splice_source`, with --splice-rows.
    """
    asked, ranks = args.splice_rows is not None, args.ranks
    with ranks.together():
        if not _holds_out(args, store):
            if args.splice_rows:
                store.holdout()  # says that there is none
            return None
        if asked or not isinstance(store, Activations) or _is_at_hand(store.manifest.get("model"), store):
            source, why = tried(lambda: splice_source(args, store), asked)
        else:
            source, why = None, ""
    return of_all(source, why, ranks)


def evaluate_at_end(
    sae: SampledSAE, args: argparse.Namespace, store: Opened, source: SpliceSource | None, folder: Path
) -> dict[str, Any]:
    """As `sampled-sae evaluate`, evaluation.json included; empty where nothing is held out."""
    if not _holds_out(args, store):
        return {}
    with args.ranks.together():
        held_out, _ = store.holdout()
    return evaluated(sae, held_out, _loaded(source, args), args, folder)


def _holds_out(args: argparse.Namespace, store: Opened) -> bool:
    return bool(store.manifest.get("holdout") if isinstance(store, Activations) else args.holdout_rows)


def evaluated(
    sae: SampledSAE, held_out: Tensor, splice: Splice | None, args: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """The metrics on held-out activations; the first rank writes them to evaluation.json."""
    result = evaluate(sae, held_out, args.batch_size, splice)
    with args.ranks.together():
        if args.ranks.first:
            write_json(folder / EVALUATION, result)
    return result


def draw_layers(sae: SampledSAE, folder: Path, store: Opened, ranks: AllRanks) -> None:
    """Of a crosscoder layers.png, by the first rank; says where it is, or why it is not. All ranks call it."""
    if not sae.cfg.is_crosscoder:
        return
    spread = LayerSpread.of(sae)
    with ranks.together():
        if not ranks.first:
            return
        if can_plot("plot of the layers"):
            print(plot_layers(spread, folder, layer_names(store.manifest, sae.cfg.layers)), flush=True)


def _loaded(source: SpliceSource | None, args: argparse.Namespace) -> Splice | None:
    """The measure; None where the model turns out to be another one, which is no reason to fail a run that is done."""
    if source is None:
        return None
    asked, ranks = args.splice_rows is not None, args.ranks
    with ranks.together():
        found, why = tried(source.model, asked)
    if (model := of_all(found, why, ranks)) is None:
        return None
    measure, why = tried(lambda: source.measure(model), asked, ranks.size == 1)
    return of_all(measure, why, ranks)


def tried(make: Callable[[], Found], asked: bool, alone: bool = True) -> tuple[Found | None, str]:
    """What is made, or why it cannot be, missing memory too; what the user has `asked` for fails.

    alone: nothing is exchanged with other ranks meanwhile. They would wait for one without memory, which ends all.
    """
    try:
        return make(), ""
    except Exception as error:
        known = isinstance(error, (ValueError, OSError, ImportError)) or (alone and is_no_memory(error))
        if asked or not known:
            raise
        return None, sentence(error, {})


def of_all(found: Found | None, why: str, ranks: AllRanks) -> Found | None:
    """What was found, where every rank has found it; else None, and a line names the first rank that has not.

    why: it was not found; empty where nothing need be said if all ranks are without.
    """
    reasons = ranks.gather(why if found is None else None)
    without = [rank for rank, reason in enumerate(reasons) if reason is not None]
    if not without:
        return found
    said = reasons[without[0]]
    if len(without) < ranks.size:
        said = f"rank {without[0]}: {said or 'the model that was harvested is not on its machine'}"
    if said:
        say_no_loss(said)
    return None


def _is_at_hand(model: str | None, store: Activations) -> bool:
    from ..lm.models import is_at_hand

    return bool(model) and store.has_text and is_at_hand(str(model))
