"""SAEs to convert, and functions that read and change the peers' files without the peers."""

from __future__ import annotations

import json

import torch
from makers import make_sae, tokens
from safetensors.torch import load_file, save_file

RULES = {
    "l=1": {"l": 1.0},
    "l=4, entropy": {"l": 4.0, "score": "entropy", "threshold_decay": 0.9, "aux_pool": 7, "dead_after": 30},
    "batchtopk": {"l": None, "seed": 3},
    "topk": {"l": None, "select": "token"},
    "token in a pool": {"l": 2.0, "select": "token"},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FILES = {
    "saelens": ("sae_weights.safetensors", "cfg.json"),
    "dictionary_learning": ("ae.pt", "config.json"),
    "sparsify": ("sae.safetensors", "cfg.json"),
}
OURS = ("config.json", "sae.safetensors")


def trained(dtype=torch.float32, **rule):
    """An SAE with decoder rows away from unit norm, counted idle tokens and a calibrated threshold."""
    sae = make_sae(dtype, **rule)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, 96).to(dtype).unsqueeze(1))
    for seed in range(2):
        sae(tokens(9, 12, dtype=dtype, seed=seed))
    sae.calibrate(tokens(200, 12, dtype=dtype, seed=7))
    return sae


def rule_for(to):
    """Options of an export to this format: to sparsify an SAE with a threshold goes only as a TopK."""
    return {"inference": "topk"} if to == "sparsify" else {}


def tensors_of(folder, to):
    file = folder / FILES[to][0]
    return torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)


def config_of(folder, to):
    return json.loads((folder / FILES[to][1]).read_text())


def same_tensors(a, b):
    return set(a) == set(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def same_files(a, b, names):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def without_extra(folder):
    """The folder as the peer itself would have written it, without this package's own file."""
    (folder / "sampled_sae.safetensors").unlink()
    return folder


def changed_config(folder, name, change):
    config = json.loads((folder / name).read_text())
    change(config)
    (folder / name).write_text(json.dumps(config))


def changed_tensors(folder, to, change):
    file, tensors = folder / FILES[to][0], tensors_of(folder, to)
    change(tensors)
    torch.save(tensors, file) if file.suffix == ".pt" else save_file(tensors, file)


# Changes that a test makes to a folder: of dictionary_learning's config, of a cfg.json, of the tensors.
def trainer(**values):
    return lambda f: changed_config(f, "config.json", lambda c: c["trainer"].update(values))


def cfg(**values):
    return lambda f: changed_config(f, "cfg.json", lambda c: c.update(values))


def put(to, **values):
    return lambda f: changed_tensors(f, to, lambda t: t.update(values))
