"""sparsify's files for inference: SAEs, transcoders and skip transcoders that keep k features a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ...support.atomic_files import field, read_json
from .. import sparsify
from ..origin import Origin
from ..portable import Say
from .reading import Place, Reading, config_of, in_dtype_of_weights

NAME = sparsify.NAME
FILES = (sparsify.WEIGHTS, sparsify.CONFIG)
# of the run, in the folder above
RUN = "config.json"


def read(place: Place, say: Say) -> Reading:
    """The SAE in a folder.

    Raises:
        ValueError: another activation than "topk", wrong tensors; naming the file.
    """
    tensors, config = sparsify.read(place.path)
    cfg = place.path / sparsify.CONFIG
    transcodes, skip = sparsify.flags(cfg, config)
    d_in, d_sae = sparsify.check_weights(tensors, config, place.path)
    made = config_of(
        cfg,
        d_in=d_in,
        d_sae=d_sae,
        rule="topk",
        k=field(cfg, config, "k", int, 1),
        d_out=d_in if transcodes else None,
        apply_b_dec_to_input=not transcodes,
        skip=skip,
    )
    found = {
        "W_enc": tensors["encoder.weight"].t(),
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    if skip:
        found["W_skip"] = tensors["W_skip"]
    name = ("skip " if skip else "") + ("transcoder" if transcodes else "SAE")
    return Reading(name, made, found, _origin(place))


def pack(reading: Reading) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, cfg.json) as sparsify has them.

    Raises:
        ValueError: what its files have no place for.
    """
    c = reading.config
    plain = (c.scale_by_decoder_norm, c.normalize, c.input_scale, c.output_scale) == (False, "none", 1, 1)
    # it centres the input of an SAE, and never that of a transcoder
    if c.rule != "topk" or not plain or c.width_out != c.d_in or c.apply_b_dec_to_input == c.is_transcoder:
        raise ValueError(f"rule={c.rule!r}, d_out={c.d_out}: sparsify's files have no place for it")
    assert c.k is not None
    return sparsify.packed(in_dtype_of_weights(reading.tensors), c.k, c.is_transcoder, normalize_decoder=False)


write = sparsify.write


def _origin(place: Place) -> Origin:
    """By the folder's name, which is that of the hook, and the run's config.json above it."""
    run = read_json(_above(place) / RUN) if (_above(place) / RUN).is_file() else {}
    model, context = run.get("model"), run.get("ctx_len")
    return Origin(
        model if isinstance(model, str) else None,
        place.number(r"layers[._]"),
        place.name.rstrip("/").rpartition("/")[2] if place.number(r"layers[._]") is not None else None,
        context if isinstance(context, int) else None,
    )


def _above(place: Place) -> Path:
    return place.path.resolve().parent
