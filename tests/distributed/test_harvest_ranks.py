"""Several processes harvest what one does, and a killed one loses its shard under way."""

import json

import pytest
from cases import mesh_of
from launching import Mishap, files, launch
from tiny_harvest import Tiny, harvest_tiny, token_rows

from sampled_sae.lm import harvest_beside

WRITES = "sampled_sae.training.store_writer:StoreWriter.write_shard"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert harvest_tiny([folder]) == 0
    return files(folder)


def go(tmp_path, size, *argv, **changes):
    return launch(tmp_path, size, [tmp_path / "store", *argv], target=harvest_tiny, **changes)


def test_three_processes_write_what_one_does_and_go_on_after_a_kill(alone, tmp_path):
    mishap = Mishap(1, WRITES, "killed", call=1, after=True)
    codes, outputs = go(tmp_path, 3, mishap=mishap)
    assert codes == [1, -9, 1]
    assert "".join(outputs).count("rank 1 is no longer there") == 1, outputs
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert (len(manifest["shards"]), manifest["complete"]) == (3, False)
    before = {entry["file"]: entry["crc32"] for entry in manifest["shards"]}
    assert go(tmp_path, 2)[0] == [0, 0]
    assert files(tmp_path / "store") == alone
    assert before.items() <= {e["file"]: e["crc32"] for e in json.loads(alone["manifest.json"])["shards"]}.items()


def test_what_differs_between_ranks_is_said(tmp_path):
    codes, outputs = go(tmp_path, 2, 3)
    assert codes == [1, 1]
    assert outputs == ["", "rank 1: rows_sha256: other than those of the first rank; give all ranks the same\n"]
    assert not (tmp_path / "store").exists()


def test_a_url_that_each_rank_has_for_itself_is_refused(tmp_path):
    """The memory of a process: the first one's manifest is not there on the other."""
    codes, outputs = launch(tmp_path, 2, ["memory://store"], target=harvest_tiny)
    assert codes == [1, 1]
    assert outputs == ["", "rank 1: memory://store: not what the first rank sees there; all ranks need one place\n"]


def two_layers(folder, ranks, wrong=None):
    """Of the tiny model; what is said where one rank is given another number of rows a shard."""
    mesh = None if ranks == 1 else mesh_of((ranks, 1))
    settings = {"batch_size": 2, "rows_per_shard": 3, "holdout_rows": 2, "source": "random", "progress": False}
    if mesh is not None and mesh.get_rank() == wrong:
        settings["rows_per_shard"] = 0
    try:
        harvest_beside(Tiny(), token_rows(), [0, 1], folder, mesh=mesh, drop_tokens=(), **settings)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def test_several_layers_are_those_of_one_process_too(workers, tmp_path):
    assert workers.run(2, two_layers, tmp_path / "two", 2) == [None, None]
    two_layers(tmp_path / "one", 1)
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_arguments_that_are_wrong_on_one_rank_are_named_by_all(workers, tmp_path):
    first, second = workers.run(2, two_layers, tmp_path / "two", 2, 1)
    assert second == "rows_per_shard=0: must be a whole number >= 1"
    assert first == f"rank 1: {second}"
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
def test_a_rank_killed_in_the_model_loses_the_shard_under_way(alone, tmp_path):
    codes, outputs = go(tmp_path, 2, mishap=Mishap(1, "tiny_harvest:Tiny.forward", "killed", call=3))
    assert codes == [1, -9]
    assert "".join(outputs).count("rank 1 is no longer there") == 1, outputs
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["complete"] is False
    assert 0 < len(manifest["shards"]) < 7
    assert go(tmp_path, 3)[0] == [0, 0, 0]
    assert files(tmp_path / "store") == alone


@pytest.mark.slow
def test_a_rank_that_cannot_write_is_named_and_the_next_run_goes_on(alone, tmp_path):
    no_room = Mishap(1, "sampled_sae.support.listed_files:save_file", "no room")
    codes, outputs = go(tmp_path, 2, mishap=no_room)
    assert (codes, outputs) == ([1, 1], ["", "rank 1: no room\n"])
    assert go(tmp_path, 2)[0] == [0, 0]
    assert files(tmp_path / "store") == alone
