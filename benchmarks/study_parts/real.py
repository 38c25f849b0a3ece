"""One run on real activations: trained, kept, and measured on held-out tokens and labelled texts by every inference."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quality import splice_of
from benchmarks.study_parts.labelled_activations import Task, tasks_of
from benchmarks.study_parts.probing import pooled, probed, probed_dense
from benchmarks.study_parts.rows import Row
from benchmarks.study_parts.sharing import shared, topics_jaccard
from benchmarks.study_parts.training import train_ours
from benchmarks.study_parts.variants import DENSE, Variant
from sampled_sae import SampledSAE, SampledSAEConfig, TrainConfig
from sampled_sae.impl.start import geometric_median
from sampled_sae.support.atomic_files import read_json, write_json
from sampled_sae.training.activation_store import ActivationStore
from sampled_sae.training.batches import ShuffledStream
from sampled_sae.training.sweep import Splice, evaluate

# tokens of the training that thresholds are calibrated on, and the batches of all measures
CALIBRATED, BATCH = 16_384, 1024
SPLICED_ROWS = 8
RULE = ("d_sae", "k", "l", "score", "pool", "select", "groups", "apply_b_dec_to_input", "aux_coefficient", "aux_pool")
# files beside a kept SAE: what agreement between seeds needs, what the training cost
DECODER, COST = "decoder.safetensors", "training.json"


@dataclass(frozen=True)
class Setup:
    """What all runs on a store have in common.

    Attributes:
        features, k: of every SAE. tokens, lr: of a training, and its peak learning rate at batches of 1,024 tokens.
        model: in which loss recovered is measured; None for no such measure.
        texts: folder of the packages with labelled texts, for probes in `model`; None for none.
        folder: where SAEs and the activations of labelled texts are kept.
    """

    features: int
    k: float
    tokens: int
    lr: float
    model: str | None
    texts: Path | None
    folder: Path


class RealStudy:
    """The runs on one store of activations.

    Args:
        store: with a held-out part. stage: "train" keeps SAEs and measures nothing, "measure" takes those that are
            kept; None trains, keeps and measures.
    """

    def __init__(self, store: ActivationStore, setup: Setup, stage: str | None) -> None:
        self.store, self.setup, self.stage = store, setup, stage
        self.held_out, _ = store.holdout()

    @cached_property
    def splice(self) -> Splice | None:
        return None if self.setup.model is None else splice_of(self.setup.model, self.store, SPLICED_ROWS)

    @cached_property
    def tasks(self) -> list[Task]:
        """Of the probes: those that are kept, else made from the texts; none without either."""
        s, file = self.setup, self.setup.folder / "labelled.safetensors"
        if not file.exists() and (s.model is None or s.texts is None):
            return []
        s.folder.mkdir(parents=True, exist_ok=True)
        return tasks_of(file, s.model or "", self.store.manifest["layer"], s.texts or Path())

    @cached_property
    def start(self) -> Tensor:
        """The first tokens of the training, in the units of the model."""
        return ShuffledStream(self.store, min(CALIBRATED, sum(self.store.tokens)), seed=0).batch(0) / self.store.scale

    def config(self, variant: Variant, seed: int) -> SampledSAEConfig:
        s = self.setup
        soon = variant.dead_batches
        dead_after = max(BATCH, s.tokens // 20) if soon is None else soon * variant.batch_size
        scale = self.store.scale
        rule = variant.rule_of(s.features)
        return SampledSAEConfig(
            self.store.d_in, s.features, s.k, seed=seed, dead_after=dead_after, input_scale=scale, **rule
        )

    def run(self, variant: Variant, seed: int) -> Row | None:
        """The row of an SAE; None where its stage has none to make."""
        about: Row = {"name": variant.name, "seed": seed, "tokens": self.setup.tokens, "lr": self.setup.lr}
        if variant.name == DENSE:
            return None if self.stage == "train" else {**about, "batch_size": None, **probed_dense(self.tasks)}
        folder = self.setup.folder / "saes" / f"{variant.name}_{self.setup.tokens}_{seed}"
        kept = (folder / COST).exists()
        if self.stage is None or (self.stage == "train" and not kept):
            began = time.process_time()
            self.trained(variant, seed).save_pretrained(folder)
            write_json(folder / COST, {"cpu_seconds": round(time.process_time() - began, 1)})
            print(f"trained: {folder}", flush=True)
        if self.stage == "train" or not (folder / COST).exists():
            return None
        sae = SampledSAE.from_pretrained(folder)
        about |= {"batch_size": variant.batch_size, "longer": variant.longer}
        about |= {name: getattr(sae.cfg, name) for name in RULE}
        return {**about, **read_json(folder / COST), **self.measured(sae.eval(), folder), "tokens": self.setup.tokens}

    def trained(self, variant: Variant, seed: int) -> SampledSAE:
        size = variant.batch_size
        # Adam's noise grows with the root of the batch
        lr = self.setup.lr * (size / BATCH) ** 0.5
        steps = round(self.setup.tokens * variant.longer) // size
        train = TrainConfig(steps, size, lr=lr, adam=variant.adam, seed=seed)
        scaled = self.start[:4096] * self.store.scale
        begin = geometric_median(scaled) if variant.start == "median" else scaled.mean(0)
        if variant.start == "zero":
            begin = torch.zeros_like(begin)
        rows = self.token_directions(begin, seed) if variant.rows == "tokens" else None
        sae = train_ours(self.config(variant, seed), train, self.batches(train), begin, variant.aligned, rows)
        sae.calibrate(self.start)
        return sae

    def token_directions(self, origin: Tensor, seed: int) -> Tensor:
        """Unit vectors [F, d] from the origin to training tokens, drawn by the seed, each once while they last."""
        n, draw = len(self.start), torch.Generator().manual_seed(seed)
        drawn = torch.randperm(max(n, self.setup.features), generator=draw)[: self.setup.features] % n
        return torch.nn.functional.normalize(self.start[drawn] * self.store.scale - origin, dim=1)

    def batches(self, train: TrainConfig) -> Iterator[Tensor]:
        stream = ShuffledStream(self.store, train.batch_size, train.seed)
        return (stream.batch(step) for step in range(train.steps))

    def measured(self, sae: SampledSAE, folder: Path) -> Row:
        """Reconstruction and use of the dictionary by every inference; what is shared, and probes, by two."""
        found = evaluate(sae, self.held_out, BATCH, self.splice)
        row = {name: value for name, value in found.items() if not isinstance(value, (list, dict))}
        for mode in ("token",) if sae.cfg.is_topk else ("threshold", "batch"):
            inference = None if mode == "token" else sae.inference_on(self.start, mode)
            encode = partial(sae.encode_sparse, inference=inference)
            with torch.no_grad():
                of_mode = shared(sae, encode, self.held_out, BATCH)
                if self.tasks:
                    codes = {task.name: (pooled(encode, task.x), task.labels) for task in self.tasks}
                    of_mode |= probed(codes) | {"topics_jaccard": topics_jaccard(*codes["topic"])}
            row |= {f"{mode}_{name}": value for name, value in of_mode.items()}
        self.keep_decoder(sae, folder)
        left = gamma_left(sae, self.start)
        return row | {"alignment": alignment(sae), "gamma": gamma(self.start), "gamma_left": left}

    def keep_decoder(self, sae: SampledSAE, folder: Path) -> None:
        """Decoder rows and how many held-out tokens activate each, for pairs of seeds."""
        counts = torch.zeros(sae.cfg.d_sae, dtype=torch.int64)
        with torch.no_grad():
            for batch in self.held_out.split(BATCH):
                counts += torch.bincount(sae.encode_sparse(batch).features, minlength=sae.cfg.d_sae)
        save_file({"rows": sae.W_dec.detach().contiguous(), "counts": counts}, folder / DECODER)


def decoder_of(folder: Path) -> tuple[Tensor, Tensor]:
    """What `keep_decoder` wrote: rows [F, d], counts int64 [F]."""
    found = load_file(folder / DECODER)
    return found["rows"], found["counts"]


def alignment(sae: SampledSAE) -> float:
    """Mean over features of the cosine of encoder column and decoder row."""
    return float(torch.nn.functional.cosine_similarity(sae.W_enc.detach().T, sae.W_dec.detach(), dim=1).mean())


def gamma(x: Tensor) -> float:
    """||mean|| / ||standard deviation|| of activations [n, d]: how much dimensions of large mean dominate."""
    return float(x.mean(0).norm() / x.std(0).norm())


def gamma_left(sae: SampledSAE, x: Tensor) -> float:
    """`gamma` of what the encoder reads: after b_dec is subtracted, where it is."""
    return gamma(x * sae.cfg.input_scale - sae.b_dec.detach() if sae.cfg.apply_b_dec_to_input else x)
