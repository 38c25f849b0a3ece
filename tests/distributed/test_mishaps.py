"""What may befall one of several processes: the others end and name it, and the run goes on to the same bits."""

import functools
import os
import shutil

import pytest
import torch
from launching import OPTIONS, Mishap, begin, do, ended, files, free_port, launch
from makers import write_store
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sampled_sae.cli import main
from sampled_sae.training.sharded_checkpoint import read_record

BATCH = "sampled_sae.training.batches:ShuffledStream.batch"
SHARDS = "torch.distributed.checkpoint:FileSystemWriter.write_data"
RECORD = "sampled_sae.training.sharded_checkpoint:write_json"
# in the order of a run: who, where, and the step of the checkpoint that is there afterwards
KILLS = [
    (Mishap(1, BATCH, "killed", call=1), None),
    (Mishap(0, "sampled_sae.sae:SampledSAE.forward", "killed", call=1), None),
    (Mishap(1, "torch:Tensor.backward", "killed", call=1), None),
    (Mishap(1, "sampled_sae.distributed.gradients:sum_all", "killed", call=1), None),
    (Mishap(1, "sampled_sae.optim:RowAdam.step", "killed", call=1, after=True), None),
    (Mishap(1, SHARDS, "killed"), None),
    (Mishap(0, RECORD, "killed"), None),
    (Mishap(0, RECORD, "killed", after=True), 3),
    (Mishap(1, SHARDS, "killed", after=True), 3),
    (Mishap(0, "sampled_sae.pretrained:write_json", "killed"), 8),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("mishaps") / "store")


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """What an undisturbed run of two processes leaves."""
    folder = tmp_path_factory.mktemp("whole")
    assert launch(folder, 2, ["train", store, folder / "run", *OPTIONS])[0] == [0, 0]
    return files(folder / "run")


def test_a_killed_rank_is_named_and_the_run_goes_on_to_the_bit(store, whole, tmp_path):
    argv = ["train", store, tmp_path / "run", *OPTIONS]
    codes, outputs = launch(tmp_path, 2, argv, Mishap(1, BATCH, "killed", call=6))
    assert codes == [1, -9]
    assert outputs == [f"sampled-sae train: {GONE.format(1)}\n", ""]
    assert launch(tmp_path, 2, argv)[0] == [0, 0]
    assert files(tmp_path / "run") == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--feature-shards", "2"],
        ["--pool-every", "5", "--pool", "sample", "--adam", "decayed", "--moments", "bfloat16"],
        ["--l", "none"],
    ],
    ids=["features", "pool", "none"],
)
def test_a_killed_run_of_every_kind_goes_on_to_the_bit(store, tmp_path, more):
    whole, run = (["train", store, tmp_path / name, *OPTIONS, *more] for name in ("whole", "run"))
    assert launch(tmp_path, 2, whole)[0] == [0, 0]
    # between two checkpoints, and between two looks for a pool
    assert launch(tmp_path, 2, run, Mishap(1, "sampled_sae.optim:RowAdam.step", "killed", call=6))[0] == [1, -9]
    assert read_record(tmp_path / "run")["step"] == 6
    assert launch(tmp_path, 2, run)[0] == [0, 0]
    assert files(tmp_path / "run") == files(tmp_path / "whole")


GONE = "rank {} is no longer there: ended by the system, or its machine lost or standing still"


@pytest.mark.slow
def test_a_rank_killed_in_every_phase_of_one_run(store, whole, tmp_path):
    run = tmp_path / "run"
    for mishap, step in KILLS:
        codes, outputs = launch(tmp_path, 2, ["train", store, run, *OPTIONS], mishap)
        other = 1 - mishap.rank
        assert (codes[mishap.rank], codes[other]) == (-9, 1), (mishap, outputs)
        assert outputs[other].count(f"sampled-sae train: {GONE.format(mishap.rank)}\n") == 1, (mishap, outputs)
        found = (run / "checkpoint.json").exists()
        assert (read_record(run)["step"] if found else None) == step, mishap
        assert not found or main(["--quiet", "verify", str(run)]) == 0, mishap
    assert launch(tmp_path, 2, ["train", store, run, *OPTIONS])[0] == [0, 0]
    assert files(run) == whole
    assert {path.name for path in run.glob("checkpoint*")} == {"checkpoint.json", read_record(run)["folder"]}


@pytest.mark.slow
def test_of_three_ranks_the_killed_one_is_named_once(store, tmp_path):
    codes, outputs = launch(tmp_path, 3, ["train", store, tmp_path / "run", *OPTIONS], Mishap(2, BATCH, "killed", 4))
    assert codes == [1, 1, -9]
    assert "".join(outputs).count(GONE.format(2)) == 1


