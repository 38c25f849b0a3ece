"""The processes of one run: what they tell each other beside their tensors, and how they fail together."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .roll_call import RollCall, in_time, verdict

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DIMENSIONS = ("data", "feature")
# that a rank which has failed waits for the others to come and hear of it; one may be at a download that stands still
SOON = 10.0
# that are named where several ranks have failed of different things
MOST_REASONS = 3
# how gloo, NCCL and the store say that another process does not answer
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)


class RankError(RuntimeError):
    """Another rank has failed, or does not answer; names it."""


class AllRanks:
    """The processes of a mesh of "data", "feature" or both, which are all there are; or one process alone.

    Everything here is done by all ranks in the same order.

    Args:
        mesh: a DeviceMesh, or None for a process alone.

    Attributes:
        rank, size: which of how many.
        data, feature: (which, of how many) along the dimensions of the mesh.
        mesh: as given.

    Raises:
        ValueError: a mesh of other dimensions, or of some of the processes only.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self.mesh = mesh
        self.rank, self.size = 0, 1
        self.data = self.feature = (0, 1)
        self._agreed: BaseException | None = None
        self._line: str | None = ""
        self._untold: str | None = None
        if mesh is None:
            return
        names = mesh.mesh_dim_names or ()
        if names not in (DIMENSIONS, *((name,) for name in DIMENSIONS)) or mesh.size() != dist.get_world_size():
            raise ValueError(
                f"mesh={mesh}: must have the dimensions {DIMENSIONS}, or one, and all {dist.get_world_size()} processes"
            )
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.data, self.feature = (
            (mesh.get_local_rank(name), mesh.size(names.index(name))) if name in names else (0, 1)
            for name in DIMENSIONS
        )
        self._control = dist.new_group(backend="gloo")
        self._roll = RollCall(dist.distributed_c10d._get_default_store(), self.rank, self.size)
        self._pending: tuple[Any, torch.Tensor] | None = None

    @property
    def first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    @property
    def control(self) -> dist.ProcessGroup | None:
        """A group of all ranks for what lies in the memory of the host; None for a process alone.

        Raises:
            RankError: this rank has failed before, and goes where the others do not meet it; says of what.
        """
        if self._untold is not None:
            self.agree(error := RankError(self._untold), "")
            raise error
        return None if self.size == 1 else self._control

    def share(self, value: Any) -> Any:
        """The value of the first rank."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, group=self.control)
        return held[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def total(self, number: float) -> float:
        """The sum of a number of each rank."""
        return number if self.size == 1 else float(sum(self.gather(number)))

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        """The sum along the data dimension, in place: the same bits on all ranks."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def max_(self, x: torch.Tensor) -> torch.Tensor:
        """The maximum along the data dimension, in place."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def _reduce(self, x: torch.Tensor, op: Any) -> torch.Tensor:
        self.control  # noqa: B018  # raises what this rank has failed of before
        if self.mesh is not None and self.data[1] > 1:
            dist.all_reduce(x, op=op, group=self.mesh.get_group("data"))
        return x

    def latest(self, number: int | None) -> int | None:
        """The largest number that any rank gave to the call before this one, which nobody waits for; None for none.

        A process alone has its own, at once.
        """
        if self.size == 1:
            return number
        before, self._pending = self._pending, None
        found = torch.tensor(number or 0)
        self._pending = dist.all_reduce(found, dist.ReduceOp.MAX, self.control, async_op=True), found
        if before is None:
            return None
        before[0].wait()
        return int(before[1]) or None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around work without exchanges between ranks: where it fails on one of them, all end with its error.

        Raises:
            RankError: another rank failed, and this one not, or of the same; its own error where this one did.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            if self.size == 1:
                raise
            error = caught
        if self.size == 1:
            return
        said = self._said(error)
        first = {what: said.index(what) for what in said if what is not None}
        if not first:
            return
        alike, mine = set(said) == {said[0]}, said[self.rank]
        if error is not None and (alike or first[mine] == self.rank):
            self.agree(error, None if self.rank != first[mine] else "" if alike else f"rank {self.rank}: ")
            raise error
        reasons = [f"rank {rank}: {what[1]}" for what, rank in first.items() if error is None or what == mine]
        self.agree(other := RankError("; ".join(reasons[:MOST_REASONS])), None)
        raise other from error

    def _said(self, error: Exception | None) -> list[Any]:
        """Of each rank what it says of its own failure, or None.

        One that has failed leaves where another is not there in SOON seconds, and one whose exchange breaks leaves too:
        with the first reason there is, as from `accounted`. One that comes later hears of it all the same.
        """
        self.control  # noqa: B018  # raises what this rank has failed of before
        if error is None:
            with self.accounted():
                return self.gather(None)
        said = type(error).__name__, reason_of(error)
        if found := in_time(lambda: self.gather(said), SOON):
            return found[0]
        first = self._account(error, local=True)
        self._untold = f"rank {self.rank}: {reason_of(error)}" if first is error else str(first)
        if first is error:
            raise error
        raise first from error

    def agree(self, error: BaseException, line: str | None) -> None:
        """Notes that all ranks know of an error; `line` is what precedes it where it is said, None where it is not."""
        self._agreed, self._line = error, line

    @contextmanager
    def accounted(self) -> Iterator[None]:
        """Around work with exchanges between ranks: an error on one ends the others with RankError, which names it."""
        try:
            yield
        except BaseException as error:
            if self.size == 1 or error is self._agreed or isinstance(error, SystemExit):
                raise
            found = self._account(error)
            if found is error:
                raise
            raise found from error

    def said_here(self, error: BaseException) -> str | None:
        """What precedes the one line for an error that went through `accounted`; None where another rank says it."""
        if self.size == 1:
            return ""
        return self._line if self._line is None or error is self._agreed else f"rank {self.rank}: "

    def set_timeout(self, timeout: timedelta) -> None:
        """For exchanges along the mesh, whose groups have torch's default and not that of the processes."""
        if self.mesh is not None:
            for group in (self._control, *self.mesh.get_all_groups()):
                dist.distributed_c10d._set_pg_timeout(timeout, group)

    def close(self) -> None:
        """At the end of all work, on all ranks."""
        if self.size > 1:
            self._roll.close()
            dist.barrier(group=self._control)
            dist.destroy_process_group()

    def _account(self, error: BaseException, local: bool = False) -> BaseException:
        """The error that this rank raises; asks the others where it is one of contact or of a signal from outside.

        local: it is neither, whatever it says.
        """
        with _signals_ignored():
            reason = reason_of(error) if local or not _lost_contact(error) else None
            alarm = self._roll.raise_alarm(reason)
        if alarm.ours and (reason is not None or (isinstance(error, KeyboardInterrupt) and not alarm.silent)):
            # a signal comes to all, a loss is that of all
            shared = isinstance(error, (KeyboardInterrupt, FloatingPointError))
            self.agree(error, "" if shared else f"rank {self.rank}: ")
            return error
        found = RankError(f"rank {alarm.rank}: {alarm.reason}" if alarm.reason is not None else verdict(alarm, error))
        self.agree(found, "" if alarm.ours else None)
        return found


