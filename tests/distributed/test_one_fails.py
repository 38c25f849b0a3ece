"""What a rank says of a failure while another is still at work that has no end."""

import pytest
import torch.distributed as dist
from cases import mesh_of

from sampled_sae.support import all_ranks
from sampled_sae.support.all_ranks import ranks_of


def failing_beside_a_stalled_one():
    """What each rank has heard in the end; the stalled one goes on when the other has."""
    store, ranks = dist.distributed_c10d._get_default_store(), ranks_of(mesh_of((2, 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(all_ranks, "SOON", 0.2)
        try:
            with ranks.accounted(), ranks.together():
                if ranks.rank == 1:
                    raise ValueError("shard: damaged")
                store.wait(["failed"])
        except (ValueError, RuntimeError) as error:
            said = type(error).__name__, str(error), ranks.said_here(error)
            if ranks.rank == 1:
                store.set("failed", "")
            return said


def test_a_rank_that_stands_still_does_not_keep_another_from_saying_what_is_wrong(workers):
    stalled, failed = workers.run(2, failing_beside_a_stalled_one)
    assert failed == ("ValueError", "shard: damaged", "rank 1: ")
    assert stalled == ("RankError", "rank 1: shard: damaged", None)
