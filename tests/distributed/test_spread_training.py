"""Training steps of several processes against one process on all tokens, in float64."""

import gc
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from cases import batches, close, compare, rows_of, spread, start, target_of, train_alone, train_on_mesh
from no_host_sync import NoHostSync, allow_late_scalars
from torch.utils._python_dispatch import _disable_current_modes

from sampled_sae import RowAdam
from sampled_sae.distributed import ranking
from sampled_sae.distributed.gradients import Pending

BASE = {"aux_coefficient": 0.1, "dead_after": 20, "aux_pool": 7, "impl": "torch"}
COUNTS = {1: [[13], [9], [5]], 2: [[7, 6], [0, 9], [5, 0]], 3: [[4, 0, 9], [2, 3, 4], [0, 0, 5]]}
CASES = [
    ((2, 1), {"row_grads": True}, "dense"),
    ((2, 1), {"row_grads": True, "l": None}, "lazy"),
    ((3, 1), {"row_grads": True, "l": 8.0, "score": "entropy"}, "decayed"),
    ((2, 1), {"select": "token", "pool": "sample", "score": "l2_squared"}, "adam"),
    ((1, 2), {"row_grads": True}, "dense"),
    ((1, 2), {"row_grads": True, "l": None, "select": "token", "aux_pool": None}, "decayed"),
    ((1, 3), {"pool": "sample", "score": "entropy", "d_sae": 101}, "dense"),
    ((1, 2), {"select": "token", "score": "uniform", "apply_b_dec_to_input": False, "d_in": 5}, "sgd"),
    ((2, 2), {"row_grads": True, "pool_every": 2, "score_tokens": 0.5, "d_in": 33}, "lazy"),
    ((2, 2), {"l": None, "input_scale": 0.37, "d_in": 20}, "adam"),
    # a pool beyond a block: of most features, of which most are touched; and by token with processes without tokens
    ((2, 1), {"row_grads": True, "l": 14.0}, "lazy"),
    ((2, 1), {"row_grads": True, "l": 8.0, "select": "token"}, "decayed"),
    # nested reconstructions, with groups that end inside and beyond what a process holds
    ((2, 1), {"row_grads": True, "l": None, "groups": (10, 40, 96)}, "dense"),
    ((1, 3), {"groups": (10, 40, 50, 101), "d_sae": 101}, "adam"),
    ((2, 2), {"row_grads": True, "l": None, "groups": (10, 40, 96)}, "lazy"),
    # transcoders, with and without a skip
    ((3, 1), {"row_grads": True, "d_out": 7}, "decayed"),
    ((2, 1), {"row_grads": True, "l": None, "skip": True, "input_scale": 0.37, "output_scale": 0.6}, "dense"),
    ((1, 3), {"row_grads": True, "d_out": 7, "skip": True, "d_sae": 101}, "lazy"),
    ((2, 2), {"skip": True, "groups": (10, 40, 96), "l": 8.0}, "adam"),
    # processes of `feature` reduce lists of other lengths over three of `data`, where the order of a sum shows
    ((3, 2), {"row_grads": True, "skip": True, "d_in": 11}, "dense"),
    # no feature is active on any process: no row is touched, and none has a gradient
    ((2, 1), {"row_grads": True, "l": None, "silent": 100}, "lazy"),
    ((1, 2), {"l": None, "select": "token", "silent": 100}, "adam"),
    ((2, 2), {"row_grads": True, "l": 8.0, "silent": 100}, "decayed"),
    # three layers side by side, given one behind the other
    ((2, 2), {"row_grads": True, "l": 8.0, "d_in": 4, "layers": 3}, "dense"),
    ((1, 2), {"row_grads": True, "l": None, "d_in": 4, "layers": 3, "input_scale": (0.5, 2.0, 1.0)}, "lazy"),
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("shape", "rule", "kind"), CASES, ids=str)
def test_ten_steps_are_those_of_one_process(workers, shape, rule, kind):
    settings, counts = {**BASE, **rule}, COUNTS[shape[0]]
    ranks = workers.run(shape[0] * shape[1], train_on_mesh, shape, settings, counts, 10, kind)
    alone = train_alone(settings, counts, 10, kind)
    assert any(line["aux"] > 0 for line in alone["lines"])
    compare(alone, ranks, counts)


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((2, 1), {"row_grads": True}),
        ((1, 3), {"d_sae": 101, "score_tokens": 0.5}),
        ((2, 2), {"pool": "sample", "score": "l2_squared", "row_grads": True}),
        pytest.param((3, 1), {"l": None, "row_grads": True}, marks=pytest.mark.slow),
        pytest.param((1, 2), {"l": 14.0, "select": "token"}, marks=pytest.mark.slow),
        pytest.param((2, 1), {"score": "uniform"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_steps_with_a_screen_are_those_of_one_process_without(workers, shape, rule):
    settings, counts = {**BASE, **rule, "dtype": torch.float32}, COUNTS[shape[0]]
    ranks = workers.run(shape[0] * shape[1], train_on_mesh, shape, {**settings, "screen": "bf16"}, counts, 8, "dense")
    alone = train_alone({**settings, "screen": "off"}, counts, 8, "dense")
    assert any(line["aux"] > 0 for line in alone["lines"])
    compare(alone, ranks, counts, 1e-5, 1e-4)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("rule", [{"l": None}, {"l": 8.0}], ids=str)
def test_a_batch_whose_budget_is_zero_leaves_no_trace(workers, shape, rule):
    """One token of which a third of an entry may be kept, between larger batches."""
    settings = {**BASE, **rule, "k": 0.3, "row_grads": True, "dtype": torch.float32}
    counts = [[9], [1], [5]] if shape[0] == 1 else [[5, 4], [0, 1], [5, 0]]
    alone = train_alone(settings, counts, 6, "dense")
    assert [len(line["tokens"]) for line in alone["lines"][:3]] == [3, 0, 2]
    compare(alone, workers.run(2, train_on_mesh, shape, settings, counts, 6, "dense"), counts, 1e-5, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("i", "kind"), enumerate(["dense", "lazy", "decayed", "adam"]))
@pytest.mark.parametrize(("j", "rule"), enumerate([{}, {"l": None}, {"l": None, "select": "token"}, {"l": 8.0}]))
def test_every_optimizer_by_every_rule_and_on_every_mesh(workers, i, kind, j, rule):
    shape = [(2, 1), (1, 2), (2, 2)][(i + j) % 3]
    settings, counts = {**BASE, **rule, "row_grads": kind != "adam"}, COUNTS[shape[0]]
    ranks = workers.run(shape[0] * shape[1], train_on_mesh, shape, settings, counts, 5, kind)
    compare(train_alone(settings, counts, 5, kind), ranks, counts)


# the pools and pairs of one process without a screen
SCREENED = {"screen": "bf16"}
TRITON = [
    ((2, 1), SCREENED, "dense"),
    ((2, 1), {"l": None, **SCREENED}, "dense"),
    ((1, 2), {"select": "token", **SCREENED}, "dense"),
    ((1, 2), {"l": None, "groups": (10, 50, 96)}, "dense"),
    ((1, 2), {"groups": (10, 50, 96)}, "dense"),
    ((2, 1), {"score": "l2_squared", "pool": "sample", **SCREENED}, "lazy"),
    ((2, 1), {"score": "uniform", "score_tokens": 0.5, "select": "token", **SCREENED}, "decayed"),
    ((2, 1), {"l": None, "select": "token"}, "decayed bfloat16"),
    ((1, 2), {"score": "entropy", "pool": "sample", "pool_every": 2}, "dense bfloat16"),
    ((1, 2), {"aux_pool": None, "score_tokens": 0.5, **SCREENED}, "lazy"),
    ((2, 1), {"aux_pool": None, "score": "entropy", "row_grads": False}, "adam"),
    ((2, 2), {"score": "l2_squared", "pool_every": 2}, "decayed"),
    ((2, 2), {"pool": "sample", **SCREENED}, "dense"),
    ((2, 2), {"l": None, "row_grads": False}, "sgd"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "rule", "kind"), TRITON, ids=str)
def test_the_triton_form(workers, shape, rule, kind):
    settings = {**BASE, "impl": "triton", "dtype": torch.float32, "dead_after": 4, "row_grads": True, **rule}
    counts = [[3, 2], [0, 4]] if shape[0] == 2 else [[5], [4]]
    ranks = workers.run(shape[0] * shape[1], train_on_mesh, shape, settings, counts, 2, kind)
    alone = train_alone({**settings, "screen": "off"}, counts, 2, kind)
    assert any(line["aux"] > 0 for line in alone["lines"])
    compare(alone, ranks, counts, 1e-4, 1e-3)


def with_room_and_without(shape, settings, counts, kind):
    """Steps whose pools have all places on each process, and steps that wait for how many are needed."""
    with pytest.MonkeyPatch.context() as patch:
        room = train_on_mesh(shape, settings, counts, 2, kind)
        patch.setattr(ranking, "MOST_ROOM", 0)
        return room, train_on_mesh(shape, settings, counts, 2, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lazy", "dense"])
def test_places_that_a_pool_leaves_free_change_nothing(workers, kind):
    """Neither pools, pairs, gradients and moments, nor which rows an optimizer moves."""
    counts = [[3, 2], [0, 4]]
    settings = {**BASE, "impl": "triton", "dtype": torch.float32, "dead_after": 4, "row_grads": True, "pool_every": 2}
    results = workers.run(4, with_room_and_without, (2, 2), settings, counts, kind)
    rooms, exact = zip(*results)
    compare({"lines": [], "state": exact[0]["state"]}, rooms, counts, 1e-5)
    for room, other in results:
        for line, of_other in zip(room["lines"], other["lines"]):
            for name, value in line.items():
                close(value, of_other[name], name, 1e-5)


def accumulate(sae, parts, rank):
    """Gradients of two batches together, of x too, through a loss that is not the SAE's own."""
    total, x_gradients = 0, []
    for of_step in parts:
        x = (torch.cat(of_step) if rank is None else of_step[rank]).clone().requires_grad_()
        out = sae(x, target_of(sae, x))
        loss = out.loss * 3
        loss.backward()
        x_gradients.append(x.grad)
        total += float(loss.detach())
    return {name: rows_of(sae, name).clone() for name, _ in sae.named_parameters()}, x_gradients, total


def accumulate_on_mesh(shape, settings, counts):
    sae, rank = spread(shape, settings)
    return rank, sae.layout.weights.first, accumulate(sae, batches(counts, 2), rank)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("rule", [{"row_grads": True}, {}, {"d_out": 5, "skip": True}], ids=str)
def test_gradients_add_up_and_reach_the_input(workers, shape, rule):
    settings, counts = {"impl": "torch", "l": 2.0, **rule}, COUNTS[shape[0]]
    expected, of_x, total = accumulate(start(settings), batches(counts, 2), None)
    for rank, first, (found, of_ours, ours) in workers.run(2, accumulate_on_mesh, shape, settings, counts):
        close(torch.tensor(ours, dtype=torch.float64), torch.tensor(total, dtype=torch.float64), "loss", 1e-12)
        for name, gradient in expected.items():
            part = gradient if name in ("b_dec", "W_skip") else gradient[first : first + len(found[name])]
            close(found[name], part, name, 1e-12)
        for step, gradient in enumerate(of_x):
            start_at = sum(counts[step][:rank])
            close(of_ours[step], gradient[start_at : start_at + counts[step][rank]], "x", 1e-12)


def left_behind(shape, settings):
    """Rows that are still held when steps are over, one with its backward pass and one without.

    What was reduced is kept, as a process group may do for a moment: from another thread, or until a device is done.
    """
    sae, rank = spread(shape, settings)
    sent, all_reduce = [], dist.all_reduce

    def send(t, *how, **named):
        sent.append(t)
        return all_reduce(t, *how, **named)

    x = batches(COUNTS[shape[0]], 1)[0][rank]
    gc.collect()
    gc.disable()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", send)
        sae(x).loss.backward()
        sae.zero_grad()
        sae(x)
        sae.zero_grad()
    held = [found for found in gc.get_objects() if isinstance(found, Pending)]
    gc.enable()
    assert sent
    return len(held)


@pytest.mark.parametrize("row_grads", [True, False])
def test_a_step_leaves_nothing_behind(workers, row_grads):
    assert workers.run(2, left_behind, (2, 1), {"impl": "torch", "l": None, "row_grads": row_grads}) == [0, 0]


def steps_without_waiting(shape, settings):
    """Fails at an operation that waits for a device. Hosts tell each other their numbers."""
    sae, rank = spread(shape, settings)
    sae.memory.inputs.check = lambda x: None
    optimizer = RowAdam(sae)
    parts = batches([[5, 3] if shape[0] == 2 else [6]], 3, dtype=torch.float32)
    exchange = sae.layout.mesh.exchange

    def between_hosts(*what):
        with _disable_current_modes():
            return exchange(*what)

    sae.layout.mesh.exchange = between_hosts
    with pytest.MonkeyPatch.context() as patch:
        allow_late_scalars(patch)
        waiting = NoHostSync()
        for step, of_step in enumerate(parts):
            with waiting if step else nullcontext():
                out = sae(of_step[rank])
                out.loss.backward()
                optimizer.step()
            optimizer.zero_grad()
    return float(out.aux), waiting.seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((2, 1), {"select": "batch", **SCREENED}),
        ((2, 1), {"select": "token", "pool": "sample", "score_tokens": 0.5}),
        ((1, 2), {"select": "batch", **SCREENED}),
        ((1, 2), {"select": "token"}),
        ((1, 2), {"select": "batch", "l": None, **SCREENED}),
        ((1, 2), {"select": "token", "l": None, **SCREENED}),
        ((2, 2), {"pool": "sample", "score": "entropy", "score_tokens": 0.5}),
    ],
    ids=str,
)
def test_no_step_waits_for_the_device(workers, shape, rule):
    """But for the union of touched rows over `data` without a pool."""
    settings = {**BASE, "impl": "triton", "dtype": torch.float32, "dead_after": 8, "row_grads": True, **rule}
    for aux, seen in workers.run(shape[0] * shape[1], steps_without_waiting, shape, settings):
        assert aux > 0
        # of a pool, and of dead features
        assert ("open_columns" in seen) == ("screen" in rule)
