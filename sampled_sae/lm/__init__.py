"""Activations of real language models: load model and texts, harvest a layer, splice reconstructions back.

Everything here needs the extra `lm` (`pip install "sampled-sae[lm]"`), which is imported only when used.
"""

from sampled_sae.lm.bundled import BUNDLED_MODELS
from sampled_sae.lm.harvest import harvest, weights_digest
from sampled_sae.lm.hooks import capture, replace
from sampled_sae.lm.models import load_model, transformer_blocks
from sampled_sae.lm.splice import SpliceEvaluator, spliced_cross_entropy
from sampled_sae.lm.texts import load_texts, token_rows

__all__ = [
    "BUNDLED_MODELS",
    "SpliceEvaluator",
    "capture",
    "harvest",
    "load_model",
    "load_texts",
    "replace",
    "spliced_cross_entropy",
    "token_rows",
    "transformer_blocks",
    "weights_digest",
]
