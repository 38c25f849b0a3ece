"""The search of impl="torch" for every activation above the floor of its feature, by each of its routes."""

import pytest
import torch

from sampled_sae.codes import SparseCodes
from sampled_sae.impl.interface import implementation
from sampled_sae.impl.torch import above, dense_above, products, screen_entries
from sampled_sae.testing import whole_numbers

TORCH, REFERENCE = implementation("torch"), implementation("reference")
INF = float("inf")


@pytest.fixture(params=["chunks", "rows"])
def route(request, monkeypatch):
    """Whether entries are listed chunk by chunk, or a rule lets so much through that whole rows are computed."""
    monkeypatch.setattr(above, "FEWEST_LISTED", 10**9 if request.param == "chunks" else 0)
    monkeypatch.setattr(above, "MOST_LISTED", 1 / 64 if request.param == "chunks" else 0)
    monkeypatch.setattr(above, "ROW_ELEMENTS", 4000)
    monkeypatch.setattr(dense_above, "FEW_FEATURES", 0)
    return request.param


@pytest.fixture(params=[2048, 7])
def block_tokens(request, monkeypatch):
    """Tokens that are taken at a time: all of a small batch, or a few."""
    monkeypatch.setattr(products, "BLOCK_TOKENS", request.param)
    monkeypatch.setattr(products, "CHUNK_ELEMENTS", 1 << 13)


def encoders(screen, dtype=torch.float32, scaled=False):
    """The specification's and ours, of whole numbers: what is above a threshold must be equal bit for bit."""
    t = whole_numbers(40, 5, 1000)
    scale = torch.arange(1000).remainder(3).float() if scaled else None
    W = t["W_enc"].t().contiguous().to(dtype)
    made = {"scale": scale, "screen": screen}
    return REFERENCE.encoder(t["x"], W, t["b_enc"], **made), TORCH.encoder(t["x"], W, t["b_enc"], **made)


def thresholds(kind):
    """[1000], or 0-dim: adversarial ones among others, ties with activations at most of them."""
    if not isinstance(kind, str):
        return torch.tensor(float(kind))
    some = torch.randint(-3, 12, (1000,), generator=torch.Generator().manual_seed(0)).float()
    some[::7], some[1::7], some[2::7], some[3::7] = -INF, INF, 0.0, 3e38
    return some if kind == "mixed" else torch.full((1000,), -INF)


@pytest.mark.usefixtures("poisoned_memory", "block_tokens", "route")
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("screen", ["off", "bf16"])
@pytest.mark.parametrize("kind", ["mixed", "all", -1.0, 0.0, 3.0, 100.0, INF], ids=str)
def test_the_same_entries_bit_for_bit(kind, screen, scaled):
    theirs, ours = encoders(screen, scaled=scaled)
    assert (ours.operands.screen is None) == (screen == "off")
    expected = REFERENCE.dense_above_threshold(theirs, thresholds(kind))
    codes = TORCH.above_threshold(ours, thresholds(kind))
    for found, wanted in zip(codes.entries(), SparseCodes.from_dense(expected).entries()):
        assert torch.equal(found, wanted)
    assert torch.equal(TORCH.dense_above_threshold(ours, thresholds(kind)), expected)


@pytest.mark.usefixtures("poisoned_memory", "block_tokens", "route")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("screen", ["off", "bf16"])
def test_weights_of_16_bits(screen, dtype):
    theirs, ours = encoders(screen, dtype)
    expected = REFERENCE.dense_above_threshold(theirs, thresholds("mixed"))
    assert torch.equal(TORCH.above_threshold(ours, thresholds("mixed")).to_dense(), expected)
    assert torch.equal(TORCH.dense_above_threshold(ours, thresholds("mixed")), expected)


def rounding_of(x, W, b):
    return 1e-6 * (x.double().norm(dim=1)[:, None] * W.double().norm(dim=1) + b.double().abs())


@pytest.mark.parametrize("huge", ["nothing", "token", "feature", "threshold"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_screen_loses_nothing(dtype, huge):
    """Real values, thresholds at activations: only what float32's rounding cannot tell apart may differ."""
    g = torch.Generator().manual_seed(0)
    x, W, b = torch.randn(64, 48, generator=g), torch.randn(3000, 48, generator=g), torch.randn(3000, generator=g)
    threshold = (x @ W.to(dtype).float().t() + b).gather(0, torch.randint(64, (1, 3000), generator=g))[0].clamp_min(12)
    if huge == "token":
        x[3] *= 1e5
    elif huge == "feature":
        W[5], threshold[5] = W[5] * 1e6, 1e7
    elif huge == "threshold":
        threshold[::2] = 3e38
    W = W.to(dtype)
    a = torch.relu(x.double() @ W.double().t() + b.double())
    codes = TORCH.above_threshold(TORCH.encoder(x, W, b, screen="bf16"), threshold)
    differ = (codes.to_dense() > 0) != (a > threshold)
    assert ((a - threshold).abs()[differ] <= rounding_of(x, W, b)[differ]).all()
    at = codes.tokens, codes.features
    assert ((codes.values - a[at]).abs() <= rounding_of(x, W, b)[at]).all()
    assert codes.count() > 1000


def test_the_bound_lets_little_through(monkeypatch):
    """Few candidates that are not active, though features and thresholds differ by orders of magnitude."""
    g = torch.Generator().manual_seed(0)
    sizes = torch.randn(3000, generator=g).mul(3).exp()
    x, W = torch.randn(64, 256, generator=g), torch.randn(3000, 256, generator=g) * sizes[:, None]
    threshold, looked = 16 * 2.5 * sizes, []
    settled = above.FloorSearch._settled
    monkeypatch.setattr(
        above.FloorSearch, "_settled", lambda *args: looked.append(len(args[3].values)) or settled(*args)
    )
    codes = TORCH.above_threshold(TORCH.encoder(x, W, torch.zeros(3000), screen="bf16"), threshold)
    assert codes.count() > 500
    assert codes.count() <= sum(looked) < 1.4 * codes.count()


def test_a_screen_out_of_range_rests():
    x, W, b = torch.ones(3, 4), torch.eye(4).repeat(16, 1), torch.zeros(64)
    W[7, 1] = 1e30
    operands = TORCH.encoder(x, W, b, screen="bf16").operands
    assert screen_entries.seen_from_above(operands, slice(0, 64), torch.zeros(1)) is None
    codes = TORCH.above_threshold(TORCH.encoder(x, W, b, screen="bf16"), torch.full((64,), 1e29))
    assert codes.features.tolist() == [7, 7, 7]


@pytest.mark.parametrize("threshold", [0.5, INF])
def test_an_activation_that_leaves_the_range_of_float32(threshold):
    x, W, b = torch.full((2, 2), 1e20), torch.ones(64, 2), torch.zeros(64)
    W[3] = 1e20
    off = TORCH.above_threshold(TORCH.encoder(x, W, b, screen="off"), torch.full((64,), threshold))
    expected = REFERENCE.above_threshold(REFERENCE.encoder(x, W, b), torch.full((64,), threshold))
    assert torch.equal(off.features, expected.features)
    assert torch.equal(off.values, expected.values)
