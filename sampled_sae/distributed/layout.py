"""The layout of a layer that is spread over a mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..codes import SparseCodes
from ..impl.column_bounds import MOST_PARTS
from ..impl.encoder import Share
from ..impl.hints import ThresholdHints
from ..impl.interface import Implementation, implementation
from ..impl.layout import Given, Layer, Layout, Leaves
from ..impl.rounded_tokens import large_enough
from ..impl.row_gradients import RowSource
from ..impl.row_guard import wrapper_of
from ..impl.torch.screen import fast_bfloat16, sums_in_float32
from ..support.float32_products import tf32_allowed
from ..support.tensor_file import Piece
from .aux_loss import aux_loss
from .gradients import SpreadRows, SumGradients
from .mesh import Mesh
from .parts import SpreadParts
from .ranks import SumBackward
from .weights import NAMES, Weights

REFUSED = -1


class MeshLayout(Layout):
    """Tokens over the dimension `data` of a mesh, features over `feature`.

    Attributes:
        mesh: the processes. weights: which features are here. batches: how many were read together so far.
    """

    def __init__(self, mesh: Mesh, weights: Weights) -> None:
        self.mesh, self.weights = mesh, weights
        self.size = mesh.size
        self.device_mesh = mesh.device_mesh
        self.batches = 0
        self._ieee = True
        self._fast, self._exact = self._of_all(fast_bfloat16()), self._of_all(sums_in_float32())
        # a process without tokens has none: with those that every process must have alike they would be mixed up
        self.own_hints: ThresholdHints = ThresholdHints()
        self._parts: dict[str, Implementation] = {}

    def parts(self, name: str) -> Implementation:
        if name not in self._parts:
            local = implementation(name)
            spread = SpreadParts(local, self.weights, self.mesh, self.own_hints, waits=name == "torch")
            self._parts[name] = replace(
                local,
                column_scores=spread.column_scores,
                column_bounds=spread.column_bounds,
                candidate_pool=spread.candidate_pool,
                select=spread.select,
                decode=spread.decode,
                decode_levels=spread.decode_levels,
                aux_loss=partial(aux_loss, spread),
                totals=spread.totals,
                squared_errors=None,
                ranking=spread.ranking,
            )
        return self._parts[name]

    def leaves(self, layer: Layer, keep_rows: bool) -> Leaves:
        parameters = [getattr(layer, name) for name in NAMES]
        parameters += [] if layer.W_skip is None else [layer.W_skip]
        W_enc, b_enc, W_dec, b_dec, *skip = (self.weights.local(p) for p in parameters)
        wanted = frozenset(name for name, p in zip(NAMES, parameters) if p.requires_grad)
        rows: RowSource
        if not wanted or not torch.is_grad_enabled():
            rows = SpreadRows(keep_rows, frozenset())
            return Leaves(W_enc.t(), b_enc, W_dec, b_dec, b_dec, rows, *skip)
        rows = SpreadRows(keep_rows, wanted)
        for part, parameter in zip((W_enc, b_enc, W_dec), parameters):
            # says that rows of it are asked for; no gradient flows here
            part.requires_grad_(parameter.requires_grad)
        b_in, b_out, rows.anchor, *skip = SumGradients.apply(rows.aside, self.mesh, self.weights, *parameters)
        return Leaves(W_enc.t(), b_enc, W_dec, b_in, b_out, rows, *skip)

    def read(self, read: Callable[[], Given], together: bool = True) -> tuple[Given, Share | None]:
        """A batch that one process cannot take, for NaN or inf or want of memory, is refused by all, with its rank.

        together: else the processes of `feature` alone, which take the same tokens, agree on them.

        Raises:
            ValueError, TypeError: that; a batch without any token; processes of `feature` that were given other tokens.
            Exception: what else `read` has met here.
        """
        ranks = self.mesh.feature
        if not together and ranks.size == 1:
            return read(), None
        self.batches += 1
        fault: Exception | None = None
        try:
            given = read()
            # with a bit for how this process multiplies float32
            number = 2 * len(given[0]) + int(tf32_allowed())
        except Exception as error:
            fault, number = error, REFUSED
        numbers = self.mesh.exchange(number, together)
        self._ieee = all(n % 2 == 0 for of_rank in numbers for n in of_rank)
        numbers = [[n // 2 for n in of_rank] for of_rank in numbers]
        where = f"in batch {self.batches} of sampled_sae.distributed"
        if isinstance(fault, (TypeError, ValueError)):
            raise type(fault)(f"rank {self.mesh.rank}, {where}: {fault}") from fault
        if fault is not None:
            raise fault
        for i, of_rank in enumerate(numbers):
            if REFUSED in of_rank:
                data = i if together else self.mesh.data.rank
                name = self.mesh.name_of(data, of_rank.index(REFUSED))
                raise ValueError(f"x: {name} refused its tokens {where} (NaN, inf, a wrong shape: it says why)")
            if len(set(of_rank)) > 1:
                raise ValueError(
                    f"x: {of_rank} tokens on the processes of the dimension 'feature' {where}; they take the same ones"
                )
        if not together:
            return given, None
        counts = [of_rank[0] for of_rank in numbers]
        if sum(counts) == 0:
            raise ValueError(f"x: no process has a token {where}; at least one is needed")
        first = sum(counts[: self.mesh.data.rank])
        return given, Share(sum(counts), self.weights.n_features, first)

    def into_encoder(self, x: Tensor) -> Tensor:
        if self.mesh.feature.size == 1 or not x.requires_grad:
            return x
        return SumBackward.apply(x, self.mesh.feature, "gradient of x")

    def of_feature_ranks(self, x: Tensor) -> tuple[Tensor, slice]:
        ranks = self.mesh.feature
        (every,), counts = ranks.gather_rows([x], "tokens")
        first = sum(counts[: ranks.rank])
        return every, slice(first, first + len(x))

    def screen(self, screen: str, impl: str, share: Share | None) -> str:
        """ "auto" and "bf16" become what is right for all processes, since scores are bounded together."""
        if share is None or screen == "off":
            return screen
        fast, exact = self._fast, self._exact
        if impl == "triton":
            fast, few = self.mesh.device_mesh.device_type == "cuda", self.mesh.data.size <= MOST_PARTS
            exact = self._ieee and few and self.weights.least_local > 1
        n_tokens = -(-share.n_tokens // self.mesh.data.size)
        wanted = screen == "bf16" or (fast and large_enough(n_tokens, self.weights.most_local))
        return "bf16" if wanted and exact else "off"

    def guard(self, layer: Layer) -> None:
        if (wrapper := wrapper_of(layer)) is not None:
            raise RuntimeError(f"{wrapper}: `parallelize` has spread the SAE already; leave it out")

    def numbered(self, codes: SparseCodes) -> SparseCodes:
        if self.mesh.feature.size == 1:
            return codes
        shape = (codes.shape[0], self.weights.n_features)
        if codes.block is not None and codes.pool is not None:
            return SparseCodes.from_block(codes.block, codes.pool + self.weights.first, shape[1], codes.low_block)
        if codes.padded is not None:
            # not by `entries`, which waits for their number; padding has the feature behind the last one
            found = codes.padded.features
            numbers = torch.where(found < self.weights.n_local, found + self.weights.first, shape[1])
            return SparseCodes.from_padded(codes.padded._replace(features=numbers), shape)
        values, tokens, features = codes.entries()
        return SparseCodes(values, tokens, features + self.weights.first, shape)

    def complete(self, codes: SparseCodes) -> SparseCodes:
        """Detached where features are split."""
        ranks = self.mesh.feature
        if ranks.size == 1:
            return codes
        columns, _ = ranks.gather_rows(self.numbered(codes).detach().entries(), "codes")
        order = torch.argsort(columns[1], stable=True)
        values, tokens, features = (column[order] for column in columns)
        return SparseCodes(values, tokens, features, (codes.shape[0], self.weights.n_features))

    def here(self, codes: SparseCodes | Tensor) -> SparseCodes:
        codes = super().here(codes)
        if self.mesh.feature.size == 1:
            return codes
        values, tokens, features = codes.entries()
        first, n_local = self.weights.first, self.weights.n_local
        at = ((features >= first) & (features < first + n_local)).nonzero().squeeze(1)
        return SparseCodes(values[at], tokens[at], features[at] - first, (codes.shape[0], n_local))

    def write(self, tensors: Mapping[str, Tensor], write: Callable[[Iterator[Piece]], None]) -> None:
        """Raises, on every process, what the first one met."""
        fault: Exception | None = None
        pieces = (piece for name, t in tensors.items() for piece in self.weights.pieces(name, t))
        if self.mesh.data.rank == self.mesh.feature.rank == 0:
            try:
                write(pieces)
            except Exception as error:
                fault = error
        if self.mesh.data.rank == 0:
            # all that hold a part send it, also where it is not written
            for _ in pieces:
                pass
        refused = self.mesh.exchange(REFUSED if fault is not None else 0)
        if fault is not None:
            raise fault
        if refused[0][0] == REFUSED:
            raise OSError(f"{self.mesh.name_of(0, 0)} could not write: it says why")

    def adopt(self, t: Tensor, name: str) -> Tensor:
        """Of a whole one, which all processes have, their parts."""
        whole = isinstance(t, DTensor) or name not in self.weights.shapes or t.shape != self.weights.shapes[name]
        return t if whole else self.weights.wrap(name, self.weights.part_of(name, t))

    def local(self, t: Tensor) -> Tensor:
        return self.weights.local(t)

    def like(self, t: Tensor, name: str) -> Tensor:
        return self.weights.wrap(name, t.t() if name == "W_enc" else t)

    def whole(self, t: Tensor) -> Tensor:
        if not isinstance(t, DTensor):
            return t.detach()
        with torch.no_grad():
            return t.full_tensor()

    def _of_all(self, fact: bool) -> bool:
        """Whether it is one on every process."""
        return all(all(of_rank) for of_rank in self.mesh.exchange(int(fact)))

    def __deepcopy__(self, memo: dict[int, object]) -> MeshLayout:
        return self
