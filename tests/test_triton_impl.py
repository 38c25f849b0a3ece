"""impl="triton" against the specification: in Triton's interpreter, or on the GPU where there is one."""

import copy

import pytest
import torch
from makers import assert_same_entries, gradients, make_sae, problem, run, tokens
from no_host_sync import NoHostSync

pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode

from sampled_sae import functional as F
from sampled_sae import testing
from sampled_sae.testing import NAMES, assert_matches_reference, normal, separated, whole_numbers
from sampled_sae.triton_impl import layer

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = [
    {"k": 3, "l": 1},
    {"k": 3, "l": 4, "score": "entropy"},
    {"k": 2.4, "l": 3, "score": "uniform"},
    {"k": 3, "l": 4, "select": "token"},
    {"k": 3, "l": None},
    {"k": 3, "l": None, "select": "token"},
]


@pytest.fixture(params=["block", "entries"])
def form(request, monkeypatch):
    """How a pool is handled; a test's pool is far below the size at which entries take over."""
    if request.param == "entries":
        monkeypatch.setattr(layer, "BLOCK_FEATURES", 0)
    return request.param


def step_of(**rule):
    def step(x, W_enc, b_enc, W_dec, b_dec):
        codes = F.sampled_topk(x - b_dec, W_enc, b_enc, impl="triton", **rule)
        return codes, F.decode(codes, W_dec, b_dec, impl="triton")

    return step


def on_device(tensors):
    return {name: t.to(DEVICE) for name, t in tensors.items()}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_step_is_no_worse_than_eager(rule, dtype, form):
    tensors = on_device(separated(normal, (19, 13, 97), dtype, least=3e-6, **rule))
    compared = assert_matches_reference(step_of(**rule), tensors, **rule)
    assert [c.name for c in compared] == ["codes", "x_hat", *(f"grad {name}" for name in NAMES)]


@pytest.mark.parametrize("rule", [r for r in RULES if r.get("score") != "entropy"], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 5), (40, 6, 210)], ids=str)
def test_exact_ties_on_whole_numbers(shape, rule, form):
    assert_matches_reference(step_of(**rule), on_device(whole_numbers(*shape)), **rule)


@pytest.mark.parametrize("maker", [testing.dead_columns, testing.heavy_tails])
@pytest.mark.parametrize("rule", [RULES[1], RULES[4], RULES[5]], ids=str)
def test_silent_columns_and_heavy_tails(rule, maker, form):
    tensors = on_device(separated(maker, (19, 13, 97), torch.float32, least=3e-6, **rule))
    assert_matches_reference(step_of(**rule), tensors, **rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_nothing_fires(rule, form):
    t = on_device(normal(9, 5, 60))
    t["b_enc"].fill_(-100.0)
    codes, x_hat, _, grads = run(t, "triton", **rule)
    assert codes.count() == 0
    assert codes.smallest() == torch.inf
    assert torch.equal(x_hat, t["b_dec"].expand(9, 5))
    assert not any(grads[name].any() for name in ("W_enc", "b_enc", "W_dec"))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_scale(rule, form):
    scale = torch.rand(97, generator=torch.Generator().manual_seed(0)) + 0.5
    tensors = on_device(separated(normal, (19, 13, 97), torch.float32, scale.double(), **rule))
    scale = scale.to(DEVICE)
    assert_matches_reference(step_of(scale=scale, **rule), tensors, scale=scale, **rule)


def test_sampled_pool_is_that_of_the_reference(form):
    t = on_device(normal(19, 13, 97))
    for seed in range(4):
        rule = {"k": 3, "l": 4, "pool": "sample"}
        ours, theirs = (run(t, impl, seed, **rule)[0] for impl in ("triton", "reference"))
        assert_same_entries(ours, theirs)


@pytest.mark.parametrize("l", [1e9, 40])
@pytest.mark.parametrize("select", ["batch", "token"])
def test_a_pool_of_everything_is_the_plain_selection_bit_for_bit(select, l):
    t = on_device(normal(19, 13, 97))
    with_pool, _, loss, grads = run(t, "triton", k=3, l=l, select=select)
    plain, _, plain_loss, plain_grads = run(t, "triton", k=3, l=None, select=select)
    assert_same_entries(with_pool, plain)
    assert torch.equal(with_pool.values, plain.values)
    assert torch.equal(loss, plain_loss)
    assert all(torch.equal(grads[name], plain_grads[name]) for name in NAMES)


@pytest.mark.parametrize("wanted", [*[(name,) for name in NAMES], ("x", "W_dec"), ("W_enc", "b_dec")])
@pytest.mark.parametrize("rule", [RULES[1], RULES[4]], ids=str)
def test_partial_gradients(rule, wanted, form):
    t = on_device(normal(19, 13, 97))
    full = run(t, "triton", **rule)[3]
    t = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in t.items()}
    _, x_hat = step_of(**rule)(*t.values())
    (t["x"] - x_hat).square().sum(-1).mean().backward()
    for name in NAMES:
        if name in wanted:
            torch.testing.assert_close(t[name].grad, full[name])
        else:
            assert t[name].grad is None


