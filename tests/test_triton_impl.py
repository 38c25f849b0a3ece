"""impl="triton" against the specification: in Triton's interpreter, or on the GPU where there is one."""

import pytest
import torch
from makers import assert_same_entries, in_each_form, problem, run

pytest.importorskip("triton")


from torch.utils._python_dispatch import TorchDispatchMode

from sampled_sae import functional as F
from sampled_sae import testing
from sampled_sae.testing import NAMES, assert_matches_reference, normal, separated, whole_numbers

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
# Two tiles of features in the interpreter, the second one not full.
SMALL = (9, 5, 37)


def step_of(**rule):
    def step(x, W_enc, b_enc, W_dec, b_dec):
        codes = F.sampled_topk(x - b_dec, W_enc, b_enc, impl="triton", **rule)
        return codes, F.decode(codes, W_dec, b_dec, impl="triton")

    return step


def on_device(tensors):
    return {name: t.to(DEVICE) for name, t in tensors.items()}


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@in_each_form(RULES)
def test_step_is_no_worse_than_eager(rule, dtype, form):
    tensors = on_device(separated(normal, (19, 13, 97), dtype, least=3e-6, **rule))
    compared = assert_matches_reference(step_of(**rule), tensors, **rule)
    assert [c.name for c in compared] == ["codes", "x_hat", *(f"grad {name}" for name in NAMES)]


@pytest.mark.one_in(5)
@in_each_form([r for r in RULES if r.get("score") != "entropy"])
@pytest.mark.parametrize("shape", [(1, 1, 5), (35, 6, 70)], ids=str)
def test_exact_ties_on_whole_numbers(shape, rule, form):
    assert_matches_reference(step_of(**rule), on_device(whole_numbers(*shape)), **rule)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("maker", [testing.dead_columns, testing.heavy_tails])
@in_each_form([RULES[1], RULES[4], RULES[5]])
def test_silent_columns_and_heavy_tails(rule, maker, form):
    tensors = on_device(separated(maker, (19, 13, 97), torch.float32, least=3e-6, **rule))
    assert_matches_reference(step_of(**rule), tensors, **rule)


@in_each_form(RULES)
def test_nothing_fires(rule, form):
    t = on_device(normal(*SMALL))
    t["b_enc"].fill_(-100.0)
    codes, x_hat, _, grads = run(t, "triton", **rule)
    assert codes.count() == 0
    assert codes.smallest() == torch.inf
    assert torch.equal(x_hat, t["b_dec"].expand(9, 5))
    assert not any(grads[name].any() for name in ("W_enc", "b_enc", "W_dec"))


@pytest.mark.one_in(4)
@in_each_form(RULES)
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


@pytest.mark.one_in(3)
@pytest.mark.parametrize("l", [1e9, 40])
@pytest.mark.parametrize("select", ["batch", "token"])
def test_a_pool_of_everything_is_the_plain_selection_bit_for_bit(select, l):
    t = on_device(normal(*SMALL))
    with_pool, _, loss, grads = run(t, "triton", k=3, l=l, select=select)
    plain, _, plain_loss, plain_grads = run(t, "triton", k=3, l=None, select=select)
    assert_same_entries(with_pool, plain)
    assert torch.equal(with_pool.values, plain.values)
    assert torch.equal(loss, plain_loss)
    assert all(torch.equal(grads[name], plain_grads[name]) for name in NAMES)


@pytest.mark.one_in(2)
@in_each_form([RULES[1], RULES[4]])
def test_partial_gradients(rule, form):
    given = on_device(normal(*SMALL))
    full = run(given, "triton", **rule)[3]
    for wanted in [*[(name,) for name in NAMES], ("x", "W_dec"), ("W_enc", "b_dec")]:
        t = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in given.items()}
        _, x_hat = step_of(**rule)(*t.values())
        (t["x"] - x_hat).square().sum(-1).mean().backward()
        for name in NAMES:
            if name in wanted:
                torch.testing.assert_close(t[name].grad, full[name])
            else:
                assert t[name].grad is None


@in_each_form([RULES[1], RULES[4]])
def test_same_bits_every_run(rule, form):
    t = on_device(normal(19, 13, 97, torch.bfloat16))
    first, second = (run(t, "triton", **rule) for _ in range(2))
    assert torch.equal(first[0].values, second[0].values)
    assert all(torch.equal(first[3][name], second[3][name]) for name in NAMES)


@in_each_form([RULES[1], RULES[4]])
def test_second_derivatives_are_refused(rule, form):
    t = {name: v.requires_grad_() for name, v in on_device(normal(*SMALL)).items()}
    _, x_hat = step_of(**rule)(*t.values())
    (grad,) = torch.autograd.grad(x_hat.square().sum(), t["W_dec"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"a second derivative was asked for, .*: impl='reference'"):
        grad.square().sum().backward()


@in_each_form([{"k": 3, "l": 4}, RULES[4], RULES[5]])
@pytest.mark.slow
def test_operators_pass_opcheck(rule, monkeypatch, form):
    """Every operator of a step, as the step calls it."""
    ops, calls = torch.ops.sampled_sae, []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "sampled_sae":
                calls.append((func, [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]))
            return func(*args, **(kwargs or {}))

    t = {name: v.requires_grad_() for name, v in on_device(normal(*SMALL)).items()}
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


def test_functional_scores_and_decode_of_foreign_codes():
    t = on_device(problem(19, 13, 97, torch.float32))
    for score in ("l2", "l2_squared", "entropy", "uniform"):
        ours, theirs = (F.column_scores(t["x"], t["W_enc"], t["b_enc"], score, impl=i) for i in ("triton", "torch"))
        torch.testing.assert_close(ours, theirs)
    codes = F.sampled_topk(t["x"], t["W_enc"], t["b_enc"], k=3, l=None, impl="torch")
    for made in (codes, codes.detach()):
        ours, theirs = (F.decode(made, t["W_dec"], t["b_dec"], impl=i) for i in ("triton", "torch"))
        torch.testing.assert_close(ours, theirs)
