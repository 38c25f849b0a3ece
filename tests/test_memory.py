import copy
import pickle

import pytest
import torch

from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig
from sampled_sae.support.reused_memory import Workspace, scratch


def like(dtype=torch.float32):
    return torch.empty(0, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_and_dtype(dtype):
    made = Workspace().empty(like(dtype), 3, 5)
    assert made.shape == (3, 5)
    assert made.dtype == dtype
    assert scratch(like(dtype), 0, 4).shape == (0, 4)


def test_memory_serves_again_once_its_last_view_is_gone():
    workspace = Workspace()
    first = workspace.empty(like(), 1000)
    place = first.data_ptr()
    view = first.view(10, 100).t()[2:3]
    del first
    assert workspace.empty(like(), 1000).data_ptr() != place, "a view is alive"
    del view
    assert workspace.empty(like(), 1000).data_ptr() == place


def test_blocks_that_became_too_small_are_let_go():
    workspace = Workspace()
    for size in range(1000, 100_000, 5000):
        workspace.empty(like(), size)
    assert len(workspace._blocks) == 1


def test_copies_share_nothing():
    workspace = Workspace()
    kept = workspace.empty(like(), 10)
    for other in (copy.deepcopy(workspace), pickle.loads(pickle.dumps(workspace))):
        assert other.empty(like(), 10).data_ptr() != kept.data_ptr()


@pytest.mark.parametrize("rule", [{"l": 2.0}, {"l": None}, {"l": None, "select": "token"}])
@pytest.mark.parametrize("row_grads", [True, False])
def test_gradients_of_one_step_survive_the_next_ones(rule, row_grads):
    sae = SampledSAE(SampledSAEConfig(d_in=6, d_sae=200, k=2, row_grads=row_grads, **rule))
    x = [torch.randn(20, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    def gradients():
        if row_grads:
            return [part.rows.grad for part in sae.row_grads]
        return [p.grad for p in sae.parameters()]

    sae(x[0]).loss.backward()
    held = gradients()
    copies = [g.clone() for g in held]
    for batch in x[1:]:
        sae.row_grads = []
        sae.zero_grad()
        sae(batch).loss.backward()
    for still, before in zip(held, copies):
        assert torch.equal(still, before)
    RowAdam(sae).step()
