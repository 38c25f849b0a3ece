"""The residual stream after several blocks of a language model, in one forward pass."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from .blocks import BlockOutputs
from .hooks import capture


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
    with ExitStack() as stack:
        for layer in earlier:
            _watch(stack, model, layer, found)
        with capture(model, last) as captured:
            yield found
        found[last] = captured.value


def _watch(stack: ExitStack, model: nn.Module, layer: int, found: dict[int, Tensor]) -> None:
    outputs = BlockOutputs(model, layer)

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        # a later block may add to it in place
        found[layer] = outputs.residual(output).clone()

    stack.callback(outputs.block.register_forward_hook(keep).remove)
    stack.enter_context(outputs.watched())
