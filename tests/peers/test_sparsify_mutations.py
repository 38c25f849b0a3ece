"""Whatever is changed on a SparseCoder changes its patched step as it changes sparsify's own."""

import copy
import dataclasses

import mutations
import pytest
import torch
from sparsify import SparseCoder, SparseCoderConfig, sparse_coder, utils
from torch import nn

from sampled_sae.integrations.sparsify import patch_sparsify

D, F = 16, 320


@pytest.fixture(autouse=True)
def eager_peer(monkeypatch):
    """sparsify's own Triton decoder needs a GPU."""
    for module in (sparse_coder, utils):
        monkeypatch.setattr(module, "decoder_impl", utils.eager_decode)


def made(**options):
    torch.manual_seed(0)
    coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=6, **options))
    with torch.no_grad():
        for p in coder.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return coder


def changes_of(coder):
    named = {
        f"cfg.{f.name} = {other}": mutations.set_attribute(f"cfg.{f.name}", other)
        for f in dataclasses.fields(coder.cfg)
        if (other := mutations.changed_value(getattr(coder.cfg, f.name))) is not None
    }
    named |= mutations.of_values(coder) | mutations.of_functions(coder, ["encode", "decode", "forward"])
    named |= mutations.of_tensors(coder) | mutations.of_modules(coder)
    for k in (1, F // 8 + 1, F + 1, 0, 2.5):
        named[f"cfg.k = {k}"] = mutations.set_attribute("cfg.k", k)
    named["cfg.activation = groupmax"] = lambda c: (setattr(c.cfg, "activation", "groupmax"), setattr(c.cfg, "k", 8))
    named["to float64"] = lambda c: c.to(torch.float64)
    named["tied"] = lambda c: setattr(c, "W_dec", c.encoder.weight)
    named["parametrized"] = lambda c: nn.utils.parametrize.register_parametrization(c, "W_dec", nn.Softplus())
    named["encoder parametrized"] = lambda c: nn.utils.parametrizations.weight_norm(c.encoder)
    named["no bias"] = mutations.set_attribute("encoder.bias", None)
    return named


def outcome(coder, change):
    """(losses, reconstruction, gradients that sparsify has right), or the error."""
    g = torch.Generator().manual_seed(1)
    x, dead = torch.randn(40, D, generator=g), torch.rand(F, generator=g) < 0.4
    try:
        coder(x, dead_mask=dead).fvu.backward()
        coder.zero_grad()
        change(coder)
        out = coder(x.to(coder.b_dec.dtype), dead_mask=dead)
        (out.fvu + out.multi_topk_fvu * 0 + out.auxk_loss * 0).backward()
    except Exception as error:
        return type(error), str(error)
    grads = {name: p.grad for name, p in coder.named_parameters() if p.grad is not None}
    return {name: getattr(out, name).detach() for name in ("fvu", "auxk_loss", "multi_topk_fvu", "sae_out")}, grads


@pytest.mark.parametrize("options", [{}, {"multi_topk": True}, {"skip_connection": True}], ids=str)
def test_every_change_is_heard(options):
    coder = made(**options)
    unchanged, heard = outcome(copy.deepcopy(coder), lambda c: None), 0
    for name, change in changes_of(coder).items():
        expected = outcome(copy.deepcopy(coder), change)
        with patch_sparsify():
            found = outcome(copy.deepcopy(coder), change)
        if isinstance(expected[0], type):
            assert isinstance(found[0], type), f"{name}: {expected}"
            continue
        assert not isinstance(found[0], type), f"{name}: {found}"
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        heard += not torch.equal(unchanged[0]["fvu"], expected[0]["fvu"])
    assert heard > 15, "changes that change nothing prove nothing"
