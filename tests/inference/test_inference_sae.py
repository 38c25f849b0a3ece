"""`InferenceSAE` as a module: some features, gradients, dtypes, memory, and what it refuses."""

import pytest
import torch
from inference_makers import D, F, make, settings_of, tensors_of
from torch.utils._python_dispatch import TorchDispatchMode

from sampled_sae import InferenceConfig, InferenceSAE, SparseCodes
from sampled_sae.impl.torch import dense_above, entries, screen
from sampled_sae.inference import inference_sae
from sampled_sae.inference.config import RULES

CHOSEN = [90, 3, 17, 4]
EVERY = {"apply_b_dec_to_input": True, "scale_by_decoder_norm": True, "normalize": "layer_norm", "input_scale": 2.0}


@pytest.mark.parametrize("changes", [{}, EVERY], ids=["plain", "every convention"])
@pytest.mark.parametrize("rule", RULES)
def test_chosen_features(rule, changes):
    sae, x = make(rule, **changes)
    x = x.view(1, 23, D)
    a = sae.encode(x)
    assert a.shape == (1, 23, F)
    torch.testing.assert_close(sae.encode(x, CHOSEN), a[..., CHOSEN])
    torch.testing.assert_close(sae.encode(x, torch.tensor(CHOSEN, dtype=torch.int32)), a[..., CHOSEN])
    alone = torch.zeros_like(a)
    alone[..., CHOSEN] = a[..., CHOSEN]
    expected = sae.decode(alone, x=x)
    assert expected.shape == x.shape
    torch.testing.assert_close(sae.decode(a[..., CHOSEN], CHOSEN, x=x), expected)
    torch.testing.assert_close(sae.decode(sae.encode_sparse(x), CHOSEN, x=x).view_as(x), expected)


def test_only_their_rows_are_read():
    sae, x = make("jumprelu", **EVERY)
    expected = sae.encode(x, CHOSEN)
    others = torch.ones(F, dtype=torch.bool).index_fill(0, torch.tensor(CHOSEN), False)
    for t in (sae.W_enc.t(), sae.W_dec, sae.b_enc, sae.threshold):
        t[others] = torch.nan
    assert torch.equal(sae.encode(x, CHOSEN), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, EVERY], ids=["plain", "every convention"])
def test_many_active_features_are_decoded_as_a_matrix(changes, dtype, monkeypatch):
    """Half of all, as in an SAE before training: the same reconstruction and gradients without sums of entries."""
    sae, x = make("relu", n_tokens=40, dtype=torch.float32, **changes)
    sae = sae.to(dtype)
    found = []
    for share in (1, inference_sae.MANY_ACTIVE):
        monkeypatch.setattr(inference_sae, "MANY_ACTIVE", share)
        given = x.clone().requires_grad_()
        out = sae(given)
        assert out.codes.count() > 0.3 * 40 * F
        out.x_hat.square().sum().backward()
        found.append((out.x_hat.detach(), given.grad))
        monkeypatch.setattr(entries.DecodeEntries, "apply", None)
    for a_list, a_matrix in zip(*found):
        torch.testing.assert_close(a_matrix, a_list, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, EVERY], ids=["plain", "every convention"])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_those_of_the_specification(rule, changes):
    """To x and to activations, sparse and dense; a second use of the same codes adds up."""
    found = []
    for impl in ("reference", "torch"):
        sae, x = make(rule, impl=impl, **changes)
        x.requires_grad_()
        out = sae(x)
        out.codes.values.retain_grad()
        (out.x_hat.square().sum() + out.codes.values.sum()).backward()
        dense = sae.encode(x)
        dense.retain_grad()
        sae.decode(dense, x=x).square().sum().backward()
        sae.encode(x, CHOSEN).sum().backward()
        found.append((x.grad, out.codes.values.grad, torch.where(dense > 0, dense.grad, 0)))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_those_of_differences(rule):
    sae, x = make(rule, n_tokens=3, **EVERY)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sae(x).x_hat, x)
    assert torch.autograd.gradcheck(lambda x: sae.encode(x), x)


