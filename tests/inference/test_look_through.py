"""A search above thresholds: how much it looks at together, what it lets go of, and that its filter loses nothing."""

import pytest
import torch
from screened import TORCH

from sampled_sae.impl.encoder import Operands
from sampled_sae.impl.rounded_tokens import RoundedTokens
from sampled_sae.impl.torch import above, look_through, screen, settling


def operands_of(n_tokens, d, dtype, n_features=1 << 13, screen="bf16"):
    W, b = torch.ones(n_features, d, dtype=dtype), torch.zeros(n_features)
    return TORCH.encoder(torch.ones(n_tokens, d, dtype=dtype), W, b, screen=screen).operands


@pytest.mark.one_in(7)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [2, 64, 1000])
@pytest.mark.parametrize("n_tokens", [1, 64, 256, 700, 12000])
def test_a_chunk_is_no_larger_than_said(n_tokens, d, dtype):
    operands = operands_of(n_tokens, d, dtype)
    search, tokens = above.FloorSearch(operands, torch.zeros(1)), 0
    for at, block in above.blocks_of_tokens(operands, search.room):
        assert block.n_tokens <= look_through.MOST_TOKENS
        look = look_through.LookThrough(block, search.floor, list(search.screens), search.room)
        assert look.screen == ("plain" if dtype == torch.bfloat16 else "bounded")
        assert 2 * block.n_tokens * look.width() <= look_through.MOST_SEEN
        tokens += at.stop - at.start
    assert tokens == n_tokens


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_tokens", [1, 32])
def test_weights_are_raised_for_few_tokens_many_at_once(n_tokens, dtype):
    """A share of [T, F] is nothing there: chunks by it were over before their products paid."""
    operands = operands_of(n_tokens, 64, dtype, screen="off")
    search = above.FloorSearch(operands, torch.zeros(1))
    look = look_through.LookThrough(operands, search.floor, list(search.screens), search.room)
    assert look.width() * 64 >= look_through.RAISED_ELEMENTS


def test_rounded_tokens_leave_room():
    """Weights are rounded again for a block of tokens, so that it is no smaller than it has to be."""
    for n_tokens, d, blocks in ((1024, 16, 1), (1024, 2304, 2), (512, 2304, 1), (2 * look_through.MOST_TOKENS, 16, 2)):
        x = torch.ones(1, 1).expand(n_tokens, d)
        W, room = torch.ones(1, 1).expand(1 << 16, d), look_through.room_of(n_tokens, 1 << 16)
        operands = Operands(x, W, torch.zeros(1 << 16), screen=RoundedTokens(x))
        assert len([*above.blocks_of_tokens(operands, room)]) == blocks
        one = torch.ones(1, 1, dtype=torch.bfloat16)
        held = operands._replace(x=one.expand(n_tokens, d), W=one.expand(1 << 16, d))
        assert len([*above.blocks_of_tokens(held, room)]) == (1 if n_tokens == 1024 else blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given_up", [False, True])
def test_tokens_that_were_rounded_are_let_go(given_up, dtype, monkeypatch):
    """Also where a search gives up its lists for whole rows."""
    if given_up:
        monkeypatch.setattr(above, "FEWEST_LISTED", 0)
        monkeypatch.setattr(above, "MOST_LISTED", 0)
    operands = operands_of(40, 16, dtype)
    operands.W[200:] = 0
    search = above.FloorSearch(operands, torch.full((1,), 3.0))
    assert (search.listed(operands) is None) == given_up
    assert search.screens[-1:] == ["bounded"]
    assert not {"x", "columns"} & set(vars(operands.screen))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_no_activation_above_its_floor_is_below_the_least_product(scaled, dtype):
    """Numbers of all sizes, floors that are activations or lie next to them."""
    g = torch.Generator().manual_seed(0)
    n = 200_000

    def sizes(low, high):
        return 10 ** (low + (high - low) * torch.rand(n, generator=g, dtype=dtype))

    z = torch.randn(n, generator=g, dtype=dtype) * sizes(-42, 38)
    b = torch.where(torch.rand(n, generator=g) < 0.5, -z, torch.randn(n, generator=g, dtype=dtype)) * sizes(-8, 0)
    b[::7], b[3] = 0, -torch.inf
    scale = torch.where(torch.rand(n, generator=g) < 0.1, 0, sizes(-44, 20)) if scaled else None
    a = z + b if scale is None else (z + b) * scale
    below = [a.nextafter(torch.full_like(a, -torch.inf)), a, a - a.abs() * 1e-6, torch.zeros_like(a)]
    operands = Operands(z[:1, None], z[:, None], b, scale)
    for floor in (*below, torch.full_like(a, torch.inf), torch.full_like(a, torch.finfo(dtype).max)):
        floor = floor.clamp_min(0) if scaled else floor
        least = screen.least_in_full(operands, floor, slice(0, n))
        assert not ((a > floor) & (z < least)).any()
    assert ((a > below[0]) & a.isfinite()).sum() > n / 2
    one = screen.least_in_full(operands, torch.ones(1, dtype=dtype), slice(5, 9))
    assert torch.equal(one, screen.least_in_full(operands, torch.ones(n, dtype=dtype), slice(5, 9)))


@pytest.mark.parametrize("at_hand", [True, False], ids=["by feature", "by token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_candidates_are_computed_once_each(dtype, at_hand, monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(70, 24, generator=g).bfloat16(), torch.randn(500, 24, generator=g).to(dtype)
    block = TORCH.encoder(x, W, torch.zeros(500), screen="off").operands
    block = block if at_hand else block._replace(x=x)
    monkeypatch.setattr(settling, "MOST_TOGETHER", 100)
    monkeypatch.setattr(settling, "PIECE_ELEMENTS", 24 * 11)
    waiting = settling.Candidates(block, 0.0)
    assert waiting.by_feature == at_hand
    assert list(waiting.products()) == []
    places = torch.randperm(70 * 500, generator=g)[:750]
    for some in places.split(200):
        waiting.add(some // 500, some % 500)
    assert waiting.count == 750
    found = [torch.cat(column) for column in zip(*waiting.products(), strict=True)]
    assert waiting.count == 0
    order = (found[1] * 500 + found[2]).argsort()
    values, tokens, features = (column[order] for column in found)
    assert torch.equal(tokens * 500 + features, places.sort().values)
    exact = (x.double() @ W.double().t())[tokens, features]
    torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-5)
    assert values.dtype == torch.float32
