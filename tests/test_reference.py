"""The specification against numbers worked out by hand, and its gradients against differences."""

import math

import pytest
import torch
from makers import problem

from sampled_sae import reference as ref
from sampled_sae.testing import NAMES

# Columns: spread evenly, concentrated, silent, one token only.
A = torch.tensor([[1.0, 3.0, 0.0, 0.0], [1.0, 0.0, 0.0, 2.0], [1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
ENTROPY_OF_3_1 = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))


def test_encode():
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    W = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 1.0]])
    b = torch.tensor([0.5, -1.0, 0.0])
    expected = torch.tensor([[1.5, 3.0, 1.0], [0.0, 0.0, 1.5]])
    assert torch.equal(ref.encode(x, W, b), expected)
    scaled = ref.encode(x, W, b, torch.tensor([2.0, 1.0, 0.5]))
    assert torch.equal(scaled, torch.tensor([[3.0, 3.0, 0.5], [0.0, 0.0, 0.75]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_encode_of_16_bit_inputs_is_computed_in_float32(dtype):
    x, W, b = torch.tensor([[3.0]]).to(dtype), torch.tensor([[1 / 3]]).to(dtype), torch.zeros(1, dtype=dtype)
    assert torch.equal(ref.encode(x, W, b), x.float() * W.float())
    assert ref.encode(x, W, b).dtype == torch.float32


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("l2", [3**0.5, 10**0.5, 0.0, 2.0]),
        ("l2_squared", [3.0, 10.0, 0.0, 4.0]),
        ("entropy", [math.log(3), ENTROPY_OF_3_1, 0.0, 0.0]),
        ("uniform", [1.0, 1.0, 0.0, 1.0]),
    ],
)
def test_column_scores(score, expected):
    scores = ref.column_scores(A, score)
    assert scores.tolist() == pytest.approx(expected, abs=1e-15)


def test_entropy_is_at_most_ln_B_and_ranks_a_lottery_column_above_a_silent_one():
    scores = ref.column_scores(A, "entropy")
    assert scores.max() <= math.log(3) + 1e-15
    assert scores[3] > scores[2] == 0


@pytest.mark.parametrize(
    ("scores", "size", "expected"),
    [
        ([1.0, 3.0, 2.0], 1, [1]),
        ([1.0, 3.0, 2.0], 2, [1, 2]),
        ([2.0, 1.0, 2.0, 2.0], 2, [0, 2]),
        ([0.0, 0.0, 0.0, 5.0], 2, [0, 3]),
        ([1.0, 1.0], 9, [0, 1]),
    ],
)
def test_pool_takes_the_highest_and_ties_go_to_the_lower_feature(scores, size, expected):
    assert ref.candidate_pool(torch.tensor(scores), size).tolist() == expected


def test_sampled_pool_takes_silent_features_last():
    scores = torch.tensor([0.0, 1.0, 0.0, 1e-6, 0.0])
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        assert ref.candidate_pool(scores, 3, "sample", g).tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("n", "kept"),
    [
        (0, []),
        (1, [(0, 1)]),
        (2, [(0, 1), (1, 3)]),
        (4, [(0, 0), (0, 1), (1, 0), (1, 3)]),  # the ones tie: token 0 first, then token 1
        (6, [(0, 0), (0, 1), (1, 0), (1, 3), (2, 0), (2, 1)]),
        (12, [(0, 0), (0, 1), (1, 0), (1, 3), (2, 0), (2, 1)]),  # never a zero
    ],
)
def test_batch_selection(n, kept):
    assert [tuple(at) for at in ref.select_batch(A, n).nonzero().tolist()] == kept


@pytest.mark.parametrize(
    ("k", "kept"),
    [
        (1, [(0, 1), (1, 3), (2, 0)]),  # the tie in token 2 goes to the lower feature
        (2, [(0, 0), (0, 1), (1, 0), (1, 3), (2, 0), (2, 1)]),
        (4, [(0, 0), (0, 1), (1, 0), (1, 3), (2, 0), (2, 1)]),
    ],
)
def test_token_selection(k, kept):
    assert [tuple(at) for at in ref.select_token(A, k).nonzero().tolist()] == kept


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Pool of 2: columns 1 (l2 3.16) and 3 (2.0); the budget of 3 takes all of it that is positive.
        ({"k": 1, "l": 2}, [[0, 3, 0, 0], [0, 0, 0, 2], [0, 1, 0, 0]]),
        # Pool of 1: column 1; two of its entries are positive, one under the budget.
        ({"k": 1, "l": 1}, [[0, 3, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]),
        # By entropy column 0 goes before column 1, whose mass is concentrated.
        ({"k": 1, "l": 1, "score": "entropy"}, [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]),
        # Every column that fires has the same score.
        ({"k": 1, "l": 2, "score": "uniform"}, [[1, 3, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]),
        ({"k": 1, "l": None}, [[1, 3, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0]]),
        ({"k": 1, "l": None, "select": "token"}, [[0, 3, 0, 0], [0, 0, 0, 2], [1, 0, 0, 0]]),
        ({"k": 2 / 3, "l": None}, [[0, 3, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0]]),
    ],
)
def test_sampled_topk(changes, expected):
    # x = I picks the rows of W out, so that the activations are A.
    codes = ref.sampled_topk(torch.eye(3).double(), A, torch.zeros(4).double(), **changes)
    assert codes.tolist() == expected


