import gc
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

# Where Python is told to leave no bytecode, each of many processes would compile torch and these tests again: several
# seconds. It is kept apart then.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).resolve().parents[1] / ".cache" / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
# The tensors here are small: a second thread costs more than it gives, several times so on a busy machine. Nor has one
# a process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
# a minute and more each: begun first, so that at the end no process waits for one of them
LONGEST = ("many_problems", "what_the_compiler_makes", "test_rehearsal", "every_step_of_a_training", "the_notebook")


def prepare():
    """Before what else is imported: the conftest.py of a folder that is named on the command line comes next."""
    import torch

    # Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    from forked import be_quick

    be_quick()


prepare()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    cases = Counter()
    for item in items:
        if (mark := item.get_closest_marker("one_in")) is not None:
            test = item.parent, item.originalname
            if cases[test] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            cases[test] += 1
    if config.getoption("markexpr") == "":
        left_out = [item for item in items if item.get_closest_marker("everyday")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    items.sort(key=lambda item: not any(name in item.name for name in LONGEST))


def pytest_collection_finish():
    """Tests are no garbage, nor are their imports: to look through them took half a second, hundreds of times."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture
def poisoned_memory():
    """Every torch.empty holds NaN, so that a read before a write shows."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["block", "entries"])
def form(request, monkeypatch):
    """How impl="triton" handles a pool; a test's pool is far below the size at which entries take over."""
    from sampled_sae.impl.triton import layer

    if request.param == "entries":
        monkeypatch.setattr(layer, "BLOCK_FEATURES", 0)
    return request.param


@pytest.fixture
def forked_workers(monkeypatch):
    """Workers of the benchmarks start in a moment."""
    from forked import forked

    monkeypatch.setattr("benchmarks.worker.CONTEXT", forked())


@pytest.fixture
def store(tmp_path):
    """A small store of activations, as harvest writes them."""
    from makers import harvested

    return harvested(tmp_path / "activations")


@pytest.fixture
def remote():
    """A URL of an empty folder in memory."""
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield "memory://data"
    files.store.clear()
