"""`patch_sparsify`: what SparseCoder calls to encode and decode, replaced and put back."""

from __future__ import annotations

import importlib
from types import ModuleType, TracebackType
from typing import Any

from .functions import Functions

# every module that SparseCoder or its users take the two functions from
TARGETS = (
    ("sparsify.sparse_coder", "fused_encoder"),
    ("sparsify.sparse_coder", "decoder_impl"),
    ("sparsify.fused_encoder", "fused_encoder"),
    ("sparsify.utils", "decoder_impl"),
)


class SparsifyPatch:
    """The functions that were replaced; `undo()`, or the end of a `with` block, puts them back.

    What was changed again in the meantime by someone else stays as it is.
    """

    def __init__(self, replaced: list[tuple[ModuleType, str, Any, Any]]) -> None:
        self._replaced = replaced

    def undo(self) -> None:
        """Puts back what this patch replaced; doing it twice does nothing."""
        for module, name, theirs, ours in self._replaced:
            if getattr(module, name) is ours:
                setattr(module, name, theirs)
        self._replaced = []

    def __enter__(self) -> SparsifyPatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def patch_sparsify() -> SparsifyPatch:
    """Every SparseCoder of this process, old or new, encodes and decodes with our functions from now on.

    Losses and selected activations stay the same up to rounding. Different are the gradients that were wrong: AuxK and
    Multi-TopK reach the encoder (theirs give it exactly zero), and an activation of 0 passes none on.

    With 8 * k <= F no [N, F] tensor is made in an ordinary step, and a token with fewer than k positive activations is
    filled up with activations of 0 under features that other tokens of the batch use, so that no feature counts as
    fired through it as long as the batch uses k features. A larger k is selected from all activations, filled up as
    sparsify does.

    On a GPU the functions are our Triton kernels. Under autocast the encoder's products are rounded as they are there,
    the decoder's as little as there, and activations come in the dtype of the weights.

    Patching twice is patching once; the second patch's `undo` does nothing.

    Raises:
        ImportError: sparsify is not installed, or has other functions than those of 1.3.
    """
    ours = Functions()
    replaced: list[tuple[ModuleType, str, Any, Any]] = []
    for module_name, name in TARGETS:
        try:
            module = importlib.import_module(module_name)
            theirs = getattr(module, name)
        except (ImportError, AttributeError) as error:
            for other, attribute, original, _ in replaced:
                setattr(other, attribute, original)
            raise ImportError(f"patch_sparsify: {error}; needs sparsify 1.3, `pip install eai-sparsify`") from error
        if isinstance(getattr(theirs, "__self__", None), Functions):
            continue
        replacement = getattr(ours, name)
        setattr(module, name, replacement)
        replaced.append((module, name, theirs, replacement))
    return SparsifyPatch(replaced)
