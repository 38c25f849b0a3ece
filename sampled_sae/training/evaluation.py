"""Metrics of an SAE on activations: reconstruction, sparsity, use of the dictionary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..codes import SparseCodes
from ..impl import inference_rule
from ..impl.given_tokens import multiplied
from ..impl.inference_rule import Inference
from ..sae import SampledSAE
from ..support.all_ranks import ranks_of
from ..support.argument_checks import check_integer, describe
from ..support.even_slices import part_of

# Tokens that the inferences which the SAE does not have are calibrated on.
CALIBRATED_ON = 65_536
# What is measured of every inference.
OF_EACH = ("l0", "fvu", "features_for_90", "jaccard")
HISTOGRAM_EDGES = [0.0, *(10.0 ** (e / 2) for e in range(-9, 0)), 1.0]


@torch.no_grad()
def evaluate_activations(
    sae: SampledSAE, x: Tensor, batch_size: int = 2048, target: Tensor | None = None
) -> dict[str, Any]:
    """Metrics on held-out activations x [n, d_in], on the CPU, as the model made them: the SAE scales them itself.

    A transcoder needs its target [n, d_out] too, whose reconstruction is measured. Of a crosscoder x is [n, layers,
    d_in] or [n, layers * d_in], and what is measured of all layers together is of each times its `cfg.input_scale`, as
    it is trained.

    The SAE may be on another device, and is left as it was. Of one that is spread over several ranks, each calls this
    with all of x and encodes its part of each batch. Returns a dict:

    - `tokens`: n.
    - `fvu`: sum of squared errors over sum of squared deviations from the mean.
    - `fvu_groups`: of a Matryoshka SAE, that of the reconstructions by each of its groups, as long as `cfg.groups`.
    - `fvu_layers`: of a crosscoder, that of each of its layers.
    - `explained_variance`: mean over dimensions of 1 - error variance / variance.
    - `cosine`, `l0`: means over tokens.
    - `dead_share`, `never_active`: share and number of features that no token activates.
    - `frequency_histogram`: numbers of features by the share of tokens that activate them, between the
      `frequency_edges`; without features never active.
    - `features_for_90`: how many features hold 90% of the kept entries.
    - `jaccard`: mean overlap of the feature sets of consecutive batches.
    - `inference`: how the metrics above select: `sae.cfg.inference`, or "token" for a TopK SAE, which keeps k features
      of each token.
    - `threshold`: what they select by, inside its set for "pool"; None for "batch" and "token".
    - `threshold_l0`, `threshold_fvu`, `threshold_features_for_90`, `threshold_jaccard`: the same four by a threshold
      over the whole dictionary. `pool_...`: inside the fixed set of the `pool_features` features of highest score.
      `batch_...`: by the rule of training, with pool and selection made for each batch. The inference of the SAE is as
      it is; a threshold or a set that it does not have is calibrated to L0 = k on the first 65,536 tokens of x. None
      for the first two of a TopK SAE, which has no such inference.

    Raises:
        ValueError: a threshold or a set that was never set.
    """
    batch_size = check_integer("batch_size", batch_size, 1)
    if sae.cfg.is_crosscoder and isinstance(x, Tensor) and x.shape[1:] == (sae.cfg.layers, sae.cfg.d_in):
        x = x.flatten(1)
    if not isinstance(x, Tensor) or x.ndim != 2:
        found = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x={found}: must be a tensor [n, d_in]")
    if (target is not None) != sae.cfg.is_transcoder:
        raise ValueError(f"target={describe(target)}: a transcoder needs one, an SAE takes none; d_out={sae.cfg.d_out}")
    if target is not None and (not isinstance(target, Tensor) or target.shape != (len(x), sae.cfg.width_out)):
        raise ValueError(f"target={describe(target)}: must be a tensor [{len(x)}, {sae.cfg.width_out}]")
    goal = x if target is None else target
    if isinstance(sae.cfg.factor_out, tuple):
        goal = multiplied(x, sae.cfg.factor_out)
    if (missing := inference_rule.missing(sae, sae.cfg)) is not None:
        raise ValueError(missing)
    was_training = sae.training
    state = {name: getattr(sae, name).clone() for name in ("threshold", "threshold_steps", "tokens_since_active")}
    generator = sae.generator.get_state()
    try:
        sae.eval()
        own = inference_rule.of_evaluation(sae, sae.cfg)
        result: dict[str, Any] = _measure(sae, x, goal, batch_size)
        measured = {own.mode: result}
        result["inference"] = own.mode
        result["threshold"] = None if own.threshold is None else float(own.threshold)
        # a set of all features is the dictionary
        same = {"threshold": "pool", "pool": "threshold"} if sae.cfg.inference_size == sae.cfg.d_sae else {}
        for mode in ("threshold", "pool", "batch"):
            if mode not in measured and same.get(mode) in measured:
                measured[mode] = measured[same[mode]]
            elif mode not in measured and (other := _other(sae, x, mode)) is not None:
                sae.generator.set_state(generator)
                measured[mode] = _measure(sae, x, goal, batch_size, other)
            result |= {f"{mode}_{name}": measured.get(mode, {}).get(name) for name in OF_EACH}
        result["pool_features"] = sae.cfg.inference_size if "pool" in measured else None
    finally:
        sae.train(was_training)
        sae.generator.set_state(generator)
        for name, value in state.items():
            getattr(sae, name).copy_(value)
    return result


def _other(sae: SampledSAE, x: Tensor, mode: str) -> Inference | None:
    """An inference that is not the SAE's own, calibrated on x where it has to be; None where it has none such."""
    if mode == "batch":
        return Inference(mode)
    if sae.cfg.is_topk:
        return None
    if mode == "threshold" and sae.cfg.inference == "batch" and int(sae.calibrated_at) > 0:
        return Inference(mode, sae.threshold)
    seen = part_of(x[:CALIBRATED_ON], *ranks_of(sae.layout.device_mesh).data)
    return sae.inference_on(seen.to(sae.W_enc.device, sae.W_enc.dtype), mode)


