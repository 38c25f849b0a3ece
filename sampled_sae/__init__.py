"""Sampled-SAE, BatchTopK and TopK sparse autoencoders as one fast, exact layer."""

from . import functional
from .codes import SparseCodes
from .config import SampledSAEConfig
from .optim import RowAdam
from .sae import SampledSAE, SampledSAEOutput
from .support.version import __version__
from .training.activation_store import ActivationStore
from .training.sae_group import SAEGroup
from .training.train_config import TrainConfig
from .training.trainer import Trainer

__all__ = [
    "ActivationStore",
    "RowAdam",
    "SAEGroup",
    "SampledSAE",
    "SampledSAEConfig",
    "SampledSAEOutput",
    "SparseCodes",
    "TrainConfig",
    "Trainer",
    "__version__",
    "functional",
]
