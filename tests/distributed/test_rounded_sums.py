"""Sums over processes that travel in 16 bits: the numbers between which they are said to lie hold."""

import pytest
import torch
from cases import mesh_of

from sampled_sae.distributed import ranks
from sampled_sae.distributed.mesh import Mesh


def between(parts, changes=()):
    """(no more, no less than the sums over the processes, bytes sent), with other constants of the module."""
    mesh = Mesh(mesh_of((len(parts), 1)))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes:
            patch.setattr(ranks, name, value)
        return *mesh.data.between(parts[mesh.data.rank].clone(), "test"), mesh.traffic.size()


def drawn(size):
    """float32 [size, N] >= 0, of every magnitude, some 0 or so large that sums are not numbers of bfloat16."""
    g = torch.Generator().manual_seed(size)
    parts = torch.randn(size, 4096, generator=g).abs() * 10.0 ** torch.randint(-44, 38, (4096,), generator=g)
    parts[torch.rand(parts.shape, generator=g) < 0.1] = 0
    parts[:, :16] = 3.4e38 / size
    # halfway between two numbers of bfloat16, or all but so
    parts[:, 16:64] = 1 + 2.0**-8 + torch.linspace(-1, 1, 48) * 2.0**-22
    return parts


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_sums_lie_between(workers, size):
    parts = drawn(size)
    exact = parts.double().sum(0)
    results = workers.run(size, between, parts)
    for least, most, sent in results:
        assert sent == 2 * 4096
        assert torch.equal(least, results[0][0])
        assert torch.equal(most, results[0][1])
        assert least.dtype == most.dtype == torch.float32
        assert (least.double() <= exact).all()
        assert (exact <= most.double()).all()
        near = exact < 3e38
        assert ((most - least).double() <= exact * size * 2.1 * 2.0**-8 + 1e-35)[near].all()


def test_the_share_is_needed(workers):
    """Two numbers that both lose as much as rounding can take, and so does their sum."""
    parts = torch.tensor([[1 + 2.0**-8 - 2.0**-20], [2.0**-8 * (1 + 2.0**-8) - 2.0**-20]])
    for share, holds in ((1.0, True), (0.9, False)):
        for _, most, _ in workers.run(2, between, parts, [("UNIT", share * ranks.UNIT)]):
            assert (parts.double().sum() <= most.double()) == holds


def test_nan_of_one_process_is_known_to_all(workers):
    parts = torch.ones(2, 3)
    parts[1, 1] = torch.nan
    for least, most, _ in workers.run(2, between, parts):
        assert least.isnan().tolist() == most.isnan().tolist() == [False, True, False]


def test_many_processes_send_float32(workers):
    """Their roundings to 16 bits would add up to too much."""
    parts = drawn(2)
    for least, most, sent in workers.run(2, between, parts, [("MOST_ROUNDED", 1)]):
        assert sent == 4 * 4096
        assert torch.equal(least, parts.sum(0))
        assert torch.equal(most, least)
