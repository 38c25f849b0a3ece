"""SAEs in the files of SAELens, dictionary_learning and sparsify, and back; none of them need be installed.

`export` writes a SampledSAE as a peer's loader expects it, `load` reads a peer's folder as a SampledSAE:

    formats.export(sae, "sae-for-saelens", to="saelens", origin=formats.Origin("EleutherAI/pythia-160m", layer=5))
    sae = formats.load("sae-for-saelens")

Ours -> theirs -> ours gives the same files again, bit for bit, and so do the tensors of theirs -> ours -> theirs.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from .. import pretrained
from ..config import SampledSAEConfig
from ..sae import SampledSAE
from ..support.argument_checks import check_choice, check_positive
from . import dictionary_learning, saelens, sparsify
from .layers import uncentred, with_one_threshold
from .origin import Origin
from .portable import RULES, PortableSAE, Say, silent, without_fraction
from .supplement import FILE as SUPPLEMENT_FILE
from .supplement import Supplement

__all__ = ["FORMATS", "INFERENCE", "Loaded", "Origin", "PortableSAE", "detect", "export", "load", "read"]

PEERS: dict[str, ModuleType] = {module.NAME: module for module in (saelens, dictionary_learning, sparsify)}
FORMATS = tuple(PEERS)
# those that have a place for them
TRANSCODERS = (saelens.NAME, sparsify.NAME)
CROSSCODERS = (dictionary_learning.NAME,)
INFERENCE = ("auto", *RULES)


class Loaded(NamedTuple):
    """What a peer's folder says.

    Attributes:
        sae: as `load` gives it.
        origin: what the SAE reads, as far as the files say.
        scale: what it multiplies activations by, `sae.cfg.input_scale`.
    """

    sae: SampledSAE
    origin: Origin
    scale: float | tuple[float, ...]


def export(
    sae: SampledSAE,
    folder: str | os.PathLike[str],
    *,
    to: str,
    inference: str = "auto",
    k: int | None = None,
    scale: float | None = None,
    origin: Origin | None = None,
    say: Say = silent,
) -> list[Path]:
    """Writes the SAE in a peer's files; returns their paths.

    Args:
        sae: its weights are not changed.
        folder: made if need be; files of the same format are replaced.
        to: "saelens", "dictionary_learning" or "sparsify".
        inference: what the peer's encode does. "threshold": what `sae.eval().encode` does; "topk": the k largest of
            each token. "auto" is "topk" for a TopK SAE (`select="token", l=None`), which is what its training did
            and what the peers call TopK, and "threshold" for all others. An SAE with `cfg.inference="batch"` needs
            one of the two, since no file can say what depends on the batch.
        k: in place of `cfg.k`, which may be a fraction where the peer has whole numbers. An error where the file
            has no place for it: SAELens' threshold SAEs.
        scale: what the SAE's activations are multiplied by, in place of `cfg.input_scale`. The peer will feed them as
            they are: biases and threshold are divided by it, codes come out divided by it.
        origin: model, layer and hook, recorded where the peer has a place for them.
        say: called with a line for each convention that was changed.

    Raises:
        ValueError: something that the peer's format cannot say; NaN or inf in the SAE, or a bias that leaves its
            dtype; a folder that holds an SAE of another format. Nothing is written then.
    """
    check_choice("to", to, FORMATS)
    if scale is not None:
        _check_takes_scale(scale, sae.cfg.is_transcoder, sae.cfg.layers)
    factor = sae.cfg.input_scale if scale is None else check_positive("scale", scale)
    rule = inference_rule(sae.cfg, inference)
    path = Path(folder)
    held = detect(path)
    if held not in (None, to):
        raise ValueError(f"{path}: holds an SAE in the format {held!r}; export to another folder")
    peer = PEERS[to]
    portable = replace(PortableSAE.of(sae, rule, k), input_scale=factor)
    portable.refuse(to, to not in TRANSCODERS, to not in CROSSCODERS)
    if sae.cfg.inference == "pool":
        outside = sae.cfg.d_sae - sae.cfg.inference_size
        say(f"{outside} features outside the fixed set get an encoder of zeros, so that they are never active")
    portable.say_of_threshold(sae, say)
    if isinstance(factor, tuple):
        say(f"the weights of each layer take its factor, {factor}: feed activations as they are; codes stay")
    elif factor != 1:
        say(
            f"biases and threshold are divided by {factor!r}: feed activations as they are; codes are divided by it too"
        )
    if portable.output_scale != 1 or (factor != 1 and portable.transcodes):
        say(f"decoder and skip give activations as they are, not times {portable.output_scale!r}")
    if factor != 1 or portable.output_scale != 1:
        portable = portable.read_at(1.0)
    if portable.layers > 1 and portable.apply_b_dec_to_input:
        say(f"{to}'s crosscoders subtract nothing from the input: b_dec W_enc is taken from b_enc, which rounds it")
        portable = uncentred(portable)
    elif peer.CENTRES_ALWAYS and portable.layers == 1 and not portable.apply_b_dec_to_input and not portable.transcodes:
        say(f"{to} subtracts b_dec from the input: b_dec W_enc is added to b_enc, which rounds it")
        portable = portable.centring()
    origin = origin or Origin()
    tensors, config = peer.pack(portable, origin, say)
    packed = peer.unpack(tensors, config, path)
    if k is not None and packed.k != k:
        raise ValueError(f"k={k!r}: {to} has no place for it beside a threshold; leave it out or export for topk")
    supplement = Supplement.of(sae, packed, factor, origin)
    peer.write(path, tensors, config)
    supplement.write(path)
    return [path / name for name in (peer.WEIGHTS, peer.CONFIG, SUPPLEMENT_FILE)]


def load(
    folder: str | os.PathLike[str],
    format: str | None = None,
    *,
    k: float | None = None,
    scale: float | None = None,
    rescale_features: bool = False,
    say: Say = silent,
) -> SampledSAE:
    """A SampledSAE of a folder in a peer's format, in evaluation mode.

    What `export` wrote comes back bit for bit with its whole configuration. Of an SAE by others the rule, k, the
    threshold and the weights are taken, and what the files say of a training by this package; everything else is the
    default, and the pool the whole dictionary (l=None).

    Args:
        folder: holds the files of one SAE.
        format: "saelens", "dictionary_learning" or "sparsify"; found by the files when absent.
        k: mean number of active features a token, where the files do not say it or another is wanted; the threshold
            stays as it is.
        scale: the SAE shall multiply activations by this (`cfg.input_scale`): biases and threshold are multiplied too,
            codes come out in other units, reconstructions are the same. When absent, what `export` folded in is
            undone, and what the peer's files say is taken.
        rescale_features: an SAE with a threshold for each feature is an error, since ours has one for all; True
            rescales each feature to the common threshold instead, which keeps the reconstruction.
        say: called with a line for each convention that was changed.

    Raises:
        ValueError: a missing, truncated or foreign file, with its name and what is wrong with it.
    """
    return read(folder, format, k=k, scale=scale, rescale_features=rescale_features, say=say).sae


def read(
    folder: str | os.PathLike[str],
    format: str | None = None,
    *,
    k: float | None = None,
    scale: float | None = None,
    rescale_features: bool = False,
    say: Say = silent,
) -> Loaded:
    """`load`, and what `export` takes to write the SAE again: `export(loaded.sae, ..., origin=loaded.origin)`."""
    path = Path(folder)
    peer = PEERS[_format_of(path, format)]
    scale = None if scale is None else check_positive("scale", scale)
    k = None if k is None else check_positive("k", k)
    tensors, described = peer.read(path)
    portable = peer.unpack(tensors, described, path, say)
    if scale is not None:
        _check_takes_scale(scale, portable.transcodes, portable.layers)
    origin = peer.origin(described).checked(path / peer.CONFIG)
    supplement = Supplement.read(path)
    if supplement is not None and supplement.fingerprint != portable.fingerprint():
        say(f"{SUPPLEMENT_FILE} is of other weights than {peer.WEIGHTS} and is left aside")
        supplement = None
    recorded: float | None
    if supplement is not None:
        factor = supplement.scale if scale is None else scale
        config, recorded = replace(supplement.config, input_scale=factor), supplement.config.k
        state = supplement.state(portable, factor)
        origin = origin.filled_by(supplement.origin)
        say("configuration and training state are those that were exported")
    else:
        portable = with_one_threshold(portable, path / peer.WEIGHTS, rescale_features, say)
        portable = portable.read_at(portable.input_scale if scale is None else scale, portable.output_scale)
        config, recorded, state = portable.config(k), portable.k, portable.state()
        if portable.training is not None:
            say(f"{peer.CONFIG} says how it was trained (l={config.l}, score={config.score!r}, ...)")
        if portable.threshold is None:
            say("the files hold no threshold: call calibrate(x) before evaluation mode")
    if k is not None:
        config = replace(config, k=without_fraction(k))
        if recorded is not None and k != recorded and float(state["threshold"]) > 0:
            say(f"k={k!r} in place of {recorded!r}: the threshold stays as it is; calibrate(x) sets it for this k")
    sae = SampledSAE(config, dtype=portable.dtype)
    sae.load_state_dict(state)
    return Loaded(sae.eval(), origin, config.input_scale)


def detect(folder: str | os.PathLike[str]) -> str | None:
    """The format of the SAE in a folder by its files: one of `FORMATS`, "sampled-sae", or None for no SAE.

    Raises:
        ValueError: files of several formats.
    """
    path = Path(folder)
    found = [
        name for name, peer in PEERS.items() if all((path / file).is_file() for file in (peer.WEIGHTS, peer.CONFIG))
    ]
    if pretrained.is_ours(path):
        found.append(pretrained.FORMAT)
    if len(found) > 1:
        raise ValueError(f"{path}: holds files of several formats: {', '.join(found)}")
    return found[0] if found else None


def inference_rule(cfg: SampledSAEConfig, inference: str) -> str:
    """What `inference` of `export` stands for: "threshold" or "topk".

    Raises:
        ValueError: "auto" for an SAE whose inference is neither.
    """
    check_choice("inference", inference, INFERENCE)
    if inference != "auto":
        return inference
    if cfg.inference == "batch" and not cfg.is_topk:
        explained = "cfg.inference='batch' depends on the whole batch, which these files cannot say"
        raise ValueError(f"inference='auto': {explained}; choose 'threshold' or 'topk' (--inference), another rule")
    return "topk" if cfg.is_topk else "threshold"


def _check_takes_scale(scale: float, transcodes: bool, layers: int) -> None:
    """ValueError for what has more than one factor."""
    if transcodes:
        raise ValueError(f"scale={scale!r}: is of an SAE; a transcoder has input_scale and output_scale in its config")
    if layers > 1:
        raise ValueError(
            f"scale={scale!r}: is of an SAE; a crosscoder of {layers} layers has input_scale in its config"
        )


def _format_of(path: Path, format: str | None) -> str:
    if format is not None:
        check_choice("format", format, FORMATS)
        return format
    found = detect(path)
    if found == pretrained.FORMAT:
        raise ValueError(f"{path}: is an SAE of sampled-sae already; SampledSAE.from_pretrained reads it")
    if found is None:
        known = "; ".join(f"{peer.WEIGHTS} and {peer.CONFIG} ({name})" for name, peer in PEERS.items())
        raise ValueError(f"{path}: no SAE in a known format; must hold {known}")
    return found
