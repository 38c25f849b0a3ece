"""Columns that the Triton form sees through bfloat16 products: the same pools, bounds that hold, nothing that waits."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from makers import make_sae, tokens
from no_host_sync import seen_in_steps
from screened import SCORED, activations, assert_same_members, assert_same_steps, encoders

pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode

from sampled_sae.impl.interface import implementation
from sampled_sae.impl.pool import PoolRule, find_pool
from sampled_sae.impl.triton import screen
from sampled_sae.impl.triton.aux_loss import dead_pool
from sampled_sae.impl.triton.screen import rounded_operands
from sampled_sae.impl.triton.screen_columns import open_columns
from sampled_sae.kernels import column_bounds as bounds_kernel
from sampled_sae.kernels import firing_bounds as firing_kernel
from sampled_sae.support.float32_products import float32_products

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = implementation("triton")
quick = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
long = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def both(*case):
    """The operands without and with a screen."""
    x, W, b, scale = (None if t is None else t.to(DEVICE) for t in case)
    return [TRITON.encoder(x, W, b, None, scale, screen=name).operands for name in ("off", "bf16")]


def pools_of(operands, rule):
    return [find_pool(TRITON, o, rule, torch.Generator().manual_seed(3)) for o in operands]


def assert_bounds(case, seen, score):
    exact = activations(*case[:4])
    exact = (exact > 0).any(0) if score == "uniform" else exact.square().sum(0)
    low, high = (t.cpu().double() for t in seen[:2])
    assert (low <= exact).all()
    # squares that float32 does not hold
    assert (exact <= high + 1e-38).all()


def check(case, k, l, scored):
    operands, (score, pool) = both(*case[:4]), scored
    assert_bounds(case, TRITON.column_bounds(operands[1], score), score)
    rule = PoolRule(k, l, score, pool)
    found = pools_of(operands, rule)
    if found[0] is not None:
        assert_same_members(case, rule, *(pool.members.cpu() for pool in found))


@pytest.mark.everyday
@quick
@given(encoders(130), st.integers(1, 8), st.sampled_from([1.0, 2.0, 4.0]), st.sampled_from(SCORED))
def test_the_same_pool(case, k, l, scored):
    check(case, k, l, scored)


@pytest.mark.slow
@long
@given(encoders(130), st.integers(1, 8), st.sampled_from([1.0, 2.0, 4.0]), st.sampled_from(SCORED))
def test_the_same_pool_of_many_problems(case, k, l, scored):
    check(case, k, l, scored)


@pytest.mark.skipif(DEVICE == "cuda", reason="a compiled kernel holds its constants")
@pytest.mark.parametrize(("share", "holds"), [(1.0, True), (0.9, False)])
@pytest.mark.parametrize("score", ["l2", "uniform"])
def test_the_bound_is_needed(score, share, holds, monkeypatch):
    """A weight as far from the 1 that is seen of it as rounding may move it; with a bias that it just exceeds."""
    for module in (bounds_kernel, firing_kernel):
        monkeypatch.setattr(module, "MARGIN", share * module.MARGIN.value)
    x, W, b = torch.tensor([[1.0, 0.0]]), torch.zeros(64, 2), torch.zeros(64)
    W[5, 0] = 1 + 2.0**-8 - 2.0**-20
    if score == "uniform":
        b[5] = 2.0**-19 - float(W[5, 0])
    _, high, *_ = TRITON.column_bounds(both(x, W, b, None)[1], score)
    assert (float(high[5]) >= (1 if score == "uniform" else float(W[5, 0]) ** 2)) == holds


@pytest.mark.one_in(2)
@pytest.mark.parametrize("value", [float("inf"), 3e38, 1e30, 1e-40])
def test_values_at_the_ends_of_float32(value):
    x, W, b = torch.ones(3, 4), torch.eye(4).repeat(16, 1), torch.zeros(64)
    W[7, 1] = value
    for score in ("l2", "uniform"):
        members = [pool.members for pool in pools_of(both(x, W, b, None), PoolRule(2, 1, score))]
        assert torch.equal(*members)


def test_more_open_columns_than_there_is_room_for():
    """Columns that all tie in bfloat16 are all computed in full: the same scores, so the same pool to the bit."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(16, 8, generator=g), torch.randn(1, 8, generator=g) * (1 + 1e-6 * torch.arange(128.0)[:, None])
    operands = both(x, W, torch.zeros(128), None)
    off, seen = pools_of(operands, PoolRule(4, 2))
    assert torch.equal(off.members, seen.members)
    assert operands[1].screen.looks.shares() == {"columns": 1.0}


def test_columns_apart_are_not_computed_again():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    W = torch.randn(256, 8, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, 2, 256)[:, None]
    operands = both(x, W, torch.zeros(256), None)
    off, seen = pools_of(operands, PoolRule(4, 2))
    assert torch.equal(off.members, seen.members)
    assert operands[1].screen.looks.shares()["columns"] < 0.05


