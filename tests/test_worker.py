"""benchmarks/worker.py: what a session in another process answers, and how its failures are told."""

import os
import time

import pytest

from benchmarks.worker import Here, Worker, WorkerError


class Session:
    def __init__(self, start):
        self.start = start

    def add(self, x):
        return self.start + x

    def die(self):
        os._exit(3)

    def hang(self):
        time.sleep(600)


@pytest.mark.parametrize("kind", [Worker, Here])
def test_answers_and_errors(kind):
    worker = kind(Session, 2)
    assert worker.call("add", 3) == 5
    with pytest.raises(WorkerError, match="TypeError: unsupported operand"):
        worker.call("add", "x")
    with pytest.raises(WorkerError, match="missing 1 required positional argument"):
        kind(Session).call("add", 3)


def test_a_process_that_dies():
    with pytest.raises(WorkerError, match="died, exit code 3"):
        Worker(Session, 2).call("die")


def test_a_process_that_hangs_is_stopped():
    """However slow the machine is, its answer never comes."""
    worker = Worker(Session, 2)
    worker.ask("hang")
    with pytest.raises(WorkerError, match="took too long"):
        worker.answer(0)
    assert not worker._process.is_alive()


def test_a_folder_comes_first_on_the_path(tmp_path):
    (tmp_path / "shadowed.py").write_text("class Session:\n    def where(self):\n        return __file__\n")
    worker = Worker(Shadow, tree=tmp_path)
    assert worker.call("where") == str(tmp_path / "shadowed.py")
    worker.close()


class Shadow:
    def where(self):
        import shadowed

        return shadowed.Session().where()
