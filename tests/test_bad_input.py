"""Every error names the argument, its value and what is allowed."""

import math
import re

import pytest
import torch
from makers import make_sae, problem, tokens

from sampled_sae import SampledSAE, SampledSAEConfig, SparseCodes
from sampled_sae import functional as F
from sampled_sae.impl import interface

IMPLS = ["torch", "reference"]
BASE = {"d_in": 12, "d_sae": 96, "k": 4}

# (field, value, error, words that follow "field=value")
CONFIG = [
    ("k", 0, ValueError, "must be in (0, 96], the number of features"),
    ("k", -3, ValueError, "must be in (0, 96]"),
    ("k", 97, ValueError, "must be in (0, 96]"),
    ("k", math.nan, ValueError, "must be in (0, 96]"),
    ("k", math.inf, ValueError, "must be in (0, 96]"),
    ("k", "4", TypeError, "must be a number in (0, 96]"),
    ("k", None, TypeError, "must be a number in (0, 96]"),
    ("k", True, TypeError, "must be a number in (0, 96]"),
    ("l", 0.99, ValueError, "must be a finite number >= 1"),
    ("l", 0, ValueError, "must be a finite number >= 1"),
    ("l", -1, ValueError, "must be a finite number >= 1"),
    ("l", math.inf, ValueError, "must be a finite number >= 1"),
    ("l", math.nan, ValueError, "must be a finite number >= 1"),
    ("l", "all", TypeError, "must be a finite number >= 1"),
    ("score", "l1", ValueError, "must be one of 'l2', 'l2_squared', 'entropy', 'uniform'"),
    ("score", None, ValueError, "must be one of 'l2'"),
    ("pool", "best", ValueError, "must be one of 'top', 'sample'"),
    ("select", "topk", ValueError, "must be one of 'batch', 'token'"),
    ("impl", "cuda", ValueError, "must be one of 'auto', 'triton', 'torch', 'reference'"),
    ("d_in", 0, ValueError, "must be a whole number >= 1"),
    ("d_in", 1.5, TypeError, "must be a whole number >= 1"),
    ("d_in", True, ValueError, "must be a whole number >= 1"),
    ("d_sae", -1, ValueError, "must be a whole number >= 1"),
    ("d_sae", "96", TypeError, "must be a whole number >= 1"),
    ("aux_coefficient", -1, ValueError, "must be a finite number >= 0"),
    ("aux_coefficient", "no", TypeError, "must be a finite number >= 0"),
    ("threshold_decay", 1.01, ValueError, "must be a finite number >= 0 and <= 1"),
    ("dead_after", 0, ValueError, "must be a whole number >= 1"),
    ("k_aux", 0, ValueError, "must be a whole number >= 1"),
    ("aux_pool", -5, ValueError, "must be a whole number >= 1"),
    ("seed", -1, ValueError, "must be a whole number >= 0"),
]


@pytest.mark.parametrize(("field", "value", "error", "words"), CONFIG)
def test_config(field, value, error, words):
    with pytest.raises(error, match=re.escape(f"{field}={value!r}: {words}")):
        SampledSAEConfig(**{**BASE, field: value})


def test_config_token_budget_is_whole():
    with pytest.raises(ValueError, match=r"k=2.5: select='token' keeps a whole number"):
        SampledSAEConfig(**{**BASE, "k": 2.5, "select": "token"})
    assert SampledSAEConfig(**{**BASE, "k": 2.0, "select": "token"}).k == 2


def test_config_as_a_dictionary():
    cfg = SampledSAEConfig(**BASE, l=None, score="entropy")
    assert SampledSAEConfig.from_dict(cfg.to_dict()) == cfg
    with pytest.raises(ValueError, match=r"unknown fields \['width'\], missing fields \['k'\]; known: \['apply"):
        SampledSAEConfig.from_dict({"d_in": 3, "d_sae": 4, "width": 4})
    with pytest.raises(TypeError, match="must be a SampledSAEConfig"):
        SampledSAE(BASE)


def spoiled(value):
    x = tokens(3, 12)
    x[1, 7] = value
    return x