def test_columns_whose_score_is_known_are_not_computed_again():
    """The score "uniform" is 0 or 1, and near the pool's boundary many are 1."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    operands = both(x, x, torch.ones(64), None)
    off, seen = pools_of(operands, PoolRule(4, 2, "uniform"))
    assert torch.equal(off.members, seen.members)
    assert operands[1].screen.looks.shares() == {"columns": 0.0}


def test_entropy_and_a_part_of_the_tokens():
    case = [torch.randn(40, 8), torch.randn(64, 8), torch.randn(64), None]
    operands = both(*case)
    assert TRITON.column_bounds(operands[1], "entropy") is None
    for rule in (PoolRule(3, 2, "entropy"), PoolRule(3, 2, score_tokens=0.3)):
        off, seen = pools_of(operands, rule)
        assert torch.equal(off.members, seen.members)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("aux_pool", [1, 5, 63, 64])
def test_dead_features_of_highest_score(aux_pool):
    """From the bounds that the pool left behind: the same as from the scores."""
    g = torch.Generator().manual_seed(0)
    operands = both(torch.randn(40, 8, generator=g), torch.randn(64, 8, generator=g), torch.zeros(64), None)
    off, seen = pools_of(operands, PoolRule(2, 2))
    dead = torch.arange(64, device=DEVICE) % 3 > 0
    expected = dead_pool(operands[0], dead, aux_pool, "l2", off.scores)
    assert len(expected) == aux_pool
    assert int(dead[expected].sum()) == min(aux_pool, int(dead.sum()))
    assert torch.equal(dead_pool(operands[1], dead, aux_pool, "l2", seen.scores), expected)


def test_where_there_is_a_screen():
    x, W = torch.ones(1024, 2, device=DEVICE), torch.ones(1024, 2, device=DEVICE)
    assert rounded_operands(x, W, "bf16") is not None
    assert (rounded_operands(x, W, "auto") is not None) == (DEVICE == "cuda")
    assert rounded_operands(x[:4], W, "auto") is None
    for operands in ((x, W.bfloat16()), (x.bfloat16(), W.bfloat16())):
        assert rounded_operands(*operands, "bf16") is None
    assert rounded_operands(x[:0], W, "bf16") is not None, "of a process without tokens, as on the others"
    assert rounded_operands(x, W, "off") is None
    with float32_products("tf32", torch.device("cuda")):
        assert rounded_operands(x, W, "bf16") is None


SIZES = [(256, 4096, True), (255, 5000, False), (256, 4095, False)]


@pytest.mark.parametrize(("n_tokens", "n_features", "enough"), SIZES)
def test_auto_asks_for_tokens_and_for_activations(n_tokens, n_features, enough, monkeypatch):
    monkeypatch.setattr(screen, "fast_bfloat16", lambda x: True)
    x, W = (torch.ones(n, 2, device=DEVICE) for n in (n_tokens, n_features))
    assert (rounded_operands(x, W, "auto") is not None) == enough


def test_operands_of_some_tokens_and_features_keep_their_screen():
    x, W, b = torch.randn(6, 4), torch.randn(9, 4), torch.zeros(9)
    operands = both(x, W, b, None)[1]
    some = operands.of_tokens(slice(2, 4)).of_features(torch.tensor([1, 3], device=DEVICE))
    assert torch.equal(some.screen.tokens.values.cpu(), x[2:4].bfloat16())
    assert torch.equal(some.screen.weights.values.cpu(), W[[1, 3]].bfloat16())
    assert some.screen.looks is operands.screen.looks
    assert operands.in_full().screen is None


RULES = [
    {"l": 3.0},
    {"l": 3.0, "score": "l2_squared", "aux_pool": 200},
    {"l": 3.0, "score": "uniform"},
    {"l": 2.0, "pool": "sample"},
    {"l": None},
]


def make(screen, **rule):
    settings = {"d_sae": 48, "aux_coefficient": 1.0, "dead_after": 25, "k_aux": 3, "aux_pool": 7, "row_grads": True}
    return make_sae(torch.float32, device=DEVICE, impl="triton", screen=screen, **{**settings, **rule})


@pytest.mark.one_in(3)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_training_takes_the_same_steps(rule):
    """With dead features from the third step on."""
    assert assert_same_steps(lambda screen: make(screen, **rule), 5).aux > 0


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dead_after", [10, 10**7])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_step_waits_for_the_device(rule, dead_after, monkeypatch):
    sae = make("bf16", **{**rule, "dead_after": dead_after})
    seen = seen_in_steps(sae, tokens(12, 12, dtype=torch.float32).to(DEVICE), monkeypatch)
    assert "round_rows" in seen
    assert ("settle_columns" in seen) == (rule["l"] is not None or dead_after == 10)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("rule", [*RULES[1:3], {"l": 3.0, "score": "entropy"}], ids=str)
def test_a_training_step_compiles_whole(rule):
    saes = [make("bf16", row_grads=False, **rule) for _ in range(2)]
    torch._dynamo.reset()
    compiled = torch.compile(saes[1], fullgraph=True, backend="aot_eager")
    for seed in range(4):
        x = tokens(12, 12, dtype=torch.float32, seed=seed).to(DEVICE)
        expected, found = saes[0](x), compiled(x)
        torch.testing.assert_close(found.loss, expected.loss)
        assert saes[0].memory.looks.shares() == saes[1].memory.looks.shares()


def test_operators_pass_opcheck():
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "sampled_sae":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        operands = both(*[torch.randn(9, 5), torch.randn(37, 5), torch.randn(37), torch.rand(37) + 0.5])
        pools_of(operands, PoolRule(2, 2))
        open_columns(*operands[0][:4], "l2", operands[0].b > 0)
    found = {str(func).split(".")[1] for func, _ in calls}
    assert {"round_rows", "seen_columns", "settle_columns", "open_columns"} <= found
    for func, args in calls:
        torch.library.opcheck(func, args)
