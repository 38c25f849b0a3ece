"""Which process this is, by the environment of torchrun and of SLURM."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from sampled_sae.cli import processes
from sampled_sae.cli.processes import gpu_of, join
from sampled_sae.support.launch import Launch, first_host, launched

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
}


def test_torchrun_says_who_it_is():
    assert launched(dict(TORCHRUN)) == Launch(3, 4, 1, 2)
    assert launched({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}) == Launch(3, 4, 1, 4)
    assert launched({**SLURM, **TORCHRUN}) == Launch(3, 4, 1, 4), "torchrun under srun"


@pytest.mark.parametrize(
    "alone",
    [
        {},
        {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "a", "SLURM_STEP_NUM_TASKS": "1"},
        # a batch script, and an interactive step
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_NODELIST": "n1"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_a_process_alone(alone):
    assert launched(alone) is None


def test_a_step_of_slurm_is_put_in_torchruns_names():
    environment = dict(SLURM)
    assert launched(environment) == Launch(5, 8, 1, 4)
    assert environment["MASTER_ADDR"] == "gpu07"
    assert 15_000 <= int(environment["MASTER_PORT"]) < 30_000
    other = {**SLURM, "SLURM_STEP_ID": "3"}
    launched(other)
    assert other["MASTER_PORT"] != environment["MASTER_PORT"]
    given = {**SLURM, "MASTER_ADDR": "me", "MASTER_PORT": "9"}
    launched(given)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("me", "9")


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[3-5]", "n3"),
        ("n[03,07-9]-x,m1", "n03-x"),
        ("a-b.c[1]", "a-b.c1"),
        ("rack[1-2]n[3]", "rack1n3"),
        ("rack[01,3]n[07-9]-x,m[1]", "rack01n07-x"),
    ],
)
def test_first_host_of_a_list(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", "[", "n[", "n[1-2", "n[]", ",n1", "n]1"])
def test_what_is_no_list_of_hosts_is_refused(nodes):
    with pytest.raises(ValueError, match=r"SLURM_STEP_NODELIST=.*must be a list of hosts"):
        first_host(nodes)


@pytest.mark.parametrize(("node", "local_rank", "tasks"), [("0", "1", 4), ("1", "3", 4), ("2", "2", 3), (None, "0", 4)])
def test_how_many_processes_slurm_has_started_on_this_machine(node, local_rank, tasks):
    of_step = {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_STEP_NUM_TASKS": "11", "SLURM_LOCALID": local_rank}
    environment = {**SLURM, **of_step, **({} if node is None else {"SLURM_NODEID": node})}
    assert launched(environment).local_size == tasks


@pytest.mark.parametrize(
    ("environment", "match"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT: not set"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4: must be from 0 to 3"),
        ({**TORCHRUN, "WORLD_SIZE": "x"}, "WORLD_SIZE='x'"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_PROCID: not set"),
    ],
)
def test_half_an_environment_is_refused(environment, match):
    with pytest.raises(ValueError, match=match):
        launched(environment)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    second = Launch(3, 4, 1, 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_of(second, n_visible=2) == 1
    with pytest.raises(ValueError, match="device='cuda': 1 GPUs for 2 processes here"):
        gpu_of(second, n_visible=1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # as SLURM's --gpus-per-task=1 does for each process
    assert gpu_of(second, n_visible=1) == 0


@pytest.mark.parametrize(
    ("given", "devices", "backend"),
    [
        ({"command": "harvest", "model_device": "cuda"}, {"model_device": "cuda:1"}, "gloo"),
        ({"command": "train", "device": "cuda", "model_device": None}, {"device": "cuda:1"}, "NCCL"),
        (
            {"command": "train", "device": "cuda", "model_device": "cuda"},
            {"device": "cuda:1", "model_device": "cuda:1"},
            "NCCL",
        ),
        ({"command": "evaluate", "model_device": "balanced"}, {"model_device": "balanced"}, "gloo"),
    ],
)
def test_a_model_too_gets_the_gpu_of_its_process(given, devices, backend, monkeypatch, capsys):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    ranks = SimpleNamespace(size=4, data=(3, 4), feature=(0, 1))
    monkeypatch.setattr(processes, "start", lambda *_: ranks)
    args = Namespace(**given)
    assert join(args, Launch(3, 4, 1, 2)) is ranks
    assert vars(args) == {**given, **devices}
    assert set(chosen) == ({1} if "cuda:1" in devices.values() else set())
    assert f"4 processes over {backend}: " in capsys.readouterr().out


def test_a_process_without_a_gpu_for_its_model_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match="model_device='cuda': 0 GPUs for 2 processes here"):
        join(Namespace(command="harvest", model_device="cuda"), Launch(3, 4, 1, 2))
