"""`from sampled_sae.data import ActivationStore`, as before it moved to `sampled_sae.training`."""

from .training.activation_store import ActivationStore
from .training.batches import ShuffledStream

__all__ = ["ActivationStore", "ShuffledStream"]
