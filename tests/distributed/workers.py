"""Processes that are started once and compute many cases, each in a gloo process group of its own."""

import gc
import os
import shutil
import tempfile
import traceback
from datetime import timedelta

import torch.distributed as dist
from forked import be_quick, forked

# against a test that hangs, no measure of speed
PATIENCE = 300


def forget_meshes():
    """Caches hold every mesh they have seen, a mesh its groups, and a group threads that look around."""
    # in the processes alone: pytest itself need not know them to collect
    from torch.distributed.tensor import _redistribute
    from torch.distributed.tensor._collective_utils import MeshTopoInfo
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    from sampled_sae.support.all_ranks import forget_ended

    forget_ended()
    _clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()
    _redistribute.clear_redistribute_planner_cache()
    MeshTopoInfo.build_from_mesh.cache_clear()
    gc.collect()


def serve(connection, rank):
    """Calls what the connection asks for: (function, arguments, number of processes, store)."""
    be_quick()
    while (task := connection.recv()) is not None:
        function, arguments, size, store = task
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE)
            )
            result = (True, function(*arguments))
        except BaseException:
            result = (False, traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            forget_meshes()
        connection.send(result)


class Workers:
    """As many processes as the largest case so far has needed."""

    def __init__(self):
        self.context = forked()
        self.folder = tempfile.mkdtemp()
        self.calls = 0
        self.workers = []

    def start(self):
        """One more."""
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=serve, args=(theirs, len(self.workers)), daemon=True)
        process.start()
        self.workers.append((process, ours))

    def run(self, size, function, *arguments):
        """What `function(*arguments)` returns in each of `size` processes that form a group."""
        while len(self.workers) < size:
            self.start()
        self.calls += 1
        task = (function, arguments, size, os.path.join(self.folder, f"store{self.calls}"))
        for _, connection in self.workers[:size]:
            connection.send(task)
        results = []
        for rank, (process, connection) in enumerate(self.workers[:size]):
            if not connection.poll(2 * PATIENCE):
                self.close()
                raise TimeoutError(f"rank {rank} has not answered")
            try:
                results.append(connection.recv())
            except EOFError:
                raise RuntimeError(f"rank {rank} died: exit code {process.exitcode}") from None
        failed = [f"rank {rank}:\n{text}" for rank, (fine, text) in enumerate(results) if not fine]
        assert not failed, "\n".join(failed)
        return [value for _, value in results]

    def close(self):
        for process, connection in self.workers:
            if process.is_alive():
                try:
                    connection.send(None)
                    process.join(timeout=10)
                except OSError:
                    pass
            if process.is_alive():
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
