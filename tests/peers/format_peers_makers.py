"""SAEs to convert, what each peer makes of the files, and what is the same."""

from __future__ import annotations

from dataclasses import replace

import torch
from dictionary_learning.utils import load_dictionary
from makers import make_sae, tokens
from sae_lens import SAE
from sparsify import SparseCoder

RULES = {"l=1": {"l": 1.0}, "l=4": {"l": 4.0}, "batchtopk": {"l": None}, "topk": {"l": None, "select": "token"}}
# (d_in, d_sae, k)
SHAPES = [(12, 96, 4), (37, 301, 7)]
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def trained(dtype=torch.float32, shape=SHAPES[0], **rule):
    """Calibrated, with decoder rows away from unit norm."""
    d_in, d_sae, k = shape
    sae = make_sae(dtype, d_in=d_in, d_sae=d_sae, k=k, **rule)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, d_sae).to(dtype).unsqueeze(1))
    sae.calibrate(tokens(300, d_in, dtype=dtype, seed=7))
    return sae


def under(sae, inference):
    """Set to compute what a peer's inference does: k of each token or the threshold."""
    sae.cfg = replace(sae.cfg, l=None, select="token" if inference == "topk" else "batch")
    return sae.eval()


def assert_same_codes(theirs, ours, scale=1.0):
    """The same entries active, the same values up to rounding."""
    assert theirs.shape == ours.shape
    assert 0 < (ours > 0).sum() < ours.numel() / 4
    assert torch.equal(theirs > 0, ours > 0)
    torch.testing.assert_close(theirs.to(ours.dtype) * scale, ours, **NEAR)


def saelens_codes(folder, x):
    sae = SAE.load_from_disk(folder, dtype=str(x.dtype).removeprefix("torch."))
    codes = sae.encode(x)
    return codes, sae.decode(codes)


def dictionary_learning_codes(folder, x):
    sae, _ = load_dictionary(str(folder), "cpu")
    codes = sae.encode(x)
    return codes, sae.decode(codes)


def sparsify_codes(folder, x):
    sae = SparseCoder.load_from_disk(folder).to(x.dtype)
    values, indices, _ = sae.encode(x)
    codes = torch.zeros(len(x), sae.num_latents, dtype=values.dtype).scatter(1, indices, values)
    return codes, sae.decode(values, indices)


PEERS = {"saelens": saelens_codes, "dictionary_learning": dictionary_learning_codes, "sparsify": sparsify_codes}


def disturbed(module, seed=0, width=0.3):
    """Every parameter away from its initial value, decoder norms away from 1."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(width * torch.randn(p.shape, generator=g).to(p.dtype))
    return module
