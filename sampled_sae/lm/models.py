"""Language models by name: causal models and encoders of Hugging Face, and some that install through pip alone."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sampled_sae.lm.bundled import BUNDLED_MODELS, bundled_folder

_LAYER_PATHS = (
    "model.layers",  # Llama, Mistral, Qwen, Gemma, Phi, OLMo, SmolLM
    "gpt_neox.layers",  # Pythia
    "transformer.h",  # GPT-2, GPT-J, Bloom, Falcon
    "transformer.blocks",  # MPT
    "model.decoder.layers",  # OPT
    "model.language_model.layers",  # text half of image-text models
    "backbone.layers",  # Mamba
    "encoder.layer",  # encoders: BERT, RoBERTa, MPNet, ESM
    "transformer.layer",  # DistilBERT
    "layers",  # the same models without their head
    "h",
)


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ImportError('language models need transformers: pip install "sampled-sae[lm]"') from error


def load_model(
    name: str, cache_dir: str | Path | None = None, dtype: torch.dtype | str = torch.float32
) -> tuple[Any, Any]:
    """Load a language model and its tokenizer, in eval mode on the CPU.

    A causal model comes with its head; an encoder (BERT, MPNet, ESM: a model that Hugging Face trained to fill in
    masked tokens, or knows without a causal form) without one, to be harvested but not spliced.

    Args:
        name: one of BUNDLED_MODELS, a Hugging Face name, or a local folder.
        cache_dir: where bundled models are kept once converted (the first load parses or unpacks their files, up
            to a minute); default `default_cache_dir()`. Models of the hub stay in Hugging Face's own cache.
        dtype: of the weights, a torch dtype or its name.

    Returns:
        (model, tokenizer), with `model.name_or_path == name`.

    Raises:
        ImportError: without transformers, or without the packages of a bundled model; says what to install.
        ValueError: for a dtype that is not a floating dtype.
        OSError: where Hugging Face knows no such model.
    """
    transformers = _transformers()
    torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise ValueError(f"dtype={dtype!r} must be a floating dtype, for example 'float32' or 'bfloat16'")
    folder = bundled_folder(name, cache_dir) if name in BUNDLED_MODELS else name
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = transformers.AutoModelForCausalLM if _is_causal(config) else transformers.AutoModel
    model = kind.from_pretrained(folder, dtype=torch_dtype).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model.name_or_path = model.config.name_or_path = name
    return model, tokenizer


def _is_causal(config: Any) -> bool:
    # BERT has a causal form too, with a mask that its weights were not trained with
    masked = any("MaskedLM" in architecture for architecture in config.architectures or ())
    return not masked and type(config) in _transformers().MODEL_FOR_CAUSAL_LM_MAPPING


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks of a language model, first block first.

    Raises:
        ValueError: if the model has none of the known layouts.
    """
    for path in _LAYER_PATHS:
        found: Any = model
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.ModuleList) and len(found) > 0:
            return found
    raise ValueError(
        f"no list of transformer blocks found in {type(model).__name__}: looked for {', '.join(_LAYER_PATHS)}"
    )


def check_layer(model: nn.Module, layer: int) -> nn.Module:
    """The block `layer` of the model; ValueError where there is none."""
    layers = transformer_blocks(model)
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(layers):
        raise ValueError(f"layer={layer!r} must be an integer from 0 to {len(layers) - 1} in this model")
    return layers[layer]


def check_rows(model: Any, rows: Tensor) -> None:
    """ValueError unless `rows` is int64 [N, context] with N >= 1, context >= 2 and ids of the vocabulary."""
    if rows.dtype != torch.int64 or rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] < 2:
        raise ValueError(
            f"rows must be int64 [N, context] with N >= 1 and context >= 2, got {rows.dtype} {list(rows.shape)}"
        )
    vocabulary = model.config.get_text_config().vocab_size
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"rows holds token ids from {low} to {high}; the model knows 0 to {vocabulary - 1}")
