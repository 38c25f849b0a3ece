"""A state dict says the factor on the activations; a threshold that is not calibrated says so wherever it is used."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from makers import make_sae, tokens

from sampled_sae import SampledSAE


@pytest.mark.parametrize(("of", "into"), [(0.25, 1.0), (1.0, 3.5), (0.1, 0.1000001)])
@pytest.mark.parametrize("inside", [False, True])
def test_a_state_of_another_scale_is_refused(of, into, inside):
    sae, fresh = make_sae(input_scale=of), make_sae(input_scale=into, seed=1)
    before = copy.deepcopy(fresh.W_enc)
    state = (torch.nn.Sequential(sae) if inside else sae).state_dict()
    with pytest.raises(ValueError, match=f"input_scale={into}: the state dict is of an SAE with input_scale={of}"):
        (torch.nn.Sequential(fresh) if inside else fresh).load_state_dict(state)
    assert torch.equal(fresh.W_enc, before)
    fresh.cfg = replace(fresh.cfg, input_scale=of)
    fresh.load_state_dict(sae.state_dict())
    assert torch.equal(fresh(tokens(5, 12)).x_hat, sae(tokens(5, 12)).x_hat)


def test_a_state_that_does_not_say_it_is_taken():
    sae, fresh = make_sae(input_scale=0.25), make_sae(input_scale=0.25, seed=1)
    fresh.load_state_dict({name: value for name, value in sae.state_dict().items() if name != "input_scale"})
    assert torch.equal(fresh.W_enc, sae.W_enc)


@pytest.mark.parametrize("copied", [lambda sae: sae, copy.deepcopy], ids=["itself", "a copy"])
@pytest.mark.parametrize("use", ["forward", "encode", "encode_sparse", "encode_above_threshold"])
def test_every_use_of_an_unset_threshold_warns_once(use, copied):
    sae = copied(make_sae()).eval()
    with pytest.warns(UserWarning, match="never set"):
        getattr(sae, use)(tokens(5, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(sae, use)(tokens(5, 12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_specification_computes_in_float32_under_autocast(dtype):
    x = tokens(40, 12, dtype=torch.float32)
    sae = make_sae(torch.float32, impl="reference", aux_coefficient=1.0, dead_after=5)
    twin = SampledSAE(sae.cfg)
    twin.load_state_dict(sae.state_dict())
    for each in (sae, twin):
        each.tokens_since_active.fill_(5)
    with torch.autocast("cpu", dtype):
        found = sae(x)
    torch.testing.assert_close((found.mse, found.aux), (lambda out: (out.mse, out.aux))(twin(x)), rtol=0, atol=0)
