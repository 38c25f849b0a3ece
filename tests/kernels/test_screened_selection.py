"""The streamed selections through a screen: the same pairs as without one, and nothing beyond its bound is missed."""

import copy

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from makers import make_sae, tokens
from no_host_sync import seen_in_steps
from screened import activations, assert_same_pairs, assert_same_steps, encoders
from screened_encoders import DEVICE, TRITON, both, drawn, on_cpu, triton_encoder

from sampled_sae.codes import SparseCodes
from sampled_sae.impl.encoder import Operands
from sampled_sae.impl.hints import Rule, ThresholdHints
from sampled_sae.impl.triton import screen_entries, stream
from sampled_sae.impl.triton.screen import tensors_of

pytestmark = pytest.mark.usefixtures("small_chunks", "looking")

INF = float("inf")
quick = settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
long = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])


@pytest.fixture
def looking(monkeypatch):
    """However much is kept, in few places."""
    monkeypatch.setattr(stream, "ABOVE_PER_TOKEN", 20)
    monkeypatch.setattr(stream, "SCREENED_CAPACITY", 2)
    monkeypatch.setattr(stream, "MOST_SCREENED", 1)


def check_rule(case, pair, k, select):
    rule, hints = Rule(min(k, len(case[1])), select), [ThresholdHints(), ThresholdHints()]
    for _ in range(1 if select == "token" else 2):  # without a hint, then with one
        off, seen = (TRITON.select(e, None, rule, h) for e, h in zip(pair, hints))
        assert_same_pairs(case, on_cpu(off), on_cpu(seen), by_token=select == "token")
        if case[4] == 0:
            assert all(torch.equal(a, b) for a, b in zip(off.entries(), seen.entries()))


def check_floor(case, pair, rank, kind):
    """Above the rank-th largest activation, as one threshold or as one for each feature; as entries or as a matrix."""
    a = activations(*case[:4]).float().flatten()
    tau = float(a.sort(descending=True).values[min(rank, len(a) - 1)])
    threshold = torch.full((len(case[1]) if "floors" in kind else 1,), tau, device=DEVICE)
    threshold = threshold if "floors" in kind else threshold[0]
    off, seen = (on_cpu(TRITON.above_threshold(e, threshold)) for e in pair)
    if "dense" in kind:
        seen = SparseCodes.from_dense(TRITON.dense_above_threshold(pair[1], threshold).cpu())
    assert_same_pairs(case, off, seen, threshold=tau)


def check(case, k, what):
    pair = both(*case[:4])
    if what in ("batch", "token"):
        check_rule(case, pair, k, what)
    else:
        check_floor(case, pair, k * len(case[0]), what)


WAYS = st.sampled_from(["batch", "token", "threshold", "floors", "dense", "dense floors"])


@quick
@given(encoders(130), st.integers(1, 4), WAYS)
def test_the_same_pairs(case, k, what):
    check(case, k, what)


@pytest.mark.slow
@long
@given(encoders(130), st.integers(1, 8), WAYS)
def test_the_same_pairs_of_many_problems(case, k, what):
    check(case, k, what)


def truth(x, W, b):
    return torch.relu(x.double() @ W.double().t() + b.double())


@pytest.mark.one_in(4)
@pytest.mark.parametrize("members", [None, range(3, 300, 3)], ids=["all", "pool"])
@pytest.mark.parametrize("select", ["batch", "token"])
def test_the_usual_case_computes_a_few_entries_alone(select, members, repairs, monkeypatch):
    """Nothing is done again, and what is kept is computed in full precision."""
    hints, rule = ThresholdHints(), Rule(4, select)
    members = None if members is None else torch.tensor(members, device=DEVICE)
    monkeypatch.setattr("sampled_sae.impl.triton.layer.BLOCK_FEATURES", 0)
    monkeypatch.setattr(stream, "SLACK", 100)
    for seed in range(3):
        x, W, b = drawn(seed=seed)
        encoder = triton_encoder(x, W, b)
        codes = on_cpu(TRITON.select(encoder, members, rule, hints))
        values, tokens, features = codes.entries()
        a = truth(x, W, b)
        if members is not None:
            a = torch.zeros_like(a).index_copy_(1, members.cpu(), a[:, members.cpu()])
        torch.testing.assert_close(values.double(), a[tokens, features], rtol=1e-6, atol=1e-6)
        best = a.flatten().topk(4 * 16).values if select == "batch" else a.topk(4).values.sort(0).values.flatten()
        torch.testing.assert_close(values.double().sort().values, best.sort().values, rtol=1e-6, atol=1e-6)
    assert not any(repairs)
    open_share, kept_share = encoder.operands.screen.looks.shares()["entries"], 4 / (300 if members is None else 99)
    assert kept_share <= open_share < 1.7 * kept_share


