"""Sampled-SAE, BatchTopK and TopK sparse autoencoders as one fast, exact layer."""

from . import functional as functional
from .codes import SampledSAEOutput as SampledSAEOutput
from .codes import SparseCodes as SparseCodes
from .config import SampledSAEConfig as SampledSAEConfig
from .formats.published import load_inference as load_inference
from .inference.codes_store import CodesStore as CodesStore
from .inference.config import InferenceConfig as InferenceConfig
from .inference.inference_sae import InferenceSAE as InferenceSAE
from .optim import RowAdam as RowAdam
from .sae import SampledSAE as SampledSAE
from .support.version import __version__ as __version__
from .training.activation_store import ActivationStore as ActivationStore
from .training.joined_activations import PairedActivations as PairedActivations
from .training.joined_activations import StackedActivations as StackedActivations
from .training.sae_group import SAEGroup as SAEGroup
from .training.train_config import TrainConfig as TrainConfig
from .training.trainer import Trainer as Trainer
