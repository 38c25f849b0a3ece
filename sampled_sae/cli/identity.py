"""Whether an SAE, activations and a language model belong together, by what their files say of them."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from ..config import SampledSAEConfig
from ..formats.published import Published
from ..pretrained import ORIGIN, RUN
from ..support.atomic_files import field, read_json
from ..training.activation_stream import StreamedActivations
from ..training.activations import Activations
from ..training.sae_group import Opened
from ..training.same_settings import identity, in_words, is_same_kind, is_same_model
from ..training.sweep import Splice, SpliceSource
from .arguments import loaded_model

SPLICE_ROWS = 16


def splice_rows(args: argparse.Namespace, held_out: int) -> int:
    """How many of the held-out rows the loss recovered is measured on."""
    count: int = min(SPLICE_ROWS, held_out) if args.splice_rows is None else args.splice_rows
    return count


def say_no_loss(why: str) -> None:
    print(f"No loss recovered: {why}", file=sys.stderr)


def trained_on(folder: Path) -> dict[str, Any]:
    """The `identity` of what an SAE reads, as its training or its import left it; empty where nothing says it."""
    if (folder / RUN).is_file():
        return dict(field(folder / RUN, read_json(folder / RUN), "activations", dict))
    if (folder / ORIGIN).is_file():
        origin = read_json(folder / ORIGIN)
        return {"model": origin.get("model_name"), "layer": block_read(origin.get("layer"), origin.get("hook_name"))}
    return {}


def block_read(layer: int | None, hook: str | None) -> int | str | None:
    """The block whose output an SAE reads; the hook itself where it reads something else than the residual stream."""
    if layer is None or not hook:
        return layer
    if "resid_pre" in hook:
        return layer - 1
    return hook if re.search("mlp|attn|attention|resid_mid|ln2|layernorm|hook_[qkvz]$|hook_embed", hook) else layer


def block(found: Published) -> int | str | None:
    """The block whose output a published SAE reads, or the hook where it reads something else; None for unknown."""
    return block_read(found.origin.layer, found.origin.hook_name)


def check_same_origin(
    name: str, found: Published, given: dict[str, Any], insist: bool, what: str = "and was given"
) -> None:
    """ValueError where an SAE's files name another model or layer than is given; what is not named is not compared."""
    then = {"model": found.origin.model_name, "layer": block(found)}
    given = {part: given.get(part) for part in then}
    before, now = (None if about["model"] is None else _short(str(about["model"])) for about in (then, given))
    differ = [] if None in (before, now) or before == now else ["model"]
    if None not in (then["layer"], given["layer"]) and then["layer"] != given["layer"]:
        differ.append("layer")
    if differ and not insist:
        is_, of = (", ".join(f"{part} {about[part]}" for part in differ) for about in (given, then))
        raise ValueError(f"{name} reads {of}, {what} {is_}; take the same, or insist with --insist")


def _short(model: str) -> str:
    """A model's name without its owner, as files have it in either form."""
    return model.rstrip("/").rpartition("/")[2].lower()


def check_same_activations(folder: Path, cfg: SampledSAEConfig, store: Activations, insist: bool) -> None:
    """Whether the SAE in `folder` reads what `store` holds; says so where nothing tells.

    Raises:
        ValueError: another width, or number of layers; without `insist`, another model, layer or source. Names both.
    """
    if cfg.layers != store.layers:
        beside = "; --beside names the layers of a crosscoder" if store.layers == 1 else ""
        raise ValueError(f"{folder}: layers={cfg.layers}, but {store.where} has {store.layers}{beside}")
    if cfg.d_in != store.d_in:
        raise ValueError(f"{folder}: d_in={cfg.d_in}, but the activations in {store.where} have {store.d_in}")
    own, found = ([*each] if isinstance(each, tuple) else [each] for each in (cfg.input_scale, store.scale))
    if not insist and own != found and sorted(own) == sorted(found):
        raise ValueError(
            f"{folder}: was trained on these layers in another order, with the scales {own}, and {store.where} has "
            f"{found}; name them as for the training, or insist with --insist"
        )
    then, now = trained_on(folder), identity(store.manifest)
    named = [about for about in (then, now) if about.get("model") or about.get("source")]
    scale = list(store.scale) if isinstance(store.scale, tuple) else store.scale
    if not named and then.get("scale") == scale:
        return  # the store that it was trained on
    if not named or not (then.get("model") or then.get("source") or "scale" in then):
        print(f"Nothing tells whether {folder} was trained on activations such as {store.where} holds", file=sys.stderr)
    elif not insist and not is_same_kind(then, now):
        raise ValueError(
            f"{folder} was trained on {in_words(then)}, but {store.where} holds {in_words(now)}; evaluate on the "
            "same kind of activations, or insist with --insist"
        )