@pytest.mark.slow
def test_a_rank_that_stands_still_is_given_up_and_one_that_is_late_is_named(store, tmp_path):
    """Side by side, since each is waited for."""
    begun = {}
    for what in ("stopped", "late"):
        (folder := tmp_path / what).mkdir()
        argv = ["train", store, folder / "run", *OPTIONS, "--rank-timeout", "20"]
        begun[what] = begin(folder, 2, argv, Mishap(1, "sampled_sae.optim:RowAdam.step", what, call=2))
    found = {what: ended(launched, waits_for=[0]) for what, launched in begun.items()}
    assert [codes for codes, _ in found.values()] == [[1, -9], [1, -9]]
    assert found["stopped"][1][0] == f"sampled-sae train: {GONE.format(1)}\n"
    late = "sampled-sae train: rank 1 is late: took no part in an exchange in time ("
    assert found["late"][1][0].startswith(late)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(store, whole, tmp_path):
    argv = ["train", store, tmp_path / "run", *OPTIONS]
    codes, outputs = launch(tmp_path, 2, argv, Mishap(1, BATCH, "SIGTERM", call=3))
    assert codes == [143, 143]
    saved = read_record(tmp_path / "run")["step"]
    assert outputs[0].startswith(f"sampled-sae train: stopped by SIGTERM: step {saved} of 8 is saved in ")
    assert outputs[1] == ""
    assert launch(tmp_path, 2, argv)[0] == [0, 0]
    assert files(tmp_path / "run") == whole


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_rank_leaves_nothing_half_written(store, whole, tmp_path, rank):
    argv = ["train", store, tmp_path / "run", *OPTIONS]
    codes, outputs = launch(tmp_path, 2, argv, full=rank)
    assert codes == [1, 1]
    assert outputs[1 - rank] == ""
    assert outputs[rank] == f"sampled-sae train: rank {rank}: {tmp_path}/run/checkpoint_00000003: File too large\n"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"metrics.jsonl"}
    assert launch(tmp_path, 2, argv)[0] == [0, 0]
    assert files(tmp_path / "run") == whole


@pytest.fixture(scope="module")
def begun(store, tmp_path_factory):
    """By feature shards: two processes, stopped at step 6, where a checkpoint is."""

    @functools.cache
    def of(shards):
        folder = tmp_path_factory.mktemp("begun")
        argv = ["train", store, folder / "run", *OPTIONS, "--feature-shards", shards]
        launch(folder, 2, argv, Mishap(0, BATCH, "no more", call=6))
        assert read_record(folder / "run")["step"] == 6
        return folder / "run"

    return of


@pytest.mark.slow
@pytest.mark.parametrize(("before", "size", "shards"), [(1, 1, 1), (1, 3, 1), (1, 2, 2), (1, 4, 2), (2, 2, 1)])
def test_another_layout_goes_on_to_rounding(store, whole, begun, tmp_path, before, size, shards):
    shutil.copytree(begun(before), tmp_path / "run")
    argv = ["train", store, tmp_path / "run", *OPTIONS, "--feature-shards", shards]
    codes = [main(list(map(str, argv)))] if size == 1 else launch(tmp_path, size, argv)[0]
    assert codes == [0] * size
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "sae.safetensors").write_bytes(whole["sae.safetensors"])
    expected = load_file(tmp_path / "whole" / "sae.safetensors")
    for name, tensor in load_file(tmp_path / "run" / "sae.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert main(["--quiet", "verify", str(tmp_path / "run")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("rule", [["--l", "none"], ["--pool-every", "5", "--adam", "decayed", "--moments", "bfloat16"]])
def test_two_processes_go_on_with_the_checkpoint_of_one(store, tmp_path, monkeypatch, rule):
    argv = ["train", str(store), str(tmp_path / "run"), *OPTIONS, *rule]
    with monkeypatch.context() as patch:
        patch.setattr("sampled_sae.training.training_run.save", save := SaveOnce())
        with pytest.raises(SaveOnce.Done):
            main(argv)
        assert save.run.step == 3
    for shards in (1, 2):
        run = tmp_path / f"run{shards}"
        shutil.copytree(tmp_path / "run", run)
        codes, _ = launch(tmp_path, 2, [*argv[:2], run, *argv[3:], "--feature-shards", shards])
        assert codes == [0, 0]
        assert not (run / "checkpoint.pt").exists()
    assert main([*argv[:2], str(tmp_path / "alone"), *argv[3:]]) == 0
    expected = load_file(tmp_path / "alone" / "sae.safetensors")
    for shards in (1, 2):
        for name, tensor in load_file(tmp_path / f"run{shards}" / "sae.safetensors").items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


class SaveOnce:
    """Writes the first checkpoint, then ends the process as a kill would."""

    class Done(BaseException):
        pass

    def __call__(self, run):
        from sampled_sae.training.resuming import save

        save(run)
        self.run = run
        raise self.Done


@pytest.mark.slow
def test_a_damaged_shard_is_found_before_anything_is_loaded(store, begun, tmp_path):
    shutil.copytree(begun(1), tmp_path / "run")
    shard = next((tmp_path / "run").glob("checkpoint_*/__1_0.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    codes, outputs = launch(tmp_path, 2, ["train", store, tmp_path / "run", *OPTIONS])
    assert codes == [1, 1]
    assert "".join(outputs).count("__1_0.distcp: damaged, its bytes do not have the checksum") == 1
    assert main(["--quiet", "verify", str(tmp_path / "run")]) == 1


def under_torchrun(argv, log, mishap):
    """In a process that torchrun's own agent has started: the first attempt has the mishap."""
    attempt, rank = (int(os.environ[name]) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
    if status := do(rank, main, argv, {}, f"{log}{attempt}{rank}", None if attempt else mishap, None):
        os._exit(status)  # else the agent waits for what this returns


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again_to_the_same_bits(store, whole, tmp_path):
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{free_port()}",
        run_id="test",
        max_restarts=1,
        start_method="forkserver",
        monitor_interval=0.1,
    )
    argv = ["train", str(store), str(tmp_path / "run"), *OPTIONS]
    elastic_launch(config, under_torchrun)(argv, f"{tmp_path}/log", Mishap(1, BATCH, "killed", call=5))
    assert GONE.format(1) in (tmp_path / "log00").read_text()
    assert files(tmp_path / "run") == whole
