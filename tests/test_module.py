"""`SampledSAE` as a module: training, evaluation, calibration, dead features, copies, files' neighbours."""

import copy

import pytest
import torch
from makers import RULES, TOPK, gradients, make_sae, tokens

from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig, SparseCodes
from sampled_sae.impl.start import geometric_median
from sampled_sae.testing import NAMES

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def test_parameters_and_initial_values():
    sae = SampledSAE(SampledSAEConfig(d_in=12, d_sae=96, k=4, seed=5))
    assert {n: tuple(p.shape) for n, p in sae.named_parameters()} == {
        "W_enc": (12, 96),
        "b_enc": (96,),
        "W_dec": (96, 12),
        "b_dec": (12,),
    }
    assert torch.equal(sae.W_enc, sae.W_dec.t())
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert sae.W_enc.t().is_contiguous()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(96))
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    assert sae.impl_in_use == "torch"
    assert "d_sae=96" in repr(sae)
    same = SampledSAE(SampledSAEConfig(d_in=12, d_sae=96, k=4, seed=5))
    other = SampledSAE(SampledSAEConfig(d_in=12, d_sae=96, k=4, seed=6))
    assert torch.equal(sae.W_dec, same.W_dec)
    assert not torch.equal(sae.W_dec, other.W_dec)


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (1, 1, 1, 12)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_forward_shapes(shape, training):
    sae = make_sae().train(training)
    x = tokens(*shape)
    out = sae(x)
    assert out.x_hat.shape == x.shape
    assert out.codes.shape == (x.numel() // 12, 96)
    assert out.loss.shape == out.mse.shape == out.aux.shape == ()
    assert sae.encode(x).shape == (*shape[:-1], 96)
    assert sae.decode(sae.encode(x)).shape == x.shape
    assert isinstance(sae.encode_sparse(x), SparseCodes)
    torch.testing.assert_close(sae.decode(out.codes).view(shape), out.x_hat)
    torch.testing.assert_close(sae.decode(sae.encode(x)), out.x_hat)
    torch.testing.assert_close(out.mse, (x - out.x_hat).square().sum(-1).mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_training_step_equals_the_reference(rule, dtype):
    x = tokens(20, 12, dtype=dtype)
    outs, grads = [], []
    for impl in ("torch", "reference"):
        sae = make_sae(dtype, impl=impl, **rule)
        leaf = x.clone().requires_grad_()
        out = sae(leaf)
        out.loss.backward()
        outs.append(out)
        grads.append({**gradients(sae), "x": leaf.grad})
        assert out.x_hat.dtype == dtype
        assert set(grads[-1]) == set(NAMES)
    ours, theirs = outs
    tolerance = TOLERANCE if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    assert torch.equal(ours.codes.to_dense() > 0, theirs.codes.to_dense() > 0)
    torch.testing.assert_close(ours.loss, theirs.loss, **tolerance)
    if dtype == torch.bfloat16:
        tolerance = {"rtol": 2**-6, "atol": 2**-7}
    for name in NAMES:
        torch.testing.assert_close(grads[0][name], grads[1][name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("aux_pool", [None, 7, 1000])
@pytest.mark.parametrize("rule", RULES[::2], ids=str)
@pytest.mark.parametrize("row_grads", [False, True])
def test_aux_loss_equals_the_reference(rule, aux_pool, row_grads):
    x, settings = tokens(20, 12), {"aux_coefficient": 0.5, "dead_after": 100, "aux_pool": aux_pool, **rule}
    found = {}
    for impl in ("torch", "reference"):
        sae = make_sae(impl=impl, row_grads=row_grads and impl == "torch", **settings)
        sae.tokens_since_active[::3] = 100
        dead = sae.dead
        out = sae(x)
        torch.testing.assert_close(out.loss, out.mse + 0.5 * out.aux)
        out.loss.backward()
        for part in sae.row_grads:
            p = getattr(sae, part.name)
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            (p.grad.t() if part.name == "W_enc" else p.grad).index_add_(0, part.features, part.rows.grad)
        found[impl] = out.aux.detach(), gradients(sae), out.codes.active_features()
    assert found["torch"][0] > 0
    torch.testing.assert_close(found["torch"][0], found["reference"][0], **TOLERANCE)
    for name in NAMES[1:]:
        torch.testing.assert_close(found["torch"][1][name], found["reference"][1][name], **TOLERANCE)
    unselected = dead.index_fill(0, found["torch"][2], False)
    reached = found["torch"][1]["W_enc"][:, unselected].any(0)
    if aux_pool == 7:
        assert reached.sum() <= 7
    else:
        assert reached.any()
        assert torch.equal(reached, (found["reference"][1]["b_enc"] != 0)[unselected])


def test_aux_is_off_without_dead_features_and_in_evaluation():
    sae = make_sae(aux_coefficient=1.0, dead_after=5)
    assert sae(tokens(3, 12)).aux == 0
    sae.tokens_since_active.fill_(5)
    assert sae(tokens(3, 12)).aux > 0
    sae.tokens_since_active.fill_(5)
    assert sae.eval()(tokens(3, 12)).aux == 0
    assert (sae.tokens_since_active == 5).all()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_row_gradients_equal_dense_gradients(rule):
    x, saes = tokens(20, 12), [make_sae(row_grads=row_grads, **rule) for row_grads in (True, False)]
    for sae in saes:
        sae(x).loss.backward()
    rows, dense = saes[0], saes[1]
    assert [getattr(rows, name).grad for name in ("W_enc", "b_enc", "W_dec")] == [None] * 3
    assert dense.row_grads == []
    torch.testing.assert_close(rows.b_dec.grad, dense.b_dec.grad)
    for part in rows.row_grads:
        full = getattr(dense, part.name).grad
        full = full.t() if part.name == "W_enc" else full
        torch.testing.assert_close(part.rows.grad, full[part.features], **TOLERANCE)
        outside = torch.ones(len(full), dtype=torch.bool).index_fill(0, part.features, False)
        assert not full[outside].any()


def test_dead_features_are_counted_in_tokens():
    sae, since = make_sae(dead_after=40), torch.zeros(96, dtype=torch.int64)
    for seed in range(4):
        active = sae(tokens(3, 5, 12, seed=seed)).codes.active_features()
        since = (since + 15).index_fill(0, active, 0)
        assert torch.equal(sae.tokens_since_active, since)
        assert torch.equal(sae.dead, since >= 40)
    assert 0 < sae.dead.sum() < 96
    state = copy.deepcopy(sae.state_dict())
    sae.eval()(tokens(3, 12))
    assert all(torch.equal(value, state[name]) for name, value in sae.state_dict().items())


@pytest.mark.parametrize("rule", [{"l": None}, {"l": 20.0, "k": 2}])
def test_the_hint_of_the_last_batch_changes_nothing(rule):
    sae = make_sae(**rule)
    fresh = [make_sae(**rule)(tokens(16, 12, seed=seed) * size) for seed, size in ((0, 1.0), (1, 9.0), (2, 0.01))]
    for seed, (size, expected) in enumerate(zip((1.0, 9.0, 0.01), fresh)):
        out = sae(tokens(16, 12, seed=seed) * size)
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(out.codes.features, expected.codes.features)


def test_no_grad_leaves_nothing_behind():
    sae = make_sae(row_grads=True)
    with torch.no_grad():
        out = sae(tokens(4, 12))
    assert not out.loss.requires_grad
    assert sae.row_grads == []


def test_the_default_device_is_taken():
    with torch.device("meta"):
        sae = SampledSAE(SampledSAEConfig(d_in=4, d_sae=8, k=2))
    assert {t.device.type for t in (*sae.parameters(), *sae.buffers())} == {"meta"}


def test_normalise_and_project():
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec.mul_(3)
    sae.W_dec.grad = tokens(96, 12)
    sae.project_decoder_grad()
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(96).double())
    assert sae.W_dec.grad.norm() > 1
    sae.normalize_decoder()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(96).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", [{"l": 4.0}, {"l": None}, {"l": None, "select": "token", "input_scale": 0.5}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_autocast_takes_16_bit_activations(dtype, rule, training):
    """As if they had been converted before; without autocast they are an error."""
    sae = make_sae(torch.float32, **rule)
    sae.calibrate(tokens(50, 12, dtype=torch.float32))
    twin = copy.deepcopy(sae.train(training))
    x = tokens(3, 10, 12, dtype=dtype)
    with pytest.raises(ValueError, match="mixed dtypes: x torch"):
        sae(x)
    expected = twin(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        out = sae(x)
        assert torch.equal(sae.encode(x), twin.encode(x.float()).to(dtype))
        assert sae.calibrate(x) == twin.calibrate(x.float())
    assert out.x_hat.dtype == dtype
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.x_hat, expected.x_hat.to(dtype))
    out.loss.backward()
    expected.loss.backward()
    for name, gradient in gradients(twin).items():
        assert gradient.dtype == torch.float32
        assert torch.equal(sae.get_parameter(name).grad, gradient)


def test_initial_b_dec_is_the_geometric_median():
    corners = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).double()
    outlier = torch.tensor([[0.0, 0.0], [1e6, 1e6]]).double()
    torch.testing.assert_close(geometric_median(corners + 5), torch.tensor([5.0, 5.0]).double(), rtol=0, atol=1e-5)
    assert geometric_median(torch.cat((corners, outlier))).norm() < 1
    x = tokens(200, 12) + 3
    sae = make_sae()
    sae.init_b_dec(x.view(10, 20, 12))

    def distance(point):
        return (x - point).norm(dim=1).sum()

    found = sae.b_dec.detach()
    assert distance(found) < distance(x.mean(0))
    for step in 0.01 * torch.eye(12, dtype=torch.float64):
        assert distance(found) <= min(distance(found + step), distance(found - step))


def test_reference_and_torch_train_alike():
    saes = [make_sae(impl=impl, aux_coefficient=1 / 32, dead_after=60) for impl in ("torch", "reference")]
    optimizers = [RowAdam(sae, lr=0.01) for sae in saes]
    for step in range(12):
        losses = []
        for sae, optimizer in zip(saes, optimizers):
            optimizer.zero_grad()
            losses.append(sae(tokens(20, 12, seed=step)).loss)
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(*losses, rtol=1e-8, atol=0)
    assert saes[0].dead.any()
    assert torch.equal(saes[0].tokens_since_active, saes[1].tokens_since_active)


@pytest.mark.parametrize("rule", [{"l": 4.0}, {"l": None}, TOPK, {"l": None, "groups": (10, 40, 96)}], ids=str)
def test_a_penalty_on_the_gradient_is_right_or_refused(rule):
    """Beside a loss that has a gradient anyway: left out, the penalty would be missing in silence."""
    x = tokens(4, 12).requires_grad_()
    reference = make_sae(impl="reference", **rule)
    assert torch.autograd.gradgradcheck(lambda x: reference(x).loss, x)
    sae = make_sae(**rule)
    loss = sae(x).loss
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative was asked for"):
        (loss + first.square().sum()).backward()
