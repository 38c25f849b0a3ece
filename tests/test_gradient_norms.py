"""Norms of gradients that come with them, so that the optimizer needs no pass of its own: right, and never stale."""

import pytest
import torch
from makers import make_sae, tokens

pytest.importorskip("triton")

from sampled_sae import RowAdam
from sampled_sae.impl import row_gradients
from sampled_sae.impl.row_gradients import norm_of

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def backward(dtype=torch.float32, times=1):
    """The row gradients of W_enc and W_dec, by name."""
    sae = make_sae(torch.float32, device=DEVICE, impl="triton", l=None, row_grads=True, aux_coefficient=0.0)
    x = tokens(32, 12, dtype=torch.float32).to(DEVICE)
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        loss = sae(x).loss
    for _ in range(times):
        loss.backward(retain_graph=True)
    return sae, {part.name: part.rows for part in sae.row_grads if part.name != "b_enc"}


def counted(monkeypatch):
    """The sizes of what norms are taken of in full."""
    sizes, norm = [], torch.linalg.vector_norm
    monkeypatch.setattr(row_gradients.torch.linalg, "vector_norm", lambda t: sizes.append(t.numel()) or norm(t))
    return sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_norm_comes_with_the_gradient(dtype, monkeypatch):
    _, rows = backward(dtype)
    assert rows.keys() == {"W_enc", "W_dec"}
    expected = {name: torch.linalg.vector_norm(leaf.grad) for name, leaf in rows.items()}
    sizes = counted(monkeypatch)
    for name, leaf in rows.items():
        torch.testing.assert_close(norm_of(leaf), expected[name])
    assert sizes == []


def test_no_gradient_is_kept_that_was_rounded_for_weights_of_16_bits():
    sae = make_sae(torch.bfloat16, device=DEVICE, impl="triton", l=None, row_grads=True, aux_coefficient=0.0)
    sae(tokens(32, 12, dtype=torch.bfloat16).to(DEVICE)).loss.backward()
    for part in sae.row_grads:
        assert part.rows.known_norm is None
        torch.testing.assert_close(norm_of(part.rows), torch.linalg.vector_norm(part.rows.grad))


def scaled_in_place(leaf):
    leaf.grad.mul_(3)


def replaced(leaf):
    leaf.grad = leaf.grad * 3


def replaced_twice(leaf):
    leaf.grad = leaf.grad * 3
    leaf.grad = leaf.grad * 3


@pytest.mark.one_in(2)
@pytest.mark.parametrize("edit", [scaled_in_place, replaced, replaced_twice])
def test_a_gradient_that_was_changed_has_another_norm(edit):
    for leaf in backward()[1].values():
        before = norm_of(leaf).clone()
        edit(leaf)
        torch.testing.assert_close(norm_of(leaf), torch.linalg.vector_norm(leaf.grad))
        assert norm_of(leaf) > 2 * before


def test_gradients_that_add_up_have_another_norm():
    once, twice = (backward(times=times)[1] for times in (1, 2))
    for name, leaf in twice.items():
        torch.testing.assert_close(norm_of(leaf), 2 * norm_of(once[name]))


def test_row_adam_clips_by_it(monkeypatch):
    sae, rows = backward()
    norms = [torch.linalg.vector_norm(t.grad) for t in (*(part.rows for part in sae.row_grads), sae.b_dec)]
    expected = torch.stack(norms).norm()
    sizes = counted(monkeypatch)
    optimizer = RowAdam(sae)
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, expected)
    assert max(sizes) < min(leaf.grad.numel() for leaf in rows.values())
