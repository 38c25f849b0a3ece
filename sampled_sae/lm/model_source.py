"""`ModelSource`: a language model over texts as the source of a stream of activations, which are stored nowhere."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sampled_sae.lm.dropped import check_drop_tokens, largest_norm, left_out
from sampled_sae.lm.layers_splice import LayersSplice
from sampled_sae.lm.models import check_rows, device_of, name_of, weights_digest
from sampled_sae.lm.passes import Place, run_at
from sampled_sae.lm.point_splice import PointSplice
from sampled_sae.lm.rows import RowReader
from sampled_sae.lm.splice import SpliceEvaluator
from sampled_sae.residual_stream.hook_points import HookPoint, check_places, check_points, points_of
from sampled_sae.support.argument_checks import check_flag, check_integer, check_number
from sampled_sae.support.atomic_files import field

_BEGINNING: dict[str, Any] = {"epoch": 0, "tokens": 0, "row": 0, "max_norms": None}


class ModelSource:
    """The residual stream after some blocks of a model, for each of them what `harvest` would store.

    Rows are read no further than the training needs, and again from the first one where the texts end. A place in them
    is saved, not activations: a training that goes on reads the texts up to there, without tokenizing them, and runs
    the model over the rows of one block again.

    Vectors are left out as in `harvest`, and where one is left out at a layer so are those of its token at the others:
    all layers see the same tokens.

    Args:
        model: causal language model or encoder, on any device or spread over several; put in eval mode.
        rows: of token ids.
        layers: indices of blocks, from 0, and other places as `HookPoint`, none twice; one pass serves all.
        model_name, source: as recorded; the model's `name_or_path` when absent.
        batch_size: rows a forward pass.
        holdout_rows: the first rows, which are never trained on; `holdout` gives them, and `harvest` has the same ones
            of the same texts.
        drop_first, drop_tokens, max_norm_ratio: as in `harvest`.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        model: Any,
        rows: RowReader,
        layers: Sequence[Place],
        *,
        model_name: str | None = None,
        source: str = "",
        batch_size: int = 8,
        holdout_rows: int = 0,
        drop_first: bool = True,
        drop_tokens: Iterable[int] | None = None,
        max_norm_ratio: float = 10.0,
    ) -> None:
        self._place: dict[str, Any] = dict(_BEGINNING)
        self._share, self._at_work = (0, 1), threading.Lock()
        self._layers = check_places(model, layers)
        self._points = points_of(model, self._layers)
        self._model, self._rows = model.eval(), rows
        self._batch_size = check_integer("batch_size", batch_size, 1)
        self._holdout_rows = check_integer("holdout_rows", holdout_rows, 0)
        self._drop_first, self._drop_tokens = (
            check_flag("drop_first", drop_first),
            check_drop_tokens(model, drop_tokens),
        )
        self._ratio = float(check_number("max_norm_ratio", max_norm_ratio, 1, None))
        self._name, self._source = name_of(model) if model_name is None else str(model_name), str(source)
        probe = torch.zeros(1, 2, dtype=torch.int64)
        if any(isinstance(each, HookPoint) for each in self._layers):
            check_points(model, self._points, probe.to(device_of(model)))
        self.widths = [x.shape[-1] for x in self._run(probe)]

    @property
    def about(self) -> list[dict[str, Any]]:
        settings = {
            "weights_sha256": weights_digest(self._model),
            "layers": [layer if isinstance(layer, int) else str(layer) for layer in self._layers],
            "batch_size": self._batch_size,
            "holdout_rows": self._holdout_rows,
            "drop_first": self._drop_first,
            "drop_tokens": self._drop_tokens,
            "max_norm_ratio": self._ratio,
            **self._rows.settings,
        }
        same = {"model": self._name, "source": self._source, "context": self._rows.context, "settings": settings}
        return [{**same, **_about(layer)} for layer in self._layers]

    def lane(self, which: int, of: int) -> ModelSource:
        """The same model over one of so many equal parts of the texts, from their beginning.

        All have the same rows held out. What is behind them is dealt in turn, in pieces of at most 65,536 characters,
        which become rows, and begin anew at their end, by themselves. A norm is too large by the first rows of each.
        """
        other = copy.copy(self)
        other._share, other._place, other._rows = (which, of), dict(_BEGINNING), self._rows.share(which, of)
        return other

    def read(self) -> list[Tensor]:
        """The vectors of one forward pass that stay, float32 [n, d] on the CPU, for each layer.

        Raises:
            ValueError: no rows, rows that leave nothing, activations that are not finite.
        """
        with self._at_work:  # the hooks of one pass would see those of another lane
            rows, place = self._next_rows(), self._place
            found = self._run(rows, self._holdout_rows + place["row"])
            if place["max_norms"] is None:
                place["max_norms"] = self._max_norms(rows, found)
            stay = self._staying(rows, found)
            place["row"] += len(rows)
            place["tokens"] += len(stay[0])
            return stay

    def holdout(self) -> tuple[list[Tensor], Tensor]:
        """(of each place the vectors of the held-out rows that stay, as `read` gives them; these rows, int64 [N, T]).

        The place in the texts stays, which are opened anew.

        Raises:
            ValueError: no rows are held out, or there are none.
        """
        if not self._holdout_rows:
            raise ValueError("holdout_rows=0: nothing is held out for an evaluation")
        here = self.state_dict()
        self._rows.restart()
        rows = self._rows.take(self._holdout_rows)
        # a norm is too large by the first rows that are trained on, whether they were read before or not
        first = rows[:0] if here["max_norms"] is not None else self._rows.take(self._batch_size)
        self.load_state_dict(here)
        if len(rows) == 0:
            raise ValueError(f"{self._source or 'the texts'}: no row of {self._rows.context} tokens to hold out")
        check_rows(self._model, rows)
        if len(first):
            check_rows(self._model, first)
            self._place["max_norms"] = self._max_norms(first, self._run(first, len(rows)))
        kept: list[list[Tensor]] = [[] for _ in self._layers]
        for i, batch in enumerate(rows.split(self._batch_size)):
            found = self._run(batch, i * self._batch_size, ", held out,")
            if self._place["max_norms"] is None:  # there is nothing to train on
                self._place["max_norms"] = self._max_norms(batch, found)
            for part, x in zip(kept, self._staying(batch, found)):
                part.append(x)
        return [torch.cat(part) for part in kept], rows

    def splice(
        self, places: Sequence[int], rows: Tensor, beside: bool = False, mesh: Any = None
    ) -> SpliceEvaluator | PointSplice | LayersSplice:
        """What measures an SAE of one of the places, by number, a transcoder of two, or with `beside` a crosscoder of
        all of them, on rows of token ids.

        mesh: the processes that share the rows where they can, as in `SpliceEvaluator`.
        """
        most = [self._place["max_norms"][i] for i in places]
        left_out: dict[str, Any] = {"drop_first": self._drop_first, "drop_tokens": self._drop_tokens}
        layer = self._layers[places[0]]
        if beside:
            return LayersSplice(self._model, rows, [self._layers[i] for i in places], max_norms=most, **left_out)
        if len(places) == 1 and isinstance(layer, int):
            return SpliceEvaluator(self._model, rows, layer, max_norm=most[0], mesh=mesh, **left_out)
        read, target = self._points[places[0]], self._points[places[-1]]
        return PointSplice(self._model, rows, read, target, max_norms=(most[0], most[-1]), **left_out)

    def state_dict(self) -> dict[str, Any]:
        return {**self._place, "rows": self._rows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        where = "the place in the texts"
        self._rows.load_state_dict(field(where, state, "rows", dict))
        self._place = {name: state[name] for name in self._place}

    def _next_rows(self) -> Tensor:
        if self._place["row"] == 0:
            if self._holdout_rows:
                self._rows.take(self._holdout_rows)
            self._rows.deal()
        rows = self._rows.take(self._batch_size)
        if len(rows) == 0:
            if not self._place["tokens"]:
                beyond = f" behind the {self._holdout_rows} that are held out" if self._holdout_rows else ""
                which, of = self._share
                dealt = f" in part {which + 1} of {of}; take longer texts, or fewer processes" if of > 1 else ""
                raise ValueError(
                    f"{self._source or 'the texts'}: no row of {self._rows.context} tokens to train on{beyond}{dealt}"
                )
            self._rows.restart()
            self._place |= {"epoch": self._place["epoch"] + 1, "tokens": 0, "row": 0}
            return self._next_rows()
        check_rows(self._model, rows)
        return rows

    def _run(self, rows: Tensor, first: int = 0, what: str = "") -> list[Tensor]:
        """The residual streams [b, T, d] in float32, each on the device of its block.

        first, what: for errors, the number of the first row in the texts, or in this share of them; what the rows are.
        """
        return run_at(self._model, rows, self._layers, first, self._source, what)

    def _staying(self, rows: Tensor, found: list[Tensor]) -> list[Tensor]:
        """Of each place the vectors [n, d] that none of them leaves out, on the CPU."""
        out, _ = left_out(rows, found, self._drop_first, self._drop_tokens, self._place["max_norms"])
        return [x[~out.to(x.device)].cpu() for x in found]

    def _max_norms(self, rows: Tensor, found: list[Tensor]) -> list[float]:
        return [largest_norm(rows, x, self._drop_first, self._drop_tokens, self._ratio) for x in found]


def _about(place: Place) -> dict[str, Any]:
    """What a manifest says of it."""
    return {"layer": place} if isinstance(place, int) else {"layer": None, "point": str(place)}
