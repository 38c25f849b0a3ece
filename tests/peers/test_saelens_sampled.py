"""The `sampled` architecture against the specification, and its threshold, pool and errors."""

import pytest
import torch
from sae_lens.saes.sae import TrainingSAE
from saelens_makers import DEVICE, B, D, F, Largest, batches, dead_mask, pair, step, step_input, tokens, trainer, uneven

from sampled_sae import SampledSAEConfig, reference
from sampled_sae.integrations import saelens


def make(dtype="float64", **changes):
    settings = {"d_in": D, "d_sae": F, "k": 3, "l": 4.0, "dtype": dtype, **changes}
    torch.manual_seed(0)
    return uneven(TrainingSAE.from_dict(saelens.SampledTrainingSAEConfig(**settings).to_dict()))


def reference_step(sae, x, dead):
    """(losses, codes, gradients) of docs/method.md in dense PyTorch, selection weighted by the decoder norms."""
    c = sae.cfg
    t = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    scale = t["W_dec"].detach().norm(dim=1) if c.rescale_acts_by_decoder_norm else torch.ones_like(t["b_enc"])
    x_in = x - t["b_dec"] if c.apply_b_dec_to_input else x
    generator = torch.Generator().manual_seed(c.seed) if c.pool == "sample" else None
    rule = {"k": c.k, "l": c.l, "score": c.score, "pool": c.pool, "select": c.select, "generator": generator}
    codes = reference.sampled_topk(x_in, t["W_enc"], t["b_enc"], scale=scale, **rule)
    x_hat = reference.decode(codes / scale, t["W_dec"], t["b_dec"])
    losses = {"mse_loss": reference.reconstruction_loss(x, x_hat)}
    aux = x.new_zeros(())
    if dead is not None:
        a = reference.encode(x_in, t["W_enc"], t["b_enc"]).detach()
        scores = reference.column_scores(a * scale, c.score)
        k_aux = c.k_aux or c.d_in // 2
        weights = (x_in.detach(), t["W_enc"], t["b_enc"], t["W_dec"], dead)
        aux = reference.aux_loss(x, x_hat, *weights, k_aux=k_aux, aux_pool=c.aux_pool, scores=scores)
    losses["auxiliary_reconstruction_loss"] = c.aux_loss_coefficient * aux
    sum(losses.values()).backward()
    return losses, codes.detach(), {name: p.grad for name, p in t.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"l": 1.0},
        {"l": None},
        {"l": None, "select": "token"},
        {"select": "token"},
        {"l": 16.0, "score": "entropy"},
        {"pool": "sample", "seed": 7},
        {"score": "l2_squared", "rescale_acts_by_decoder_norm": False},
        {"score": "uniform", "apply_b_dec_to_input": False, "k": 2.5},
        {"aux_pool": 20, "k_aux": 6, "aux_loss_coefficient": 0.5},
        {"aux_pool": 20, "l": None},
        {"aux_pool": 20, "l": None, "rescale_acts_by_decoder_norm": False},
        {"aux_pool": None},
        {"impl": "reference"},
    ],
    ids=str,
)
@pytest.mark.parametrize("n_dead", [None, 60])
def test_step_equals_the_specification(changes, n_dead):
    sae, x, dead = make(**changes), tokens(dtype=torch.float64), dead_mask(n_dead)
    losses, codes, grads = reference_step(sae, x, dead)
    output, found = step(sae, x, dead)
    torch.testing.assert_close(output.feature_acts.to_dense(), codes)
    for name, loss in losses.items():
        torch.testing.assert_close(output.losses[name], loss, rtol=1e-10, atol=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-8, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"aux_pool": 20, "l": None}, {"select": "token", "l": None}], ids=str)
def test_triton_form(changes):
    """In Triton's interpreter, or on a GPU."""
    sae = make("float32", impl="triton", **changes).to(DEVICE)
    x, dead = tokens(20).to(DEVICE), dead_mask(60).to(DEVICE)
    losses, codes, grads = reference_step(sae, x, dead)
    output, found = step(sae, x, dead)
    torch.testing.assert_close(output.feature_acts.to_dense(), codes, rtol=1e-4, atol=1e-4)
    for name, loss in losses.items():
        torch.testing.assert_close(output.losses[name], loss, rtol=1e-4, atol=1e-6)
    for name, grad in grads.items():
        assert (found[name] - grad).norm() <= 1e-4 * grad.norm()
    assert float(sae.topk_threshold) > 0


