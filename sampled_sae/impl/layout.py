"""Where the tokens and the features of a layer are: all in this process, unless `sampled_sae.distributed` spreads them.

What depends on it asks the layer's layout, so that the step of one process and that of many are the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..codes import SparseCodes
from ..support.tensor_file import Piece
from .encoder import Share
from .hints import ThresholdHints
from .interface import Implementation, implementation
from .row_gradients import RowSource
from .row_guard import guard_rule
from .step_memory import StepMemory


class Layer(Protocol):
    """What a layout asks of a SampledSAE."""

    memory: StepMemory

    @property
    def W_enc(self) -> nn.Parameter: ...
    @property
    def b_enc(self) -> nn.Parameter: ...
    @property
    def W_dec(self) -> nn.Parameter: ...
    @property
    def b_dec(self) -> nn.Parameter: ...
    @property
    def W_skip(self) -> nn.Parameter | None: ...


# tokens of a batch, and what goes with them
Given = TypeVar("Given", bound=tuple[Tensor, ...])


class Leaves(NamedTuple):
    """What a step computes with, of this process, and where its gradients go.

    W_enc: [F, d]. b_enc: [F]. W_dec: [F, d_out]. b_in, b_out: [d_out], b_dec as the encoder subtracts and the decoder
    adds it. W_skip: [d, d_out], or None.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_in: Tensor
    b_out: Tensor
    rows: RowSource
    W_skip: Tensor | None = None


class Layout:
    """Of one process, which holds everything; nothing has to travel.

    Attributes:
        size: number of processes.
        device_mesh: of them; None for one.
        own_hints: where searches start that go through the tokens or the features of this process alone; None for one.
    """

    size = 1
    device_mesh: DeviceMesh | None = None
    own_hints: ThresholdHints | None = None

    def parts(self, name: str) -> Implementation:
        """The layer's parts in the implementation `name`."""
        return implementation(name)

    def leaves(self, layer: Layer, keep_rows: bool) -> Leaves:
        """The layer's weights for one step; `keep_rows` as in `RowSource`."""
        rows = layer.memory.rows(keep_rows)
        return Leaves(layer.W_enc.t(), layer.b_enc, layer.W_dec, layer.b_dec, layer.b_dec, rows, layer.W_skip)

    def read(self, read: Callable[[], Given], together: bool = True) -> tuple[Given, Share | None]:
        """What `read` makes of the caller's batch, tokens [B, d] first, and where they stand among all processes'.

        together: else they stand alone, and None is said of them.
        """
        return read(), None

    def into_encoder(self, x: Tensor) -> Tensor:
        """x [B, d] as the encoder is given it."""
        return x

    def of_feature_ranks(self, x: Tensor) -> tuple[Tensor, slice]:
        """Tokens [B, d] of the processes that hold other features, one after another, and which of them are x."""
        return x, slice(None)

    def screen(self, screen: str, impl: str, share: Share | None) -> str:
        """What `cfg.screen` means for a batch, or for tokens that stand alone where `share` is None."""
        return screen

    def guard(self, layer: Layer) -> None:
        """Refuses, before a step with gradients, what would train `layer` by another rule."""
        guard_rule(layer)

    def numbered(self, codes: SparseCodes) -> SparseCodes:
        """Codes of the features here, as those of all features."""
        return codes

    def complete(self, codes: SparseCodes) -> SparseCodes:
        """Codes of the features here and those of all others, of the tokens here."""
        return codes

    def here(self, codes: SparseCodes | Tensor) -> SparseCodes:
        """Of codes of all features, [B, F] or a dense tensor [..., F], those of the features here."""
        return codes if isinstance(codes, SparseCodes) else SparseCodes.from_dense(codes.view(-1, codes.shape[-1]))

    def write(self, tensors: Mapping[str, Tensor], write: Callable[[Iterator[Piece]], None]) -> None:
        """Lets one process write parameters and buffers, piece by piece; the others wait for it."""
        write(Piece(name, t) for name, t in tensors.items())

    def adopt(self, t: Tensor, name: str) -> Tensor:
        """A tensor of a state, in the form that parameter or buffer `name` has here."""
        return t

    def local(self, t: Tensor) -> Tensor:
        """The part of a parameter, a buffer or a moment that is here; changes to it are seen by all that hold it."""
        return t

    def like(self, t: Tensor, name: str) -> Tensor:
        """The inverse of `local`, for what has the shape of parameter or buffer `name`."""
        return t

    def whole(self, t: Tensor) -> Tensor:
        """All of a parameter or a buffer, detached, on every process."""
        return t.detach()


ALONE = Layout()
