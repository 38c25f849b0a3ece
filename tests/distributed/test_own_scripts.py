"""A script of a user's: what befalls one process is what the others say, whatever befalls them then."""

import pytest
import torch
import torch.distributed as dist
from cases import mesh_of
from launching import launch
from makers import make_sae

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


def spread_and_evaluated(name):
    """Metrics of an SAE over a mesh of one dimension."""
    sae = parallelize(make_sae(torch.float32), dist.init_device_mesh("cpu", (2,), mesh_dim_names=(name,)))
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
    sae.calibrate(x if name == "feature" else x.split(32)[dist.get_rank()])
    return evaluate_activations(sae, x, 16)


@pytest.mark.parametrize("name", ["data", "feature"])
def test_a_mesh_of_one_dimension_is_evaluated_too(workers, name):
    first, second = workers.run(2, spread_and_evaluated, name)
    assert first == second
