"""`sae.splice`: a language model on reconstructions, with features steered or ablated."""

import math

import pytest
import torch
from makers import make_sae, tokens
from tiny_models import CONTEXT, LAYERS, VOCABULARY, D, gpt2, llama, tiny

from sampled_sae import InferenceConfig, InferenceSAE
from sampled_sae.lm import capture, replace

ROWS = torch.randint(0, VOCABULARY, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
LAYER = 1


@pytest.fixture(scope="module", params=[llama, gpt2], ids=lambda make: make.__name__)
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


def an_sae(**changes):
    sae = make_sae(torch.float32, **{"d_in": D, "input_scale": 0.5, **changes}).eval()
    sae.calibrate(tokens(400, D, dtype=torch.float32))
    return sae


def an_inference_sae(**settings):
    g = torch.Generator().manual_seed(2)
    shapes = {"W_enc": (D, 64), "b_enc": (64,), "W_dec": (64, D), "b_dec": (D,)}
    weights = {name: 0.3 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return InferenceSAE(InferenceConfig(d_in=D, d_sae=64, rule="relu", **settings), weights)


SAES = {
    "sampled": an_sae,
    "topk": lambda: an_sae(l=None, select="token"),
    "decoder norm": lambda: an_inference_sae(scale_by_decoder_norm=True, input_scale=3.0),
    "layer norm": lambda: an_inference_sae(normalize="layer_norm", apply_b_dec_to_input=True),
}


@pytest.fixture(params=SAES, ids=str)
def sae(request):
    return SAES[request.param]()


def residual(model):
    with capture(model, LAYER) as captured, torch.no_grad():
        model(input_ids=ROWS, use_cache=False)
    return captured.value


@torch.no_grad()
def logits(model, **options):
    return model(input_ids=ROWS, use_cache=False, **options).logits


@torch.no_grad()
def expected(model, x):
    with replace(model, LAYER, lambda _: x):
        return logits(model)


def decoded(sae, dense, x):
    """What the SAE makes of dense codes [n, F] of tokens x [n, d]."""
    options = {"x": x} if isinstance(sae, InferenceSAE) else {}
    return sae.decode(dense, **options)


def edited(model, sae, change, keep_error):
    """The residual stream with the dense codes of all but the first tokens changed by hand."""
    x = residual(model)
    inner = x[:, 1:].reshape(-1, D)
    dense = sae.encode_sparse(inner).to_dense()
    after = decoded(sae, change(dense.clone()), inner)
    inner = inner + after - decoded(sae, dense, inner) if keep_error else after
    return torch.cat((x[:, :1], inner.view(3, -1, D)), dim=1).detach()


def strongest(model, sae):
    return int(sae.encode_sparse(residual(model)[:, 1:].reshape(-1, D)).to_dense().sum(0).argmax())


def test_replace_steer_and_ablate(model, sae):
    j = strongest(model, sae)

    def ablated(codes):
        codes[:, j] = 0
        return codes

    def steered(codes):
        codes[:, j] += 2.5
        codes[:, 3 if j != 3 else 4] -= 1.0
        return codes

    steer = {j: 2.5, (3 if j != 3 else 4): -1.0}
    cases = [
        ({}, lambda codes: codes, False),
        ({"ablate": [j]}, ablated, True),
        ({"ablate": [j], "replace": True}, ablated, False),
        ({"steer": steer}, steered, True),
        ({"steer": steer, "replace": True}, steered, False),
    ]
    before = logits(model)
    for options, change, keep_error in cases:
        with sae.splice(model, LAYER, **options):
            got = logits(model)
        torch.testing.assert_close(got, expected(model, edited(model, sae, change, keep_error)), rtol=1e-3, atol=1e-4)
        assert (got - before).abs().max() > 1e-3, options
        assert torch.equal(logits(model), before), "the model is as it was"


def test_steering_a_sampled_sae_adds_its_decoder_row(model):
    sae = an_sae()
    x = residual(model)
    x[:, 1:] += 3.0 * sae.W_dec[7].detach() / sae.cfg.input_scale
    with sae.splice(model, LAYER, steer={7: 3.0}):
        torch.testing.assert_close(logits(model), expected(model, x), rtol=1e-4, atol=1e-5)


def test_a_feature_that_is_not_active_is_ablated_without_a_trace(model):
    sae = an_sae()
    active = sae.encode_sparse(residual(model).reshape(-1, D)).active_mask()
    silent = (~active).nonzero().flatten().tolist()
    before = logits(model)
    with sae.splice(model, LAYER, ablate=silent):
        assert torch.equal(logits(model), before)
    with sae.splice(model, LAYER, replace=False):
        assert torch.equal(logits(model), before)


def test_the_first_token_and_outliers_stay(model):
    sae = an_sae()
    x = residual(model)
    norms = x[:, 1:].norm(dim=-1).flatten()
    limit = float(norms.median())
    seen = []
    with sae.splice(model, LAYER, max_norm=limit), replace(model, LAYER, lambda y: seen.append(y) or y):
        logits(model)
    moved = (seen[0] != x).any(dim=-1)
    assert not moved[:, 0].any()
    assert torch.equal(moved[:, 1:], x[:, 1:].norm(dim=-1) <= limit)
    with sae.splice(model, LAYER, drop_first=False), replace(model, LAYER, lambda y: seen.append(y) or y):
        logits(model)
    assert (seen[1] != x).any(dim=-1).all()


def test_behind_left_padding_the_first_attended_token_stays(model):
    sae, seen = an_sae(), []
    attended = torch.ones_like(ROWS)
    attended[1, :4] = 0
    with replace(model, LAYER, lambda y: seen.append(y) or y):
        logits(model, attention_mask=attended)
    with sae.splice(model, LAYER), replace(model, LAYER, lambda y: seen.append(y) or y):
        logits(model, attention_mask=attended)
    same = (seen[0] == seen[1]).all(dim=-1)
    assert same.nonzero().tolist() == [[0, 0], [1, 4], [2, 0]]


@pytest.mark.parametrize(
    "make", [llama, gpt2, lambda: tiny("Mamba", "CausalLM", state_size=4)], ids=["llama", "gpt2", "mamba"]
)
def test_generation_with_a_cache_equals_generation_without(make):
    """The first token of a later step is not the first of its sequence."""
    torch.manual_seed(0)
    model, sae = make().eval(), an_sae()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(2, 4).long()}
    plain = model.generate(ROWS[:2, :4], **options)
    with sae.splice(model, LAYER, steer={5: 60.0}):
        cached = model.generate(ROWS[:2, :4], use_cache=True, **options)
        whole = model.generate(ROWS[:2, :4], use_cache=False, **options)
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, plain)


