"""The weights of a layer, where they are, and what keeps the norms of decoder rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import SampledSAEConfig
from .decoder_rows import layer_norms, normalize_, without_growth
from .layout import ALONE, Layout
from .step_memory import StepMemory
from .threshold import ThresholdModule


class LayerWeights(ThresholdModule):
    """W_enc [d, F], b_enc [F], W_dec [F, d_out], b_dec [d_out], and W_skip [d, d_out] or None.

    Of a crosscoder d and d_out are the widths of all layers together.

    Attributes:
        layout: which of them are in this process: all, or what `sampled_sae.distributed.parallelize` has left here.
        memory: what one training step leaves for the next.
        tokens_since_active: int64 [F].
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    W_skip: nn.Parameter | None
    layout: Layout
    cfg: SampledSAEConfig
    tokens_since_active: Tensor

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self.layout = ALONE
        self.memory = StepMemory()

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
        W_enc = unit_rows(cfg.d_in) if cfg.is_transcoder else W_dec.clone()
        if cfg.is_crosscoder:
            W_enc.mul_(layer_norms(W_dec, cfg.layers).sum(1, keepdim=True))
            normalize_(W_dec, cfg.layers)
        self.W_dec = nn.Parameter(W_dec)
        self.W_enc = nn.Parameter(W_enc.t())
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, device=device, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(cfg.width_out, device=device, dtype=dtype))
        zeros = torch.zeros(cfg.d_in, cfg.width_out, device=device, dtype=dtype) if cfg.skip else None
        self.register_parameter("W_skip", None if zeros is None else nn.Parameter(zeros))

    @torch.no_grad()
    def layer_norms(self) -> Tensor:
        """Norms of the decoder rows of each feature, one a layer: [d_sae, layers], in float32 or float64.

        They say where a feature lives: `norms / norms.sum(1, keepdim=True)` is 1 for the only layer of a feature and
        1 / layers in each where it is equally strong.
        """
        W = self.layout.whole(self.W_dec)
        return layer_norms(W.to(torch.promote_types(W.dtype, torch.float32)), self.cfg.layers)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Unit decoder rows; equivalent to `W_dec /= W_dec.norm(dim=1, keepdim=True)`. Those of a crosscoder's layers
        get norms that add up to 1, `W_dec /= W_dec.view(d_sae, layers, d_in).norm(dim=2).sum(1, keepdim=True)`."""
        normalize_(self.layout.local(self.W_dec), self.cfg.layers)

    @torch.no_grad()
    def project_decoder_grad(self) -> None:
        """Removes from W_dec.grad the part that changes what `normalize_decoder` keeps: that parallel to each decoder
        row, or along the rows of a crosscoder's layers. For optimizers other than RowAdam."""
        if self.W_dec.grad is not None:
            grad = self.layout.local(self.W_dec.grad)
            grad.copy_(without_growth(grad, self.layout.local(self.W_dec), self.cfg.layers))
