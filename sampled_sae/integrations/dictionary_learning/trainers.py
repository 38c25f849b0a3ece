"""The trainers for `trainSAE`."""

from __future__ import annotations

from typing import Any

import torch
from dictionary_learning.trainers import batch_top_k, top_k
from torch import Tensor

from ...codes import SparseCodes
from ...formats.dictionary_learning import TRAINING
from ...impl.hints import Rule
from ...support.argument_checks import check_integer
from .dictionaries import AutoEncoderTopK, BatchTopKSAE
from .row_trainer import RowTrainer
from .step import StepInputs, average_threshold


class BatchTopKTrainer(RowTrainer, batch_top_k.BatchTopKTrainer):
    """dictionary_learning's `BatchTopKTrainer`, faster."""

    dictionary = BatchTopKSAE
    trainer_class = "BatchTopKTrainer"


class TopKTrainer(RowTrainer, top_k.TopKTrainer):
    """dictionary_learning's `TopKTrainer`, faster.

    There a feature of zero activation may be among the k of a token and then counts as active; here it does not.
    """

    dictionary = AutoEncoderTopK
    trainer_class = "TopKTrainer"


class SampledTrainer(RowTrainer, batch_top_k.BatchTopKTrainer):
    """Sampled-SAE: training selects inside a pool of ceil(k*l) features.

    Saved as, and used for inference like, a BatchTopKSAE: a feature is active where its activation exceeds the
    threshold, which follows the value that gives the whole dictionary a mean L0 of k, and which the last of the
    `steps` calibrates to that on its batch. With select="token" and l=None it is an AutoEncoderTopK.
    `config["sampled_sae"]` says what `trainer_class` does not.

    Args:
        args, kwargs: those of `BatchTopKTrainer`.
        l, score, pool, pool_every, score_tokens, select, aux_pool: as in `SampledSAEConfig`.
        threshold_every: where training selects in a pool, every so many steps from `threshold_start_step` on the
            threshold moves, by so many steps' decay: each time costs the activations of the whole dictionary.
        adam, moments: `mode` and `moments` of `RowAdam`.
    """

    def __init__(
        self,
        *args: Any,
        l: float | None = None,
        score: str = "l2",
        pool: str = "top",
        pool_every: int = 1,
        score_tokens: float = 1.0,
        select: str = "batch",
        aux_pool: int | None = 1024,
        threshold_every: int = 10,
        adam: str = "dense",
        moments: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        threshold_every = check_integer("threshold_every", threshold_every, 1)
        by_token = select == "token" and l is None
        self.dictionary = AutoEncoderTopK if by_token else BatchTopKSAE
        self.trainer_class = "TopKTrainer" if by_token else "BatchTopKTrainer"
        self.rule = {
            "l": l,
            "score": score,
            "pool": pool,
            "pool_every": pool_every,
            "score_tokens": score_tokens,
            "select": select,
            "aux_pool": aux_pool,
        }
        self.adam = {"mode": adam, "moments": moments}
        super().__init__(*args, **{"wandb_name": "SampledSAE", **kwargs})
        self.threshold_every = threshold_every
        said = {"threshold_every": threshold_every, "adam": adam, "moments": str(moments or self.ae.b_dec.dtype)}
        self.config[TRAINING] = {**self.rule, **said}

    def update(self, step: int, x: Tensor) -> Tensor:
        loss = super().update(step, x)
        if step == self.steps - 1 and not self.selects_in_all:
            self.ae.sae.calibrate(self._tokens(x))
        return loss

    @property
    def selects_in_all(self) -> bool:
        """Whether the threshold follows from what training keeps, as in dictionary_learning."""
        c = self.ae.sae.cfg
        return c.l is None or (c.select == "batch" and c.pool_size == c.d_sae)

    def move_threshold(self, inputs: StepInputs, codes: SparseCodes, steps: int) -> None:
        """Toward the smallest of the B*k largest activations in the whole dictionary; `steps`: 0 where it starts."""
        if self.selects_in_all:
            super().move_threshold(inputs, codes, steps)
        elif steps % self.threshold_every == 0:
            with torch.no_grad():
                found = inputs.parts.select(inputs.encoder, None, Rule(self.ae.sae.cfg.k), self._memory.hints)
            average_threshold(self.ae.sae, found.smallest(), self.threshold_beta**self.threshold_every)
