"""impl="torch" against the specification."""

import pytest
import torch
from makers import assert_same_entries, leaves, make_sae, problem, run, tokens

from sampled_sae import functional as F
from sampled_sae import reference
from sampled_sae.config import pool_size
from sampled_sae.impl.encoder import Operands
from sampled_sae.impl.row_gradients import RowSource
from sampled_sae.impl.torch.block import use_block
from sampled_sae.impl.torch.products import sums_of_rows
from sampled_sae.impl.torch.scores import column_statistics, finish_scores
from sampled_sae.support.argument_checks import SCORES
from sampled_sae.testing import NAMES, assert_matches_reference, normal, relative_error, separated, whole_numbers

# (B, d, F, k): one token; primes; a few blocks of 64 and a rest; a dictionary large enough for the block path.
SHAPES = [(1, 3, 5, 2), (7, 5, 37, 3), (33, 17, 252, 20), (50, 8, 1000, 3)]
BLOCK = (50, 8, 1000, 3)
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def assert_same_step(tensors, generator_seed=None, scale=None, **rule):
    codes, x_hat, loss, grads = run(tensors, "torch", generator_seed, scale, **rule)
    codes_r, x_hat_r, loss_r, grads_r = run(tensors, "reference", generator_seed, scale, **rule)
    assert_same_entries(codes, codes_r)
    torch.testing.assert_close(codes.values, codes_r.values, **TOLERANCE)
    torch.testing.assert_close(x_hat, x_hat_r, **TOLERANCE)
    torch.testing.assert_close(loss, loss_r, **TOLERANCE)
    for name in NAMES:
        torch.testing.assert_close(grads[name], grads_r[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    return codes, grads


def test_the_grid_takes_both_paths():
    taken = {use_block(pool_size(k, l, n), k, n) for _, _, n, k in SHAPES for l in (1, 1.5, 4)}
    assert taken == {True, False}
    assert use_block(pool_size(3, 4, 1000), 3, 1000)
    assert not use_block(pool_size(20, 4, 252), 20, 252)


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("select", ["batch", "token"])
@pytest.mark.parametrize("pool", ["top", "sample"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_equals_the_reference(shape, score, pool, select):
    B, d, n_features, k = shape
    for l in (1, 4, None) if pool == "top" else (1.5,):
        codes, _ = assert_same_step(
            problem(B, d, n_features), generator_seed=4, k=k, l=l, score=score, pool=pool, select=select
        )
        assert codes.count() > 0


@pytest.mark.parametrize("l", [1, 4, None])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_fractional_budget(shape, l):
    B, d, n_features, k = shape
    codes, _ = assert_same_step(problem(B, d, n_features), k=k - 0.4, l=l)
    assert 0 < codes.count() <= round(B * (k - 0.4))


@pytest.mark.parametrize("k", [0.01, 0.04])
@pytest.mark.parametrize("l", [4, None])
def test_budget_of_none_or_one(k, l):
    codes, _ = assert_same_step(problem(20, 4, 600), k=k, l=l)
    assert codes.count() == round(20 * k)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("select", ["batch", "token"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("l", [4, 50, None])
def test_scale(score, select, l):
    scale = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    scaled, _ = assert_same_step(problem(*BLOCK[:3]), scale=scale, k=3, l=l, score=score, select=select)
    plain = run(problem(*BLOCK[:3]), "torch", k=3, l=l, score=score, select=select)[0]
    assert not torch.equal(scaled.to_dense(), plain.to_dense())


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("select", ["batch", "token"])
@pytest.mark.parametrize("score", ["l2", "l2_squared", "uniform"])
@pytest.mark.parametrize("shape", [(9, 4, 70, 5), (40, 6, 300, 2), (64, 5, 1000, 4)], ids=str)
def test_exact_ties_on_whole_numbers(shape, score, select, dtype):
    B, d, n_features, k = shape
    tensors = whole_numbers(B, d, n_features, dtype)
    for l in (1, 2, 3.5, 20, None):
        rule = {"k": k, "l": l, "score": score, "select": select}
        ours, theirs = (run(tensors, impl, **rule)[0] for impl in ("torch", "reference"))
        assert_same_entries(ours, theirs)
        assert torch.equal(ours.values, theirs.values)
        assert all(value == int(value) for value in ours.values.tolist())


@pytest.mark.parametrize("select", ["batch", "token"])
@pytest.mark.parametrize("shape", [(9, 4, 70, 5), (64, 5, 1000, 4)], ids=str)
def test_entropy_pool_on_whole_numbers_up_to_rounding(shape, select):
    B, d, n_features, k = shape
    t = whole_numbers(B, d, n_features, torch.float64)
    a = reference.encode(t["x"], t["W_enc"], t["b_enc"])
    exact = reference.column_scores(a, "entropy")
    codes = F.sampled_topk(t["x"], t["W_enc"], t["b_enc"], k=k, l=2, score="entropy", select=select)
    assert exact[codes.active_features()].min() >= exact.sort(descending=True).values[2 * k - 1] - 1e-12
    torch.testing.assert_close(F.column_scores(t["x"], t["W_enc"], t["b_enc"], "entropy"), exact, **TOLERANCE)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("select", ["batch", "token"])
@pytest.mark.parametrize("l", [1, 4, 60, None])
def test_silent_columns_and_fewer_positives_than_the_budget(score, select, l):
    tensors = problem(30, 6, 900)
    tensors["b_enc"][torch.arange(900) % 100 != 7] = -100.0  # nine features can fire
    tensors["b_enc"][7::100] -= 0.8
    codes, grads = assert_same_step(tensors, k=4, l=l, score=score, select=select)
    assert 0 < codes.count() < 30 * 4
    assert (codes.features % 100 == 7).all()
    assert not grads["b_enc"][torch.arange(900) % 100 != 7].any()


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("select", ["batch", "token"])
@pytest.mark.parametrize("l", [1, 4, 60, None])
@pytest.mark.parametrize("score", SCORES)
def test_nothing_fires(score, select, l):
    tensors = problem(6, 4, 500)
    tensors["b_enc"].fill_(-100.0)
    codes, grads = assert_same_step(tensors, k=2, l=l, score=score, select=select)
    assert codes.count() == 0
    assert codes.smallest() == torch.inf
    assert not any(grads[name].any() for name in ("W_enc", "b_enc", "W_dec"))


@pytest.mark.parametrize("select", ["batch", "token"])
@pytest.mark.parametrize("l", [12, 12.4, 1e9])
def test_a_pool_of_everything_is_the_plain_selection_bit_for_bit(select, l):
    tensors = problem(21, 9, 60, torch.float32)
    with_pool, _, loss, grads = run(tensors, "torch", k=5, l=l, select=select)
    plain, _, plain_loss, plain_grads = run(tensors, "torch", k=5, l=None, select=select)
    assert_same_entries(with_pool, plain)
    assert torch.equal(with_pool.values, plain.values)
    assert torch.equal(loss, plain_loss)
    assert all(torch.equal(grads[name], plain_grads[name]) for name in NAMES)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_at_l_1_every_positive_of_the_pool_is_kept(shape, score):
    B, d, n_features, k = shape
    t = problem(B, d, n_features)
    codes = F.sampled_topk(t["x"], t["W_enc"], t["b_enc"], k=k, l=1, score=score)
    a = reference.encode(t["x"], t["W_enc"], t["b_enc"])
    members = F.candidate_pool(reference.column_scores(a, score), k)
    expected = torch.zeros_like(a).index_copy_(1, members, a[:, members])
    torch.testing.assert_close(codes.to_dense(), expected, **TOLERANCE)


@pytest.mark.parametrize("select", ["batch", "token"])
@pytest.mark.parametrize("l", [2, 50, None])
@pytest.mark.parametrize("score", SCORES)
def test_order_of_the_tokens_does_not_matter(score, select, l):
    t = problem(40, 7, 800)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    rule = {"k": 3, "l": l, "score": score, "select": select}
    codes = F.sampled_topk(t["x"], t["W_enc"], t["b_enc"], **rule).to_dense()
    permuted = F.sampled_topk(t["x"][order], t["W_enc"], t["b_enc"], **rule).to_dense()
    assert torch.equal(permuted != 0, codes[order] != 0)
    torch.testing.assert_close(permuted, codes[order], **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_of_rows_leave_nothing_of_what_their_memory_held(dtype):
    """Under autocast too, which would round a product; the first and last rows have no entries."""
    source, weights = tokens(5, 3, dtype=dtype), torch.tensor([1.0, -2, 0.5], dtype=dtype)
    ends, columns = torch.tensor([0, 0, 2, 3, 3]), torch.tensor([4, 0, 4])
    out = torch.full((4, 3), torch.nan, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert sums_of_rows(source, columns, weights, ends, out) is out
    nothing = torch.zeros(3, dtype=dtype)
    torch.testing.assert_close(out, torch.stack([nothing, source[4] - 2 * source[0], 0.5 * source[4], nothing]))


def test_sums_of_many_wide_rows_leave_nothing_either():
    """Two thirds of them without entries."""
    source, counts = tokens(64, 768, dtype=torch.float32), torch.arange(3000) % 3 * (torch.arange(3000) % 3 == 2)
    ends = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    columns = torch.arange(int(ends[-1])) * 7 % 64
    weights = tokens(len(columns), 1, dtype=torch.float32)[:, 0]
    expected = torch.zeros(3000, 768).index_add_(
        0, torch.arange(3000).repeat_interleave(counts), weights[:, None] * source[columns]
    )
    out = torch.full((3000, 768), torch.nan)
    torch.testing.assert_close(sums_of_rows(source, columns, weights, ends, out), expected)


@pytest.mark.parametrize("select", ["batch", "token"])
@pytest.mark.parametrize("l", [2, 50, None])
def test_memory_layout_does_not_matter(l, select):
    plain = problem(18, 6, 700)
    strided = {
        "x": plain["x"].t().contiguous().t(),
        "W_enc": plain["W_enc"].t().contiguous().t(),
        "b_enc": plain["b_enc"].repeat_interleave(2)[::2],
        "W_dec": plain["W_dec"].t().contiguous().t(),
        "b_dec": plain["b_dec"].repeat_interleave(3)[::3],
    }
    assert not strided["b_enc"].is_contiguous()
    _, x_hat, loss, grads = run(plain, "torch", k=3, l=l, select=select)
    t = {name: tensor.detach().requires_grad_() for name, tensor in strided.items()}
    codes = F.sampled_topk(t["x"] - t["b_dec"], t["W_enc"], t["b_enc"], k=3, l=l, select=select)
    other = F.decode(codes, t["W_dec"], t["b_dec"])
    torch.testing.assert_close(other, x_hat, **TOLERANCE)
    reference.reconstruction_loss(t["x"], other).backward()
    for name in NAMES:
        torch.testing.assert_close(t[name].grad, grads[name], **TOLERANCE)
    assert loss > 0


def test_leading_dimensions_are_flattened():
    t = problem(24, 6, 50)
    flat = F.sampled_topk(t["x"], t["W_enc"], t["b_enc"], k=3)
    folded = F.sampled_topk(t["x"].view(2, 3, 4, 6), t["W_enc"], t["b_enc"], k=3)
    single = F.sampled_topk(t["x"][0], t["W_enc"], t["b_enc"], k=3)
    assert torch.equal(flat.to_dense(), folded.to_dense())
    assert single.shape == (1, 50)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("wanted", [*[(name,) for name in NAMES], ("x", "W_dec"), ("W_enc", "b_dec")])
@pytest.mark.parametrize("l", [4, 60, None])
def test_partial_gradients(wanted, l):
    tensors = problem(*BLOCK[:3])
    full = run(tensors, "torch", k=3, l=l)[3]
    t = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    codes = F.sampled_topk(t["x"] - t["b_dec"], t["W_enc"], t["b_enc"], k=3, l=l)
    reference.reconstruction_loss(t["x"], F.decode(codes, t["W_dec"], t["b_dec"])).backward()
    for name in NAMES:
        if name in wanted:
            torch.testing.assert_close(t[name].grad, full[name], **TOLERANCE)
        else:
            assert t[name].grad is None


@pytest.mark.parametrize("select", ["batch", "token"])
@pytest.mark.parametrize("l", [4, 60, None])
def test_gradient_is_exactly_zero_outside_the_touched_features(l, select):
    codes, _, _, grads = run(problem(*BLOCK[:3], torch.float32), "torch", k=3, l=l, select=select)
    touched = torch.zeros(1000, dtype=torch.bool).index_fill(0, codes.active_features(), True)
    assert 0 < touched.sum() < 1000
    for rows in (grads["W_enc"].t(), grads["b_enc"][:, None], grads["W_dec"]):
        assert torch.equal(rows.any(1), touched)


@pytest.mark.parametrize("l", [2, 50, None])
def test_gradcheck(l):
    tensors = list(leaves(problem(4, 3, 400 if l == 2 else 150, seed=3)).values())
    scale = torch.linspace(0.5, 2, tensors[2].numel(), dtype=torch.float64)

    def step(x, W_enc, b_enc, W_dec, b_dec):
        codes = F.sampled_topk(x - b_dec, W_enc, b_enc, k=2, l=l, scale=scale, impl="torch")
        return codes.values, F.decode(codes, W_dec, b_dec, impl="torch")

    assert torch.autograd.gradcheck(step, tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("select", ["batch", "token"])
@pytest.mark.parametrize(("l", "score"), [(2, "l2"), (2, "entropy"), (30, "l2"), (None, "l2")])
def test_no_worse_than_eager_pytorch(dtype, select, l, score):
    rule = {"k": 2, "l": l, "score": score, "select": select}

    def step(x, W_enc, b_enc, W_dec, b_dec):
        codes = F.sampled_topk(x - b_dec, W_enc, b_enc, **rule)
        assert codes.values.dtype == torch.float32
        return codes, F.decode(codes, W_dec, b_dec)

    compared = assert_matches_reference(step, separated(normal, (12, 16, 300), dtype, **rule), **rule)
    assert [c.name for c in compared] == ["codes", "x_hat", *(f"grad {name}" for name in NAMES)]


@pytest.mark.parametrize("score", SCORES)
def test_statistics_of_two_batches_add_up(score):
    t = problem(30, 5, 200)
    W, b = t["W_enc"].t(), t["b_enc"]
    parts = [column_statistics(Operands(x, W, b), score) for x in t["x"].split([11, 19])]
    whole = reference.column_scores(reference.encode(t["x"], t["W_enc"], b), score)
    torch.testing.assert_close(finish_scores(parts[0] + parts[1], score), whole, **TOLERANCE)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_column_scores(score, dtype):
    t = problem(70, 24, 500, dtype)
    exact = reference.column_scores(reference.encode(t["x"].double(), t["W_enc"].double(), t["b_enc"].double()), score)
    ours, eager = (F.column_scores(t["x"], t["W_enc"], t["b_enc"], score, impl=i) for i in ("torch", "reference"))
    assert ours.dtype == torch.float32
    assert not ours.requires_grad
    assert relative_error(ours, exact) <= 2 * relative_error(eager, exact) + 1e-6


def test_row_source_keeps_rows_in_place_of_dense_gradients():
    W = problem(1, 3, 8)["W_dec"].requires_grad_()
    features = torch.tensor([1, 4])
    rows = RowSource(keep=True)
    taken = rows.gather("W_dec", W, features, W.dtype)
    (taken * 2).sum().backward()
    assert W.grad is None
    assert [(g.name, g.features.tolist(), g.rows.grad.tolist()) for g in rows.gradients] == [
        ("W_dec", [1, 4], [[2.0] * 3] * 2)
    ]


@pytest.mark.parametrize("shape", [(7, 5, 33), (130, 6, 1000)], ids=str)
@pytest.mark.parametrize("integers", [True, False])
def test_threshold_counts_and_their_sum_over_batches(shape, integers):
    t = problem(*shape, dtype=torch.float64)
    x, W, b = (t[n].round() if integers else t[n] for n in ("x", "W_enc", "b_enc"))
    thresholds = torch.tensor([0.0, 1.0, 1.0, 2.0, 1e9], dtype=torch.float64)
    a = torch.relu(x @ W + b)
    expected = (a[None] > thresholds[:, None, None]).sum((1, 2))
    assert expected[0] > expected[3] > 0
    assert torch.equal(F.threshold_counts(x, W, b, thresholds), expected)
    parts = [F.threshold_counts(part, W, b, thresholds) for part in (x[:3], x[3:])]
    assert torch.equal(parts[0] + parts[1], expected)
    with pytest.raises(ValueError, match="ascending"):
        F.threshold_counts(x, W, b, thresholds.flip(0))


@pytest.mark.parametrize("l", [2.0, 8.0, None])
def test_autocast_changes_nothing(l):
    """It used to reach into a small pool's products, and the backward pass found operands of two dtypes."""
    found = []
    for enabled in (False, True):
        sae = make_sae(torch.float32, d_sae=128, l=l, impl="torch")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = sae(tokens(20, 12, dtype=torch.float32)).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in sae.parameters())])
    for plain, autocast in zip(*found):
        torch.testing.assert_close(autocast, plain)
