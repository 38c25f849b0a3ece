"""Copies, conversions and optimizers keep the values, and the memory layout of W_enc."""

import copy
import io

import pytest
import torch
from makers import make_sae, tokens
from safetensors.torch import load_file, load_model, save_file, save_model

from sampled_sae import RowAdam, SampledSAE


def assert_same_module(a, b):
    assert a.cfg == b.cfg
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        other = b.state_dict()[name]
        assert torch.equal(value, other)
        assert value.dtype == other.dtype
    assert a.W_enc.stride() == b.W_enc.stride() == (1, a.cfg.d_in)


def torch_save(sae):
    file = io.BytesIO()
    torch.save(sae, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def state_dict(sae):
    file = io.BytesIO()
    torch.save(sae.state_dict(), file)
    file.seek(0)
    fresh = SampledSAE(sae.cfg, dtype=sae.W_enc.dtype)
    fresh.load_state_dict(torch.load(file))
    return fresh


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_the_docstring_says_of_safetensors(tmp_path, dtype):
    """The state dict is the SAE's own memory, as in torch: a running mean of weights is taken through it."""
    sae, averaged, fresh, loaded = (make_sae(dtype, seed=seed) for seed in range(4))
    sae(tokens(9, 12, dtype=dtype))
    for ours, theirs in zip(averaged.state_dict().values(), sae.state_dict().values()):
        ours.copy_(theirs)
    assert_same_module(averaged, sae)
    save_model(sae, str(tmp_path / "model.safetensors"))
    load_model(fresh, str(tmp_path / "model.safetensors"))
    save_file({name: t.contiguous() for name, t in sae.state_dict().items()}, tmp_path / "state.safetensors")
    loaded.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for copied in (fresh, loaded):
        assert_same_module(copied, sae)


@pytest.mark.parametrize("row_grads", [True, False])
@pytest.mark.parametrize("make_copy", [copy.deepcopy, torch_save, state_dict], ids=lambda f: f.__name__)
def test_copies(make_copy, row_grads):
    sae = make_sae(torch.float32, row_grads=row_grads, pool="sample" if make_copy is not state_dict else "top")
    sae(tokens(9, 12, dtype=torch.float32)).loss.backward()
    twin = make_copy(sae)
    assert_same_module(sae, twin)
    x = tokens(9, 12, dtype=torch.float32, seed=4)
    assert torch.equal(sae(x).loss, twin(x).loss)
    assert torch.equal(sae.eval().encode(x), twin.eval().encode(x))
    with torch.no_grad():
        twin.W_enc.zero_()
    assert sae.W_enc.any()


def test_conversion_of_dtype_keeps_the_layout():
    sae = make_sae(torch.float32).to(torch.float64)
    assert sae.W_enc.t().is_contiguous()
    out = sae(tokens(5, 12))
    out.loss.backward()
    assert out.loss.dtype == sae.W_enc.grad.dtype == torch.float64
    assert sae.W_enc.grad.stride() == sae.W_enc.stride()


@pytest.mark.parametrize(
    "make",
    [
        lambda sae: RowAdam(sae),
        lambda sae: torch.optim.Adam(sae.parameters()),
        lambda sae: torch.optim.Adam(sae.parameters(), fused=True),
        lambda sae: torch.optim.AdamW(sae.parameters(), foreach=True),
        lambda sae: torch.optim.SGD(sae.parameters(), momentum=0.9, lr=0.01),
    ],
    ids=["RowAdam", "Adam", "fused", "foreach", "SGD"],
)
def test_memory_layout_survives_an_optimizer(make):
    sae = make_sae(torch.float32)
    optimizer = make(sae)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = sae(tokens(40, 12, dtype=torch.float32)).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]
    assert sae.W_enc.t().is_contiguous()
    for value in optimizer.state[sae.W_enc].values():
        if isinstance(value, torch.Tensor) and value.dim() == 2:
            assert value.stride() == sae.W_enc.stride()