ACTIVATIONS = [
    (lambda: spoiled(math.nan), ValueError, "x: 1 of 36 values are NaN or inf, the first at (1, 7)"),
    (lambda: spoiled(math.inf), ValueError, "x: 1 of 36 values are NaN or inf, the first at (1, 7)"),
    (lambda: spoiled(-math.inf).flip(0), ValueError, "x: 1 of 36 values are NaN or inf, the first at (1, 7)"),
    (lambda: tokens(3, 11), ValueError, "x.shape=(3, 11): the last dimension must be d_in=12"),
    (lambda: tokens(12, 3), ValueError, "x.shape=(12, 3): the last dimension must be d_in=12"),
    (lambda: torch.tensor(1.0).double(), ValueError, "x.shape=(): the last dimension must be d_in=12"),
    (lambda: tokens(0, 12), ValueError, "x.shape=(0, 12): the batch is empty; at least one token"),
    (lambda: tokens(4, 0, 12), ValueError, "x.shape=(4, 0, 12): the batch is empty"),
    (lambda: tokens(3, 12).long(), TypeError, "x.dtype=torch.int64: must be one of torch.float16"),
    (lambda: tokens(3, 12) > 0, TypeError, "x.dtype=torch.bool: must be one of torch.float16"),
    (lambda: tokens(3, 12).to(torch.complex64), TypeError, "x.dtype=torch.complex64: must be one of"),
    (lambda: [[0.0] * 12], TypeError, "x=list: must be a torch.Tensor of shape [..., 12]"),
    (lambda: None, TypeError, "x=NoneType: must be a torch.Tensor"),
    (lambda: tokens(3, 12).float(), ValueError, "mixed dtypes: x torch.float32, W_enc torch.float64"),
    (lambda: tokens(3, 12).bfloat16(), ValueError, "mixed dtypes: x torch.bfloat16, W_enc torch.float64"),
    (lambda: tokens(3, 12).to("meta"), ValueError, "mixed devices: x meta, W_enc cpu"),
]
IDS = [words[:45] for _, _, words in ACTIVATIONS]


