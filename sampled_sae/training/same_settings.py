"""What activations are of, and whether what lies in a folder was made with the settings of now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_BEFORE = {"precision": "fp32", "k_start": None, "l_start": None, "schedule_steps": None, "decoder_start": "random"}


def identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """Model, fingerprint of its weights, layer and source of a store, None where its manifest does not say; the hook
    points of what is no residual stream."""
    about = {name: manifest.get(name) for name in ("model", "layer", "source")}
    about |= {"point": manifest["point"]} if manifest.get("point") else {}
    of_target = (manifest.get("target") or {}).get("point")
    about |= {"target": {"point": of_target}} if of_target else {}
    return {**about, "weights_sha256": manifest.get("settings", {}).get("weights_sha256")}


def side_by_side(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """Of layers beside each other what tells their manifest from that of the first.

    Model, layer, point, source and settings are of all in one, and the `layers` one by one, by their `identity`.
    """
    abouts = [identity(manifest) for manifest in manifests]
    said = [name for name in ("model", "layer", "point", "source") if any(name in about for about in abouts)]
    common = {name: _joined([about.get(name) for about in abouts]) for name in said}
    weights = _joined([about["weights_sha256"] for about in abouts])
    settings = {**manifests[0].get("settings", {}), "weights_sha256": weights}
    return {**common, "settings": settings, "layers": abouts}


def _joined(values: list[Any]) -> Any:
    """What all have in common, else all of them in one line; None where one says nothing."""
    if any(value is None for value in values):
        return None
    return values[0] if len(set(values)) == 1 else ", ".join(map(str, values))


def in_words(about: dict[str, Any]) -> str:
    """What activations are of, from an `identity`."""
    if about.get("model") is not None:
        layer = "an unknown layer" if about.get("layer") is None else f"layer {about['layer']}"
        layer = " to ".join(filter(None, [about.get("point"), (about.get("target") or {}).get("point")])) or layer
        weights = f" (weights {about['weights_sha256'][:8]})" if about.get("weights_sha256") else ""
        return f"{layer} of {about['model']}{weights}"
    return f"source {about['source']!r}" if about.get("source") else "activations without a name"


def is_same_model(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """By the weights where both identities have their fingerprint, else by name."""
    name = "weights_sha256" if one.get("weights_sha256") and other.get("weights_sha256") else "model"
    return bool(one.get(name) == other.get(name))


def check_harvested_model(harvested: dict[str, Any], model: dict[str, Any]) -> None:
    """ValueError where activations with a fingerprint of their model are of another than this one, by identities."""
    if harvested.get("weights_sha256") and not is_same_model(harvested, model):
        raise ValueError(
            f"manifest is of {in_words(harvested)}, but the model gives {in_words({**harvested, **model})}; take the "
            "model that was harvested, in the same dtype, or insist=True"
        )


def is_same_kind(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether activations are of the same model and layer or, where neither has a model, of the same source."""
    if one.get("model") is None and other.get("model") is None:
        return (one.get("source") or "") == (other.get("source") or "")
    layers = {about["layer"] for about in (one, other) if about.get("layer") is not None}
    points = [(about.get("point"), (about.get("target") or {}).get("point")) for about in (one, other)]
    return is_same_model(one, other) and len(layers) < 2 and points[0] == points[1]


def completed(train: Any) -> Any:
    """The settings of a training; those of an earlier version with what it had where this one has a choice."""
    return {**_BEFORE, **train} if isinstance(train, dict) else train


def check_same_settings(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """`then` and `now` are part -> settings. Of the same bytes the source may have another name by now.

    Raises:
        ValueError: a part differs; names the file `path`, and the values of what differs.
    """
    for part, values in now.items():
        before = then.get(part)
        if part == "activations" and isinstance(before, dict) and _same_bytes(then.get("data"), now.get("data")):
            before = {**before, "source": values["source"]}
        if before == values:
            continue
        if not isinstance(values, dict) or not isinstance(before, dict):
            changed = f"{part}: was {before}, is {values}" if part in then and None in (before, values) else part
            raise ValueError(f"{path}: made with other settings ({changed}); use another folder")
        differ = [name for name in {**values, **before} if before.get(name) != values.get(name)]
        changes = "; ".join(f"{name} was {before.get(name)!r}, is {values.get(name)!r}" for name in differ)
        raise ValueError(
            f"{path}: made with other settings ({part}: {', '.join(differ)}): {changes}; use another folder"
        )


def _same_bytes(data: Any, other: Any) -> bool:
    """Whether two lists of shards have the same checksums."""
    return bool(data) and data == other and isinstance(data, list) and all("crc32" in shard for shard in data)
