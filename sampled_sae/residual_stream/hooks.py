"""Read or replace the residual stream of a language model after a block, or read it after several.

Convention: layer i is the residual stream AFTER block i, counted from 0. That is `hidden_states[i + 1]` of
Hugging Face's `output_hidden_states=True`, except at the last block, where Hugging Face's entry has passed
the final norm and ours has not (and in Mamba and RWKV, whose lists leave the embedding out: `hidden_states[i]`).
"The sixth layer" of a paper is layer 5.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from .blocks import BlockOutputs, PassEnded


class Captured:
    """Holds the residual stream [B, T, d] of the last forward pass in `value`."""

    def __init__(self) -> None:
        self._value: Tensor | None = None

    @property
    def value(self) -> Tensor:
        if self._value is None:
            raise RuntimeError("nothing captured: no forward pass of the model has reached the layer")
        return self._value


@contextmanager
def capture(model: nn.Module, layer: int) -> Iterator[Captured]:
    """Capture the residual stream after block `layer` and stop the forward pass there.

    The forward pass ends the `with` block too, so make it the last statement:

        with capture(model, 5) as captured:
            model(input_ids=rows, use_cache=False)
        x = captured.value  # [B, T, d]

    Raises:
        ValueError: if the model is none of text, or has no such layer; in the forward pass, if the model needs more
            than token ids, leaves the block out, or its block returns another shape than [B, T, d].
    """
    outputs, captured = BlockOutputs(model, layer), Captured()

    def stop(output: Any) -> None:
        captured._value = outputs.residual(output)
        raise PassEnded

    with suppress(PassEnded), outputs.watched(stop):
        yield captured


@contextmanager
def capture_layers(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Layer -> residual stream [B, T, d] of a forward pass, which ends at the last of them.

    As `capture`: the forward pass ends the `with` block too, and the errors are the same.

        with capture_layers(model, [3, 5]) as found:
            model(input_ids=rows, use_cache=False)
        x = found[3]  # [B, T, d]
    """
    *earlier, last = sorted(set(layers))
    found: dict[int, Tensor] = {}

    def keep(layer: int, outputs: BlockOutputs, output: Any) -> None:
        # a later block may add to it in place
        found[layer] = outputs.residual(output).clone()

    with ExitStack() as stack:
        for layer in earlier:
            outputs = BlockOutputs(model, layer)
            stack.enter_context(outputs.watched(partial(keep, layer, outputs)))
        with capture(model, last) as captured:
            yield found
        found[last] = captured.value


@contextmanager
def replace(model: nn.Module, layer: int, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context, every forward pass continues from `fn(x)` after block `layer`.

    Args:
        model: a language model of Hugging Face.
        layer: index of the block, from 0.
        fn: takes the residual stream [B, T, d] and returns its replacement, same shape, dtype and device.

    Raises:
        ValueError: as `capture`, and (in the forward pass) if `fn` changes shape or dtype.
    """
    outputs = BlockOutputs(model, layer)

    def substitute(output: Any) -> Any:
        before = outputs.residual(output)
        after = fn(before)
        if after.shape != before.shape or after.dtype != before.dtype:
            raise ValueError(
                f"fn returned {after.dtype} {list(after.shape)} for a residual stream of "
                f"{before.dtype} {list(before.shape)}"
            )
        return outputs.with_residual(output, after)

    with outputs.watched(substitute):
        yield