ALONE = AllRanks()
_made: dict[tuple[DeviceMesh, dist.ProcessGroup | None], AllRanks] = {}


def ranks_of(mesh: DeviceMesh | None) -> AllRanks:
    """The AllRanks of a mesh, one for all who ask."""
    if mesh is None:
        return ALONE
    if not dist.is_initialized():
        raise ValueError(f"mesh={mesh}: its process group has ended")
    forget_ended()
    # meshes of another start of the process group are other meshes, and equal
    key = (mesh, dist.group.WORLD)
    if key not in _made:
        _made[key] = AllRanks(mesh)
    return _made[key]


def forget_ended() -> None:
    """Ends the alarms of meshes whose process group has ended, and lets go of the threads of their groups."""
    world = dist.group.WORLD if dist.is_initialized() else None
    for key in [key for key in _made if key[1] is not world]:
        _made.pop(key)._roll.close()


def reason_of(error: BaseException) -> str:
    """What an error says, or is where it says nothing."""
    return f"{error}" or type(error).__name__


def _lost_contact(error: BaseException) -> bool:
    """Whether it may come from another rank's end: a broken exchange, or a signal of the launcher that saw it."""
    if isinstance(error, (dist.DistError, KeyboardInterrupt)):
        return True
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """A launcher that sees one rank end sends SIGTERM to all others, which have a last word to say."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
