"""The search of impl="torch" for every activation above the floor of its feature, by each of its routes."""

import pytest
import torch

from sampled_sae.codes import SparseCodes
from sampled_sae.impl.interface import implementation
from sampled_sae.impl.torch import (
    above,
    bounded_screen,
    column_filter,
    dense_above,
    look_through,
    plain_screen,
    products,
    screen,
    settling,
)
from sampled_sae.inference.config import InferenceConfig
from sampled_sae.inference.encoding import tokens_to_encode
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
    monkeypatch.setattr("sampled_sae.support.even_slices.FEWEST_ROWS", request.param)
    monkeypatch.setattr(above, "TOKEN_ELEMENTS", 1)
    monkeypatch.setattr(settling, "MOST_SOON", request.param)
    monkeypatch.setattr(above, "FEWEST_SEEN", 0)
    for bound in ("LEAST_PRODUCT", "MOST_SEEN", "MOST_PRODUCT"):
        monkeypatch.setattr(look_through, bound, 1 << 14)
    monkeypatch.setattr(products, "CHUNK_ELEMENTS", 1 << 13)
    monkeypatch.setattr(products, "FEWEST_TOGETHER", 64)
    for part in (plain_screen, bounded_screen):
        monkeypatch.setattr(part, "WEIGHT_ELEMENTS", 1)
    monkeypatch.setattr(plain_screen, "MORE_WEIGHT_ELEMENTS", 1)


def encoders(screened, dtype=torch.float32, scaled=False):
    """The specification's and ours, of whole numbers: what is above a threshold must be equal bit for bit."""
    t = whole_numbers(40, 5, 1000)
    scale = torch.arange(1000).remainder(3).float() if scaled else None
    W = t["W_enc"].t().contiguous().to(dtype)
    made = {"scale": scale, "screen": screened}
    return REFERENCE.encoder(t["x"], W, t["b_enc"], **made), TORCH.encoder(t["x"], W, t["b_enc"], **made)


def thresholds(kind):
    """[1000], or 0-dim: adversarial ones among others, ties with activations at most of them."""
    if not isinstance(kind, str):
        return torch.tensor(float(kind))
    some = torch.randint(-3, 12, (1000,), generator=torch.Generator().manual_seed(0)).float()
    some[::7], some[1::7], some[2::7], some[3::7] = -INF, INF, 0.0, 3e38
    return some if kind == "mixed" else torch.full((1000,), -INF)


@pytest.mark.one_in(5)
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


def candidates(monkeypatch):
    """How many candidates every chunk of a search leaves."""
    looked, add = [], settling.Candidates.add
    monkeypatch.setattr(settling.Candidates, "add", lambda *args: looked.append(len(args[1])) or add(*args))
    return looked


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
    threshold, looked = 16 * 2.5 * sizes, candidates(monkeypatch)
    codes = TORCH.above_threshold(TORCH.encoder(x, W, torch.zeros(3000), screen="bf16"), threshold)
    assert codes.count() > 500
    assert codes.count() <= sum(looked) < 1.4 * codes.count()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norms_of_weights_are_summed_in_float32(dtype):
    rows = torch.cat((torch.ones(1, 4096), torch.full((1, 4096), 3e-7), torch.zeros(1, 4096))).to(dtype)
    norms = torch.empty(3)
    screen.norms_into(norms, rows)
    exact = rows.double().norm(dim=1)
    assert (screen.MARGIN * norms >= exact).all()
    assert (norms <= screen.MARGIN * exact + 1e-16).all()


def test_a_screen_out_of_range_rests():
    x, W, b = torch.ones(3, 4), torch.eye(4).repeat(16, 1), torch.zeros(64)
    W[7, 1] = 1e30
    operands = TORCH.encoder(x, W, b, screen="bf16").operands
    assert bounded_screen.BoundedScreen(operands, torch.zeros(1)).places(slice(0, 64)) is None
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_tokens", [1, 16, 37])
@pytest.mark.parametrize("kind", ["one", "positive", "each"])
def test_places_that_reach_their_floor(kind, n_tokens, dtype):
    g = torch.Generator().manual_seed(n_tokens)
    a = torch.randint(-3, 4, (n_tokens, 50), generator=g).to(dtype)
    a[0, 7], a[-1, 8], a[0, 9] = torch.nan, INF, -INF
    floor = torch.tensor([2.0]) if kind == "one" else torch.randint(-2, 5, (43,), generator=g).float()
    floor = (floor.clamp_min(1) if kind == "positive" else floor).to(dtype)
    seen = a if kind == "one" else a[:, :43]
    expected = torch.zeros_like(a, dtype=torch.bool)
    expected[:, : seen.shape[1]] = ~(seen < floor)
    ways = [column_filter.places_reaching(a, floor)]
    if kind != "one":
        ways.append(column_filter.rows_reaching(seen.t().contiguous(), floor)[::-1])
    for rows, columns in ways:
        found = torch.zeros_like(a, dtype=torch.bool)
        found[rows, columns] = True
        assert len(rows) == int(found.sum())
        assert torch.equal(found, expected)


