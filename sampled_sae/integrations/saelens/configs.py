"""Configs of the four architectures: SAELens' own, and for `sampled` the options of `SampledSAEConfig` beside them."""

from __future__ import annotations

from dataclasses import dataclass

from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEConfig
from sae_lens.saes.topk_sae import TopKSAEConfig, TopKTrainingSAEConfig

from ...config import SampledSAEConfig
from ...support.argument_checks import check_integer, check_number

# fields that SampledSAEConfig has under the same names
SHARED = (
    *("k", "l", "score", "pool", "pool_every", "score_tokens", "select"),
    *("k_aux", "aux_pool", "impl", "screen", "seed"),
)


@dataclass
class SampledTopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """SAELens' TopKTrainingSAEConfig, field by field; `use_sparse_activations` has no effect."""

    @classmethod
    def architecture(cls) -> str:
        return "sampled_topk"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig


@dataclass
class SampledBatchTopKTrainingSAEConfig(BatchTopKTrainingSAEConfig):
    """SAELens' BatchTopKTrainingSAEConfig, field by field."""

    @classmethod
    def architecture(cls) -> str:
        return "sampled_batchtopk"


@dataclass
class SampledMatryoshkaBatchTopKTrainingSAEConfig(MatryoshkaBatchTopKTrainingSAEConfig):
    """SAELens' MatryoshkaBatchTopKTrainingSAEConfig, field by field."""

    @classmethod
    def architecture(cls) -> str:
        return "sampled_matryoshka_batchtopk"


@dataclass
class SampledTrainingSAEConfig(BatchTopKTrainingSAEConfig):
    """A Sampled-SAE inside SAELens: what `SampledSAEConfig` has, under SAELens' names where SAELens has one.

    Args:
        l, score, pool, pool_every, score_tokens, select, k_aux, aux_pool, impl, screen: as in `SampledSAEConfig`.
        k: average number of active features a token; a whole number for `select="token"`.
        aux_loss_coefficient: `aux_coefficient` there.
        topk_threshold_lr: 1 - `threshold_decay` there. The running mean starts at its first value.
        threshold_every: where the rule is not BatchTopK's, every so many steps the threshold moves toward the value
            that gives the whole dictionary a mean L0 of k on the batch: no driver of SAELens calibrates after training.
        rescale_acts_by_decoder_norm: score and select by activation times decoder norm, as SAELens' BatchTopK.
        seed: of `pool="sample"`. Initial weights are SAELens'.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """

    k: float = 32
    l: float | None = None
    score: str = "l2"
    pool: str = "top"
    pool_every: int = 1
    score_tokens: float = 1.0
    select: str = "batch"
    aux_loss_coefficient: float = 1 / 32
    k_aux: int | None = None
    aux_pool: int | None = 1024
    topk_threshold_lr: float = 0.001
    threshold_every: int = 10
    impl: str = "auto"
    seed: int = 0
    screen: str = "auto"

    @classmethod
    def architecture(cls) -> str:
        return "sampled"

    def __post_init__(self) -> None:
        made = SampledSAEConfig(self.d_in, self.d_sae, **{name: getattr(self, name) for name in SHARED})
        for name in SHARED:
            setattr(self, name, getattr(made, name))
        self.aux_loss_coefficient = check_number("aux_loss_coefficient", self.aux_loss_coefficient, 0, None)
        self.topk_threshold_lr = check_number("topk_threshold_lr", self.topk_threshold_lr, 0, 1)
        self.threshold_every = check_integer("threshold_every", self.threshold_every, 1)
        if self.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            raise ValueError(
                f"normalize_activations={self.normalize_activations!r}: must be 'none', 'expected_average_only_in' or "
                "'covariance_whitening'; the aux loss needs residuals in the units of the decoder"
            )
        super().__post_init__()