@pytest.mark.parametrize("few", [0, 10**6], ids=["by list or rows", "as a whole"])
@pytest.mark.parametrize("rule", RULES)
def test_dense_activations_are_the_listed_ones(rule, few, monkeypatch):
    monkeypatch.setattr(dense_above, "FEW_FEATURES", few)
    sae, x = make(rule)
    torch.testing.assert_close(sae.encode(x), sae.encode_sparse(x).to_dense())


def test_dense_codes_are_decoded_whatever_their_number():
    sae, x = make("relu")
    for codes in (sae.encode(x), sae.encode(x) * (torch.arange(F) == 5), torch.zeros(2, F, dtype=torch.float64)):
        torch.testing.assert_close(sae.decode(codes), codes @ sae.W_dec + sae.b_dec)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_weights_of_16_bits(rule, x_dtype, dtype):
    """As the same weights in float64, up to float32's rounding; what comes out has the dtype of what came in."""
    cfg = InferenceConfig(**settings_of(rule, **EVERY))
    tensors = tensors_of(cfg, dtype)
    x = make(rule)[1].to(x_dtype)
    sae = InferenceSAE(cfg, tensors)
    exact = InferenceSAE(cfg, {name: t.double() for name, t in tensors.items()})
    out, expected = sae(x), exact(x.double())
    assert out.x_hat.dtype == sae.encode(x).dtype == x_dtype
    assert out.codes.values.dtype == torch.promote_types(x_dtype, torch.float32)
    torch.testing.assert_close(out.codes.to_dense().double(), expected.codes.to_dense(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.x_hat.double(), expected.x_hat, rtol=2e-2, atol=2e-2)
    assert sae.W_enc.dtype == sae.W_dec.dtype == dtype
    assert sae.get_buffer("b_dec").dtype == torch.float32


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor in float32 that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.dtype == torch.float32:
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.one_in(3)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("screened", [False, True], ids=["full", "screened"])
def test_no_copy_of_the_weights_and_no_matrix_of_activations(screened, rule, monkeypatch):
    monkeypatch.setattr("sampled_sae.impl.torch.products.CHUNK_ELEMENTS", 1 << 14)
    monkeypatch.setattr("sampled_sae.impl.torch.look_through.LEAST_PRODUCT", 1 << 14)
    monkeypatch.setattr("sampled_sae.impl.torch.look_through.MOST_SEEN", 1 << 14)
    monkeypatch.setattr("sampled_sae.impl.torch.look_through.MOST_PRODUCT", 1 << 14)
    monkeypatch.setattr("sampled_sae.impl.torch.products.GATHERED_ELEMENTS", 1 << 13)
    monkeypatch.setattr("sampled_sae.inference.products.CHUNK_ELEMENTS", 1 << 13)
    wide = {"d_in": 64, "d_sae": 4096, "scale_by_decoder_norm": True, "screen": "bf16" if screened else "off"}
    sae, x = make(rule, n_tokens=64, dtype=torch.bfloat16, **wide)
    held = next(name for name in ("threshold", "b_enc", "b_gate") if hasattr(sae, name))
    getattr(sae, held).add_(40 if held == "threshold" else -5)
    with Largest() as largest:
        out = sae(x.float().requires_grad_())
        out.x_hat.sum().backward()
    assert 0 < out.codes.count() < 64 * 64
    assert largest.elements < 64 * 4096 / 2


def test_tensors_that_lie_as_they_should_are_not_copied():
    cfg = InferenceConfig(**settings_of("relu"))
    tensors = tensors_of(cfg, torch.float32)
    tensors["W_enc"] = tensors["W_enc"].t().contiguous().t()
    sae = InferenceSAE(cfg, tensors)
    assert {n: t.data_ptr() for n, t in sae.named_buffers()} == {n: t.data_ptr() for n, t in tensors.items()}


def test_a_move_to_16_bits_leaves_biases_and_thresholds():
    sae, _ = make("jumprelu", dtype=torch.float32)
    threshold = sae.threshold.clone()
    sae.to(torch.bfloat16)
    assert sae.W_enc.dtype == torch.bfloat16
    assert torch.equal(sae.threshold, threshold)
    assert sae.W_enc.t().is_contiguous()


def test_a_state_dict_goes_to_another_sae():
    sae, x = make("topk")
    other, _ = make("topk", seed=5)
    other.encode_sparse(x)
    other.load_state_dict(sae.state_dict())
    assert torch.equal(other.encode(x), sae.encode(x))


def test_a_decoder_row_of_zeros_adds_nothing():
    sae, x = make("topk", scale_by_decoder_norm=True)
    sae.W_dec[::2] = 0
    out = sae(x)
    assert (out.codes.features % 2 == 1).all()
    assert out.x_hat.isfinite().all()


def test_a_token_of_zeros_has_a_norm():
    for normalize in ("layer_norm", "constant_norm"):
        sae, x = make("relu", normalize=normalize)
        x[0] = 0
        out = sae(x)
        assert out.x_hat.isfinite().all()
        assert (out.x_hat[0] == 0).all()


def test_auto_screens_weights_of_16_bits_too(monkeypatch):
    monkeypatch.setattr(screen, "fast_bfloat16", lambda: True)
    looks = []
    seen = screen.RoundedTokens.columns.func
    monkeypatch.setattr(screen.RoundedTokens, "columns", property(lambda self: looks.append(1) or seen(self)))
    sae, x = make("jumprelu", n_tokens=512, dtype=torch.bfloat16, d_sae=4096)
    sae.encode_sparse(x)
    assert looks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "softmax"}, "rule='softmax': must be one of 'relu', 'jumprelu', 'topk', 'threshold', 'gated'"),
        ({"rule": "topk"}, "k=None: must be given for rule='topk'"),
        ({"k": 3}, "k=3: must be given for rule='topk' and for no other"),
        ({"rule": "topk", "k": 97}, "k=97: must be at most d_sae=96"),
        ({"d_out": 3, "apply_b_dec_to_input": True}, "apply_b_dec_to_input=True: a transcoder's b_dec"),
        ({"output_scale": 2.0}, "output_scale=2.0: must be 1 for an SAE"),
        ({"input_scale": 0}, "input_scale=0: must be a finite number > 0"),
        ({"normalize": "whitened"}, "normalize='whitened': must be one of"),
        ({"skip": 1}, "skip=1: must be True or False"),
    ],
)
def test_configurations_that_are_refused(changes, message):
    with pytest.raises((ValueError, TypeError)) as error:
        InferenceConfig(**settings_of("relu") | changes)
    assert message in str(error.value)