def test_decode_and_loss():
    c = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    W_dec = torch.tensor([[1.0, 0.0, -1.0], [0.5, 1.0, 0.0]])
    b_dec = torch.tensor([0.0, 1.0, 1.0])
    x_hat = ref.decode(c, W_dec, b_dec)
    assert x_hat.tolist() == [[1.0, 3.0, 1.0], [1.0, 1.0, 0.0]]
    assert ref.decode(c, W_dec).tolist() == [[1.0, 2.0, 0.0], [1.0, 0.0, -1.0]]
    x = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    assert float(ref.reconstruction_loss(x, x_hat)) == (4 + 5) / 2


def aux_case():
    """Residuals (1, 0) and (0, 2); activations of the three features: token 0 (1, 2, 0), token 1 (0, 3, 4)."""
    x = torch.tensor([[2.0, 1.0], [1.0, 4.0]], dtype=torch.float64)
    x_hat = torch.tensor([[1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    W_enc = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 4.0]], dtype=torch.float64)
    W_dec = torch.tensor([[0.5, 0.0], [0.0, 0.5], [0.0, 0.25]], dtype=torch.float64)
    return x, x_hat, torch.eye(2).double(), W_enc, torch.zeros(3).double(), W_dec


@pytest.mark.parametrize(
    ("dead", "k_aux", "aux_pool", "error"),
    [
        # The residual's variance: mean (.5, 1), so ((.25 + 1) + (.25 + 1)) / 2 = 1.25.
        ([True, False, False], 1, None, ((0.25 + 0) + (0 + 4)) / 2),
        ([True, False, True], 1, None, ((0.25 + 0) + (0 + 1)) / 2),
        ([True, True, True], 1, None, ((1 + 1) + (0 + 1)) / 2),
        ([True, True, True], 2, None, ((0.25 + 1) + (0 + 0.25)) / 2),
        # Of the dead 0 and 2 the second has the higher score: token 0 is left as it is.
        ([True, False, True], 1, 1, ((1 + 0) + (0 + 1)) / 2),
        ([True, False, True], 1, 2, ((0.25 + 0) + (0 + 1)) / 2),
    ],
)
def test_aux(dead, k_aux, aux_pool, error):
    x, x_hat, x_in, W_enc, b_enc, W_dec = aux_case()
    scores = ref.column_scores(ref.encode(x_in, W_enc, b_enc))
    value = ref.aux_loss(
        x,
        x_hat,
        x_in,
        W_enc,
        b_enc,
        W_dec,
        torch.tensor(dead),
        k_aux=k_aux,
        aux_pool=aux_pool,
        scores=scores,
    )
    assert float(value) == pytest.approx(error / 1.25, rel=1e-15)


def test_aux_is_zero_with_none_dead_or_a_constant_residual():
    x, x_hat, x_in, W_enc, b_enc, W_dec = aux_case()
    none, every = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    assert ref.aux_loss(x, x_hat, x_in, W_enc, b_enc, W_dec, none, k_aux=1) == 0
    assert ref.aux_loss(x, x - 1.0, x_in, W_enc, b_enc, W_dec, every, k_aux=1) == 0


@pytest.mark.parametrize("select", ["batch", "token"])
@pytest.mark.parametrize("l", [1.5, None])
@pytest.mark.parametrize("score", ["l2", "entropy"])
def test_gradients_of_the_step(select, l, score):
    tensors = [t.requires_grad_() for t in problem(4, 3, 7, seed=3).values()]
    scale = torch.linspace(0.5, 2, 7, dtype=torch.float64)

    def loss(x, W_enc, b_enc, W_dec, b_dec):
        rule = {"k": 2, "l": l, "score": score, "select": select}
        c = ref.sampled_topk(x - b_dec, W_enc, b_enc, scale=scale, **rule)
        return ref.reconstruction_loss(x, ref.decode(c, W_dec, b_dec))

    assert torch.autograd.gradcheck(loss, tensors)


@pytest.mark.parametrize("aux_pool", [None, 2])
def test_gradients_of_aux_reach_the_dead_features_alone(aux_pool):
    tensors = problem(5, 4, 6, seed=5)
    x, x_hat = tensors["x"].requires_grad_(), torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    weights = [tensors[name].requires_grad_() for name in NAMES[1:4]]
    dead = torch.tensor([True, False, True, True, False, True])
    scores = ref.column_scores(ref.encode(x, *weights[:2]))

    def aux(W_enc, b_enc, W_dec):
        return ref.aux_loss(x, x_hat, x, W_enc, b_enc, W_dec, dead, k_aux=2, aux_pool=aux_pool, scores=scores)

    assert torch.autograd.gradcheck(aux, weights)
    aux(*weights).backward()
    assert x.grad is None
    assert x_hat.grad is None
    candidates = dead.nonzero().squeeze(1)
    if aux_pool is not None:
        candidates = candidates[ref.candidate_pool(scores[candidates], aux_pool)]
    W_enc, b_enc, W_dec = (w.grad for w in weights)
    for touched in (W_enc.any(0), b_enc != 0, W_dec.any(1)):
        assert touched.nonzero().squeeze(1).tolist() == candidates.tolist()