@pytest.mark.slow
def test_a_list_without_room_is_seen_on_the_device(repairs, monkeypatch):
    """Too many candidates end in the full search: of a batch by its repair, of tokens by a product that is needed."""
    x, W, b = drawn()
    W[:] = W[0]
    case = (x, W, b * 0, None, 1e-6)
    off, seen = both(*case[:4])
    for select in ("batch", "token"):
        hints = [ThresholdHints(), ThresholdHints()]
        for _ in range(2):
            codes = [TRITON.select(e, None, Rule(3, select), h) for e, h in zip((off, seen), hints)]
            assert_same_pairs(case, *(on_cpu(c) for c in codes), by_token=select == "token")
            values = [c.values for c in codes]
            torch.testing.assert_close(*values)
    assert any(repairs)
    assert repairs[-1]


def planted():
    """An activation as far from what is seen of it as the bound allows: 0 is seen where 2^-8 is true."""
    x = torch.tensor([[1.0, 0.0]]).repeat(3, 1)
    W, b = torch.zeros(200, 2), torch.zeros(200)
    W[5, 0], b[5] = 1 + 2.0**-8 - 2.0**-20, -1
    return x, W, b


@pytest.mark.parametrize(("share", "found"), [(1.0, True), (0.9, False)])
def test_the_bound_is_needed(share, found, monkeypatch):
    x, W, b = planted()
    spread_of = screen_entries.spread_of

    def narrower(operands):
        whole = spread_of(operands)
        return whole._replace(norms=share * whole.norms, errors=share * whole.errors, of_bias=share * whole.of_bias)

    monkeypatch.setattr(screen_entries, "spread_of", narrower)
    operands = triton_encoder(x, W, b).operands
    true = 2.0**-8 - 2.0**-20
    least = torch.tensor(true).nextafter(torch.tensor(0.0))
    floors = torch.full((200,), float(least), device=DEVICE)
    for above in ((float(least), None), (0.0, floors)):
        assert len(stream.stream_above(operands, *above).values) == 3 * found
    assert len(stream.stream_above(operands.in_full(), float(least)).values) == 3
    hint = least[None].to(DEVICE)
    hits = stream.hits_above(operands, hint, 9)
    assert int(hits.found) == 3 * found


@pytest.mark.one_in(3)
@pytest.mark.parametrize("value", [float("nan"), INF, 3e38, 1e30, 1e-40])
def test_values_at_the_ends_of_float32(value):
    """Whatever is found without a screen is found with one."""
    x, W, b = torch.ones(3, 4), torch.eye(4).repeat(25, 1), torch.zeros(100)
    W[7, 1] = value
    pair = both(x, W, b)
    for select in ("batch", "token"):
        off, seen = (on_cpu(TRITON.select(e, None, Rule(2, select))) for e in pair)
        for theirs, ours in zip(off.entries(), seen.entries()):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    for threshold in (0.5, 1e-41):
        off, seen = (on_cpu(TRITON.above_threshold(e, torch.tensor(threshold, device=DEVICE))) for e in pair)
        assert all(torch.equal(a, b) for a, b in zip(off.entries(), seen.entries()))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("tau", [-1.0, 0.0, 7.0, INF])
