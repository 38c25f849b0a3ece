"""The two functions of sparsify: encode to k activations of each token, decode them."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...codes import SparseCodes
from ...impl.hints import ThresholdHints
from ...impl.interface import implementation, resolve_impl
from ...impl.row_gradients import RowSource
from ...support.argument_checks import check_choice, check_integer, describe
from ...support.reused_memory import Workspace
from .encoder_call import EncoderCall, PreActivations

ACTIVATIONS = ("topk", "groupmax")


class Functions(threading.local):
    """`fused_encoder` and `decoder_impl`, and what they keep between calls: memory for gradients, hints."""

    def __init__(self) -> None:
        self._workspace = Workspace()
        self._hints = WeakTensorKeyDictionary()

    def fused_encoder(self, input: Tensor, weight: Tensor, bias: Tensor | None, k: int, activation: str) -> Any:
        """As sparsify's, with right gradients through every result.

        Args:
            input: [..., d].
            weight, bias: [F, d], [F] or None.
            k: entries of each token.
            activation: "topk": the k largest; "groupmax": the largest of each of k groups of F / k features.

        Returns:
            EncoderOutput(top_acts [..., k] in weight's dtype, top_indices int64 [..., k], pre_acts [..., F], which is
            computed when it is used). For "topk" equivalent to `pre_acts = relu(input @ weight.T + bias);
            *pre_acts.topk(k, sorted=False), pre_acts`.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        from sparsify.fused_encoder import EncoderOutput

        check_choice("activation", activation, ACTIVATIONS)
        k = check_integer("k", k, 1)
        n_features = weight.shape[0]
        if k > n_features:
            raise ValueError(f"k={k}: must be at most {n_features}, the number of features")
        if activation == "groupmax" and n_features % k:
            raise ValueError(f"k={k}: groupmax needs a divisor of {n_features}, the number of features")
        if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
            raise ValueError(f"input={describe(input)}: the last dimension must be {weight.shape[1]}")
        hints = self._hints.setdefault(weight, ThresholdHints())
        call = EncoderCall(input, weight, bias, hints, RowSource(workspace=self._workspace))
        kept = call.topk(k) if activation == "topk" else call.group_max(k)
        return EncoderOutput(*kept, PreActivations(call))

    def decoder_impl(self, top_indices: Tensor, top_acts: Tensor, W_dec: Tensor) -> Tensor:
        """sum_j top_acts_j W_dec[:, top_indices_j], [..., d], differentiable in top_acts and W_dec.

        As sparsify's, it takes no notice of autocast.

        Args:
            top_indices: int64 [..., k], below F.
            top_acts: [..., k].
            W_dec: [d, F], fastest as the transpose of a contiguous [F, d].

        Raises:
            ValueError: naming the argument.
        """
        if top_indices.shape != top_acts.shape:
            raise ValueError(f"top_indices={describe(top_indices)}: must have the shape of top_acts, {top_acts.shape}")
        W = W_dec.mT
        lead, k = top_acts.shape[:-1], top_acts.shape[-1]
        if top_acts.numel() == 0:
            return (top_acts.unsqueeze(-1) * W[top_indices]).sum(-2)
        tokens = torch.arange(lead.numel(), device=top_acts.device).repeat_interleave(k)
        values = top_acts.flatten().to(torch.promote_types(W.dtype, torch.float32))
        codes = SparseCodes(values, tokens, top_indices.flatten().long(), (lead.numel(), W.shape[0]))
        parts = implementation(resolve_impl("auto", W.device, W.dtype))
        with torch.autocast(W.device.type, enabled=False):
            return (
                parts.decode(codes, W, None, RowSource(workspace=self._workspace)).to(W.dtype).view(*lead, W.shape[1])
            )
