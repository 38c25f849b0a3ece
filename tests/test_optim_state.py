"""RowAdam's state: saved, loaded, copied, taken over by another mode."""

import copy
import io

import pytest
import torch
from makers import make_sae, state_of
from optim_steps import assert_close, backward

from sampled_sae import RowAdam


@pytest.mark.parametrize("make_contiguous", [False, True])
@pytest.mark.parametrize("row_grads", [True, False])
@pytest.mark.parametrize("mode", ["dense", "decayed"])
def test_resume_is_bit_for_bit(mode, row_grads, make_contiguous):
    sae = make_sae(torch.float32, row_grads=row_grads, pool="sample")
    rows = RowAdam(sae, lr=0.01, mode=mode)

    def train(sae, rows, first, last):
        for step in range(first, last):
            rows.zero_grad()
            backward(sae, step, torch.float32)
            rows.step()

    train(sae, rows, 0, 3)
    saved = {"sae": sae.state_dict(), "optimizer": copy.deepcopy(rows.state_dict()), "rng": sae.generator.get_state()}
    if make_contiguous:  # as safetensors stores moments
        for state in saved["optimizer"]["state"].values():
            state.update({name: state[name].contiguous() for name in ("exp_avg", "exp_avg_sq")})
    file = io.BytesIO()
    torch.save(saved, file)
    train(sae, rows, 3, 6)

    file.seek(0)
    saved = torch.load(file)
    fresh = make_sae(torch.float32, seed=99, row_grads=row_grads, pool="sample")
    fresh_rows = RowAdam(fresh, lr=0.5, mode=mode)
    fresh.load_state_dict(saved["sae"])
    fresh_rows.load_state_dict(saved["optimizer"])
    fresh.generator.set_state(saved["rng"])
    train(fresh, fresh_rows, 3, 6)
    for name, value in sae.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name
    for p, q in zip(sae.parameters(), fresh.parameters()):
        assert rows.state[p]["step"] == 6
        assert all(torch.equal(rows.state[p][n], fresh_rows.state[q][n]) for n in rows.state[p])
        assert all(rows.state[p][n].dtype == fresh_rows.state[q][n].dtype for n in rows.state[p])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_steps_of_rows_survive_a_load(dtype):
    """As integers: torch gives them the weights' dtype, in which 1001 is 1000."""
    sae = make_sae(dtype, row_grads=True)
    rows = RowAdam(sae, mode="decayed")
    backward(sae, 0, dtype)
    rows.step()
    last = rows.state[sae.W_enc]["last"]
    last.copy_(torch.arange(1001, 1001 + len(last)))
    again = RowAdam(sae, mode="decayed")
    again.load_state_dict(copy.deepcopy(rows.state_dict()))
    assert torch.equal(again.state[sae.W_enc]["last"], last)


@pytest.mark.parametrize("before", ["dense", "lazy", "decayed"])
@pytest.mark.parametrize("after", ["dense", "lazy", "decayed"])
def test_another_mode_goes_on_from_a_state(before, after):
    sae = make_sae(row_grads=True)
    rows = RowAdam(sae, lr=0.01, mode=before)
    for step in range(3):
        rows.zero_grad()
        backward(sae, step)
        rows.step()
    # the state as the new mode would have left it, had all rows moved in the last step
    plain = copy.deepcopy(rows.state_dict())
    for state in plain["state"].values():
        state.pop("last", None)
    found = []
    for state in (rows.state_dict(), plain):
        twin = copy.deepcopy(sae)
        other = RowAdam(twin, lr=0.01, mode=after)
        other.load_state_dict(copy.deepcopy(state))
        other.zero_grad()
        backward(twin, 5)
        other.step()
        found.append(state_of(twin))
    if (before, after) == ("decayed", "decayed"):
        assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])
    else:
        assert_close(*found, rtol=0, atol=0)


def test_a_copy_of_sae_and_optimizer_trains_on():
    sae = make_sae(row_grads=True)
    rows = RowAdam(sae, lr=0.01, mode="decayed", clip=0.5)
    backward(sae, 0)
    rows.step()
    twin, optimizer = copy.deepcopy((sae, rows))
    for s, o in ((sae, rows), (twin, optimizer)):
        o.zero_grad()
        backward(s, 1)
        o.step()
    assert_close(state_of(sae), state_of(twin), rtol=0, atol=0)
    assert optimizer.clip == 0.5


def test_copies_do_not_share(tmp_path):
    sae = make_sae(row_grads=True)
    backward(sae, 0)
    twin = copy.deepcopy(sae)
    assert len(twin.row_grads) == len(sae.row_grads)
    rows = RowAdam(twin, lr=0.1)
    before = state_of(sae)
    rows.step()
    assert_close(before, state_of(sae), rtol=0, atol=0)
    assert not torch.equal(twin.W_enc, sae.W_enc)
