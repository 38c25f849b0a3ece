"""`StreamedBatches`: shuffled batches of a stream, which is read once, in order and no further than they need."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..support.all_ranks import ALONE, AllRanks
from ..support.argument_checks import check_finite, check_integer
from ..support.atomic_files import field
from ..support.even_slices import share
from ..support.output_folder import sharing
from .activation_stream import StreamedActivations
from .batches import of_lanes
from .store_writer import LARGEST
from .stream_lane import FirstBlock, StreamLane


class StreamedBatches:
    """The batches of a training on a stream.

    Each block of the stream is shuffled in memory, in an order that depends on (seed, block) alone; the tokens left at
    its end, fewer than a batch, are dropped. The last two blocks share what is left to read evenly, so that the
    threshold is calibrated on no small one. The scale is that of the first block.

    With several lanes each is a share of the stream, with blocks of its own, and gives an equal part of every batch, as
    in `ShuffledStream`. The blocks of all of them together have the tokens of the buffer, and the scale is that of all
    their first blocks.

    Args:
        part: what is read.
        batch_size: tokens a batch.
        seed: of the order.
        steps: batches that are asked for in all.
        lanes: into how many shares the stream is cut.
        ranks: the processes that read it; each asks for its part of each batch. What all of them do together: the first
            look at the scales, `calibration_batches` and `state_dict`.

    Attributes:
        rows: (start, stop) of this process's part among the tokens of a batch.

    Raises:
        ValueError: a batch_size above the buffer, or below a token for each lane and process; lanes of an iterator.
    """

    def __init__(
        self,
        part: StreamedActivations,
        batch_size: int,
        seed: int,
        steps: int,
        lanes: int = 1,
        ranks: AllRanks = ALONE,
    ) -> None:
        self._part, self._ranks = part, ranks
        self.batch_size, self.seed = check_integer("batch_size", batch_size, 1), check_integer("seed", seed, 0)
        self.steps, self.lanes = check_integer("steps", steps, 1), check_integer("lanes", lanes, 1)
        if self.batch_size > part.stream.buffer_tokens:
            raise ValueError(
                f"batch_size={batch_size}: must be at most {part.stream.buffer_tokens}, the buffer_tokens of the stream"
            )
        if self.batch_size < max(self.lanes, ranks.size):
            raise ValueError(
                f"batch_size={batch_size}: must be at least {max(self.lanes, ranks.size)}, a token a process"
            )
        self.rows = share(self.batch_size, ranks.rank, ranks.size)
        self._own = list(of_lanes(self.batch_size, self.lanes, self.rows))
        self._lanes = {
            lane: StreamLane(part, self.batch_size, self.seed, self.steps, (lane, self.lanes), ranks.size)
            for lane, _, _ in self._own
        }
        self._scales: list[float] | None = None  # of x, and of a pair of its targets

    def check_room(self) -> None:
        """Whether there is room for what the processes hold that share this one's memory, or its disk; `Room.check`."""
        room, ranks = self._part.stream.room, self._ranks
        # of the blocks of all lanes, which have the tokens of the buffer
        held = sharing(room.folder, len(self._own) / self.lanes, ranks)
        with ranks.together():
            room.check(sum(held))

    @property
    def scale(self) -> float | tuple[float, ...]:
        """Activations times this have mean ||x||^2 = d_in, by the first block; one number a layer of several."""
        return tuple(self.scales) if self._part.layers > 1 else self.scales[0]

    @property
    def output_scale(self) -> float:
        """The same of the targets; 1 where there are none."""
        return self.scales[1] if self._part.d_out is not None else 1.0

    @property
    def scales(self) -> list[float]:
        """Of what is read, layer by layer, and, of a pair, of what is reconstructed."""
        if self._scales is None:
            self._scales = self._measured()
        return self._scales

    def batch(self, t: int) -> Tensor:
        """This process's part of batch t >= 0, times the scale: [n, d_in], of a pair [n, d_in + d_out], each times its
        own. Quick for the block held and the one behind it.

        Raises:
            ValueError: what the stream raises, its end, NaN or inf in the batch; with the step.
        """
        scales, found = self.scales, []
        for lane, start, stop in self._own:
            parts = [x.mul_(scale) for x, scale in zip(self._lanes[lane].take(t, start, stop), scales)]
            found.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        x = found[0] if len(found) == 1 else torch.cat(found)
        check_finite(x, "activations", f" at step {t}")
        return x

    def calibration_batches(self, n: int) -> range:
        """Numbers of at most n batches that the threshold is calibrated on: those of the last block trained on, which
        all lanes have in theirs."""
        with self._ranks.together():
            own = [lane.last_block() for lane in self._lanes.values()]
        found = [block for of_rank in self._ranks.gather(own) for block in of_rank]
        return range(max(first for first, _ in found), min(end for _, end in found))[-n:]

    def state_dict(self) -> dict[str, Any]:
        """Where the blocks held begin; where none is, the last place that is known."""
        own = {number: lane.state_dict() for number, lane in self._lanes.items()}
        places = [place for _, place in sorted(self._of_all(own).items())]
        of_targets = {} if self._part.d_out is None else {"output_scale": self.output_scale}
        scale = self.scales if self._part.layers > 1 else self.scales[0]
        return {**(places[0] if self.lanes == 1 else {"lanes": places}), "scale": scale, **of_targets}

    def offer(self, where: str, state: Any) -> None:
        """A place of a checkpoint, to begin with in place of the beginning.

        Raises:
            ValueError: it is none, or of another stream; begins with `where`.
        """
        names = ("scale",) if self._part.d_out is None else ("scale", "output_scale")
        if self._part.layers > 1:
            found = field(where, state, "scale", (list, tuple))
            if len(found) != self._part.layers or not all(isinstance(scale, float) for scale in found):
                raise ValueError(f"{where}: scale={found!r}: must be {self._part.layers} numbers, one a layer")
            scales = [float(scale) for scale in found]
        else:
            scales = [float(field(where, state, name, float)) for name in names]
        if self._scales not in (None, scales):
            raise ValueError(f"{where}: scales {scales}, the stream has {self._scales}")
        places = [state] if self.lanes == 1 else field(where, state, "lanes", list)
        if len(places) != self.lanes:
            raise ValueError(f"{where}: the places of {len(places)} lanes, there are {self.lanes}")
        for number, lane in self._lanes.items():
            lane.offer(where, places[number])
        self._scales = scales

    @contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """Within it the next block is read while the one held is trained on."""
        for lane in self._lanes.values():
            lane.ahead = True
        try:
            yield
        finally:
            for lane in self._lanes.values():
                lane.ahead = False
                lane.stop()

    def _measured(self) -> list[float]:
        """The scales, by the first block of every lane."""
        handed_out = self._ranks.size > 1 and not self._part.stream.divides
        with self._ranks.together():
            own = {number: lane.first_block(handed_out) for number, lane in self._lanes.items()}
        found = self._of_all(own)
        with self._ranks.together():
            if handed_out:
                self._check_differ(found)
            return self._scales_by(found)

    def _scales_by(self, found: dict[int, FirstBlock]) -> list[float]:
        tokens, scales = sum(block.tokens for block in found.values()), []
        for i, width in enumerate(self._part.widths):
            square = math.fsum(found[number].squares[i] for number in sorted(found)) / tokens
            if not 0 < square < LARGEST**2:
                raise ValueError(
                    f"{self._part.where}: the first {tokens} activations have a mean square of {square:.3g}"
                )
            scales.append(math.sqrt(width / square))
        return scales

    def _check_differ(self, found: dict[int, FirstBlock]) -> None:
        """ValueError where two lanes give the same: processes that were handed one iterator instead of a share each."""
        seen: dict[str, int] = {}
        for number, block in sorted(found.items()):
            if block.crc32 in seen:
                raise ValueError(
                    f"{self._part.where}: gives ranks {seen[block.crc32]} and {number} the same activations; each "
                    "process needs a share of its own"
                )
            seen[block.crc32] = number

    def _of_all(self, own: dict[int, Any]) -> dict[int, Any]:
        """By lane, what the processes have of theirs."""
        return {lane: value for of_rank in self._ranks.gather(own) for lane, value in of_rank.items()}
