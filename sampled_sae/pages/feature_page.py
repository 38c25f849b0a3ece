"""The page of one SAE: an overview, a table of all features, and some of them in full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..inference.codes_store import CodesStore
from ..inference.inference_sae import InferenceSAE
from ..training.activation_store import ActivationStore
from .activity import Activity
from .choice import FeatureChoice
from .contexts import CorpusText
from .feature_details import NEIGHBOURS, Details, nearest
from .html import packed, page
from .loss_shares import can_share, loss_shares

if TYPE_CHECKING:
    from ..lm.logit_lens import LensTokens

SCRIPTS = ("common.js", "charts.js", "long_table.js", "feature_view.js", "features.js")
# features of a compressed part: a page unpacks one when a feature of it is opened
PART = 16
# tokens of greatest activation by which any feature is found
KEYS = 8
# above, neighbours are looked for of the features in full alone
ALL_NEIGHBOURS = 1 << 15


@dataclass(frozen=True)
class LanguageModel:
    """What a page asks of the model.

    Attributes:
        words: token ids to texts.
        lens: decoder rows [P, d] to the tokens that they raise and lower; None where the SAE writes elsewhere.
    """

    words: Callable[[Sequence[int]], list[str]]
    lens: Callable[[Tensor], LensTokens] | None


@dataclass(frozen=True)
class PageSettings:
    """How much a page holds.

    Attributes:
        choice: the features in full.
        seed: of a random choice.
        tokens: of the corpus, at most that many and the rest of a shard.
        contexts: top contexts a feature.
    """

    choice: FeatureChoice
    seed: int = 0
    tokens: int = 1_000_000
    contexts: int = 16


@torch.no_grad()
def feature_page(
    sae: InferenceSAE,
    codes: CodesStore,
    store: ActivationStore | None,
    model: LanguageModel | None,
    settings: PageSettings,
    overview: dict[str, Any],
    progress: bool = True,
) -> str:
    """The HTML of an SAE's page.

    Args:
        sae: on the CPU.
        codes: of the SAE, over the shards of `store` where there is one.
        store: the activations, for what features carry of the loss; None where there are codes alone.
        model: None for tokens by their numbers, and no logit lens.
        settings: see the class.
        overview: from `run_overview`.

    Raises:
        ValueError: a feature that the SAE does not have; damaged files.
    """
    n_shards = shards_of(codes.tokens, settings.tokens)
    activity = Activity.read(codes, n_shards)
    text = CorpusText.read(codes, n_shards)
    shares = None
    if store is not None and can_share(sae):
        with torch.enable_grad():
            shares = loss_shares(sae, store, codes, n_shards)
    features = settings.choice.of(activity.sums if shares is None else _carried(shares.rise, activity), settings.seed)
    everywhere = torch.arange(activity.d_sae)
    cosines, neighbours = nearest(sae.W_dec, features if activity.d_sae > ALL_NEIGHBOURS else everywhere, NEIGHBOURS)
    lens = None if model is None or model.lens is None else model.lens(sae.W_dec[features].float())
    ids, word_of = _vocabulary(text, lens)
    own = slice(None) if len(cosines) == len(features) else features
    details = Details(activity, text, features, cosines[own], neighbours[own], lens, word_of, settings.contexts)
    measured = {"tokens": activity.n_tokens, "l0": activity.l0, "fvu": None if shares is None else shares.fvu}
    data = {
        **overview,
        "measured": {**measured, "silent": float((activity.counts == 0).double().mean())},
        "words": [str(i) for i in ids] if model is None else model.words(ids),
        "has": {"model": model is not None, "lens": lens is not None, "text": text is not None},
        "columns": {
            "counts": packed(activity.counts.int()),
            "means": packed((activity.sums / activity.counts.clamp(min=1)).float()),
            "maxima": packed(activity.maxima),
            "rises": None if shares is None else packed(shares.rise.float()),
            "neighbours": packed(_spread(neighbours[:, :1].int(), features, activity.d_sae, -1)),
            "cosines": packed(_spread(cosines[:, :1], features, activity.d_sae, 0)),
            "keys": None if text is None else packed(_keys(activity, text, word_of)),
        },
        "keys": KEYS,
        "part": PART,
        "shown": packed(features.int()),
        "lens_keys": packed(_lens_keys(lens, word_of)),
    }
    with tqdm(total=len(features), unit="feature", desc="look") if progress else nullcontext() as bar:
        made = list(details.each(bar.update if bar is not None else lambda n: None))
    parts = [made[i : i + PART] for i in range(0, len(made), PART)]
    return page(f"SAE {overview['name']}", "features.html", SCRIPTS, data, parts)


def shards_of(tokens: Sequence[int], wanted: int) -> int:
    """How many of the first shards hold the tokens wanted, all of them where there are fewer."""
    total = 0
    for i, count in enumerate(tokens):
        if total >= wanted:
            return i
        total += count
    return len(tokens)


def _carried(rise: Tensor, activity: Activity) -> Tensor:
    """What "top" goes by: the rise of the loss, and above 0 for all that fire, so that they count as alive."""
    return torch.where(activity.counts > 0, rise - rise.min() + torch.finfo(torch.float64).tiny, 0.0)


def _vocabulary(text: CorpusText | None, lens: LensTokens | None) -> tuple[list[int], Tensor]:
    """(token ids on the page, ascending; int64 [largest + 1], the place of each id among them)."""
    found = [] if text is None else [text.rows.unique()]
    found += [] if lens is None else [lens.raised_ids.flatten(), lens.lowered_ids.flatten()]
    ids = torch.cat([torch.empty(0, dtype=torch.int64), *found]).unique()
    word_of = torch.zeros(int(ids[-1]) + 1 if len(ids) else 0, dtype=torch.int64)
    word_of[ids] = torch.arange(len(ids))
    return ids.tolist(), word_of


def _spread(column: Tensor, features: Tensor, n_features: int, missing: float) -> Tensor:
    """[F] of values [P, 1] of some features, or of all; [P, 0] where an only feature has no neighbour."""
    if column.numel() == n_features:
        return column.flatten()
    spread = torch.full((n_features,), missing, dtype=column.dtype)
    return spread.index_copy_(0, features, column.flatten()) if column.numel() else spread


def _keys(activity: Activity, text: CorpusText, word_of: Tensor) -> Tensor:
    """int32 [F, KEYS]: the words on which each feature is most active, -1 where there are no more."""
    entries = activity.strongest(KEYS)
    words = word_of[text.ids]
    if not len(activity.tokens):
        return torch.full(entries.shape, -1, dtype=torch.int32)
    return torch.where(entries < 0, -1, words[activity.tokens[entries.clamp(min=0)]]).int()


def _lens_keys(lens: LensTokens | None, word_of: Tensor) -> Tensor:
    """int32 [P, n]: the words that each feature in full raises most."""
    return torch.empty(0, dtype=torch.int32) if lens is None else word_of[lens.raised_ids[:, :KEYS]].int()
