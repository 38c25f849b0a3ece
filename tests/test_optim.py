"""RowAdam against the calls it stands for."""

import copy
import io

import pytest
import torch
from makers import make_sae, tokens

from sampled_sae import RowAdam
from sampled_sae.rows import RowGradient
from sampled_sae.torch_impl.row_adam import stochastically_rounded

# Path of the gradients by rule: a block of the pool, a pool entry by entry, the whole dictionary.
RULES = [{"d_sae": 128, "l": 4.0}, {"d_sae": 64, "l": 4.0}, {"l": None}, {"l": None, "select": "token"}]
# Every second feature dead at the start, so that the auxiliary loss adds parts on other features.
AUX = {"aux_coefficient": 1 / 32, "dead_after": 50}


def state_of(sae):
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


def plain_step(sae, adam, clip):
    """Step 8 of METHOD.md by torch's own parts."""
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(sae.parameters(), clip)
    sae.project_decoder_grad()
    adam.step()
    sae.normalize_decoder()


def backward(sae, seed, dtype=torch.float64):
    loss = sae(tokens(10, 12, seed=seed, dtype=dtype)).loss
    loss.backward()
    return loss.detach()


def assert_close(a, b, rtol=1e-9, atol=1e-11):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("row_grads", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{}, {"clip": None}, {"clip": 0.1, "weight_decay": 0.1}, {"betas": (0.5, 0.7), "eps": 1e-3, "lr": 0.1}],
    ids=str,
)
def test_equals_clip_project_adam_normalise(settings, row_grads, rule):
    settings = {"lr": 0.01, **settings}
    sae = make_sae(row_grads=row_grads, **rule, **AUX)
    other = make_sae(**rule, **AUX)
    for s in (sae, other):
        s.tokens_since_active[::2] = 100
    clip = settings.get("clip", 1.0)
    rows = RowAdam(sae, **settings)
    adam = torch.optim.Adam(other.parameters(), **{k: v for k, v in settings.items() if k != "clip"})
    before = state_of(sae)
    for step in range(5):
        rows.zero_grad()
        adam.zero_grad()
        ours, theirs = backward(sae, step), backward(other, step)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        assert (sae.W_enc.grad is None) == row_grads
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in other.parameters()]))
        rows.step()
        plain_step(other, adam, clip)
        torch.testing.assert_close(rows.grad_norm.double(), norm, rtol=1e-6, atol=0)
        assert_close(state_of(sae), state_of(other), rtol=1e-5 if clip else 1e-9, atol=1e-8 if clip else 1e-11)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.cfg.d_sae, dtype=torch.float64))
    assert all(not torch.equal(before[name], p) for name, p in sae.named_parameters())


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_row_gradients_equal_dense_ones_bit_for_bit(rule):
    saes = [make_sae(torch.float32, row_grads=row_grads, **rule, **AUX) for row_grads in (True, False)]
    for sae in saes:
        sae.tokens_since_active[::2] = 100
        backward(sae, 0, torch.float32)
    dense = {name: torch.zeros_like(p) for name, p in saes[0].named_parameters()}
    dense["b_dec"] = saes[0].b_dec.grad
    features = set()
    for part in saes[0].row_grads:
        target = dense[part.name].t() if part.name == "W_enc" else dense[part.name]
        target.index_add_(0, part.features, part.rows.grad)
        features.update(part.features.tolist())
    for name, p in saes[1].named_parameters():
        torch.testing.assert_close(dense[name], p.grad, rtol=1e-6, atol=1e-7)
    assert 0 < len(features) <= saes[0].cfg.d_sae


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_accumulation_over_two_forwards(rule):
    sae, other = make_sae(row_grads=True, **rule), make_sae(**rule)
    rows, adam = RowAdam(sae, lr=0.01, clip=None), torch.optim.Adam(other.parameters(), lr=0.01)
    for step in range(3):
        rows.zero_grad()
        adam.zero_grad()
        for half in range(2):
            for s in (sae, other):
                backward(s, 2 * step + half)
        touched = [p.features for p in sae.row_grads if p.name == "W_enc"]
        assert len(touched) == 2
        assert set(touched[0].tolist()) & set(touched[1].tolist())
        rows.step()
        plain_step(other, adam, None)
        assert_close(state_of(sae), state_of(other))