@pytest.mark.parametrize(("make", "error", "words"), ACTIVATIONS, ids=IDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_activations_of_the_functions(make, error, words, impl):
    t = problem(1, 12, 20)
    for call in (F.column_scores, F.sampled_topk):
        options = {} if call is F.column_scores else {"k": 2}
        with pytest.raises(error, match=re.escape(words)):
            call(make(), t["W_enc"], t["b_enc"], impl=impl, **options)


@pytest.mark.parametrize(("make", "error", "words"), ACTIVATIONS, ids=IDS)
@pytest.mark.parametrize("method", ["__call__", "encode", "encode_sparse", "calibrate", "init_b_dec"])
@pytest.mark.parametrize("training", [True, False])
def test_activations_of_the_module(make, error, words, method, training):
    sae = make_sae().train(training)
    state = {name: value.clone() for name, value in sae.state_dict().items()}
    with pytest.raises(error, match=re.escape(words)):
        getattr(sae, method)(make())
    assert all(torch.equal(value, state[name]) for name, value in sae.state_dict().items())


def test_large_but_finite_activations_are_let_through():
    x = torch.full((3, 12), 1e308, dtype=torch.float64)
    assert torch.isfinite(F.column_scores(x, *list(problem(1, 12, 20).values())[1:3], "uniform")).all()


@pytest.mark.parametrize("method", ["__call__", "encode", "calibrate", "init_b_dec"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_too_large_for_a_loss_are_refused_by_the_module(method, dtype):
    sae, x = make_sae(dtype), tokens(3, 12, dtype=dtype)
    x[1, 7] = 1e19
    with pytest.raises(
        ValueError, match=r"x: values up to 1e\+19: the sum of their squares is too large for a loss in"
    ):
        getattr(sae, method)(x)


def test_a_loss_of_the_largest_activations_that_are_let_through_is_finite():
    sae = make_sae(torch.float32)
    x = torch.full((3, 12), 5e17 / 6)
    assert sae(x).loss.isfinite()
    with pytest.raises(ValueError, match="x: values up to"):
        sae(1.2 * x)


def test_targets_too_large_for_a_loss_are_refused():
    sae = SampledSAE(SampledSAEConfig(**BASE, d_out=5))
    with pytest.raises(ValueError, match=r"target: values up to 3e\+38"):
        sae(torch.randn(3, 12), torch.full((3, 5), 3e38))


ENCODER = [
    ({"W_enc": None}, "W_enc=None: must be a tensor of shape [d_in, d_sae]"),
    ({"W_enc": torch.zeros(12).double()}, "W_enc=tensor (12,): must be a tensor of shape [d_in, d_sae]"),
    ({"W_enc": torch.zeros(12, 0).double()}, "W_enc=tensor (12, 0): must be a tensor of shape"),
    ({"W_enc": torch.zeros(20, 12).double()}, "x.shape=(3, 12): the last dimension must be d_in=20"),
    ({"W_enc": torch.zeros(12, 20)}, "mixed dtypes: x torch.float64, W_enc torch.float32, b_enc torch.float64"),
    ({"W_enc": torch.zeros(12, 20, device="meta").double()}, "mixed devices: x cpu, W_enc meta, b_enc cpu"),
    ({"b_enc": None}, "b_enc=None: must be a tensor of shape [20]"),
    ({"b_enc": torch.zeros(19).double()}, "b_enc=tensor (19,): must be a tensor of shape [20]"),
    ({"b_enc": torch.zeros(20, 1).double()}, "b_enc=tensor (20, 1): must be a tensor of shape [20]"),
    ({"b_enc": torch.zeros(20).half()}, "mixed dtypes: x torch.float64, W_enc torch.float64, b_enc torch.float16"),
    ({"scale": 2.0}, "scale=2.0: must be a tensor of shape [20]"),
    ({"scale": torch.ones(12).double()}, "scale=tensor (12,): must be a tensor of shape [20]"),
    ({"scale": torch.arange(20.0).double()}, "scale: must be > 0 everywhere, its smallest value is 0.0"),
    ({"scale": torch.full((20,), math.nan).double()}, "scale: must be > 0 everywhere"),
    ({"scale": torch.ones(20)}, "mixed dtypes"),
    ({"impl": "fast"}, "impl='fast': must be one of 'auto', 'triton', 'torch', 'reference'"),
    ({"score": "l3"}, "score='l3': must be one of 'l2'"),
]


@pytest.mark.parametrize(("changes", "words"), ENCODER, ids=[words[:40] for _, words in ENCODER])
@pytest.mark.parametrize("call", [F.column_scores, F.sampled_topk])
def test_encoder(call, changes, words):
    t = problem(3, 12, 20)
    options = {} if call is F.column_scores else {"k": 2}
    arguments = {"x": t["x"], "W_enc": t["W_enc"], "b_enc": t["b_enc"], **options, **changes}
    with pytest.raises(ValueError, match=re.escape(words)):
        call(**arguments)


@pytest.mark.parametrize(
    ("field", "value", "error", "words"), [c for c in CONFIG if c[0] in ("k", "l", "score", "pool", "select")]
)
def test_rule_of_sampled_topk(field, value, error, words):
    t = problem(3, 12, 96)
    with pytest.raises(error, match=re.escape(f"{field}={value!r}: {words}")):
        F.sampled_topk(t["x"], t["W_enc"], t["b_enc"], **{"k": 4, field: value})


@pytest.mark.parametrize(
    ("scores", "size", "how", "error", "words"),
    [
        (torch.ones(4), 0, "top", ValueError, "size=0: must be a whole number >= 1"),
        (torch.ones(4), 1.5, "top", TypeError, "size=1.5: must be a whole number >= 1"),
        (torch.ones(4), 2, "bottom", ValueError, "pool='bottom': must be one of 'top', 'sample'"),
        (torch.ones(2, 2), 2, "top", ValueError, "scores=tensor (2, 2): must be a tensor of shape [F]"),
        (torch.ones(0), 2, "top", ValueError, "scores=tensor (0,): must be a tensor of shape [F]"),
        ([1.0], 2, "top", ValueError, "scores=list: must be a tensor of shape [F]"),
        (torch.tensor([1.0, -1.0]), 1, "top", ValueError, "scores: every value must be a number >= 0"),
        (torch.tensor([1.0, math.nan]), 1, "sample", ValueError, "scores: every value must be a number >= 0"),
    ],
)
def test_candidate_pool(scores, size, how, error, words):
    with pytest.raises(error, match=re.escape(words)):
        F.candidate_pool(scores, size, how)


CODES = SparseCodes.from_dense(torch.eye(4).double())
BLOCK = SparseCodes.from_block(torch.eye(4).double(), torch.arange(4), 4)
W_DEC = torch.ones(4, 3).double()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("codes", [CODES, BLOCK], ids=["entries", "block"])
@pytest.mark.parametrize(
    ("W_dec", "b_dec", "words"),
    [
        (torch.ones(5, 3).double(), None, "W_dec=tensor (5, 3): must be a tensor of shape [4, d_in]"),
        (torch.ones(4).double(), None, "W_dec=tensor (4,): must be a tensor of shape [4, d_in]"),
        (None, None, "W_dec=None: must be a tensor of shape [4, d_in]"),
        (W_DEC, torch.ones(4).double(), "b_dec=tensor (4,): must be a tensor of shape [3]"),
        (W_DEC, 0.5, "b_dec=0.5: must be a tensor of shape [3]"),
        (W_DEC, torch.ones(3), "mixed dtypes: W_dec torch.float64, b_dec torch.float32"),
        (W_DEC, torch.ones(3, device="meta").double(), "mixed devices: W_dec cpu, b_dec meta"),
        (W_DEC.to("meta"), None, "mixed devices: codes cpu, W_dec meta"),
    ],
)
def test_decode(codes, W_dec, b_dec, words, impl):
    with pytest.raises(ValueError, match=re.escape(words)):
        F.decode(codes, W_dec, b_dec, impl=impl)


def test_decode_of_something_else():
    with pytest.raises(TypeError, match="codes=Tensor: must be SparseCodes"):
        F.decode(torch.eye(4), W_DEC)
    with pytest.raises(ValueError, match=r"codes.shape=\(2, 95\): the last dimension must be 96"):
        make_sae().decode(torch.zeros(2, 95))
    with pytest.raises(ValueError, match=r"codes.shape=\(4, 4\): the last dimension must be 96"):
        make_sae().decode(CODES)
    with pytest.raises(TypeError, match=r"codes=list: must be SparseCodes or a torch\.Tensor"):
        make_sae().decode([1.0])


@pytest.mark.parametrize("l0", [0, -1, 97, math.nan, "4"])
def test_calibrate(l0):
    with pytest.raises((ValueError, TypeError), match=re.escape(f"l0={l0!r}: must be")):
        make_sae().calibrate(tokens(9, 12), l0)


def test_triton_says_where_it_cannot_run(monkeypatch):
    t = problem(3, 12, 20)
    for dtype, message in (
        (torch.float64, "torch.float64 has no Triton form"),
        (torch.float32, "needs tensors on a GPU"),
    ):
        monkeypatch.setattr(interface, "interpreted", lambda: False)
        x, W_enc, b_enc = (t[name].to(dtype) for name in ("x", "W_enc", "b_enc"))
        with pytest.raises(ValueError, match=f"impl='triton': {message}"):
            F.sampled_topk(x, W_enc, b_enc, k=2, impl="triton")
        with pytest.raises(ValueError, match=f"impl='triton': {message}"):
            F.column_scores(x, W_enc, b_enc, impl="triton")
        with pytest.raises(ValueError, match=f"impl='triton': {message}"):
            F.decode(CODES, W_DEC.to(dtype), impl="triton")
        with pytest.raises(ValueError, match=f"impl='triton': {message}"):
            SampledSAE(SampledSAEConfig(d_in=4, d_sae=8, k=2, impl="triton"), dtype=dtype)
    monkeypatch.setattr(interface, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="impl='triton': the package triton is not installed"):
        F.decode(CODES, W_DEC, impl="triton")
    assert F.resolve_impl("auto", "cuda") == "torch"


def test_auto_takes_triton_on_a_gpu():
    assert F.resolve_impl("auto", "cpu") == "torch"
    assert F.resolve_impl("auto", "cuda") == F.resolve_impl("auto", "cuda:1", torch.bfloat16) == "triton"
    assert F.resolve_impl("auto", "cuda", torch.float64) == "torch"
    assert F.resolve_impl("reference", "cuda") == "reference"