def splice_source(args: argparse.Namespace, store: Opened) -> SpliceSource | None:
    """The language model in which reconstructions are measured, by the options; loaded later. None for no splicing.

    Of a stream it is the model at work.

    Raises:
        ValueError: more rows than are held out, no text, a model other than the one that was harvested, or with
            --splice-rows one that predicts no next token.
    """
    if not isinstance(store, Activations):
        return _of_stream(args, store)
    there = (store.manifest.get("holdout") or {}).get("rows") or 0
    count = splice_rows(args, there)
    if count == 0 and args.splice_rows is None and args.model is not None:
        store.holdout_rows()  # says that there are none
    if count == 0:
        return None
    if store.has_text and not 0 <= count <= there:
        raise ValueError(f"--splice-rows {count}: must be from 0 to {there}, the held-out rows in {store.where}")
    rows = store.holdout_rows()[:count]
    if (said := _of_several_models(store)) is not None:
        if args.splice_rows is not None:
            raise ValueError(f"--splice-rows {count}: {said}")
        say_no_loss(said)
        return None
    # one model may have given layers side by side under two names
    harvested = {**identity(store.manifest), "model": _parts(store)[0]["model"]}
    name = args.model or harvested["model"]
    if not name:
        raise ValueError(f"{store.where}: does not name the language model it was harvested from; give its --model")
    if not args.insist and not harvested["weights_sha256"]:
        check_model({"model": name}, harvested, store.where)
    if not has_loss(name, args, count):
        return None

    def load() -> Any:
        from ..lm import weights_digest

        model = loaded_model(name, args)
        if not args.insist:
            check_model({"model": name, "weights_sha256": weights_digest(model)}, harvested, store.where)
        return model

    def measure(model: Any) -> Splice:
        from ..lm import LayersSplice, PointSplice, SpliceEvaluator

        if store.layers > 1:
            return LayersSplice.of_harvest(model, rows, store.manifest, insist=True).evaluate
        if store.d_out is not None or harvested.get("point"):
            return PointSplice.of_harvest(model, rows, store.manifest, insist=True).evaluate
        return SpliceEvaluator.of_harvest(model, rows, store.manifest, insist=True, mesh=args.ranks.mesh).evaluate

    # Without --insist the weights are those that were harvested, under whatever name.
    return SpliceSource({"model": name if args.insist else harvested["model"], "rows": count}, load, measure)


def _of_stream(args: argparse.Namespace, part: StreamedActivations) -> SpliceSource | None:
    count = splice_rows(args, args.holdout_rows)
    if count == 0 or not has_loss(args.model, args, count):
        return None

    def measure(source: Any) -> Splice:
        rows = part.holdout()[1][:count]
        made: Splice = source.splice(part.indices, rows, part.layers > 1, args.ranks.mesh).evaluate
        return made

    return SpliceSource({"model": args.model, "rows": count}, lambda: part.source, measure)


def _parts(store: Activations) -> list[dict[str, Any]]:
    """The identities of what stands side by side in the activations: a pair's two, or each layer's."""
    target = store.manifest.get("target")
    of_pair = [identity(store.manifest), *([] if target is None else [target])]
    return list(store.manifest.get("layers") or of_pair)


def _of_several_models(store: Activations) -> str | None:
    """Why no single model gives the activations; None where one does, or where they are of one place."""
    first, *others = _parts(store)
    for other in others:
        if not (other["model"] and is_same_model(other, first)):
            which = "the targets are" if store.layers == 1 else f"beside {in_words(first)} one is"
            return f"{store.where}: {which} of {in_words(other)}, so that no model gives both"
    return None


def has_loss(name: str, args: argparse.Namespace, count: int) -> bool:
    """Whether the model predicts a next token, so that a splice has a loss; says so where it has none."""
    from ..lm.models import is_causal_model

    if is_causal_model(name, args.cache):
        return True
    if args.splice_rows is not None:
        raise ValueError(f"--splice-rows {count}: {name} predicts no next token; leave it out, or give 0")
    say_no_loss(f"{name} is an encoder and predicts no next token")
    return False


def check_model(model: dict[str, Any], harvested: dict[str, Any], where: str) -> None:
    """ValueError where a model is not the one whose activations are in `where`, by their `identity`."""
    if not is_same_model(model, harvested):
        then, now = ({**harvested, **about} for about in (harvested, {"weights_sha256": None, **model}))
        raise ValueError(
            f"{where} holds {in_words(then)}, and --model {model['model']} gives {in_words(now)}; take the "
            "model that was harvested, as it was loaded then, or insist with --insist"
        )