def test_rows_beside_a_dense_gradient_are_added_to_it():
    sae, other = make_sae(row_grads=True), make_sae()
    rows, adam = RowAdam(sae, lr=0.01, clip=None), torch.optim.Adam(other.parameters(), lr=0.01)
    for s in (sae, other):
        backward(s, 0)
        (s.W_enc.square().sum() + s.b_enc.sum() + s.W_dec.pow(4).sum()).backward()
    rows.step()
    plain_step(other, adam, None)
    assert_close(state_of(sae), state_of(other))


def test_a_dense_gradient_of_any_memory_layout(monkeypatch):
    monkeypatch.setattr("sampled_sae.torch_impl.row_adam.CHUNK_ELEMENTS", 12 * 7)
    sae, other = make_sae(), make_sae()
    rows, adam = RowAdam(sae, lr=0.01, clip=None), torch.optim.Adam(other.parameters(), lr=0.01)
    for s in (sae, other):
        s.W_enc.grad = tokens(12, 96)
        s.W_dec.grad = tokens(12, 96, seed=2).t()
    rows.step()
    plain_step(other, adam, None)
    assert_close(state_of(sae), state_of(other))


def test_weights_of_another_memory_layout(monkeypatch):
    monkeypatch.setattr("sampled_sae.torch_impl.row_adam.CHUNK_ELEMENTS", 12 * 7)
    sae, other = make_sae(), make_sae()
    contiguous = {name: t.clone().contiguous() for name, t in sae.state_dict().items()}
    sae.load_state_dict(contiguous, assign=True)
    assert sae.W_enc.stride() != other.W_enc.stride()
    rows, adam = RowAdam(sae, lr=0.01, clip=None), torch.optim.Adam(other.parameters(), lr=0.01)
    for step in range(3):
        rows.zero_grad()
        adam.zero_grad()
        for s in (sae, other):
            backward(s, step)
        rows.load_state_dict(copy.deepcopy(rows.state_dict()))
        rows.step()
        plain_step(other, adam, None)
        assert_close(state_of(sae), state_of(other))


def test_parameters_without_gradient_stay():
    sae = make_sae(row_grads=True)
    sae.W_enc.requires_grad_(False)
    rows = RowAdam(sae, lr=0.1)
    before = state_of(sae)
    backward(sae, 0)
    assert {part.name for part in sae.row_grads} == {"b_enc", "W_dec"}
    rows.step()
    after = state_of(sae)
    assert torch.equal(before["W_enc"], after["W_enc"])
    assert not torch.equal(before["b_enc"], after["b_enc"])
    rows.zero_grad()
    rows.step()
    assert_close(after, state_of(sae), rtol=0, atol=0)


def test_zero_grad_drops_rows():
    sae = make_sae(row_grads=True)
    rows = RowAdam(sae)
    backward(sae, 0)
    assert all(isinstance(part, RowGradient) for part in sae.row_grads)
    rows.zero_grad()
    assert sae.row_grads == []
    assert sae.b_dec.grad is None


def test_moments_keep_the_weights_memory():
    sae = make_sae(row_grads=True)
    rows = RowAdam(sae)
    backward(sae, 0)
    rows.step()
    for p in sae.parameters():
        for name in ("exp_avg", "exp_avg_sq"):
            assert rows.state[p][name].stride() == p.stride()
            assert rows.state[p][name].dtype == p.dtype


def test_closure():
    sae = make_sae(row_grads=True)
    rows = RowAdam(sae)
    assert rows.step(lambda: backward(sae, 0)) > 0
    assert rows.grad_norm > 0


