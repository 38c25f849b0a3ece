"""Sampled-SAE, BatchTopK and TopK sparse autoencoders as one fast, exact layer."""

from . import functional
from .codes import SparseCodes
from .config import SampledSAEConfig
from .group import SAEGroup
from .optim import RowAdam
from .sae import SampledSAE, SampledSAEOutput

__version__ = "0.1.0"
__all__ = ["RowAdam", "SAEGroup", "SampledSAE", "SampledSAEConfig", "SampledSAEOutput", "SparseCodes", "functional"]
