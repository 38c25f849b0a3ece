"""Tokens, features and states in the shapes in which they come: views, autocast, copies, numpy, other layouts."""

import copy
import pickle

import numpy as np
import pytest
import torch
from inference_makers import D, F, make, make_whole

from sampled_sae.inference.config import RULES

FORMS = [{"impl": "reference"}, {"impl": "torch", "screen": "off"}, {"impl": "torch", "screen": "bf16"}]
IDS = ["reference", "torch", "screened"]
VIEWS = {
    "rows of another matrix": lambda x: torch.cat((x, x + 1), 1)[:, :D],
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "stored by columns": lambda x: x.t().contiguous().t(),
    "backwards in memory": lambda x: x.flip(0).flip(0),
}


@pytest.mark.one_in(7)
@pytest.mark.parametrize("how", VIEWS)
@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize("rule", RULES)
def test_tokens_that_are_a_view(rule, form, how):
    sae, x = make_whole(rule, **form)
    expected, found = sae(x), sae(VIEWS[how](x))
    for a, b in zip(found.codes.entries(), expected.codes.entries(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(found.x_hat, expected.x_hat)
    one = x[:1].expand(5, D)
    assert torch.equal(sae.encode(one), sae.encode(x[:1]).expand(5, F))


@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize("rule", RULES)
def test_autocast_rounds_nothing(rule, form):
    sae, x = make(rule, dtype=torch.float32, apply_b_dec_to_input=True, **form)
    expected, dense, some = sae(x), sae.encode(x), sae.encode(x, [5, 2])
    decoded = sae.decode(dense)
    with torch.autocast("cpu", torch.bfloat16):
        found = sae(x)
        assert torch.equal(found.codes.values, expected.codes.values)
        assert torch.equal(found.x_hat, expected.x_hat)
        assert torch.equal(sae.encode(x), dense)
        assert torch.equal(sae.encode(x, [5, 2]), some)
        assert torch.equal(sae.decode(dense), decoded)


@pytest.mark.parametrize("rule", RULES)
def test_copies(rule):
    sae, x = make(rule)
    expected = sae(x).x_hat
    for other in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert torch.equal(other(x).x_hat, expected)
        assert other.W_enc.t().is_contiguous()
        other.W_dec.zero_()
    assert torch.equal(sae(x).x_hat, expected)


@pytest.mark.parametrize("features", [range(3, 6), np.array([3, 4, 5]), (3, 4, 5), torch.tensor([3, 4, 5]).short()])
def test_features_by_any_list(features):
    sae, x = make("relu")
    torch.testing.assert_close(sae.encode(x, features), sae.encode(x)[:, 3:6])


@pytest.mark.parametrize(
    "features", [[-1], [0, -96], [96], [3, 5, 3], [], 3, [[3]], [True], [2.0], ["3"], [None], np.array([3.5]), {3}]
)
@pytest.mark.parametrize("rule", ["relu", "topk"])
def test_features_that_are_refused(rule, features):
    sae, x = make(rule)
    codes = sae.encode(x)
    for use in (lambda: sae.encode(x, features), lambda: sae.decode(codes, features)):
        with pytest.raises((ValueError, TypeError), match=r"features.*must be distinct whole numbers from 0 to 95"):
            use()


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_that_is_loaded_lies_as_it_should(assign):
    sae, x = make("jumprelu")
    other, _ = make("jumprelu", seed=5)
    other.load_state_dict({name: t.contiguous() for name, t in sae.state_dict().items()}, assign=assign)
    assert other.W_enc.t().is_contiguous()
    assert torch.equal(other(x).x_hat, sae(x).x_hat)


@pytest.mark.parametrize(
    ("name", "value"), [("threshold", "nan"), ("W_enc", "nan"), ("b_enc", "inf"), ("W_dec", "inf")]
)
def test_a_state_with_bad_values_is_refused(name, value):
    sae, x = make("jumprelu")
    expected = sae(x).x_hat
    state = {key: t.clone() for key, t in sae.state_dict().items()}
    state[name][(3,) * state[name].dim()] = float(value)
    with pytest.raises(ValueError, match=f"{name}: 1 of its values are NaN"):
        sae.load_state_dict(state)
    assert torch.equal(sae(x).x_hat, expected)
