"""SAELens with this package's training step: same parameters, losses and files, no [B, F] tensor.

Importing registers four architectures for training under names of their own; `SAETrainer` and
`LanguageModelSAETrainingRunner` drive them as they are.

| architecture | config | the same as SAELens' | saved for inference as |
|---|---|---|---|
| sampled_batchtopk | SampledBatchTopKTrainingSAEConfig | batchtopk | jumprelu |
| sampled_matryoshka_batchtopk | SampledMatryoshkaBatchTopKTrainingSAEConfig | matryoshka_batchtopk | jumprelu |
| sampled_topk | SampledTopKTrainingSAEConfig | topk | topk |
| sampled | SampledTrainingSAEConfig | | jumprelu |

`accelerate(sae)` gives a living TopK, BatchTopK or MatryoshkaBatchTopK training SAE the same step. What is saved for
inference loads in SAELens without this package.
"""

from __future__ import annotations

from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class

from .accelerated import (
    SampledBatchTopKTrainingSAE,
    SampledMatryoshkaBatchTopKTrainingSAE,
    SampledTopKTrainingSAE,
    accelerate,
)
from .configs import (
    SampledBatchTopKTrainingSAEConfig,
    SampledMatryoshkaBatchTopKTrainingSAEConfig,
    SampledTopKTrainingSAEConfig,
    SampledTrainingSAEConfig,
)
from .sampled import SampledTrainingSAE

__all__ = [
    "SampledBatchTopKTrainingSAE",
    "SampledBatchTopKTrainingSAEConfig",
    "SampledMatryoshkaBatchTopKTrainingSAE",
    "SampledMatryoshkaBatchTopKTrainingSAEConfig",
    "SampledTopKTrainingSAE",
    "SampledTopKTrainingSAEConfig",
    "SampledTrainingSAE",
    "SampledTrainingSAEConfig",
    "accelerate",
]

for _sae, _config in (
    (SampledTrainingSAE, SampledTrainingSAEConfig),
    (SampledBatchTopKTrainingSAE, SampledBatchTopKTrainingSAEConfig),
    (SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig),
    (SampledMatryoshkaBatchTopKTrainingSAE, SampledMatryoshkaBatchTopKTrainingSAEConfig),
):
    _name = _config.architecture()
    if _name in SAE_TRAINING_CLASS_REGISTRY and SAE_TRAINING_CLASS_REGISTRY[_name][0].__module__.startswith(__name__):
        del SAE_TRAINING_CLASS_REGISTRY[_name]  # this module is being loaded again
    register_sae_training_class(_name, _sae, _config)
