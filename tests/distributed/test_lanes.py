"""Which tokens each process reads: the same batches whoever reads what part of them, each token once."""

import pytest
import torch
from makers import D, write_store

from sampled_sae import ActivationStore
from sampled_sae.training.batches import ShuffledStream


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Shards of unequal lengths, one of them empty."""
    return ActivationStore.open(write_store(tmp_path_factory.mktemp("lanes") / "store", (200, 7, 130, 0, 170, 96)))


def parts(store, size, of, lanes=None, seed=3):
    return [ShuffledStream(store, size, seed, lanes or of, (i, of)) for i in range(of)]


@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_parts_make_the_batch_of_one_process(wide, lanes, of, monkeypatch):
    monkeypatch.setattr("sampled_sae.training.batches.GROUP_BYTES", 4 * D * 150)
    whole = ShuffledStream(wide, 50, 3, lanes)
    shares = parts(wide, 50, of, lanes)
    for t in (0, 3, 9, 17, 4):
        assert torch.equal(torch.cat([share.batch(t) for share in shares]), whole.batch(t))
    ends = [end for share in shares for end in share.rows]
    assert (ends[0], ends[-1], ends[1:-1:2]) == (0, 50, ends[2::2])


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 7])
def test_an_epoch_has_no_token_twice_and_leaves_out_ends_alone(wide, lanes):
    stream = ShuffledStream(wide, 50, 1, lanes)
    n, tokens = stream.batches_per_epoch(0), sum(wide.tokens)
    seen = torch.cat([stream.batch(t) for t in range(n)])
    assert len(seen) == 50 * n > tokens - 50 * lanes
    everything = torch.cat([wide.shard(i) for i in range(6)]) * wide.scale
    assert len(torch.cat((everything, seen)).unique(dim=0)) == len(everything) == tokens
    assert len(seen.unique(dim=0)) == len(seen)
    assert not torch.equal(stream.batch(n), stream.batch(0)), "the second epoch has another order"


def test_one_lane_is_what_a_process_alone_has_always_read(wide):
    stream = ShuffledStream(wide, 64, 5)
    generator = torch.Generator().manual_seed(5 * 1_000_003 * 1_000_003)
    order = torch.randperm(6, generator=generator).tolist()
    x = torch.cat([wide.shard(i) for i in order]) * wide.scale
    shuffled = x[torch.randperm(len(x), generator=generator.manual_seed(5 * 1_000_003 * 1_000_003 + 1))]
    assert torch.equal(stream.batch(2), shuffled[128:192])


@pytest.mark.parametrize("of", [2, 4, 8])
def test_bytes_read_and_held_fall_as_one_over_the_processes(tmp_path, monkeypatch, of):
    store = ActivationStore.open(write_store(tmp_path / "store", (64,) * 16))
    read, whole = [], ActivationStore.shard
    monkeypatch.setattr(ActivationStore, "shard", lambda *a: read.append(x := whole(*a)) or x)
    for share in parts(store, 64, of):
        read.clear()
        for t in range(share.batches_per_epoch(0)):
            share.batch(t)
        assert sum(len(x) for x in read) == 1024 // of
        assert sum(len(x) for _, x in share._loaded.values()) == 1024 // of


def test_a_part_of_a_shard_is_read_without_the_rest_and_is_verified(tmp_path):
    store = ActivationStore.write(tmp_path / "store", torch.randn(90, 5), shard_tokens=90)
    assert torch.equal(store.shard(0, 20, 50), store.shard(0)[20:50])
    path = tmp_path / "store" / store.manifest["shards"][0]["file"]
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match="corrupt, checksum"):
        ActivationStore.open(tmp_path / "store").shard(0, 0, 5)


@pytest.mark.parametrize(("settings", "match"), [({"lanes": 0}, "lanes"), ({"part": (0, 51)}, "at least 51, a token")])
def test_bad_shares_are_refused(wide, settings, match):
    with pytest.raises(ValueError, match=match):
        ShuffledStream(wide, 50, **settings)
