"""`patch_sparsify`: what SparseCoder calls to encode and decode, replaced and put back."""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from .encode_decode import Functions

# every module that SparseCoder or its users take the two functions from
TARGETS = (
    ("sparsify.sparse_coder", "fused_encoder"),
    ("sparsify.sparse_coder", "decoder_impl"),
    ("sparsify.fused_encoder", "fused_encoder"),
    ("sparsify.utils", "decoder_impl"),
)


class SparsifyPatch(ExitStack):
    """The functions that were replaced; `undo()`, or the end of a `with` block, puts them back.

    What was changed again in the meantime by someone else stays as it is.
    """

    def undo(self) -> None:
        """Puts back what this patch replaced; doing it twice does nothing."""
        self.close()


def put_back(module: ModuleType, name: str, theirs: Any, ours: Any) -> None:
    if getattr(module, name) is ours:
        setattr(module, name, theirs)


def patch_sparsify() -> SparsifyPatch:
    """Every SparseCoder of this process, old or new, encodes and decodes with our functions from now on.

    Losses and selected activations stay the same up to rounding. Different are the gradients that were wrong: AuxK and
    Multi-TopK reach the encoder (theirs give it exactly zero), and an activation of 0 passes none on.

    With 8 * k <= F no step makes an [N, F] tensor; all activations are computed only where `pre_acts` is used for more
    than a selection.

    On a GPU the functions are our Triton kernels. Under autocast the encoder's products are rounded as they are there,
    the decoder's as little as there, and activations come in the dtype of the weights.

    Patching twice is patching once; the second patch's `undo` does nothing.

    Raises:
        ImportError: sparsify is not installed, or has other functions than those of 1.3.
    """
    functions = Functions()
    with SparsifyPatch() as patch:  # puts back what was replaced if one cannot be
        for module_name, name in TARGETS:
            try:
                module = importlib.import_module(module_name)
                theirs = getattr(module, name)
            except (ImportError, AttributeError) as error:
                raise ImportError(f"patch_sparsify: {error}; needs sparsify 1.3, `pip install eai-sparsify`") from error
            if not isinstance(getattr(theirs, "__self__", None), Functions):
                ours = getattr(functions, name)
                setattr(module, name, ours)
                patch.callback(put_back, module, name, theirs, ours)
        return patch.pop_all()