def _measure(
    sae: SampledSAE, x: Tensor, goal: Tensor, batch_size: int, inference: Inference | None = None
) -> dict[str, Any]:
    """Of what x is encoded to and `goal` reconstructed from, which are one for an SAE; `goal` is in the units of the
    training where the layers of a crosscoder have their own.

    inference: by that of evaluation mode where None.
    """
    device, ranks = sae.W_enc.device, ranks_of(sae.layout.device_mesh)
    counts = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=device)
    error_sum = torch.zeros(sae.cfg.width_out, dtype=torch.float64, device=device)
    error_squares, cosines = torch.zeros_like(error_sum), torch.zeros((), dtype=torch.float64, device=device)
    groups, in_units = sae.cfg.groups or (), isinstance(sae.cfg.factor_out, tuple)
    group_squares = torch.zeros(len(groups), dtype=torch.float64, device=device)
    overlaps: list[float] = []
    before: Tensor | None = None
    for whole, whole_goal in zip(x.split(batch_size), goal.split(batch_size)):
        given = part_of(whole, *ranks.data).to(device, sae.W_enc.dtype)
        batch = part_of(whole_goal, *ranks.data).to(device)
        codes = sae.encode_sparse(given, inference=inference)

        def decoded(codes: SparseCodes, given: Tensor = given, like: Tensor = batch) -> Tensor:
            return sae.decode(codes, given, scaled=in_units).view(like.shape).to(like.dtype)

        x_hat = decoded(codes)
        error = (batch - x_hat).double()
        error_sum += error.sum(0)
        error_squares += error.square().sum(0)
        for i, size in enumerate(groups):
            group_squares[i] += (batch - decoded(codes.of_first(size))).double().square().sum()
        cosines += torch.nn.functional.cosine_similarity(batch, x_hat, dim=1).sum()
        counts += torch.bincount(codes.features, minlength=sae.cfg.d_sae)
        active = ranks.max_(codes.active_mask().to(torch.uint8)).bool()
        if before is not None and len(whole) == batch_size:
            union = int((active | before).sum())
            overlaps.append(int((active & before).sum()) / union if union else 1.0)
        before = active
    for total in (counts, error_sum, error_squares, cosines, group_squares):
        ranks.sum_(total)
    n = len(x)
    counts, error_sum, error_squares = counts.cpu(), error_sum.cpu(), error_squares.cpu()
    deviations = (goal.double() - goal.double().mean(0)).square().sum(0)
    error_variance = error_squares - error_sum.square() / n
    frequency = (counts[counts > 0].double() / n).clamp(max=1.0).numpy()
    nested = {"fvu_groups": (group_squares.cpu() / deviations.sum()).tolist()} if groups else {}
    if sae.cfg.is_crosscoder:
        of_layers = (t.view(sae.cfg.layers, -1).sum(1) for t in (error_squares, deviations))
        nested["fvu_layers"] = torch.div(*of_layers).tolist()
    return {
        "tokens": n,
        "fvu": float(error_squares.sum() / deviations.sum()),
        **nested,
        "explained_variance": float((1 - error_variance / deviations.clamp_min(1e-30)).mean()),
        "cosine": float(cosines) / n,
        "l0": float(counts.sum()) / n,
        "dead_share": float((counts == 0).double().mean()),
        "never_active": int((counts == 0).sum()),
        "frequency_edges": HISTOGRAM_EDGES,
        "frequency_histogram": np.histogram(frequency, HISTOGRAM_EDGES)[0].tolist(),
        "features_for_90": features_for_share(counts, 0.9),
        "jaccard": float(np.mean(overlaps)) if overlaps else None,
    }