@pytest.mark.parametrize("few", [0, 256], ids=["by token", "by feature"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("huge", ["nothing", "token", "feature"])
def test_bfloat16_weights_and_tokens_are_looked_through_as_they_are(huge, scaled, few, monkeypatch):
    """Thresholds at activations; the screen leaves out nothing, few of what it lets through are not active."""
    monkeypatch.setattr(plain_screen, "FEW_TOKENS", few)
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(64, 96, generator=g), torch.randn(3000, 96, generator=g)
    b = torch.randn(3000, generator=g)
    if huge == "token":
        x[3] *= 1e3
    if huge == "feature":
        W[5] *= 64
    x, W = x.bfloat16().float(), W.bfloat16()
    scale = torch.rand(3000, generator=g) if scaled else None
    a = (x.double() @ W.double().t() + b) * (1 if scale is None else scale.double())
    threshold = a.sort(0, descending=True).values[1].float().clamp_min(0)
    looked = candidates(monkeypatch)
    monkeypatch.setattr(look_through, "BoundedScreen", None)
    encoder = TORCH.encoder(x, W, b, scale=scale, screen="bf16")
    assert plain_screen.is_plain(encoder.operands)
    codes = TORCH.above_threshold(encoder, threshold)
    differ = (codes.to_dense() > 0) != (a > threshold)
    slack = rounding_of(x, W, b) * (1 if scale is None else scale.double())
    assert ((a - threshold).abs()[differ] <= slack[differ]).all()
    at = codes.tokens, codes.features
    assert ((codes.values - a[at]).abs() <= slack[at]).all()
    assert 2000 < codes.count() <= sum(looked) < 2.5 * codes.count()


def test_other_tokens_need_the_other_screen():
    g = torch.Generator().manual_seed(0)
    x, W, b = torch.randn(64, 32, generator=g), torch.randn(300, 32, generator=g).bfloat16(), torch.zeros(300)
    for tokens, weights, plain in (
        (x, W, False),
        (x.bfloat16().float(), W, True),
        (x.bfloat16().float(), W.half(), False),
    ):
        assert plain_screen.is_plain(TORCH.encoder(tokens, weights, b, screen="bf16").operands) == plain
    operands = TORCH.encoder(x.bfloat16().float(), (W * 1e16).bfloat16(), b, screen="bf16").operands
    assert plain_screen.PlainScreen(operands, torch.zeros(1)).places(slice(0, 300)) is None


def test_a_screen_that_leaves_too_much_open_is_dropped(monkeypatch):
    monkeypatch.setattr(above, "MOST_SCREENED", 0)
    theirs, ours = encoders("bf16", torch.bfloat16)
    search = above.FloorSearch(ours.operands, thresholds("mixed").clamp_min(0))
    found = search.of_block(ours.operands)
    assert search.screens == []
    expected = REFERENCE.above_threshold(theirs, thresholds("mixed"))
    assert torch.equal(found.features, expected.features)
    assert torch.equal(found.values, expected.values)


@pytest.mark.parametrize(
    ("n_tokens", "d", "dtype", "rule", "screened"),
    [
        (64, 4, torch.bfloat16, "relu", True),
        (64, 4, torch.bfloat16, "topk", False),
        (64, 4, torch.float32, "relu", False),
        (64, 4, torch.float16, "relu", False),
        (300, 4, torch.float32, "relu", True),
        (1, 64, torch.bfloat16, "relu", True),
        (1, 4, torch.bfloat16, "relu", False),
        (1, 64, torch.float32, "relu", False),
    ],
    ids=str,
)
def test_auto_rounds_no_weights_for_few_tokens(n_tokens, d, dtype, rule, screened, monkeypatch):
    monkeypatch.setattr(screen, "fast_bfloat16", lambda: True)
    cfg = InferenceConfig(d_in=d, d_sae=1 << 15, rule=rule, k=3 if rule == "topk" else None)
    tensors = {"W_enc": torch.zeros(1 << 15, d, dtype=dtype).t(), "b_enc": torch.zeros(1 << 15)}
    tokens = tokens_to_encode(TORCH, cfg, tensors, torch.ones(n_tokens, d), None)
    assert (tokens.encoder.operands.screen is not None) == screened


def test_a_few_features_that_are_all_active_leave_the_screen_to_others():
    t = whole_numbers(40, 5, 8)
    operands = TORCH.encoder(t["x"], t["W_enc"].t().contiguous(), t["b_enc"] + 1000, screen="bf16").operands
    search = above.FloorSearch(operands, torch.zeros(1))
    assert len(search.of_block(operands).values) == 40 * 8
    assert search.screens == ["plain", "bounded"]
