"""Rules x conventions x forms x dtypes: bit for bit on whole numbers, within rounding on real values."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inference_makers import settings_of

from sampled_sae.inference.config import RULES, InferenceConfig
from sampled_sae.inference.inference_sae import InferenceSAE
from sampled_sae.inference.tensors import WEIGHTS, shapes_of

INF = float("inf")
FORMS = [{"impl": "torch", "screen": "off"}, {"impl": "torch", "screen": "bf16"}, {"impl": "triton"}]
IDS = ["torch", "screened", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def runs(examples):
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=slow)


@st.composite
def problems(draw, whole):
    """(settings, tensors, x): of any rule and convention, thresholds that tie, zero, huge and infinite among them."""
    rule, d, F = draw(st.sampled_from(RULES)), draw(st.integers(1, 9)), draw(st.integers(2, 150))
    changes = {"d_in": d, "d_sae": F}
    if rule == "topk":
        changes["k"] = draw(st.integers(1, min(F, 12)))
    if draw(st.booleans()):
        changes["d_out"], changes["skip"] = draw(st.integers(1, 5)), draw(st.booleans())
    else:
        changes["apply_b_dec_to_input"] = draw(st.booleans())
    if not whole:
        changes["scale_by_decoder_norm"] = draw(st.booleans())
        changes["normalize"] = draw(st.sampled_from(["none", "layer_norm", "constant_norm"]))
    changes["input_scale"] = draw(st.sampled_from([1.0, 2.0]))
    cfg = InferenceConfig(**settings_of(rule, **changes))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def made(shape):
        if whole:
            return torch.randint(-2, 3, shape, generator=g).float()
        return torch.randn(shape, generator=g)

    tensors = {name: made(shape) for name, shape in shapes_of(cfg).items()}
    x = made((draw(st.integers(1, 20)), d))
    if whole and "r_mag" in tensors:
        tensors["r_mag"].zero_()
    kind = draw(st.sampled_from(["ties", "mixed", "all", "none", "zero"]))
    if "threshold" in tensors:
        t = tensors["threshold"].mul_(2)
        some = {"ties": t, "all": t - INF, "none": t + INF, "zero": 0 * t}.get(kind, t.clone())
        if kind == "mixed" and t.dim():
            some[::4], some[1::4], some[2::4] = -INF, INF, 3e38
        tensors["threshold"] = some
    if draw(st.booleans()):  # a feature that never fires, and a token of zeros
        tensors["W_enc"][:, 0] = 0
        x[0] = 0
    return cfg, tensors, x, draw(st.sampled_from(DTYPES))


def saes(cfg, tensors, dtype, form):
    """The specification and a form of it, weights in `dtype`."""
    if dtype is not None:
        tensors = {name: t.to(dtype) if name in WEIGHTS else t for name, t in tensors.items()}
    fields = cfg.to_dict()
    both = (InferenceConfig(**fields | changes) for changes in ({"impl": "reference"}, form))
    return [InferenceSAE(c, tensors) for c in both]


def check_whole(problem, form):
    cfg, tensors, x, dtype = problem
    reference, ours = saes(cfg, tensors, dtype, form)
    wanted, out = reference(x), ours(x)
    for a, b in zip(out.codes.entries(), wanted.codes.entries()):
        assert torch.equal(a, b)
    assert torch.equal(out.x_hat, wanted.x_hat)
    assert torch.equal(ours.encode(x), wanted.codes.to_dense())
    some = torch.arange(cfg.d_sae)[:: -(-cfg.d_sae // 5)].flip(0)
    assert torch.equal(ours.encode(x, some), wanted.codes.to_dense()[:, some])


def check_real(problem, form):
    """Against float64: values within float32's rounding, and only entries within it of a boundary may differ."""
    cfg, tensors, x, dtype = problem
    _, ours = saes(cfg, tensors, dtype, form)
    in_float64 = {name: (t.to(dtype) if name in WEIGHTS else t).double() for name, t in tensors.items()}
    exact, _ = saes(cfg, in_float64, None, FORMS[0])
    found, wanted = ours.encode(x).double(), exact.encode(x.double())
    size = 3e-5 * (1 + wanted.abs() + x.double().norm() * tensors["W_enc"].double().norm(dim=0) * 3)
    both = (found != 0) & (wanted != 0)
    if cfg.scale_by_decoder_norm:
        size = size * (1 + tensors["W_dec"].double().norm(dim=1))
    if "r_mag" in tensors:
        size = size * (1 + tensors["r_mag"].double().exp())
    assert ((found - wanted).abs()[both] <= size.expand_as(found)[both]).all()
    # normal draws do not tie: what differs stands within rounding of a boundary
    assert int(((found != 0) != (wanted != 0)).sum()) <= 0.002 * found.numel() + 1
    torch.testing.assert_close(ours.encode_sparse(x).to_dense().double(), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS[:2], ids=IDS[:2])
@runs(60)
@given(problem=problems(whole=True))
def test_whole_numbers_bit_for_bit(form, problem):
    check_whole(problem, form)


@pytest.mark.parametrize("form", FORMS[:2], ids=IDS[:2])
@runs(60)
@given(problem=problems(whole=False))
def test_real_values_within_rounding(form, problem):
    check_real(problem, form)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS[:2], ids=IDS[:2])
@runs(250)
@given(whole=problems(whole=True), real=problems(whole=False))
def test_many_problems(form, whole, real):
    check_whole(whole, form)
    check_real(real, form)


@pytest.mark.slow
@runs(6)
@given(problem=problems(whole=True))
def test_some_problems_by_triton(problem):
    """In the interpreter, where each takes seconds."""
    check_whole(problem, FORMS[2])
