"""Language models by name: causal models and encoders of Hugging Face, and some that install through pip alone."""

import hashlib
import importlib.util
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sampled_sae.lm.bundled import BUNDLED_MODELS, bundled_folder, is_installed
from sampled_sae.lm.foreign_errors import named
from sampled_sae.residual_stream.blocks import text_config, transformer_blocks
from sampled_sae.support.argument_checks import check_device
from sampled_sae.support.atomic_files import field, read_json


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ImportError('language models need transformers: pip install "sampled-sae[lm]"') from error


# how transformers spreads a model over the devices there are
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


def load_model(
    name: str,
    cache_dir: str | Path | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """Load a language model and its tokenizer, in eval mode.

    A causal model comes with its head; an encoder (BERT, MPNet, ESM: a model that Hugging Face trained to fill in
    masked tokens, or knows without a causal form) without one, to be harvested but not spliced.

    Args:
        name: one of BUNDLED_MODELS, a Hugging Face name, or a local folder.
        cache_dir: where bundled models are kept once converted (the first load parses or unpacks their files, up
            to a minute); default `default_cache_dir()`. Models of the hub stay in Hugging Face's own cache.
        dtype: of the weights, a torch dtype or its name.
        device: where the model is put, or a `device_map` of transformers: "auto", "balanced", "balanced_low_0" or
            "sequential" spread it over the devices there are.

    Returns:
        (model, tokenizer), with `model.name_or_path == name`.

    Raises:
        ImportError: without transformers, or without the packages of a bundled model; says what to install.
        ValueError: for a dtype that is not a floating dtype, a device that is not there, or a model that is none of
            text (naming its class).
        OSError: where Hugging Face knows no such model.
    """
    torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise ValueError(f"dtype={dtype!r} must be a floating dtype, for example 'float32' or 'bfloat16'")
    spread = {"device_map": device} if device in SPREAD else {}
    place = None if spread else check_device(device)
    _, kind, folder = _architecture(name, cache_dir)
    with _naming(name):
        model = kind.from_pretrained(folder, dtype=torch_dtype, **spread).eval()
    transformer_blocks(model)
    if place is not None:
        model.to(place)
    tokenizer = load_tokenizer(name, cache_dir)
    model.name_or_path = model.config.name_or_path = name
    return model, tokenizer


def load_tokenizer(name: str, cache_dir: str | Path | None = None) -> Any:
    """The tokenizer of `load_model`, without the model."""
    with _naming(name):
        return _transformers().AutoTokenizer.from_pretrained(_folder(name, cache_dir))


def load_skeleton(name: str, cache_dir: str | Path | None = None) -> Any:
    """The model of `load_model` without its weights (on the meta device): for checks that need no weights."""
    config, kind, _ = _architecture(name, cache_dir)
    with _naming(name), torch.device("meta"):
        return kind.from_config(config)


def is_causal_model(name: str, cache_dir: str | Path | None = None) -> bool:
    """Whether `load_model` gives a model that predicts the next token, by its configuration alone."""
    return _architecture(name, cache_dir)[1] is _transformers().AutoModelForCausalLM


def is_at_hand(name: str) -> bool:
    """Whether `load_model` needs no network for it: its package, its folder, or the hub's cache on this machine."""
    if importlib.util.find_spec("transformers") is None:
        return False
    if name in BUNDLED_MODELS:
        return is_installed(name)
    if Path(name).is_dir():
        return True
    try:
        return _in_hub_cache(name, "config.json") is not None and _has_weights_in_hub_cache(name)
    except ValueError:  # no name of a repository, or a damaged list of the weights' parts
        return False


def _in_hub_cache(name: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None


def _has_weights_in_hub_cache(name: str) -> bool:
    """In one file, or every part of them. An interrupted download, or one of the configuration alone, leaves less."""
    for file in ("model.safetensors", "pytorch_model.bin"):
        if _in_hub_cache(name, file) is not None:
            return True
        if (index := _in_hub_cache(name, f"{file}.index.json")) is not None:
            parts = field(index, read_json(index), "weight_map", dict).values()
            return all(_in_hub_cache(name, str(part)) is not None for part in parts)
    return False


def predicts_next_token(model: Any) -> bool:
    """Whether the model has a head for the next token; one that fills in masked tokens is none."""
    head = getattr(model, "get_output_embeddings", lambda: None)
    return head() is not None and "MaskedLM" not in type(model).__name__


def name_of(model: Any) -> str:
    """What the model was loaded by; empty for one that does not say."""
    return str(getattr(model, "name_or_path", ""))


def device_of(model: nn.Module) -> torch.device:
    """Where token ids go: to the first of the parameters."""
    return next(model.parameters()).device


def weights_digest(model: nn.Module) -> str:
    """Fingerprint of the model: names, shapes and the first values of all parameters (not every value)."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        # the same model is another's part in DataParallel and torch.compile
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
        first = parameter.detach().flatten()[:64].float().cpu()
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype} {first.tolist()}".encode())
    return digest.hexdigest()


def identity_of(model: nn.Module) -> dict[str, Any]:
    """Name and fingerprint, as a manifest has them."""
    return {"model": name_of(model), "weights_sha256": weights_digest(model)}


def _naming(name: str) -> AbstractContextManager[None]:
    return named(f"model={name!r}: cannot be loaded")


def _folder(name: str, cache_dir: str | Path | None) -> str | Path:
    return bundled_folder(name, cache_dir) if name in BUNDLED_MODELS else name


def _architecture(name: str, cache_dir: str | Path | None) -> tuple[Any, Any, str | Path]:
    """(configuration, class that makes the model, where its files are)."""
    transformers = _transformers()
    folder = _folder(name, cache_dir)
    with _naming(name):
        config = transformers.AutoConfig.from_pretrained(folder)
    kind = transformers.AutoModelForCausalLM if _is_causal(config) else transformers.AutoModel
    return config, kind, folder


def _is_causal(config: Any) -> bool:
    # BERT has a causal form too, with a mask that its weights were not trained with
    masked = any("MaskedLM" in architecture for architecture in config.architectures or ())
    return not masked and type(config) in _transformers().MODEL_FOR_CAUSAL_LM_MAPPING


def check_context(model: Any, context: int) -> None:
    """ValueError where a row of `context` tokens has more positions than the model knows."""
    about = text_config(model)
    positions = (getattr(about, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    limits = [limit for limit in positions if isinstance(limit, int) and limit > 0]
    for name, table in model.named_modules():
        # RoBERTa and its kind count positions from the row after the padding's
        if isinstance(table, nn.Embedding) and name.endswith("position_embeddings") and table.padding_idx is not None:
            limits.append(table.num_embeddings - table.padding_idx - 1)
    if limits and context > min(limits):
        raise ValueError(f"context={context} must be at most {min(limits)}, the positions of {type(model).__name__}")


def check_rows(model: Any, rows: Tensor) -> None:
    """ValueError unless `rows` is int64 [N, context] with N >= 1, 2 <= context <= positions, ids of the vocabulary."""
    wanted = "rows must be a tensor, int64 [N, context] with N >= 1 and context >= 2, got"
    if not isinstance(rows, Tensor):
        raise TypeError(f"{wanted} {type(rows).__name__}")
    if rows.dtype != torch.int64 or rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] < 2:
        raise ValueError(f"{wanted} {rows.dtype} {list(rows.shape)}")
    check_context(model, rows.shape[1])
    vocabulary = getattr(text_config(model), "vocab_size", None)
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        known = "no negative ones" if vocabulary is None else f"0 to {vocabulary - 1}"
        raise ValueError(f"rows holds token ids from {low} to {high}; the model knows {known}")
