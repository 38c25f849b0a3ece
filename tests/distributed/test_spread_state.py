"""States of an SAE over a mesh: saved, loaded whole, and through torch.distributed.checkpoint at another layout."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import batches, mesh_of, optimizer_of, spread, start, state, train, train_alone
from makers import D, write_store
from torch.utils._python_dispatch import TorchDispatchMode

from sampled_sae import ActivationStore, SampledSAE, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.distributed import parallelize
from sampled_sae.pretrained import TENSORS
from sampled_sae.training import resuming, training_run

SETTINGS = {"l": 3.0, "impl": "torch", "row_grads": True}
COUNTS = {1: [[11]], 2: [[7, 4]]}


def trained(shape, steps, folder):
    """Trains over a mesh, saves in both forms; the whole state at the end."""
    sae, rank = spread(shape, SETTINGS)
    optimizer = optimizer_of(sae, "decayed")
    train(sae, batches(COUNTS[shape[0]], steps), "decayed", rank, optimizer)
    sae.save_pretrained(folder / "one")
    dcp.save({"sae": sae.state_dict(), "optimizer": moments(optimizer)}, checkpoint_id=folder / "sharded")
    return state(sae)


def moments(optimizer):
    return {str(i): state for i, state in optimizer.state_dict()["state"].items()}


def resumed(shape, steps, folder):
    """Goes on at another layout from the sharded checkpoint."""
    sae, rank = spread(shape, {**SETTINGS, "seed": 1})
    optimizer = optimizer_of(sae, "decayed")
    data = batches(COUNTS[shape[0]], steps)
    train(sae, data[:1], "decayed", rank, optimizer)  # so that the moments exist
    held = {"sae": sae.state_dict(), "optimizer": moments(optimizer)}
    dcp.load(held, checkpoint_id=folder / "sharded")
    sae.load_state_dict(held["sae"])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {int(i): s for i, s in held["optimizer"].items()}, "param_groups": groups})
    train(sae, data[steps // 2 :], "decayed", rank, optimizer)
    return state(sae)


@pytest.mark.parametrize(("before", "after"), [((2, 1), (1, 2)), ((1, 2), (2, 1))], ids=str)
def test_a_checkpoint_goes_on_at_another_layout(workers, tmp_path, before, after):
    expected = train_alone(SETTINGS, COUNTS[after[0]], 6, "decayed")["state"]
    saved = workers.run(2, trained, before, 3, tmp_path)
    one = SampledSAE.from_pretrained(tmp_path / "one")
    for name in TENSORS:
        for found in saved:
            assert torch.equal(one.state_dict()[name], found[name]), name
    for found in workers.run(2, resumed, after, 6, tmp_path):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-12)


def from_whole(shape, states, steps):
    sae, rank = spread(shape, {**SETTINGS, "seed": 1})
    optimizer = optimizer_of(sae, "decayed")
    sae.load_state_dict(states["sae"])
    optimizer.load_state_dict(states["optimizer"])
    train(sae, batches(COUNTS[shape[0]], steps)[steps // 2 :], "decayed", rank, optimizer)
    return state(sae)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=str)
def test_the_state_of_one_process_goes_on_over_a_mesh(workers, shape):
    sae = start(SETTINGS)
    optimizer = optimizer_of(sae, "decayed")
    data = batches(COUNTS[shape[0]], 6)
    train(sae, data[:3], "decayed", None, optimizer)
    results = workers.run(2, from_whole, shape, {"sae": sae.state_dict(), "optimizer": optimizer.state_dict()}, 6)
    train(sae, data[3:], "decayed", None, optimizer)
    for found in results:
        for name, value in state(sae).items():
            torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-12)


def full_disk(shape, folder):
    sae, _ = spread(shape, SETTINGS)
    (folder / "file").write_text("in the way")
    try:
        sae.save_pretrained(folder / "file")
    except OSError as error:
        return str(error)
    return None


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=str)
def test_what_the_first_process_cannot_write_stops_all(workers, tmp_path, shape):
    first, second = workers.run(2, full_disk, shape, tmp_path)
    assert first is not None
    assert second == "rank 0 could not write: it says why"


def saved_in_pieces(shape, folder):
    """Bytes of the largest tensor that saving meets on this process."""
    sae, _ = spread(shape, SETTINGS)
    most = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            out = func(*args, **(kwargs or {}))
            most = max(most, out.untyped_storage().size() if isinstance(out, torch.Tensor) else 0)
            return out

    with Sizes():
        sae.save_pretrained(folder)
    return most


def test_saving_gathers_the_parts_one_by_one(workers, tmp_path):
    whole = start(SETTINGS)
    assert max(workers.run(3, saved_in_pieces, (1, 3), tmp_path)) == whole.W_enc.nbytes / 3
    assert torch.equal(SampledSAE.from_pretrained(tmp_path).W_enc, whole.W_enc)


def on_a_mesh_of_one():
    """Whether everything of an SAE is as it was, and what it computes."""
    sae = start(SETTINGS)
    before = {**sae.__dict__, **sae._parameters, **sae._buffers}
    mesh = mesh_of((1, 1))
    same = parallelize(sae, mesh) is sae
    after = {**sae.__dict__, **sae._parameters, **sae._buffers}
    same = same and before.keys() == after.keys() and all(after[name] is value for name, value in before.items())
    lines = train(sae, batches([[11]], 3), "decayed", None)
    return same, lines[-1]["loss"], state(sae)


def test_a_mesh_of_one_process_leaves_the_sae_as_it_is(workers):
    ((same, loss, found),) = workers.run(1, on_a_mesh_of_one)
    alone = train_alone(SETTINGS, [[11]], 3, "decayed")
    assert same
    assert loss == alone["lines"][-1]["loss"]
    assert all(torch.equal(found[name], t) for name, t in alone["state"].items())


def kept_pool(taken):
    """A pool that is kept, and what is left of it behind a checkpoint's tensors."""
    sae, _ = spread((1, 2), SETTINGS)
    run = SimpleNamespace(sae=sae, optimizer=optimizer_of(sae, "dense"), feed=SimpleNamespace(device="cpu"))
    members, here = torch.tensor([1, 4, 7]), sae.layout.mesh.rank
    state = {"members": members, "scores": torch.rand(48, dtype=torch.float64), "uses": 2}
    state |= {"taken": torch.tensor(taken[here])} if taken[here] else {}
    sae.memory.pool.load_state_dict(state, "cpu")
    tensors = resuming._tensors(run)
    sae.memory.pool.reset()
    resuming._take_over(run, tensors, {"uses": 2})
    return state, sae.memory.pool.state_dict()


