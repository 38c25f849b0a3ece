"""SAELens' W_enc [d, F] kept feature by feature in memory."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.sae import SAE
from torch import Tensor, nn

from ...impl.interface import Implementation, implementation, resolve_impl


def feature_major(t: Tensor) -> Tensor:
    """The same [d, F], each feature's weights contiguous."""
    return t if t.t().is_contiguous() else t.t().contiguous().t()


class FeatureRows(SAE[Any]):
    """Mixed into a SAE of SAELens, in front of it: its weights lie so whatever is loaded, and are saved as SAELens'."""

    W_enc: nn.Parameter

    def parts(self) -> Implementation:
        """Those of the implementation in use."""
        return implementation(resolve_impl("auto", self.W_enc.device, self.W_enc.dtype))

    def decoder_norms(self) -> Tensor:
        """[F], in at least float32; those of rows of zeros are so small that what is divided by them stays finite."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        norms = torch.linalg.vector_norm(self.W_dec.detach(), dim=-1, dtype=dtype)
        return norms.clamp_min_(torch.finfo(dtype).tiny)

    def prepare(self) -> None:
        """Lays them out; no value changes."""
        self.W_enc.data = feature_major(self.W_enc.data)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        self.prepare()
        return result

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """safetensors takes row-major tensors alone."""
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()
