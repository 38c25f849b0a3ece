"""Commands as torchrun starts them: processes of their own, their output, and what may befall one of them."""

import importlib
import os
import resource
import signal
import socket
import sys
import time
from dataclasses import dataclass

from forked import be_quick, forked, write_to
from workers import PATIENCE

from sampled_sae.support import roll_call

# of train and sweep; --quiet is the last one
COMMON = ["--features", "96", "--k", "3", "--steps", "8", "--batch-size", "64", "--checkpoint-every", "3"]
COMMON += ["--log-every", "2", "--rank-timeout", str(PATIENCE), "--quiet"]
OPTIONS = ["--l", "4", *COMMON]

# mishaps after which a rank says nothing; of two, the other one need not wait for what it says
DUMB, SIZES = ("killed", "stopped"), ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


@dataclass
class Mishap:
    """What happens to one rank (None: to all) when it calls a function for the n-th time, from 0, before or after.

    what: "killed", "stopped" (stands still), "late" (for longer than the test takes), "SIGTERM", or the text of a
    ValueError.
    """

    rank: int | None
    function: str
    what: str
    call: int = 0
    after: bool = False

    def __post_init__(self):
        self.find()  # a name that is gone fails the test at once, not a process that the others wait for

    def find(self):
        """(owner, name of its attribute, the function)"""
        module, path = self.function.split(":")
        *owners, name = path.split(".")
        owner = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        return owner, name, getattr(owner, name)

    def arm(self):
        owner, name, whole = self.find()
        calls = iter(range(10**9))

        def called(*args, **kwargs):
            now = next(calls) == self.call
            if now and not self.after:
                self.happen()
            result = whole(*args, **kwargs)
            if now and self.after:
                self.happen()
            return result

        setattr(owner, name, called)

    def happen(self):
        signals = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "SIGTERM": signal.SIGTERM}
        if self.what == "late":
            return time.sleep(PATIENCE)
        if self.what not in signals:
            raise ValueError(self.what)
        return os.kill(os.getpid(), signals[self.what])


def command_line(argv):
    from sampled_sae.cli import main

    try:
        return main(argv)
    except SystemExit as end:  # of argparse
        return end.code


def run_rank(*task):
    """One process, whose exit status is what its task returns."""
    os._exit(do(*task))


def do(rank, target, argv, environment, log, mishap, most_bytes):
    """What `target(argv)` returns, with the standard streams in a file."""
    names = ("SLURM_PROCID", "SLURM_LOCALID") if "SLURM_STEP_NUM_TASKS" in environment else ("RANK", "LOCAL_RANK")
    os.environ.update(environment, **dict.fromkeys(names, str(rank)))
    write_to(log)
    be_quick()
    if most_bytes is not None:
        sys.dont_write_bytecode = True  # Python 3.11 keeps the part of a .pyc file that there was room for
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    if mishap is not None and mishap.what in DUMB and "2" in (os.environ.get(name) for name in SIZES):
        roll_call.ANSWER_SECONDS = 0.2
    if mishap is not None and mishap.rank in (None, rank):
        mishap.arm()
    status = target(argv)
    sys.stdout.flush()
    return status


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(*what, waits_for=None, **more):
    """(exit statuses, outputs) of `size` processes that run one command: `begin` and `ended`."""
    return ended(begin(*what, **more), waits_for)


def begin(folder, size, argv, mishap=None, full=None, target=command_line, slurm=False):
    """`size` processes that run one command, or another function of its arguments, and their logs.

    folder: for the logs. full: the rank whose disk has room for files of 3000 bytes. slurm: started as by srun, not as
    by torchrun.
    """
    context = forked()
    world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    if slurm:
        world = {"SLURM_STEP_NUM_TASKS": str(size), "SLURM_STEP_TASKS_PER_NODE": str(size), "SLURM_NODEID": "0"}
        world["SLURM_STEP_NODELIST"] = "localhost"
    environment = {**world, "MASTER_PORT": str(free_port())}
    logs = [folder / f"log{rank}.txt" for rank in range(size)]
    processes = [
        context.Process(
            target=run_rank,
            args=(rank, target, list(map(str, argv)), environment, logs[rank], mishap, 3000 if rank == full else None),
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes, logs


def ended(begun, waits_for=None):
    """(exit statuses, outputs) of processes begun.

    waits_for: ranks whose end is waited for; the others are killed then.

    Raises:
        TimeoutError: some had not ended in time; says what all have written.
    """
    processes, logs = begun
    end, hang = time.monotonic() + PATIENCE, []
    for rank, process in enumerate(processes):
        if waits_for is None or rank in waits_for:
            process.join(max(0, end - time.monotonic()))
            hang += [rank] if process.is_alive() else []
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    outputs = [log.read_text() if log.exists() else "" for log in logs]
    if hang:
        raise TimeoutError(f"ranks {hang} had not ended after {PATIENCE} seconds; all have said {outputs}")
    for log in logs:
        log.unlink(missing_ok=True)
    return [process.exitcode for process in processes], outputs


def files(folder):
    """What a folder holds, by name; the record of a checkpoint without the time that it took."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.startswith("checkpoint")}
