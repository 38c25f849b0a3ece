"""SAEs in the layouts that the field publishes, written byte by byte as their owners write them, without their code."""

from __future__ import annotations

import json
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

D, F, D_OUT = 12, 96, 10


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(d_out=D, dtype=torch.float32):
    """W_enc, b_enc, W_dec, b_dec with decoder rows away from unit norm."""
    return {
        "W_enc": draw(D, F, seed=1, dtype=dtype) / D**0.5,
        "b_enc": 0.1 * draw(F, seed=2, dtype=dtype),
        "W_dec": draw(F, d_out, seed=3, dtype=dtype) / d_out**0.5,
        "b_dec": 0.3 * draw(d_out, seed=4, dtype=dtype),
    }


def thresholds(kind="random"):
    """[F]: for each feature its own, or what a rule has to get right."""
    values = {"random": draw(F, seed=5).abs(), "zero": torch.zeros(F), "huge": torch.full((F,), 1e30)}
    values |= {"-inf": torch.full((F,), -torch.inf), "inf": torch.full((F,), torch.inf), "below zero": -draw(F).abs()}
    return values[kind]


def x(n=40, d=D, seed=9, dtype=torch.float32):
    return draw(n, d, seed=seed, dtype=dtype) + 0.2


def write_gemma_scope(root: Path, repository="gemma-scope-2b-pt-res", d_out=D, threshold="random") -> Path:
    """As google/gemma-scope-2b-pt-res has them: float32 arrays, nothing beside them."""
    folder = root / repository / "layer_12" / "width_16k" / "average_l0_82"
    folder.mkdir(parents=True)
    arrays = {name: t.numpy() for name, t in weights(d_out).items()}
    np.savez(folder / "params.npz", **arrays, threshold=thresholds(threshold).numpy())
    return folder


def write_gemma_scope_2(root: Path, skip=False) -> Path:
    """As google/gemma-scope-2-270m-pt has them: lower-case names, an affine transcoder's skip as [d_in, d_out]."""
    folder = root / "gemma-scope-2-270m-pt" / ("transcoder" if skip else "resid_post") / "layer_5_width_16k_l0_small"
    folder.mkdir(parents=True)
    tensors = {name.lower(): t for name, t in weights().items()} | {"threshold": thresholds()}
    config = {"architecture": "jump_relu", "model_name": "google/gemma-3-270m", "width": F}
    config["hf_hook_point_in"] = "model.layers.5.output"
    if skip:
        tensors["affine_skip_connection"] = draw(D, D, seed=6)
        config |= {"hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output", "affine_connection": True}
        config["hf_hook_point_out"] = "model.layers.5.post_feedforward_layernorm.output"
    save_file(tensors, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


SAELENS_6 = {
    "d_in": D,
    "d_sae": F,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {
        "sae_lens_version": "6.22.1",
        "sae_lens_training_version": "6.22.1",
        "model_name": "pythia-160m",
        "hook_name": "blocks.5.hook_resid_post",
        "hook_head_index": None,
        "context_size": 128,
        "prepend_bos": True,
    },
}
# As of jbloom/GPT2-Small-SAEs-Reformatted: everything on one level, and no word on the architecture.
SAELENS_3 = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.8.hook_resid_pre",
    "hook_point_layer": 8,
    "dataset_path": "Skylion007/openwebtext",
    "context_size": 128,
    "d_in": D,
    "d_sae": F,
    "dtype": "torch.float32",
    "device": "cpu",
    "expansion_factor": 8,
    "l1_coefficient": 8e-05,
    "log_to_wandb": True,
}


def saelens_tensors(architecture, threshold="random", dtype=torch.float32):
    d_out = D_OUT if "transcoder" in architecture else D
    tensors = weights(d_out, dtype)
    if "jumprelu" in architecture:
        tensors["threshold"] = thresholds(threshold).to(dtype)
    if "skip" in architecture:
        tensors["W_skip"] = draw(d_out, D, seed=6, dtype=dtype)
    if architecture == "gated":
        del tensors["b_enc"]
        tensors |= {"b_gate": 0.1 * draw(F, seed=2), "b_mag": 0.1 * draw(F, seed=7), "r_mag": 0.3 * draw(F, seed=8)}
    return tensors


