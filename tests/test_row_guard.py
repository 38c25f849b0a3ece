"""With row_grads=True what would train a part of the SAE, or on gradients of another scale, is refused."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from makers import make_sae, state_of, tokens
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrize
from torch.optim.swa_utils import AveragedModel

from sampled_sae import RowAdam
from sampled_sae.impl import row_guard


def assert_same(a, b):
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def backward(sae, seed=0):
    loss = sae(tokens(9, 12, seed=seed)).loss
    loss.backward()
    return loss


OTHERS = {
    "adam": lambda sae: torch.optim.Adam(sae.parameters(), lr=0.1),
    "adamw": lambda sae: torch.optim.AdamW(sae.parameters(), lr=0.1, foreach=True),
    "sgd": lambda sae: torch.optim.SGD(sae.parameters(), lr=0.1),
    "adagrad": lambda sae: torch.optim.Adagrad(sae.parameters(), lr=0.1),
    "subset": lambda sae: torch.optim.SGD([sae.W_dec], lr=0.1),
    "groups": lambda sae: torch.optim.Adam([{"params": [sae.b_dec]}, {"params": [sae.W_enc, sae.b_enc], "lr": 1e-3}]),
    "with_others": lambda sae: torch.optim.Adam([*nn.Linear(2, 2).parameters(), *sae.parameters()]),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("whose_zero_grad", ["optimizer", "module"])
def test_another_optimizer_is_refused_before_it_moves_anything(name, whose_zero_grad):
    sae = make_sae(row_grads=True)
    optimizer = OTHERS[name](sae)
    before = state_of(sae)
    (optimizer if whose_zero_grad == "optimizer" else sae).zero_grad()
    backward(sae)
    with pytest.raises(RuntimeError, match=r"row_grads=True: .*set row_grads=False, or use sampled_sae.RowAdam\(sae\)"):
        optimizer.step()
    assert_same(before, state_of(sae))


@pytest.mark.parametrize("make", [lambda p: torch.optim.LBFGS(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)])
def test_another_optimizer_with_a_closure_is_refused_in_its_first_step(make):
    sae = make_sae(row_grads=True)
    optimizer = make(sae.parameters())

    def closure():
        optimizer.zero_grad()
        return backward(sae)

    with pytest.raises(RuntimeError, match="does not see the gradient of"):
        optimizer.step(closure)


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizer_is_refused_where_the_rows_were_dropped_before_backward(name):
    sae = make_sae(row_grads=True)
    optimizer = OTHERS[name](sae)
    before = state_of(sae)
    loss = sae(tokens(9, 12)).loss
    sae.zero_grad()
    loss.backward()
    with pytest.raises(RuntimeError, match="does not see the gradient of"):
        optimizer.step()
    assert_same(before, state_of(sae))


def test_other_optimizers_of_other_parameters_step():
    sae, model = make_sae(row_grads=True), nn.Linear(12, 12)
    bias, other = torch.optim.SGD([sae.b_dec], lr=0.1), torch.optim.Adam(model.parameters())
    backward(sae)
    bias.step()
    other.step()


def test_another_optimizer_steps_without_rows():
    sae = make_sae()
    optimizer = torch.optim.Adam(sae.parameters())
    before = state_of(sae)
    for seed in range(2):
        optimizer.zero_grad()
        backward(sae, seed)
        optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in sae.named_parameters())


def test_gradients_are_accumulated_for_rowadam():
    """Several backward passes, one step: as with dense gradients."""
    sae, dense = make_sae(row_grads=True), make_sae()
    optimizers = RowAdam(sae), RowAdam(dense)
    for step in range(2):
        for layer, optimizer in zip((sae, dense), optimizers):
            optimizer.zero_grad()
            for micro in range(3):
                backward(layer, 3 * step + micro)
            optimizer.step()
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p, dense.get_parameter(name))


EDITS = {
    "clip_grad_norm_": lambda sae: clip_grad_norm_(sae.parameters(), 1e-3),
    "a norm below the bound": lambda sae: clip_grad_norm_(sae.parameters(), 1e9),
    "clip_grad_value_": lambda sae: clip_grad_value_(sae.parameters(), 1e-3),
    "division": lambda sae: [p.grad.div_(4) for p in sae.parameters() if p.grad is not None],
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("copied", [False, True])
def test_what_edits_dense_gradients_alone_is_refused(edit, copied):
    sae = make_sae(row_grads=True)
    optimizer = RowAdam(sae)
    if copied:
        sae, optimizer = copy.deepcopy((sae, optimizer))
    before = state_of(sae)
    for seed in range(2):
        backward(sae, seed)
    EDITS[edit](sae)
    with pytest.raises(RuntimeError, match=r"b_dec.grad was changed after backward .*sae.row_grads were not"):
        optimizer.step()
    assert_same(before, state_of(sae))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_steps_and_zeroed_gradients_are_no_edits(set_to_none):
    sae = make_sae(row_grads=True)
    optimizer = RowAdam(sae)
    for seed in range(3):
        optimizer.zero_grad(set_to_none)
        backward(sae, seed)
        optimizer.step()
        optimizer.step()
    sae.b_dec.requires_grad_(False)
    RowAdam(sae)


@pytest.mark.parametrize("unscale", [False, True])
def test_gradscaler_is_refused(unscale):
    sae = make_sae(torch.float32, row_grads=True)
    optimizer, scaler = RowAdam(sae), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = state_of(sae)
    scaler.scale(sae(tokens(9, 12, dtype=torch.float32)).loss).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(
        RuntimeError, match="row_grads=True: GradScaler does not unscale row gradients; set row_grads=False"
    ):
        scaler.step(optimizer)
    assert_same(before, state_of(sae))


@pytest.mark.parametrize("scale", [1024.0, 0.5])
def test_what_a_gradscaler_unscales_without_stepping_is_refused(scale):
    """`unscale_` writes into gradients and leaves their version as it was."""
    sae = make_sae(torch.float32, row_grads=True)
    optimizer, scaler = RowAdam(sae), torch.amp.GradScaler("cpu", init_scale=scale)
    before = state_of(sae)
    scaler.scale(sae(tokens(9, 12, dtype=torch.float32)).loss).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"b_dec.grad was changed after backward .*unscale_"):
        optimizer.step()
    assert_same(before, state_of(sae))


def test_gradscaler_with_dense_gradients_or_switched_off():
    results = []
    for row_grads, scale in ((False, 1024.0), (True, None), (False, None)):
        sae = make_sae(torch.float32, row_grads=row_grads)
        optimizer = RowAdam(sae)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        scaler.scale(sae(tokens(9, 12, dtype=torch.float32)).loss).backward()
        scaler.step(optimizer)
        results.append(state_of(sae))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)
        torch.testing.assert_close(results[2][name], value)


def ddp_worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=1)
    sae = make_sae(row_grads=True)
    ddp = DistributedDataParallel(sae, find_unused_parameters=True)
    try:
        ddp(tokens(9, 12))
    except RuntimeError as error:
        (folder / "error").write_text(str(error))
    backward(sae)  # the module itself, outside of DDP
    assert sae.row_grads
    os._exit(0)  # torch 2.13 can hang in DDP's destructor


def test_ddp_is_refused(tmp_path):
    multiprocessing.spawn(ddp_worker, args=(tmp_path,), nprocs=1)
    assert "DistributedDataParallel does not reduce row gradients" in (tmp_path / "error").read_text()


def test_weights_that_are_not_the_modules_are_refused():
    sae, x = make_sae(row_grads=True), tokens(9, 12)
    weights = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    with pytest.raises(RuntimeError, match=r"W_enc is no parameter of the module here \(functional_call"):
        torch.func.functional_call(sae, weights, (x,))
    with pytest.raises(RuntimeError, match="set row_grads=False"):
        torch.func.grad(lambda w: torch.func.functional_call(sae, w, (x,)).loss)(weights)
    parametrize.register_parametrization(sae, "W_dec", nn.Softplus())
    with pytest.raises(RuntimeError, match="W_dec is no parameter of the module here"):
        sae(x)
    dense = make_sae()
    loss = torch.func.functional_call(dense, weights, (x,)).loss
    assert all(bool(g.any()) for g in torch.autograd.grad(loss, list(weights.values())))


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradient_hooks_that_rows_would_not_call_are_refused(register):
    sae = make_sae(row_grads=True)
    handle = getattr(sae.W_enc, register)(lambda grad: None)
    with pytest.raises(RuntimeError, match="row_grads=True: row gradients do not call the hooks on W_enc"):
        sae(tokens(9, 12))
    handle.remove()
    backward(sae)


def test_replaced_parameters_are_refused():
    sae = make_sae(row_grads=True)
    optimizer = RowAdam(sae)
    sae.load_state_dict({name: t.clone() for name, t in sae.state_dict().items()}, assign=True)
    backward(sae)
    with pytest.raises(RuntimeError, match=r"sae.W_\w+ was replaced since; make a new RowAdam\(sae\)"):
        optimizer.step()


def test_averaged_models_are_copies_of_their_own():
    sae = make_sae(row_grads=True)
    optimizer = RowAdam(sae, lr=0.1)
    averaged = AveragedModel(sae, avg_fn=lambda average, new, n: (average + new) / 2)
    averaged.update_parameters(sae)
    first = state_of(sae)
    backward(sae)
    optimizer.step()
    averaged.update_parameters(sae)
    for name, p in averaged.module.named_parameters():
        torch.testing.assert_close(p, (first[name] + sae.get_parameter(name)) / 2)
    assert averaged.module.row_grads == []


def test_what_is_gone_is_not_watched():
    sae = make_sae(row_grads=True)
    backward(sae)
    assert sae in row_guard.LAYERS
    count = len(row_guard.LAYERS)
    del sae
    assert len(row_guard.LAYERS) < count
