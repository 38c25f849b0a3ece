"""`from sampled_sae.train import TrainConfig, Trainer`, as before they moved to `sampled_sae.training`."""

from .training.train_config import TrainConfig
from .training.trainer import Trainer

__all__ = ["TrainConfig", "Trainer"]