def test_a_kept_pool_with_free_places_is_saved_with_them(workers):
    for before, after in workers.run(2, kept_pool, ([True, False, True], None)):
        assert before.keys() == after.keys()
        assert all(torch.equal(torch.as_tensor(after[name]), torch.as_tensor(t)) for name, t in before.items())


def hints_of(sae):
    return sae.memory.hints.state_dict(), sae.layout.own_hints.state_dict()


def hints_saved_and_loaded(shape, rule, store, folder):
    """Where searches start when the last checkpoint is written, and when a training goes on from it."""
    mesh, seen = mesh_of(shape), []
    config = SampledSAEConfig(D, 96, **rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "save", lambda run: (seen.append(hints_of(run.sae)), resuming.save(run)))
        patch.setattr(
            training_run, "load", lambda run, *found: (resuming.load(run, *found), seen.append(hints_of(run.sae)))
        )
        for steps in (3, 4):
            how = TrainConfig(steps=steps, batch_size=64, checkpoint_every=3, log_every=1)
            Trainer(config, how, ActivationStore.open(store), folder, mesh=mesh).run(progress=False)
    return seen


@pytest.mark.parametrize(
    ("shape", "rule", "own"),
    [((2, 1), {"k": 3, "l": None}, False), ((2, 1), {"k": 3, "l": None, "select": "token"}, True)],
    ids=["batch", "token"],
)
def test_a_training_goes_on_from_the_thresholds_that_each_process_knew(workers, tmp_path, shape, rule, own):
    store = write_store(tmp_path / "store")
    results = workers.run(2, hints_saved_and_loaded, shape, rule, store, tmp_path / "run")
    for saved, loaded, *_ in results:
        assert saved == loaded
        assert saved[own]
    if own:
        assert results[0][0] != results[1][0]