def test_a_configuration_travels_as_json():
    cfg = InferenceConfig(D, F, "topk", k=4, d_out=3, skip=True)
    assert InferenceConfig.from_dict(cfg.to_dict()) == cfg
    with pytest.raises(ValueError, match="unknown fields \\['l'\\], missing fields \\['d_in'\\]"):
        InferenceConfig.from_dict({"d_sae": 3, "rule": "relu", "l": 4})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": None}, "missing ['threshold']"),
        ({"b_gate": torch.zeros(F)}, "unknown ['b_gate']"),
        ({"W_dec": torch.zeros(D, F)}, "W_dec=tensor (12, 96): must be a tensor of shape [96, 12]"),
        ({"W_dec": torch.zeros(F, D).bfloat16()}, "weights must share one dtype"),
        ({"b_enc": torch.full((F,), torch.inf)}, "b_enc: 96 of its values are NaN or inf"),
        ({"threshold": torch.full((F,), torch.nan)}, "threshold: 96 of its values are NaN"),
        ({"W_enc": torch.zeros(D, F, dtype=torch.int64)}, "W_enc.dtype=torch.int64"),
    ],
)
def test_tensors_that_are_refused(change, message):
    cfg = InferenceConfig(**settings_of("jumprelu"))
    tensors = {n: t for n, t in (tensors_of(cfg, torch.float32) | change).items() if t is not None}
    with pytest.raises((ValueError, TypeError)) as error:
        InferenceSAE(cfg, tensors)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda s, x: s(x[:, :3]), "x.shape=(23, 3): the last dimension must be d_in=12"),
        (lambda s, x: s(x * torch.nan), "x: 276 of 276 values are NaN or inf"),
        (lambda s, x: s.encode(x, []), "features=tensor (0,): must be distinct whole numbers from 0 to 95"),
        (lambda s, x: s.encode(x, [1, 96]), "features: 96 is among them"),
        (lambda s, x: s.encode(x, [1, 1]), "features: one of them stands twice"),
        (lambda s, x: s.encode(x, [0.5]), "features.dtype=torch.float32"),
        (lambda s, x: s.encode(x, "all"), "features='all': must be distinct"),
        (lambda s, x: s.decode(s.encode_sparse(x)), "x=None: normalize='layer_norm' is undone"),
        (lambda s, x: s.decode(s.encode_sparse(x), x=x[:2]), "has 2 tokens, the codes have 23"),
        (lambda s, x: s.decode(s.encode(x), [3], x=x), "codes=tensor (23, 96): the last dimension must be 1"),
        (lambda s, x: s.encode(x, torch.ones(F, dtype=torch.bool)), "features.dtype=torch.bool: must be distinct"),
        (lambda s, x: s.encode(x, [2**70]), "must be distinct whole numbers from 0 to 95"),
        (lambda s, x: s.encode_sparse(x[:0, :5]), "x.shape=(0, 5): the last dimension must be d_in=12"),
        (lambda s, x: s(x.to_sparse()), "x.layout=torch.sparse_coo: must be torch.strided"),
        (lambda s, x: s.decode(s.encode(x).long(), x=x), "codes: torch.strided of torch.int64: must be"),
        (lambda s, x: s.decode(s.encode(x).to_sparse(), x=x), "codes: torch.sparse_coo of torch.float64: must be"),
        (lambda s, x: s.decode([1], x=x), "codes=list: must be SparseCodes or a torch.Tensor"),
        (lambda s, x: s.decode(SparseCodes.from_dense(x), x=x), "codes.shape=(23, 12): must be [B, 96]"),
        (lambda s, x: s.W_enc.requires_grad_() is s(x), "gives gradients to activations alone"),
    ],
)
def test_uses_that_are_refused(use, message):
    sae, x = make("jumprelu", normalize="layer_norm")
    with pytest.raises((ValueError, TypeError)) as error:
        use(sae, x)
    assert message in str(error.value)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("screen", ["off", "bf16"])
