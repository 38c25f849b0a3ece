"""The transformer blocks of a language model, and the residual stream in what a block returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..support.argument_checks import check_integer

_LIST_NAMES = ("layers", "layer", "h", "blocks", "block")
_OTHER_SENSES = ("vision", "visual", "image", "audio", "speech", "video", "protein")
_OTHER_STREAMS = ("xlnet", "reformer")  # blocks that return [T, B, d], or two streams of which each holds a half
_SUPPORTED = "supported are causal language models and encoders of text with one list of blocks"


def text_config(model: Any) -> Any:
    """The part of the model's configuration that is about text, also inside a wrapper; None where there is none."""
    config: Any = next((module.config for module in model.modules() if hasattr(module, "config")), None)
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # it has several, of which none is the model's
        return config


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks of a language model, first block first; also inside a wrapper (PEFT, images).

    Raises:
        ValueError: naming the model's class, where it is no model of text alone or has no such list.
    """
    name = type(model).__name__
    about = text_config(model)
    taken = getattr(model, "main_input_name", "input_ids")
    if getattr(about, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder: {_SUPPORTED}")
    if taken != "input_ids":
        raise ValueError(f"{name} takes {taken} and not token ids: {_SUPPORTED}")
    if getattr(about, "model_type", None) in _OTHER_STREAMS:
        raise ValueError(f"the blocks of {name} do not return its residual stream [B, T, d]: {_SUPPORTED}")
    found = dict(_block_lists(model))
    if len(found) > 1:
        depth = getattr(about, "num_hidden_layers", None)
        found = {path: blocks for path, blocks in found.items() if len(blocks) == depth} or found
    if len(found) != 1:
        several = f", but {', '.join(found)}" if found else ""
        raise ValueError(f"no list of transformer blocks found in {name}{several}: {_SUPPORTED}")
    return next(iter(found.values()))


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for path, module in model.named_modules():
        parts = path.split(".")
        elsewhere = any(part.isdigit() or sense in part for part in parts for sense in _OTHER_SENSES)
        if isinstance(module, nn.ModuleList) and len(module) and parts[-1] in _LIST_NAMES and not elsewhere:
            yield path, module


def check_layer(model: nn.Module, layer: int) -> nn.Module:
    """The block `layer` of the model; ValueError where there is none."""
    blocks = transformer_blocks(model)
    allowed = f"layer={layer!r} must be an integer from 0 to {len(blocks) - 1} in this model"
    try:
        index = check_integer("layer", layer, 0)
    except (TypeError, ValueError):
        raise ValueError(allowed) from None
    if index >= len(blocks):
        raise ValueError(allowed)
    return blocks[index]


class PassEnded(Exception):
    """Ends a forward pass of which nobody needs the rest."""


class BlockOutputs:
    """Reads and replaces the residual stream in what one block returns, and checks its shape.

    Args:
        model, layer: the model and the index of the block.
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.block = check_layer(model, layer)
        self._model, self._layer = model, layer
        self._running = self._reached = False
        self._shape: tuple[int, ...] | None = None  # [B, T] of the forward pass under way, where it is known

    @contextmanager
    def watched(self, fn: Callable[[Any], Any]) -> Iterator[None]:
        """Within the context fn is called with what the block returns; what it gives takes its place unless it is None.

        A forward pass that cannot run or does not reach the block is a ValueError.
        """
        handles = [
            self.block.register_forward_hook(lambda module, args, output: fn(output)),
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._model.register_forward_hook(self._end),
        ]
        try:
            with torch.compiler.set_stance("force_eager"):  # what is compiled already knows no hooks
                yield
        except (AttributeError, LookupError, TypeError, ValueError, NotImplementedError) as error:
            if not self._running or self._reached:
                raise
            name = type(self._model).__name__
            raise ValueError(f"{name} does not run on these token ids alone ({error}): {_SUPPORTED}") from error
        finally:
            for handle in handles:
                handle.remove()

    def residual(self, output: Any) -> Tensor:
        """The residual stream [B, T, d]: the tensor itself, the first of a tuple or list, or of a dict's values.

        Raises:
            ValueError: naming the shape, for anything else.
        """
        self._reached = True
        x = output[_key(output)] if isinstance(output, (tuple, list, dict)) and output else output
        width = getattr(text_config(self._model), "hidden_size", None)
        expected: list[Any] = ["B", "T"] if self._shape is None else list(self._shape)
        expected.append("d" if width is None else width)
        found: Any = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        fits = isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 3
        if not fits or any(size != want for size, want in zip(x.shape, expected) if isinstance(want, int)):
            raise ValueError(
                f"block {self._layer} of {type(self._model).__name__} returns {found}, not the residual stream "
                f"[B, T, d] = [{', '.join(map(str, expected))}]: models whose blocks pass on several streams or "
                "another number of tokens are not supported"
            )
        return x

    def with_residual(self, output: Any, x: Tensor) -> Any:
        """The block's output with x in the place of its residual stream."""
        if isinstance(output, dict):
            changed = type(output)(output)
            changed[_key(output)] = x
            return changed
        if isinstance(output, (tuple, list)):
            return type(output)([x, *output[1:]]) if type(output) in (tuple, list) else type(output)(x, *output[1:])
        return x

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running, self._reached, self._shape = True, False, None
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if isinstance(tokens, Tensor) and tokens.ndim >= 2:
            self._shape = tuple(tokens.shape[:2])

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running = False
        if not self._reached:
            raise ValueError(f"layer={self._layer}: {type(module).__name__} ran without its block {self._layer}")


def _key(output: Any) -> Any:
    """Where the residual stream stands in a block's output of several values."""
    if isinstance(output, dict):
        return next((key for key, value in output.items() if isinstance(value, Tensor)), next(iter(output)))
    return 0