def test_scheduler_and_lr_by_group():
    sae, other = make_sae(row_grads=True), make_sae()
    rows = RowAdam(sae, lr=0.02, clip=None)
    adam = torch.optim.Adam([{"params": [p], "name": n} for n, p in other.named_parameters()], lr=0.02)
    schedulers = []
    for optimizer in (rows, adam):
        by_name = {group["name"]: group for group in optimizer.param_groups}
        assert set(by_name) == {"W_enc", "b_enc", "W_dec", "b_dec"}
        by_name["b_dec"]["lr"] = 0.5
        by_name["W_dec"]["lr"] = 0.0
        schedulers.append(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    for step in range(4):
        for s, optimizer, scheduler in zip((sae, other), (rows, adam), schedulers):
            optimizer.zero_grad()
            backward(s, step)
            optimizer.step() if optimizer is rows else plain_step(s, adam, None)
            scheduler.step()
    assert rows.param_groups[0]["lr"] == adam.param_groups[0]["lr"]
    assert_close(state_of(sae), state_of(other))


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


def rows_touched(sae):
    """bool [F] by parameter: whether the row has a gradient other than zero."""
    touched = {name: torch.zeros(sae.cfg.d_sae, dtype=torch.bool) for name in ("W_enc", "b_enc", "W_dec")}
    for part in sae.row_grads:
        moving = part.rows.grad != 0
        touched[part.name][part.features] |= moving.any(1) if moving.dim() > 1 else moving
    return touched


def as_rows(name, t):
    return t.t() if name == "W_enc" else t


@pytest.mark.parametrize(
    ("mode", "settings"),
    [("lazy", {}), ("lazy", {"clip": 0.1, "weight_decay": 0.1}), ("decayed", {}), ("decayed", {"clip": 0.1})],
    ids=str,
)
@pytest.mark.parametrize("rule", [*RULES, {"l": None, **AUX}], ids=str)
def test_rows_without_gradient_stand_still(mode, rule, settings, monkeypatch):
    """And the others take a step of Adam's, from moments that stood still too, or that decayed in every step."""
    monkeypatch.setattr("sampled_sae.torch_impl.row_adam.CHUNK_ELEMENTS", 12 * 7)
    sae = make_sae(row_grads=True, **rule)
    sae.tokens_since_active[::2] = 100
    twin = copy.deepcopy(sae)
    rows, adam = RowAdam(sae, lr=0.01, mode=mode, **settings), RowAdam(twin, lr=0.01, **settings)
    idle = 0
    for step in range(4):
        rows.zero_grad()
        backward(sae, step)
        touched, before = rows_touched(sae), state_of(sae)
        twin.load_state_dict(sae.state_dict())
        twin.row_grads = copy.deepcopy(sae.row_grads)
        twin.b_dec.grad = sae.b_dec.grad
        if mode == "lazy" and step:
            for p, q in zip(sae.parameters(), twin.parameters()):
                adam.state[q].update({n: rows.state[p][n].clone() for n in ("exp_avg", "exp_avg_sq")})
        adam.step()
        rows.step()
        after, expected = state_of(sae), state_of(twin)
        torch.testing.assert_close(after["b_dec"], expected["b_dec"])
        for name, moving in touched.items():
            old, new, wanted = (as_rows(name, state[name]) for state in (before, after, expected))
            assert torch.equal(new[~moving], old[~moving])
            torch.testing.assert_close(new[moving], wanted[moving], rtol=1e-5, atol=1e-8)
            assert moving.any()
            idle += int((~moving).sum())
    assert idle > 0


def test_lazy_is_sparse_adam():
    """torch's adds eps before bias correction, hence one so small."""
    sae = make_sae(row_grads=True, apply_b_dec_to_input=False)
    weight = torch.nn.Parameter(sae.W_enc.detach().t().clone())
    rows = RowAdam(sae, lr=0.01, eps=1e-20, mode="lazy", clip=None)
    sparse = torch.optim.SparseAdam([weight], lr=0.01, eps=1e-20)
    for step in range(4):
        rows.zero_grad()
        backward(sae, step)
        part = next(part for part in sae.row_grads if part.name == "W_enc")
        moving = (part.rows.grad != 0).any(1)
        weight.grad = torch.sparse_coo_tensor(
            part.features[moving][None], part.rows.grad[moving], weight.shape, is_coalesced=True
        )
        rows.step()
        sparse.step()
        torch.testing.assert_close(sae.W_enc.detach().t(), weight.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["dense", "lazy", "decayed"])
def test_modes_take_dense_gradients_too(mode):
    """Rows that are zero in a dense gradient are rows without one."""
    saes = [make_sae(row_grads=row_grads) for row_grads in (True, False)]
    optimizers = [RowAdam(sae, lr=0.01, mode=mode) for sae in saes]
    for step in range(3):
        for sae, optimizer in zip(saes, optimizers):
            optimizer.zero_grad()
            backward(sae, step)
            optimizer.step()
    assert_close(*map(state_of, saes))


@pytest.mark.parametrize("mode", ["dense", "lazy", "decayed"])
def test_16_bit_moments(mode):
    """A path near that of full moments, resumed with the moments that were saved."""
    full, half = (make_sae(torch.float32, row_grads=True, l=None) for _ in range(2))
    start = state_of(full)
    optimizers = [RowAdam(full, lr=0.01, mode=mode), RowAdam(half, lr=0.01, mode=mode, moments=torch.bfloat16)]
    for step in range(20):
        for sae, optimizer in zip((full, half), optimizers):
            optimizer.zero_grad()
            backward(sae, step, torch.float32)
            optimizer.step()
        if step == 10:
            saved = copy.deepcopy(optimizers[1].state_dict())
            optimizers[1] = RowAdam(half, lr=0.5, mode=mode, moments=torch.bfloat16)
            optimizers[1].load_state_dict(saved)
            for i, p in enumerate(half.parameters()):
                for name, value in saved["state"][i].items():
                    assert optimizers[1].state[p][name].dtype == value.dtype
                    assert torch.equal(optimizers[1].state[p][name], value)
            assert saved["state"][0]["exp_avg"].dtype == torch.bfloat16
    for name, value in state_of(half).items():
        moved = (state_of(full)[name] - start[name]).norm()
        assert 0 < (value - state_of(full)[name]).norm() < 0.15 * moved, name


def test_rounding_is_right_on_average():
    generator = torch.Generator().manual_seed(0)
    value = torch.tensor([1.001, -3.3, 1e-20, 0.0, 5e-3])
    many = stochastically_rounded(value.repeat(40_000, 1), torch.bfloat16, generator)
    torch.testing.assert_close(many.float().mean(0), value, rtol=1e-4, atol=0)
    assert (many.float() - value).abs().max() < 2**-7 * 3.3
    assert torch.equal(many[:, 3], torch.zeros(40_000, dtype=torch.bfloat16))


def test_many_chunks(monkeypatch):
    monkeypatch.setattr("sampled_sae.torch_impl.row_adam.CHUNK_ELEMENTS", 12 * 7)
    sae, other = make_sae(row_grads=True), make_sae()
    rows, adam = RowAdam(sae, lr=0.01, clip=None), torch.optim.Adam(other.parameters(), lr=0.01)
    for step in range(3):
        rows.zero_grad()
        adam.zero_grad()
        for s in (sae, other):
            backward(s, step)
        rows.step()
        plain_step(other, adam, None)
    assert_close(state_of(sae), state_of(other))


def test_16_bit_parameters_follow_adam():
    sae, other = make_sae(torch.bfloat16, row_grads=True), make_sae(torch.bfloat16)
    rows = RowAdam(sae, lr=0.05, clip=None)
    adam = torch.optim.Adam(other.parameters(), lr=0.05, fused=True)
    for step in range(2):
        rows.zero_grad()
        adam.zero_grad()
        for s in (sae, other):
            backward(s, step, torch.bfloat16)
        rows.step()
        plain_step(other, adam, None)
    for p, q in zip(sae.parameters(), other.parameters()):
        assert (p - q).norm() <= 0.02 * q.norm()


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


def test_the_modules_zero_grad_drops_rows():
    sae = make_sae(row_grads=True)
    backward(sae, 0)
    sae.zero_grad()
    assert sae.row_grads == []


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


def test_a_step_leaves_the_gradients_as_they_are():
    sae = make_sae(row_grads=True)
    rows = RowAdam(sae, lr=0.0, clip=None)
    backward(sae, 0)
    (sae.W_enc.square().sum() + sae.W_dec.pow(4).sum()).backward()
    norms = []
    for _ in range(2):
        rows.step()
        norms.append(float(rows.grad_norm))
    assert norms[0] == norms[1]


def test_a_wrapped_sae_is_refused():
    with pytest.raises(TypeError, match="sae=Sequential: must be a SampledSAE"):
        RowAdam(torch.nn.Sequential(make_sae()))


def test_moments_need_float32_weights():
    with pytest.raises(ValueError, match=r"moments=torch.bfloat16: needs weights in float32, these are torch.float64"):
        RowAdam(make_sae(), moments=torch.bfloat16)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "lr=-1.0: must be a finite number >= 0"),
        ({"lr": "fast"}, TypeError, "lr='fast'"),
        ({"eps": float("nan")}, ValueError, "eps=nan"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1"),
        ({"betas": (0.9, 1.5)}, ValueError, r"betas\[1\]=1.5"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\]=1.0"),
        ({"clip": -1}, ValueError, "clip=-1"),
        ({"mode": "sparse"}, ValueError, "mode='sparse'"),
        ({"moments": torch.float16}, ValueError, "moments=torch.float16"),
    ],
)
def test_bad_settings(settings, error, words):
    with pytest.raises(error, match=words):
        RowAdam(make_sae(), **settings)
