"""The trainers for `trainSAE`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dictionaries import AutoEncoderTopK, BatchTopKSAE
from .row_trainer import RowTrainer


class BatchTopKTrainer(RowTrainer):
    """dictionary_learning's `BatchTopKTrainer`, faster."""

    dictionary = BatchTopKSAE
    trainer_class = "BatchTopKTrainer"


class TopKTrainer(RowTrainer):
    """dictionary_learning's `TopKTrainer`, faster.

    There a feature of zero activation may be among the k of a token and then counts as active; here it does not.
    """

    dictionary = AutoEncoderTopK
    trainer_class = "TopKTrainer"


class SampledTrainer(RowTrainer):
    """Sampled-SAE: training selects inside a pool of ceil(k*l) features.

    Saved as, and used for inference like, a BatchTopKSAE: a feature is active where its activation exceeds the
    threshold, which the last of the `steps` calibrates to L0 = k on its batch. With select="token" and l=None it is
    an AutoEncoderTopK. `config["sampled_sae"]` says what `trainer_class` does not.

    Args:
        args, kwargs: those of `BatchTopKTrainer`.
        l, score, pool, pool_every, score_tokens, select, aux_pool: as in `SampledSAEConfig`.
        adam, moments: `mode` and `moments` of `RowAdam`.
    """

    def __init__(
        self,
        *args: Any,
        l: float | None = 4.0,
        score: str = "l2",
        pool: str = "top",
        pool_every: int = 1,
        score_tokens: float = 1.0,
        select: str = "batch",
        aux_pool: int | None = 1024,
        adam: str = "dense",
        moments: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
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
        self.config["sampled_sae"] = {**self.rule, "adam": adam, "moments": str(moments or self.ae.b_dec.dtype)}

    def update(self, step: int, x: Tensor) -> Tensor:
        loss = super().update(step, x)
        if step == self.steps - 1 and self.ae.sae.cfg.l is not None:
            self.ae.sae.calibrate(self._tokens(x))
        return loss