def test_two_splices_add_up(model):
    sae = an_sae()
    with sae.splice(model, LAYER, steer={3: 1.0, 9: 2.0}):
        together = logits(model)
    with sae.splice(model, LAYER, steer={3: 1.0}), sae.splice(model, LAYER, steer={9: 2.0}):
        torch.testing.assert_close(logits(model), together, rtol=1e-4, atol=1e-5)


BAD = [
    ({"steer": {96: 1.0}}, ValueError, r"steer=96: must be a feature from 0 to 95"),
    ({"ablate": [-1]}, ValueError, r"ablate=-1: must be a whole number >= 0"),
    ({"ablate": "3"}, TypeError, r"ablate='3': must be features"),
    ({"ablate": 3}, TypeError, r"ablate=3: must be features"),
    ({"steer": [3]}, TypeError, r"steer=\[3\]: must map features"),
    ({"steer": {3: math.nan}}, ValueError, r"steer\[3\]=nan: must be a finite number"),
    ({"steer": {3: 1.0}, "ablate": [3]}, ValueError, r"ablate=\[3\]: is steered too"),
    ({"replace": 1}, TypeError, r"replace=1: must be True or False"),
    ({"drop_first": 0}, TypeError, r"drop_first=0: must be True or False"),
    ({"max_norm": 0}, ValueError, r"max_norm=0: must be a number above 0"),
    ({"max_norm": math.nan}, ValueError, r"max_norm=nan: must be a number above 0"),
]


@pytest.mark.parametrize(("options", "kind", "said"), BAD, ids=[said for _, _, said in BAD])
def test_bad_arguments(options, kind, said):
    torch.manual_seed(0)
    with pytest.raises(kind, match=said), an_sae().splice(llama(), LAYER, **options):
        pass


def test_what_cannot_be_spliced():
    model = llama()
    with pytest.raises(ValueError, match=f"layer={LAYERS} must be an integer from 0 to {LAYERS - 1}"):
        an_sae().splice(model, LAYERS).__enter__()
    with pytest.raises(ValueError, match=r"model=LlamaForCausalLM: has d=16, the SAE reads d_in=12"):
        make_sae(torch.float32).eval().splice(model, LAYER).__enter__()
    with pytest.raises(ValueError, match=r"in training mode.*call sae\.eval\(\) first"):
        an_sae().train().splice(model, LAYER).__enter__()
    transcoder = InferenceSAE(
        InferenceConfig(d_in=D, d_sae=4, rule="relu", d_out=D),
        {"W_enc": torch.ones(D, 4), "b_enc": torch.zeros(4), "W_dec": torch.ones(4, D), "b_dec": torch.zeros(D)},
    )
    with pytest.raises(ValueError, match=r"d_out=16: a transcoder reconstructs other activations"):
        transcoder.splice(model, LAYER).__enter__()