def features_for_share(counts: Tensor, share: float) -> int:
    """How many of the most used features hold `share` of all kept entries; counts int64 [F]."""
    ordered = counts.sort(descending=True).values.cumsum(0)
    total = int(ordered[-1])
    return 0 if total == 0 else int((ordered < share * total).sum()) + 1


class Reconstruction:
    """x [n, d_in], as the model made them, to what the SAE makes of them in the mode it is in: [n, d_in], of a
    transcoder [n, d_out]; of a crosscoder both are [n, layers, d_in].

    What `evaluate` takes of `sampled_sae.lm.SpliceEvaluator` for an SAE, of `PointSplice` for a transcoder, and of
    `LayersSplice` for a crosscoder. Written `reconstruct_with(sae)`.

    Of an SAE that is spread over several ranks all call it, each with tokens of its own.

    Attributes:
        kind: "an SAE", "a transcoder" or "a crosscoder".
    """

    # SpliceEvaluator leaves the scaling to it
    scales = True

    def __init__(self, sae: SampledSAE) -> None:
        self.sae = sae
        self.kind = "a transcoder" if sae.cfg.is_transcoder else "a crosscoder" if sae.cfg.is_crosscoder else "an SAE"

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        tokens, own = self.sae.layout.of_feature_ranks(x.to(self.sae.W_enc.device, self.sae.W_enc.dtype))
        return self.sae.decode(self.sae.encode_sparse(tokens), tokens)[own].to(x)


reconstruct_with = Reconstruction


def closing_line(result: dict[str, Any], folder: Path) -> str:
    """FVU, L0 and loss recovered of held-out activations, as far as they were measured, and the folder."""
    shown = (("fvu", "FVU", ".4f"), ("l0", "L0", ".2f"), ("loss_recovered_zero", "loss recovered", ".4f"))
    parts = [f"{label} {result[name]:{form}}" for name, label, form in shown if result.get(name) is not None]
    missing = [label for name, label, _ in shown if result.get(name) is None]
    if missing:
        parts.append(f"{' and '.join(missing)} not measured")
    return ", ".join([*parts, f"SAE in {folder}"])