def write_saelens(root: Path, architecture="jumprelu", threshold="random", config=None, **changes) -> Path:
    """As SAE.save_model writes them."""
    root.mkdir(parents=True, exist_ok=True)
    described = {**(SAELENS_6 if config is None else config)}
    if config is None:
        described["architecture"] = architecture
    if architecture == "topk":
        described["k"] = 5
    if "transcoder" in architecture:
        described |= {"d_out": D_OUT, "apply_b_dec_to_input": False}
    described |= changes
    save_file(saelens_tensors(architecture, threshold), root / "sae_weights.safetensors")
    (root / "cfg.json").write_text(json.dumps(described))
    return root


def write_sparsify(root: Path, transcode=False, skip=False) -> Path:
    """As SparseCoder.save_to_disk writes them, below the run's own config.json."""
    folder = root / ("layers.5.mlp" if transcode else "layers.5")
    folder.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-160m", "ctx_len": 2048}))
    w = weights()
    tensors = {"encoder.weight": w["W_enc"].t().contiguous(), "encoder.bias": w["b_enc"]}
    tensors |= {"W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    if skip:
        tensors["W_skip"] = draw(D, D, seed=6)
    save_file(tensors, folder / "sae.safetensors")
    config = {"activation": "topk", "expansion_factor": 8, "normalize_decoder": True, "num_latents": F, "k": 5}
    config |= {"multi_topk": False, "skip_connection": skip, "transcode": transcode, "d_in": D}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def write_qwen_scope(root: Path, repository="SAE-Res-Qwen3-1.7B-Base-W32K-L0_5") -> Path:
    """As Qwen/SAE-Res-... has them: one file a layer, matrices the other way round, k in the repository's name."""
    folder = root / repository
    folder.mkdir(parents=True)
    w = weights()
    tensors = {"W_enc": w["W_enc"].t().contiguous(), "W_dec": w["W_dec"].t().contiguous()}
    torch.save({**tensors, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}, folder / "layer3.sae.pt")
    return folder


def write_dictionary_learning(root: Path, of: str) -> Path:
    """As trainSAE writes them."""
    root.mkdir(parents=True, exist_ok=True)
    w = weights()
    linear = {"encoder.weight": w["W_enc"].t().contiguous(), "decoder.weight": w["W_dec"].t().contiguous()}
    k = torch.tensor(5, dtype=torch.int32)
    batch = {"k": k, "threshold": torch.tensor(0.7)}
    states = {
        "AutoEncoder": {**linear, "encoder.bias": w["b_enc"], "bias": w["b_dec"]},
        "AutoEncoderNew": {**linear, "encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]},
        "GatedAutoEncoder": {
            **linear,
            "decoder_bias": w["b_dec"],
            "gate_bias": 0.1 * draw(F, seed=2),
            "mag_bias": 0.1 * draw(F, seed=7),
            "r_mag": 0.3 * draw(F, seed=8),
        },
        "JumpReluAutoEncoder": {**w, "threshold": thresholds()},
        "AutoEncoderTopK": {**linear, **batch, "encoder.bias": w["b_enc"], "b_dec": w["b_dec"]},
        "BatchTopKSAE": {**linear, **batch, "encoder.bias": w["b_enc"], "b_dec": w["b_dec"]},
        "MatryoshkaBatchTopKSAE": {**w, **batch, "group_sizes": torch.tensor([F // 4, F - F // 4])},
    }
    torch.save(states[of], root / "ae.pt")
    trainer = {
        "dict_class": of,
        "activation_dim": D,
        "dict_size": F,
        "k": 5,
        "layer": 4,
        "lm_name": "EleutherAI/pythia",
    }
    (root / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    return root


DICTIONARIES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)
ARCHITECTURES = (
    "standard",
    "topk",
    "jumprelu",
    "gated",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)


class Hub(types.ModuleType):
    """Stands in for huggingface_hub: a folder of repositories, from which files that match are taken into a cache."""

    def __init__(self, repositories, cache):
        super().__init__("huggingface_hub")
        self.repositories, self.cache, self.asked, self.patterns = repositories, cache, [], []

    def snapshot_download(self, name, revision=None, allow_patterns=None):
        self.asked.append((name, revision))
        self.patterns += allow_patterns
        if not (self.repositories / name).is_dir():
            raise OSError(f"404 Client Error\n{name}")
        for pattern in allow_patterns:
            source, target = self.repositories / name / pattern, self.cache / name / pattern
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
        return str(self.cache / name)
