"""What `train` does after the last step: metrics on held-out activations, in the model where it is at hand."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from ..pretrained import EVALUATION
from ..sae import SampledSAE
from ..support.all_ranks import AllRanks
from ..support.atomic_files import write_json
from ..training.activation_stream import StreamedActivations
from ..training.activations import Activations
from ..training.layer_spread import LayerSpread, layer_names, plot_layers
from ..training.sweep import SpliceSource, evaluate
from .identity import splice_source


def closing_splice(args: argparse.Namespace, store: Activations) -> SpliceSource | None:
    """The language model that the loss recovered is measured in; None for none.

    With --splice-rows it has to be there. Without, it is taken where nothing need be fetched for it.

    Raises:
        ValueError: as `splice_source`, with --splice-rows.
    """
    asked = args.splice_rows is not None
    if not store.manifest.get("holdout"):
        if args.splice_rows:
            store.holdout()  # says that there is none
        return None
    if not asked and not _is_at_hand(store.manifest.get("model"), store):
        return None
    as_harvested = {"model": None, "cache": None, "model_dtype": "float32", "model_device": None}
    about = argparse.Namespace(splice_rows=args.splice_rows, insist=False, ranks=args.ranks, **as_harvested)
    try:
        return splice_source(about, store)
    except (ValueError, OSError, ImportError) as error:
        if asked:
            raise
        print(f"No loss recovered: {error}", file=sys.stderr)
        return None


def evaluate_at_end(
    sae: SampledSAE, args: argparse.Namespace, store: Activations, source: SpliceSource | None
) -> dict[str, Any]:
    """As `sampled-sae evaluate`, evaluation.json included; empty for a store without a held-out part."""
    if not store.manifest.get("holdout"):
        return {}
    ranks = args.ranks
    with ranks.together():
        held_out, _ = store.holdout()
    result = evaluate(sae, held_out, args.batch_size, _loaded(source, args))
    with ranks.together():
        if ranks.first:
            write_json(args.out / EVALUATION, result)
    return result


def draw_layers(sae: SampledSAE, folder: Path, store: Activations | StreamedActivations, ranks: AllRanks) -> None:
    """Of a crosscoder layers.png, by the first rank; says where it is, or why it is not. All ranks call it."""
    if not sae.cfg.is_crosscoder:
        return
    spread = LayerSpread.of(sae)
    with ranks.together():
        if not ranks.first:
            return
        if importlib.util.find_spec("matplotlib") is None:
            print('No plot of the layers without matplotlib: pip install "sampled-sae[plot]"', flush=True)
        else:
            print(plot_layers(spread, folder, layer_names(store.manifest, sae.cfg.layers)), flush=True)


def _loaded(source: SpliceSource | None, args: argparse.Namespace) -> Any:
    """The measure; None where the model turns out to be another one, which is no reason to fail a run that is done."""
    try:
        return None if source is None else source.load()
    except (ValueError, OSError, ImportError) as error:
        if args.splice_rows is not None:
            raise
        print(f"No loss recovered: {error}", file=sys.stderr)
        return None


def _is_at_hand(model: str | None, store: Activations) -> bool:
    from ..lm.models import is_at_hand

    return bool(model) and store.has_text and is_at_hand(str(model))
