"""Tokens, features, codes and states in the shapes in which they come: views, none, copies, numpy, made by hand."""

import copy
import pickle

import numpy as np
import pytest
import torch
from inference_makers import D, F, make, make_whole

from sampled_sae import functional
from sampled_sae.codes import SparseCodes
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


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize("rule", RULES)
def test_no_tokens_at_all(rule, form, normalize):
    """Of a mask that lets none through, as SAELens has it: nothing is active, and shapes are what they always are."""
    sae, x = make(rule, dtype=torch.float32, normalize=normalize, **form)
    none = x.new_zeros(3, 0, D).requires_grad_()
    out, dense, some = sae(none), sae.encode(none), sae.encode(none, [5, 2])
    assert (out.x_hat.shape, out.codes.shape, out.codes.count()) == ((3, 0, D), (0, F), 0)
    assert (dense.shape, some.shape) == ((3, 0, F), (3, 0, 2))
    assert sae.decode(dense, x=none).shape == sae.decode(some, [5, 2], x=none).shape == (3, 0, D)
    assert sae.decode(out.codes, x=none).shape == (0, D)
    (out.x_hat.sum() + dense.sum() + some.sum() + out.codes.values.sum()).backward()
    assert none.grad.shape == none.shape
    assert torch.equal(sae(x).x_hat, make(rule, dtype=torch.float32, normalize=normalize, **form)[0](x).x_hat)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize("rule", RULES)
def test_second_derivatives_are_right_or_refused(rule, form):
    sae, x = make(rule, n_tokens=2, **form)
    x.requires_grad_()
    for use in (
        lambda x: sae(x).x_hat,
        lambda x: sae.encode(x),
        lambda x: sae.encode(x, [5, 2]),
        lambda x: sae.encode_sparse(x).values,
    ):
        squares = lambda x, use=use: use(x).square().sum()  # noqa: E731
        if form["impl"] == "reference":
            assert torch.autograd.gradgradcheck(squares, x)
            continue
        (first,) = torch.autograd.grad(squares(x), x, create_graph=True)
        with pytest.raises(RuntimeError, match="a second derivative was asked for, which only the dense forms have"):
            torch.autograd.grad((first * x).sum(), x)


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


@pytest.mark.parametrize(
    ("tokens", "features"), [((1, 0), (2, 3)), ((0, 0), (3, 2)), ((0, 0), (2, 2)), ((0, 2), (2, 3)), ((0, 1), (2, F))]
)
def test_codes_made_by_hand_that_are_no_list(tokens, features):
    """Out of order or of range: what a decode adds up by token would be that of others."""
    sae, _ = make("relu", dtype=torch.float32)
    codes = SparseCodes(torch.ones(2), torch.tensor(tokens), torch.tensor(features), (2, F))
    for decode in (lambda: sae.decode(codes), lambda: functional.decode(codes, sae.W_dec)):
        with pytest.raises(ValueError, match=r"codes of shape \(2, 96\): their 2 entries must lie in it, sorted"):
            decode()


def test_codes_made_by_hand():
    sae, _ = make("relu", dtype=torch.float32)
    codes = SparseCodes(torch.ones(2), torch.tensor([0, 1]), torch.tensor([7, 3]), (2, F))
    torch.testing.assert_close(sae.decode(codes), sae.W_dec[[7, 3]] + sae.b_dec)
