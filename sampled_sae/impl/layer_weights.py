"""The weights of a layer, where they are, and what keeps decoder rows at unit norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import SampledSAEConfig
from .layout import ALONE, Layout
from .threshold import ThresholdModule


class LayerWeights(ThresholdModule):
    """W_enc [d, F], b_enc [F], W_dec [F, d_out], b_dec [d_out], and W_skip [d, d_out] or None.

    Attributes:
        layout: which of them are in this process: all, or what `sampled_sae.distributed.parallelize` has left here.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    W_skip: nn.Parameter | None
    layout: Layout

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self.layout = ALONE

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Whole tensors are taken by a layer that is spread over processes too."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[key] = self.layout.adopt(state_dict[key], key[len(prefix) :])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def make_weights(self, cfg: SampledSAEConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        """Those that a training starts from: docs/method.md, "Start"."""
        generator = torch.Generator().manual_seed(cfg.seed)

        def unit_rows(width: int) -> Tensor:
            rows = torch.randn(cfg.d_sae, width, generator=generator, device="cpu")
            return nn.functional.normalize(rows, dim=1).to(device=device, dtype=dtype)

        W_dec = unit_rows(cfg.width_out)
        self.W_dec = nn.Parameter(W_dec)
        self.W_enc = nn.Parameter((unit_rows(cfg.d_in) if cfg.is_transcoder else W_dec.clone()).t())
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, device=device, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(cfg.width_out, device=device, dtype=dtype))
        zeros = torch.zeros(cfg.d_in, cfg.width_out, device=device, dtype=dtype) if cfg.skip else None
        self.register_parameter("W_skip", None if zeros is None else nn.Parameter(zeros))

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Unit decoder rows; equivalent to `W_dec /= W_dec.norm(dim=1, keepdim=True)`."""
        W = self.layout.local(self.W_dec)
        W.div_(torch.linalg.vector_norm(W, dim=1, keepdim=True).clamp_min_(1e-12))

    @torch.no_grad()
    def project_decoder_grad(self) -> None:
        """Removes from W_dec.grad the part parallel to each decoder row; for optimizers other than RowAdam."""
        if self.W_dec.grad is not None:
            W, grad = nn.functional.normalize(self.layout.local(self.W_dec), dim=1), self.layout.local(self.W_dec.grad)
            grad.sub_((grad * W).sum(1, keepdim=True) * W)