def test_same_bits_every_run(form):
    t = on_device(normal(40, 13, 210, torch.bfloat16))
    for rule in (RULES[1], RULES[4]):
        first, second = (run(t, "triton", **rule) for _ in range(2))
        assert torch.equal(first[0].values, second[0].values)
        assert all(torch.equal(first[3][name], second[3][name]) for name in NAMES)


@pytest.mark.parametrize("rule", [RULES[1], RULES[4]], ids=str)
def test_second_derivatives_are_refused(rule, form):
    t = {name: v.requires_grad_() for name, v in on_device(normal(19, 13, 97)).items()}
    _, x_hat = step_of(**rule)(*t.values())
    (grad,) = torch.autograd.grad(x_hat.square().sum(), t["W_dec"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use impl='reference'"):
        grad.square().sum().backward()


def sae_pair(**settings):
    """The same SAE as impl="triton" and impl="torch", in float32."""
    made = [make_sae(torch.float32, impl=impl, **settings).to(DEVICE) for impl in ("triton", "torch")]
    assert [sae.impl_in_use for sae in made] == ["triton", "torch"]
    return made


MODULE_RULES = [
    {"l": 3.0},
    {"l": 3.0, "select": "token", "score": "entropy"},
    {"l": None},
    {"l": None, "select": "token"},
    {"l": 3.0, "apply_b_dec_to_input": False},
]


@pytest.mark.parametrize("rule", MODULE_RULES, ids=str)
def test_module_equals_the_torch_form_over_steps(rule, form):
    """Losses, gradients, threshold and dead counts, with the aux loss from the third step on."""
    ours, theirs = sae_pair(aux_coefficient=0.5, dead_after=25, k_aux=3, aux_pool=20, **rule)
    for seed in range(4):
        x = tokens(12, 12, dtype=torch.float32, seed=seed).to(DEVICE)
        out, expected = ours(x), theirs(x)
        assert_same_entries(out.codes, expected.codes)
        for name in ("loss", "mse", "aux", "x_hat"):
            torch.testing.assert_close(getattr(out, name), getattr(expected, name), msg=lambda m, n=name: f"{n}: {m}")
        for sae, o in ((ours, out), (theirs, expected)):
            sae.zero_grad()
            o.loss.backward()
        for name, gradient in gradients(theirs).items():
            torch.testing.assert_close(ours.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5)
        assert ours.W_enc.grad.stride() == ours.W_enc.stride()
    assert expected.aux > 0
    assert torch.equal(ours.tokens_since_active, theirs.tokens_since_active)
    assert torch.equal(ours.threshold_steps, theirs.threshold_steps)
    torch.testing.assert_close(ours.threshold, theirs.threshold)
    for sae in (ours, theirs):
        sae.calibrate(x, 3)
    torch.testing.assert_close(ours.threshold, theirs.threshold)
    ours.threshold.copy_(theirs.threshold)
    assert_same_entries(ours.eval().encode_sparse(x), theirs.eval().encode_sparse(x))
    torch.testing.assert_close(ours(x).x_hat, theirs(x).x_hat)


@pytest.mark.parametrize("aux_pool", [1, 7, 96, 1000, None])
@pytest.mark.parametrize("rule", [{"l": 3.0}, {"l": None}], ids=str)
@pytest.mark.parametrize("n_dead", [0, 1, 9, 96])
def test_aux_loss(rule, aux_pool, n_dead):
    ours, theirs = sae_pair(aux_coefficient=1.0, dead_after=50, k_aux=2, aux_pool=aux_pool, **rule)
    x = tokens(12, 12, dtype=torch.float32).to(DEVICE)
    found = []
    for sae in (ours, theirs):
        sae.tokens_since_active[:n_dead] = 50
        out = sae(x)
        if n_dead:
            out.aux.backward()
            found.append((out.aux.detach(), [sae.get_parameter(n).grad for n in ("W_enc", "b_enc", "W_dec")]))
        else:
            assert out.aux == 0
    if n_dead:
        assert found[0][0] > 0
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", MODULE_RULES[:4], ids=str)
def test_row_gradients_are_the_rows_of_the_dense_ones(rule, form):
    rows, dense = (make_sae(torch.float32, impl="triton", row_grads=keep, **rule).to(DEVICE) for keep in (True, False))
    x = tokens(5, 12, dtype=torch.float32).to(DEVICE)
    for sae in (rows, dense):
        sae(x).loss.backward()
    assert rows.W_enc.grad is rows.W_dec.grad is rows.b_enc.grad is None
    seen = set()
    for g in rows.row_grads:
        expected = dense.get_parameter(g.name).grad
        expected = expected.t() if g.name == "W_enc" else expected
        whole = torch.zeros_like(expected).index_copy_(0, g.features, g.rows.grad)
        torch.testing.assert_close(whole, expected)
        assert (g.features.diff() > 0).all()
        seen.add(g.name)
    assert seen == {"W_enc", "b_enc", "W_dec"}


def test_more_features_than_slots(monkeypatch):
    """Rows of the gradient are then chosen among the features: as many as there are slots."""
    ours, theirs = sae_pair(l=None, k=1, row_grads=True)
    x = tokens(7, 12, dtype=torch.float32).to(DEVICE)
    for sae in (ours, theirs):
        sae(x).loss.backward()
    for name in ("W_enc", "b_enc", "W_dec"):
        wholes = []
        for sae in (ours, theirs):
            p = sae.get_parameter(name).detach()
            whole = torch.zeros_like(p.t() if name == "W_enc" else p)
            (g,) = [g for g in sae.row_grads if g.name == name]
            wholes.append(whole.index_copy_(0, g.features, g.rows.grad))
        assert len(next(g for g in ours.row_grads if g.name == name).features) == 7
        torch.testing.assert_close(*wholes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", MODULE_RULES[:3], ids=str)
def test_autocast_takes_16_bit_products_and_keeps_float32_gradients(rule, form):
    ours, theirs = sae_pair(**rule)
    x = tokens(64, 12, dtype=torch.float32).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = ours(x)
    expected = theirs(x)
    assert out.x_hat.dtype == out.codes.values.dtype == torch.float32
    assert 1e-6 < abs(out.mse - expected.mse) / expected.mse < 0.02
    for o in (out, expected):
        o.loss.backward()
    for name, gradient in gradients(ours).items():
        other = theirs.get_parameter(name).grad
        assert gradient.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), other.flatten(), 0) > 0.95


@pytest.mark.slow
def test_trains_to_the_same_loss_curve_as_torch():
    """30 steps of Adam on 32 directions in 16 dimensions: losses within 1e-3 of each other at every step."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(32, 16, generator=g), dim=1)
    weights = torch.rand(30, 32, 32, generator=g) * (torch.rand(30, 32, 32, generator=g) < 0.1)
    batches = (weights @ directions).to(DEVICE)
    for rule in ({"l": 4.0}, {"l": None}):
        curves = []
        for impl in ("triton", "torch"):
            sae = make_sae(torch.float32, d_in=16, d_sae=64, k=3, impl=impl, **rule).to(DEVICE)
            optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
            losses = []
            for x in batches:
                out = sae(x)
                optimizer.zero_grad()
                out.loss.backward()
                optimizer.step()
                sae.normalize_decoder()
                losses.append(out.loss.item())
            curves.append(torch.tensor(losses))
        assert curves[0][-5:].mean() < 0.7 * curves[0][:5].mean()
        torch.testing.assert_close(*curves, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rule", MODULE_RULES, ids=str)
@pytest.mark.parametrize("dead_after", [10, 10**7])
def test_no_step_waits_for_the_device(rule, dead_after, form, monkeypatch):
    sae = make_sae(torch.float32, impl="triton", aux_coefficient=1.0, dead_after=dead_after, **rule).to(DEVICE)
    monkeypatch.setattr(sae._finite, "check", lambda x: None)
    x = tokens(12, 12, dtype=torch.float32).to(DEVICE)
    sae(x).loss.backward()
    for _ in range(2):
        with NoHostSync() as mode:
            sae(x).loss.backward()
    assert "decode_block" in mode.seen or "decode_entries" in mode.seen
    assert "sort" in mode.seen or "decode_block" in mode.seen


@pytest.mark.parametrize(
    "rule", [{"k": 3, "l": 4}, {"k": 3, "l": None}, {"k": 3, "l": None, "select": "token"}], ids=str
)
def test_operators_pass_opcheck(rule, monkeypatch, form):
    """Every operator of a step, as the step calls it."""
    ops, calls = torch.ops.sampled_sae, []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "sampled_sae":
                calls.append((func, [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]))
            return func(*args, **(kwargs or {}))

    t = {name: v.requires_grad_() for name, v in on_device(normal(9, 5, 37)).items()}
    with Record():
        _, x_hat = step_of(**rule)(*t.values())
        x_hat.square().sum().backward()
    assert len({func for func, _ in calls}) >= 4
    assert hasattr(ops, "column_statistics")
    for func, args in calls:
        leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        backward = "backward" in str(func) or str(func).split(".")[1] in (
            "column_statistics",
            "top_pool",
            "select_entries",
        )
        args = args if not backward else [a.detach() if isinstance(a, torch.Tensor) else a for a in leaves]
        torch.library.opcheck(func, tuple(args))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", [MODULE_RULES[0], MODULE_RULES[2], MODULE_RULES[3]], ids=str)
def test_a_training_step_compiles_whole(rule, backend):
    sae = make_sae(torch.float32, impl="triton", aux_coefficient=1.0, dead_after=20, **rule).to(DEVICE)
    twin = copy.deepcopy(sae)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for seed in range(3):
        x = tokens(12, 12, dtype=torch.float32, seed=seed).to(DEVICE)
        expected, found = sae(x), compiled(x)
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(found.x_hat, expected.x_hat)
        assert_same_entries(found.codes, expected.codes)
        for module, out in ((sae, expected), (twin, found)):
            module.zero_grad()
            out.loss.backward()
        for name, gradient in gradients(sae).items():
            torch.testing.assert_close(twin.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)
    assert expected.aux > 0
    for name in ("threshold", "threshold_steps", "tokens_since_active"):
        torch.testing.assert_close(sae.get_buffer(name), twin.get_buffer(name))


def test_functional_scores_and_decode_of_foreign_codes():
    t = on_device(problem(19, 13, 97, torch.float32))
    for score in ("l2", "l2_squared", "entropy", "uniform"):
        ours, theirs = (F.column_scores(t["x"], t["W_enc"], t["b_enc"], score, impl=i) for i in ("triton", "torch"))
        torch.testing.assert_close(ours, theirs)
    codes = F.sampled_topk(t["x"], t["W_enc"], t["b_enc"], k=3, l=None, impl="torch")
    for made in (codes, codes.detach()):
        ours, theirs = (F.decode(made, t["W_dec"], t["b_dec"], impl=i) for i in ("triton", "torch"))
        torch.testing.assert_close(ours, theirs)