@pytest.mark.parametrize("rule", RULES)
def test_tokens_are_prepared_a_few_at_a_time(rule, screen, normalize, monkeypatch):
    """Where nothing but a search reads them; and that changes nothing."""
    options = {"normalize": normalize, "apply_b_dec_to_input": True, "scale_by_decoder_norm": True, "screen": screen}
    sae, x = make(rule, 41, torch.float32, **options)
    whole = sae.encode_sparse(x), sae.encode(x, [5, 2])
    pieces = "rounded_tokens.PIECE_ELEMENTS", "torch.settling.PIECE_ELEMENTS", "torch.above.PREPARED_ELEMENTS"
    for name in pieces:
        monkeypatch.setattr(f"sampled_sae.impl.{name}", 7 * D)
    monkeypatch.setattr("sampled_sae.impl.torch.above.OF_PREPARED", 0)
    if normalize == "none":  # candidates are computed token by token
        monkeypatch.setattr("sampled_sae.impl.torch.settling.OF_TOKENS", 0)
    monkeypatch.setattr("sampled_sae.impl.torch.above.ROW_TOKEN_ELEMENTS", 7 * D)
    monkeypatch.setattr("sampled_sae.impl.torch.above.FEWEST_TOKENS", 7)
    monkeypatch.setattr("sampled_sae.support.even_slices.FEWEST_ROWS", 7)
    seen = []
    prepared = type(sae)._prepared
    monkeypatch.setattr(type(sae), "_prepared", lambda sae, x, *args: seen.append(len(x)) or prepared(sae, x, *args))
    codes = sae.encode_sparse(x)
    if rule == "topk":
        assert seen == [41]
    else:
        assert max(seen) == 7
        assert sum(seen) >= 41
    assert codes.shape == (41, F)
    assert torch.equal(codes.tokens, whole[0].tokens)
    assert torch.equal(codes.features, whole[0].features)
    torch.testing.assert_close(codes.values, whole[0].values)
    torch.testing.assert_close(sae.encode(x, [5, 2]), whole[1])
    asked = x.clone().requires_grad_()
    sae.encode_sparse(asked).values.sum().backward()
    assert seen[-1] == 41
    assert asked.grad.count_nonzero() > 0
