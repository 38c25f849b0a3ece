"""A script of a user's: what befalls one process is what the others say, whatever befalls them then."""

import pytest
import torch
import torch.distributed as dist
from cases import mesh_of, state
from launching import launch
from makers import SMALL_SAE, make_sae, write_store

from sampled_sae import ActivationStore, TrainConfig, Trainer
from sampled_sae.distributed import accounted, parallelize
from sampled_sae.support import all_ranks
from sampled_sae.support.all_ranks import ranks_of
from sampled_sae.training.evaluation import evaluate_activations


def own_loop(argv):
    """Three steps, in the second of which one process fails by itself; argv: which."""
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("data",))
    sae = parallelize(make_sae(), mesh)
    with accounted(mesh):
        for step in range(3):
            if step == 1 and dist.get_rank() == int(argv[0]):
                raise KeyError("shard 7")
            sae(torch.ones(3, 12, dtype=torch.float64)).loss.backward()


def own_work(argv):
    """Reads something by itself, which fails on one process while the other is at something else; argv: which."""
    dist.init_process_group("gloo")
    ranks, store = ranks_of(mesh_of((2, 1))), dist.distributed_c10d._get_default_store()
    all_ranks.SOON = 0.2
    failing = ranks.rank == int(argv[0])
    with ranks.together():
        if failing:
            store.set("failed", "")
            raise ValueError("shard 7: damaged")
        store.wait(["failed"])


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("script", [own_loop, own_work], ids=lambda script: script.__name__)
def test_the_reason_of_the_first_reaches_all(tmp_path, script, failing):
    codes, outputs = launch(tmp_path, 2, [failing], target=script)
    assert codes == [1, 1]
    reason = "'shard 7'" if script is own_loop else "shard 7: damaged"
    own = "KeyError: " if script is own_loop else "ValueError: "
    assert outputs[failing].splitlines()[-1] == own + reason
    assert outputs[1 - failing].splitlines()[-1].endswith(f"RankError: rank {failing}: {reason}")


def failing_twice():
    """What each rank has heard, where one goes on after an error that the other, still at work, was not told of."""
    store, ranks = dist.distributed_c10d._get_default_store(), ranks_of(mesh_of((2, 1)))
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(all_ranks, "SOON", 0.2)
        for reason in ("shard 7: damaged", "nothing to close") if ranks.rank == 1 else (None,):
            try:
                with ranks.together():
                    if reason is not None:
                        raise ValueError(reason)
                    store.wait(["failed twice"])
            except (ValueError, RuntimeError) as error:
                said.append((type(error).__name__, str(error)))
        if ranks.rank == 1:
            store.set("failed twice", "")
    return said


def test_a_second_error_does_not_hide_the_first(workers):
    late, failed = workers.run(2, failing_twice)
    assert failed == [("ValueError", "shard 7: damaged"), ("RankError", "rank 1: shard 7: damaged")]
    assert late == [("RankError", "rank 1: shard 7: damaged")]


def failing_differently():
    """What each of three ranks raises, and says, where two fail of different things at one place."""
    ranks = ranks_of(mesh_of((3, 1)))
    try:
        with ranks.together():
            if ranks.rank:
                raise OSError(f"disk {ranks.rank}: full")
    except (OSError, RuntimeError) as error:
        return type(error).__name__, str(error), ranks.said_here(error)


def test_each_of_several_reasons_is_said(workers):
    none, first, second = workers.run(3, failing_differently)
    assert none == ("RankError", "rank 1: disk 1: full; rank 2: disk 2: full", None)
    assert first == ("OSError", "disk 1: full", "rank 1: ")
    assert second == ("OSError", "disk 2: full", "rank 2: ")


def trained_and_evaluated(shape, names, store, folder):
    """The weights of a training, and the metrics on what it held out."""
    mesh, found = dist.init_device_mesh("cpu", shape, mesh_dim_names=names), ActivationStore.open(store)
    how = TrainConfig(steps=3, batch_size=64, checkpoint_every=2)
    sae = Trainer(SMALL_SAE, how, found, folder, mesh=mesh).run(progress=False)
    return state(sae), evaluate_activations(sae, found.holdout()[0], 64)


@pytest.mark.parametrize(("name", "shape"), [("data", (2, 1)), ("feature", (1, 2))])
def test_a_mesh_may_have_one_dimension(workers, tmp_path, name, shape):
    store = write_store(tmp_path / "store")
    both = workers.run(2, trained_and_evaluated, shape, all_ranks.DIMENSIONS, store, tmp_path / "both")
    one = workers.run(2, trained_and_evaluated, (2,), (name,), store, tmp_path / "one")
    for (weights, metrics), (expected, of_both) in zip(one, both):
        assert metrics == of_both
        assert all(torch.equal(weights[name], t) for name, t in expected.items())


def begun_at_tokens(shape, store, folder):
    mesh, how = mesh_of(shape), TrainConfig(steps=3, batch_size=64, decoder_start="tokens")
    return state(Trainer(SMALL_SAE, how, ActivationStore.open(store), folder, mesh=mesh).sae)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_decoder_rows_begin_at_the_same_tokens_as_on_one_process(workers, tmp_path, shape):
    store = write_store(tmp_path / "store")
    how = TrainConfig(steps=3, batch_size=64, decoder_start="tokens")
    alone = Trainer(SMALL_SAE, how, ActivationStore.open(store), tmp_path / "alone", lanes=2).sae
    for weights in workers.run(2, begun_at_tokens, shape, store, tmp_path / "spread"):
        for name in ("W_enc", "W_dec"):
            assert torch.equal(weights[name], alone.get_parameter(name))


def refused_meshes():
    """What is said of meshes that are none of all processes by tokens and features."""
    said = []
    for shape, names in (((2,), ("tokens",)), ((1, 2), ("feature", "data"))):
        try:
            accounted(dist.init_device_mesh("cpu", shape, mesh_dim_names=names))
        except ValueError as error:
            said.append(str(error))
    return said


def test_other_meshes_are_refused(workers):
    for said in workers.run(2, refused_meshes):
        of_others, of_order = said
        assert of_others == "mesh.mesh_dim_names=('tokens',): must be among ('data', 'feature')"
        assert "must have the dimensions ('data', 'feature'), or one, and all 2 processes" in of_order
