"""Whether activations that are to stand side by side are of the same tokens, by what their manifests say."""

from __future__ import annotations

from typing import Any

from .activations import Activations


def check_same_tokens(name: str, part: Activations, first: Activations) -> None:
    """ValueError where `part`, which was given as the argument `name`, has other tokens than `first`.

    Shards and held-out parts have the same sizes. Where both were harvested, the rows of token ids are the same too,
    and in each part the tokens that were left out of them.
    """
    held_out = [(each.manifest.get("holdout") or {}).get("tokens") for each in (part, first)]
    if part.tokens != first.tokens or held_out[0] != held_out[1]:
        shown = " and ".join(f"{sum(each.tokens)} in {len(each.tokens)} shards" for each in (part, first))
        raise ValueError(
            f"{name}={part.where}: must have the tokens of {first.where} in shards of the same sizes, and as many held "
            f"out; they have {shown}, held out {held_out[0]} and {held_out[1]}"
        )
    texts = [each.manifest.get("settings", {}).get("rows_sha256") for each in (part, first)]
    if _differ(*texts):
        raise ValueError(f"{name}={part.where}: was harvested from other token rows than {first.where}; take the same")
    for i, (one, other) in enumerate(zip(*(map(_places, _files(each)) for each in (part, first)))):
        if _differ(one, other):
            where = f"shard {i}" if i < len(first.tokens) else "the held-out part"
            raise ValueError(
                f"{name}={part.where}: has other tokens than {first.where} in {where}, since others were left out for "
                "their norms; harvest both in one pass, which leaves out the same"
            )


def _files(each: Activations) -> list[dict[str, Any]]:
    """What the manifest says of every shard, and of the held-out part where there is one."""
    found = each.manifest.get("holdout")
    return [*each.manifest["shards"], *([found] if found else [])]


def _places(entry: Any) -> Any:
    return entry.get("places_crc32") if isinstance(entry, dict) else None


def _differ(one: Any, other: Any) -> bool:
    return None not in (one, other) and one != other
