"""How this process was started: alone, or by torchrun or SLURM as one of several."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from typing import NamedTuple

# what torch reads when the processes look for each other
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Launch(NamedTuple):
    """rank of size processes, local_rank of the local_size on its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def launched(environment: MutableMapping[str, str] = os.environ) -> Launch | None:
    """Which of several processes this is; None for a process alone.

    torchrun's variables come first. Those of a SLURM step of several tasks (`srun`) are put in torchrun's names; a
    batch script itself, which sees the job's tasks too, is a process alone.

    Raises:
        ValueError: a variable that is missing, no whole number, or out of range.
    """
    if not any(name in environment for name in ("RANK", "WORLD_SIZE")):
        if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
            return None
        _from_slurm(environment)
    if environment.get("WORLD_SIZE") == "1":
        return None  # whatever else is set, or is not
    if missing := [name for name in _TORCHRUN if name not in environment]:
        raise ValueError(f"{', '.join(missing)}: not set, but others of torchrun's variables are; start with torchrun")
    try:
        rank, size, local_rank = (int(environment[name]) for name in _TORCHRUN[:3])
    except ValueError:
        raise ValueError(", ".join(f"{n}={environment[n]!r}" for n in _TORCHRUN[:3]) + ": must be numbers") from None
    if not 0 <= rank < size:
        raise ValueError(f"RANK={rank}: must be from 0 to {size - 1}, WORLD_SIZE being {size}")
    return Launch(rank, size, local_rank, max(local_rank + 1, _tasks_here(environment)))


def _tasks_here(environment: MutableMapping[str, str]) -> int:
    """Processes of this start on this machine; 0 where nothing says it."""
    if (of_torchrun := environment.get("LOCAL_WORLD_SIZE", "")).isdigit():
        return int(of_torchrun)
    # "4(x2),3" of SLURM: 4 on each of two machines, 3 on another
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks = [int(number) for number, times in parts for _ in range(int(times or 1))]
    here = int(node) if (node := environment.get("SLURM_NODEID", "")).isdigit() else 0
    return tasks[here] if here < len(tasks) else 0


def _from_slurm(environment: MutableMapping[str, str]) -> None:
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    for ours, theirs in names.items():
        if theirs not in environment:
            raise ValueError(f"{theirs}: not set, but SLURM_STEP_NUM_TASKS is; start with srun or torchrun")
        environment[ours] = environment[theirs]
    job, step = (re.sub(r"\D", "", environment.get(f"SLURM_{part}_ID", "")) or "0" for part in ("JOB", "STEP"))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST") or "localhost"
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    # below the ports that systems give out by themselves; two steps of one job have two
    environment.setdefault("MASTER_PORT", str(15_000 + (int(job) * 7 + int(step)) % 15_000))


def first_host(nodes: str) -> str:
    """The first name of a list as SLURM writes it: "n[03-05,9],m1" gives n03, "r[1-2]n[7,9]" r1n7."""
    found = re.match(r"(?:[^,\[\]]|\[[^\[\],-]+[^\[\]]*\])+", nodes)
    if found is None or nodes[found.end() : found.end() + 1] not in ("", ","):
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r}: must be a list of hosts")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", found[0])