@pytest.mark.parametrize("guess", [1, 20])
def test_above_is_strict_with_any_room(guess, tau, monkeypatch):
    monkeypatch.setattr(stream, "ABOVE_PER_TOKEN", guess)
    g = torch.Generator().manual_seed(0)
    x, W, b = (torch.randint(-2, 3, s, generator=g).float() for s in ((9, 5), (100, 5), (100,)))
    members = torch.arange(3, 100, 3, device=DEVICE)
    pair = both(x, W, b)
    for chosen in (None, members):
        found = [stream.stream_above(e.operands.among(chosen), tau) for e in pair]
        assert all(torch.equal(ours, theirs) for theirs, ours in zip(*found))


def test_floors_of_each_feature_which_may_be_negative():
    g = torch.Generator().manual_seed(0)
    x, W, b = (torch.randint(-2, 3, s, generator=g).float() for s in ((9, 5), (100, 5), (100,)))
    floors = (torch.randint(-3, 9, (100,), generator=g) * 1.0).to(DEVICE)
    floors[::7] = INF
    found = [stream.stream_above(e.operands, 0.0, floors) for e in both(x, W, b)]
    assert all(torch.equal(ours, theirs) for theirs, ours in zip(*found))
    assert len(found[0].values) > 50
    assert (found[0].values < 0).any()


def test_small_lists_need_no_screen(repairs):
    """Where there is room for every entry, all are computed at once."""
    x, W, b = drawn(B=4, F=7)
    off, seen = both(x, W, b)
    for select in ("batch", "token"):
        codes = [TRITON.select(e, None, Rule(5, select)) for e in (off, seen)]
        assert all(torch.equal(a, b) for a, b in zip(*(c.entries() for c in codes)))


def test_nothing_of_an_empty_batch():
    x, W, b = drawn()
    operands = Operands(x[:0].to(DEVICE), W.to(DEVICE), b.to(DEVICE))
    assert len(stream.stream_above(operands, 0.0).values) == 0
    # of a process whose part is empty, and which screens as the others do
    encoder = TRITON.encoder(x[:0].to(DEVICE), W.to(DEVICE), b.to(DEVICE), screen="bf16")
    assert encoder.operands.screen is not None
    for select in ("batch", "token"):
        assert all(len(part) == 0 for part in TRITON.select(encoder, None, Rule(5, select)).entries())


RULES = [{"l": None}, {"l": None, "select": "token"}, {"l": 8.0}]


def make(screen, **rule):
    return make_sae(
        torch.float32, device=DEVICE, impl="triton", screen=screen, aux_coefficient=1.0, dead_after=60, **rule
    )


@pytest.fixture
def entries_alone(monkeypatch):
    """No pool is handled as a block."""
    monkeypatch.setattr("sampled_sae.impl.triton.layer.BLOCK_FEATURES", 0)


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("entries_alone")
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_training_takes_the_same_steps(rule):
    assert_same_steps(lambda screen: make(screen, row_grads=True, **rule), 3)


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("entries_alone")
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_step_waits_for_the_device(rule, monkeypatch):
    seen = seen_in_steps(make("bf16", **rule), tokens(16, 12).float().to(DEVICE), monkeypatch)
    assert {"round_rows", "select_entries"} <= seen


@pytest.mark.slow
@pytest.mark.usefixtures("entries_alone")
@pytest.mark.parametrize("rule", RULES[:2], ids=str)
def test_a_step_compiles_whole(rule):
    sae = make("bf16", **rule)
    twin = copy.deepcopy(sae)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = tokens(16, 12, seed=seed).float().to(DEVICE)
        expected, found = sae(x), compiled(x)
        torch.testing.assert_close(found.loss, expected.loss)
        assert torch.equal(*(out.codes.to_dense() != 0 for out in (expected, found)))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("per_token", [True, False])
def test_the_operator_passes_opcheck(per_token):
    o = triton_encoder(*drawn()).operands
    screen = tensors_of(o.screen)
    arguments = (o.x, o.W, o.b, None, None, 3 if per_token else 100, per_token, None, screen)
    torch.library.opcheck(torch.ops.sampled_sae.select_entries, arguments)