@pytest.mark.parametrize("l", [1.0, 4.0, 64.0, None])
@pytest.mark.parametrize("n_dead", [None, 4096])
def test_no_dense_codes(l, n_dead):
    n, n_features = 1024, 8192  # [B, F] is far larger than a chunk of 2M elements in bfloat16
    sae = make("float32", d_in=8, d_sae=n_features, l=l)
    with Largest() as found:
        for number in range(2):
            step(sae, tokens(n, 8), dead_mask(n_dead, n_features), number)
    assert found.size < n * n_features / 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"l": None},
        {"l": None, "k": 0.01},
        {"select": "token"},
        {"pool": "sample"},
        {"pool_every": 5},
        {"aux_pool": 20},
        {"aux_pool": 20, "l": None},
        {"aux_pool": 20, "score_tokens": 0.5},
        {"aux_pool": 20, "pool_every": 5},
    ],
    ids=str,
)
def test_hooks_on_dense_activations_change_nothing(changes):
    """The dense step, which such hooks ask for, computes the same as the sparse one."""
    sparse, dense = make(**changes), make(**changes)
    dense.add_hook("hook_sae_acts_post", lambda t, hook: None)
    for number in range(12):
        x = tokens(seed=number, dtype=torch.float64)
        expected, expected_grads = step(sparse, x, dead_mask(60), number)
        output, grads = step(dense, x, dead_mask(60), number)
        torch.testing.assert_close(output.feature_acts.detach(), expected.feature_acts.to_dense())
        torch.testing.assert_close(output.loss, expected.loss)
        for name, grad in expected_grads.items():
            torch.testing.assert_close(grads[name], grad)
        torch.testing.assert_close(dense.topk_threshold, sparse.topk_threshold)


@pytest.mark.parametrize(("l", "select"), [(1.0, "batch"), (4.0, "batch"), (None, "batch"), (None, "token")])
def test_threshold_gives_l0_of_k_without_calibration(l, select):
    """The mean of BatchTopK's thresholds, whatever the pool: what is saved has about k active features a token."""
    sae = make("float32", l=l, select=select, threshold_every=5, topk_threshold_lr=0.05)
    data = batches(61, batch=200)
    run = trainer(sae, data[:60], 60 * 200, batch=200, lr=1e-4, lr_end=1e-5)
    sae = run.fit().eval()
    with torch.no_grad():
        l0 = float((sae.encode(data[60]) > 0).sum(1).float().mean())
    assert 2.4 < l0 < 3.6
    assert sae.calibrate(data[60]) == float(sae.topk_threshold)
    with torch.no_grad():
        assert int((sae.encode(data[60]) > 0).sum()) == 600
        sae.calibrate(data[60], l0=5)
        assert int((sae.encode(data[60]) > 0).sum()) == 1000


def test_threshold_starts_at_its_first_value():
    sae = make(l=None, topk_threshold_lr=0.01)
    first = step(sae, tokens(dtype=torch.float64))[0].feature_acts.values().min()
    assert float(sae.topk_threshold) == pytest.approx(float(first))
    second = step(sae, tokens(seed=2, dtype=torch.float64))[0].feature_acts.values().min()
    assert float(sae.topk_threshold) == pytest.approx(0.99 * float(first) + 0.01 * float(second))


def test_pool_is_kept_for_pool_every_steps():
    sae = make(pool_every=3, l=1.0)
    used = []
    for number in range(6):
        acts = step(sae, tokens(seed=number, dtype=torch.float64), number=number)[0].feature_acts
        used.append(set(acts.indices()[1].tolist()))
    first, second = set.union(*used[:3]), set.union(*used[3:])
    assert len(first) == len(second) == 3
    assert first != second


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("changes", [{"pool": "sample"}, {"pool_every": 3}], ids=str)
def test_encode_between_steps_changes_no_step(changes, hooked):
    """It selects as the next step would on its activations."""
    alone, watched = make(l=1.0, **changes), make(l=1.0, **changes)
    if hooked:
        watched.add_hook("hook_sae_acts_pre", lambda t, hook: None)
    for number in range(5):
        x = tokens(seed=number, dtype=torch.float64)
        codes = watched.encode(x).detach()
        watched.encode(tokens(seed=100 + number, dtype=torch.float64))
        expected, output = (step(sae, x, dead_mask(60), number)[0] for sae in (alone, watched))
        torch.testing.assert_close(output.loss, expected.loss)
        torch.testing.assert_close(codes, expected.feature_acts.to_dense())


