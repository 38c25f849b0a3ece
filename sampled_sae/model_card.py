"""The README of an SAE on the Hugging Face hub: what it reads, how to load it, what was measured, every setting."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from .config import SampledSAEConfig
from .support.hub import is_identifier
from .support.version import __version__

MARK = "<!-- written by sampled-sae: the next push_to_hub replaces it; without this line it stays -->"
TAGS = ("sparse-autoencoder", "mechanistic-interpretability", "sampled-sae")
# entry of evaluation.json -> what the card calls it
METRICS = {
    "fvu": "FVU: squared error over variance",
    "l0": "L0: active features a token",
    "loss_recovered_zero": "loss recovered (zero ablation)",
    "loss_recovered_mean": "loss recovered (mean ablation)",
    "ce_clean": "cross-entropy of the model, nats a token",
    "ce_spliced": "cross-entropy with reconstructions, nats a token",
    "explained_variance": "explained variance",
    "cosine": "cosine of activation and reconstruction",
    "dead_share": "share of features never active",
    "tokens": "held-out tokens",
}


@dataclass(frozen=True)
class RunFacts:
    """What is known of an SAE besides its config.

    Attributes:
        origin: model_name, layer, hook_name and context_size of its activations, those that are known.
        train: settings of its training.
        evaluation: what `sampled-sae evaluate` measured.
    """

    origin: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)


def model_card(repository: str, cfg: SampledSAEConfig, facts: RunFacts, revision: str | None = None) -> str:
    """The text of README.md, with the hub's metadata at its head."""
    model, layer, hook = (facts.origin.get(name) for name in ("model_name", "layer", "hook_name"))
    reads = "Activations that its files do not name."
    if model is not None and hook not in (None, f"blocks.{layer}.hook_resid_post"):
        reads = f"Activations of {_plain(model)} at {_plain(hook)}."
    elif model is not None:
        reads = f"The residual stream of {_plain(model)}" + ("" if layer is None else f" after block {layer}") + "."
    at = "" if revision is None else f", revision={json.dumps(revision)}"
    load = f"sae = SampledSAE.from_pretrained({json.dumps(repository)}{at})"
    parts = [
        _metadata(model),
        MARK,
        f"# {repository.split('/')[-1]}",
        f"{_kind(cfg)} with {cfg.d_sae:,} features on {_reads(cfg)}. {reads}",
        f"## Load\n\n```python\nfrom sampled_sae import SampledSAE\n\n{load}\n"
        f"codes = sae.encode_sparse(x)  # x: {_shape(cfg)}, as the model makes them\n"
        f"{_decoding(cfg)}\n```",
        _metrics(facts.evaluation),
        "## Settings\n\n" + _table(("setting", "value"), cfg.to_dict()),
    ]
    if facts.train:
        parts.append("## Training\n\n" + _table(("setting", "value"), facts.train))
    parts.append(f"Written by sampled-sae {__version__}.")
    return "\n\n".join(parts) + "\n"


def _kind(cfg: SampledSAEConfig) -> str:
    if cfg.is_transcoder:
        return f"A transcoder {'and linear skip ' if cfg.skip else ''}to activations of width {cfg.d_out},"
    if cfg.is_crosscoder:
        return "A crosscoder"
    return "A sparse autoencoder" if cfg.groups is None else "A Matryoshka sparse autoencoder"


def _reads(cfg: SampledSAEConfig) -> str:
    if cfg.is_crosscoder:
        return f"{cfg.layers} layers of width {cfg.d_in} side by side"
    return f"activations of width {cfg.d_in}"


def _shape(cfg: SampledSAEConfig) -> str:
    return f"[tokens, {cfg.layers}, {cfg.d_in}]" if cfg.is_crosscoder else f"[tokens, {cfg.d_in}]"


def _decoding(cfg: SampledSAEConfig) -> str:
    if not cfg.is_transcoder:
        return "x_hat = sae.decode(codes)"
    return f"y_hat = sae.decode(codes, x)  # [tokens, {cfg.d_out}], of what was its target"


def _metadata(model: str | None) -> str:
    lines = ["---", "library_name: sampled-sae", "tags:", *(f"- {tag}" for tag in TAGS)]
    if model is not None and is_identifier(model):
        lines.append(f"base_model: {model}")
    return "\n".join([*lines, "---"])


def _metrics(evaluation: dict[str, Any]) -> str:
    found = {label: evaluation[name] for name, label in METRICS.items() if evaluation.get(name) is not None}
    if not found:
        return "## Metrics\n\nNone were measured: `sampled-sae evaluate` writes them beside the SAE."
    return "## Metrics\n\nOn held-out activations:\n\n" + _table(("metric", "value"), found)


def _table(heads: tuple[str, str], rows: dict[str, Any]) -> str:
    lines = [f"| {heads[0]} | {heads[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {_plain(name)} | {_plain(_number(value))} |" for name, value in rows.items())])


def _number(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def _plain(value: Any) -> str:
    """As text of a table's cell: neither markup nor a new line."""
    text = " ".join(str(value).split())
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, f"\\{sign}")
    return text