def test_score_tokens_scores_on_a_share():
    whole, share = make(l=1.0), make(l=1.0, score_tokens=0.5)
    x = tokens(dtype=torch.float64)
    x[::2] *= 0.01
    a, b = (set(step(sae, x)[0].feature_acts.indices()[1].tolist()) for sae in (whole, share))
    assert a != b


def test_l_none_is_batchtopk():
    """Same codes and mse as the accelerated BatchTopK; only the aux loss is another."""
    _, batchtopk = pair("batchtopk", "float64", k=3)
    sampled = make(l=None)
    sampled.load_state_dict(batchtopk.state_dict())
    x = tokens(dtype=torch.float64)
    a, b = (sae.training_forward_pass(step_input(x)) for sae in (sampled, batchtopk))
    assert torch.equal(a.feature_acts.to_dense(), b.feature_acts.to_dense())
    assert torch.equal(a.losses["mse_loss"], b.losses["mse_loss"])


def test_a_pool_with_decoder_rows_of_zeros_stays_finite():
    sae = make()
    with torch.no_grad():
        sae.W_dec[3:] = 0
    output, grads = step(sae, tokens(dtype=torch.float64), dead_mask(60))
    assert output.loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads.values())


def test_evaluation_does_not_depend_on_the_batch():
    sae = make("float32")
    sae.calibrate(tokens(400))
    sae.eval()
    x = tokens(20)
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x)[:5], sae.encode(x[:5]))
        assert sae.encode(x.view(4, 5, D)).shape == (4, 5, F)
        assert sae(x).shape == x.shape


def test_every_option_of_ours_is_there():
    """Under our name, or under SAELens' where it has one; what its drivers decide is left out."""
    renamed = {"aux_coefficient": "aux_loss_coefficient", "threshold_decay": "topk_threshold_lr"}
    # dead_feature_window is the trainer's, gradients are its optimizer's, the factor is its activation scaler's
    theirs = {"dead_after", "row_grads", "input_scale"}
    # Matryoshka SAEs, transcoders and crosscoders are none of it there; its files have one rule of inference
    elsewhere = {"groups", "layers", "d_out", "skip", "output_scale", "inference", "inference_pool"}
    ours = set(SampledSAEConfig.__dataclass_fields__) - theirs - elsewhere
    assert {renamed.get(name, name) for name in ours} <= set(saelens.SampledTrainingSAEConfig.__dataclass_fields__)
    cfg, own = saelens.SampledTrainingSAEConfig(d_in=D, d_sae=F), SampledSAEConfig(d_in=D, d_sae=F, k=32)
    for name in ours - set(renamed):
        assert getattr(cfg, name) == getattr(own, name), name
    assert cfg.aux_loss_coefficient == own.aux_coefficient
    assert cfg.topk_threshold_lr == pytest.approx(1 - own.threshold_decay)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, r"k=0: must be in \(0, 160\]"),
        ({"k": 200}, "k=200: must be in"),
        ({"l": 0.5}, "l=0.5: must be a finite number >= 1"),
        ({"score": "l3"}, "score='l3': must be one of 'l2'"),
        ({"pool": "all"}, "pool='all': must be one of"),
        ({"select": "both"}, "select='both': must be one of"),
        ({"select": "token", "k": 2.5}, "select='token' keeps a whole number"),
        ({"impl": "cuda"}, "impl='cuda': must be one of"),
        ({"pool_every": 0}, "pool_every=0: must be a whole number >= 1"),
        ({"threshold_every": 0}, "threshold_every=0"),
        ({"score_tokens": 0}, r"score_tokens=0: must be a finite number in \(0, 1\]"),
        ({"aux_pool": 0}, "aux_pool=0"),
        ({"k_aux": -1}, "k_aux=-1"),
        ({"aux_loss_coefficient": -1.0}, "aux_loss_coefficient=-1.0"),
        ({"topk_threshold_lr": 2.0}, "topk_threshold_lr=2.0"),
        ({"seed": -1}, "seed=-1"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm': must be 'none'"),
    ],
    ids=str,
)
def test_bad_config(changes, message):
    with pytest.raises(ValueError, match=message):
        saelens.SampledTrainingSAEConfig(**{"d_in": D, "d_sae": F, "k": 3, **changes})


@pytest.mark.parametrize(("l0", "shape"), [(0, (B, D)), (3, (0, D)), (3, (2, 5, D))])
def test_bad_calibration(l0, shape):
    with pytest.raises(ValueError, match=f"l0={l0}"):
        make("float32").calibrate(torch.zeros(shape), l0)
