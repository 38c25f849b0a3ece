"""SAEBench, and whatever else takes an SAE by duck typing: a trained SampledSAE as a custom SAE.

custom = SAEBenchSAE(sae, model_name="pythia-160m-deduped", hook_layer=8)
run_eval(config, [("mine", custom)], device, output_path)  # of sae_bench.evals.sparse_probing.main, for one
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import inference_rule
from ..formats.portable import PortableSAE
from ..impl.threshold import NEVER_SET, fault
from ..sae import SampledSAE
from ..support.argument_checks import HALF, check_activations, check_integer, check_positive


@dataclass
class SAEBenchConfig:
    """The fields that SAEBench's evaluations and SAELens' activation store read of a custom SAE.

    `architecture` is "topk", "batch_topk" or "sampled_sae"; `training` holds the SampledSAEConfig. SAEBench adds
    attributes of its own.
    """

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    architecture: str
    dtype: str
    device: str
    apply_b_dec_to_input: bool
    training: dict[str, Any]
    context_size: int | None = None
    hook_head_index: int | None = None
    activation_fn_str: str = "relu"
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    finetuning_scaling_factor: bool = False
    prepend_bos: bool = True
    normalize_activations: str = "none"
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -100_000  # SAEBench's word for "not said"
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SAEBenchSAE(nn.Module):
    """A SampledSAE in the shape SAEBench asks for: dense codes, unit decoder rows, activations as they are.

    Parameters, without gradient: `W_enc` [d_in, d_sae], `b_enc` [d_sae], `W_dec` [d_sae, d_in] with rows of norm 1,
    `b_dec` [d_in]. Buffers: `norms` [d_sae], the decoder norms that were folded into the encoder and the codes, and
    `threshold` [d_sae], which stays in float32 under `.to(bfloat16)`. The SampledSAE is copied, not changed.

    Reconstructions are those of `sae.eval()`; codes are those times norms / `sae.cfg.input_scale`.

    Args:
        sae: a trained SampledSAE.
        model_name: as TransformerLens names it.
        hook_layer: block, from 0.
        hook_name: of the activations; `blocks.{hook_layer}.hook_resid_post` by default.
        scale: what the SAE's activations are multiplied by, in place of `cfg.input_scale`; the evaluations feed them as
            they are, and get reconstructions of that size back.
        inference: "threshold": active where `sae.eval()` says so; "topk": the k largest of each token; "auto":
            "topk" for a TopK SAE, "threshold" for all others.
        context_size: tokens a row of the texts, for evaluations that need one.

    Raises:
        ValueError, TypeError: naming the argument; a threshold that was never set; NaN or inf; a decoder row of zeros.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    norms: Tensor
    threshold: Tensor

    def __init__(
        self,
        sae: SampledSAE,
        *,
        model_name: str,
        hook_layer: int,
        hook_name: str | None = None,
        scale: float | None = None,
        inference: str = "auto",
        context_size: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(sae, SampledSAE):
            raise TypeError(f"sae={type(sae).__name__}: must be a SampledSAE")
        if not isinstance(model_name, str) or not model_name:
            raise TypeError(f"model_name={model_name!r}: must be a name that TransformerLens knows")
        hook_layer = check_integer("hook_layer", hook_layer, 0)
        context_size = None if context_size is None else check_integer("context_size", context_size, 1)
        self.rule = inference_rule(sae.cfg, inference)
        portable = PortableSAE.of(sae, self.rule)
        portable.refuse("SAEBench")
        factor = sae.cfg.input_scale if scale is None else check_positive("scale", scale)
        portable = replace(portable, input_scale=factor).read_at(1.0)
        self.k = portable.whole_k("inference='topk'") if self.rule == "topk" else None
        threshold = portable.threshold
        if self.rule == "topk":
            threshold = torch.zeros(())
        elif threshold is None:
            raise ValueError(NEVER_SET)
        elif (found := fault(sae)) is not None:
            warnings.warn(found, stacklevel=2)
        norms = torch.linalg.vector_norm(portable.W_dec.double(), dim=1)
        if not bool((norms > 0).all()):
            raise ValueError(f"sae.W_dec: {int((norms == 0).sum())} rows are zero, which no factor makes unit rows")
        dtype = portable.dtype
        self.W_enc = fixed(portable.W_enc.double() * norms, dtype)
        self.b_enc = fixed(portable.b_enc.double() * norms, dtype)
        self.W_dec = fixed(portable.W_dec.double() / norms[:, None], dtype)
        self.b_dec = fixed(portable.b_dec, dtype)
        exact = torch.promote_types(dtype, torch.float32)
        self.register_buffer("norms", norms.to(exact))
        self.register_buffer("threshold", (threshold.double() * norms).to(exact))
        whole = sae.cfg.l is None
        self.cfg = SAEBenchConfig(
            model_name=model_name,
            d_in=portable.d_in,
            d_sae=portable.d_sae,
            hook_layer=hook_layer,
            hook_name=hook_name or f"blocks.{hook_layer}.hook_resid_post",
            architecture=("topk" if sae.cfg.select == "token" else "batch_topk") if whole else "sampled_sae",
            dtype="",
            device="",
            apply_b_dec_to_input=portable.apply_b_dec_to_input,
            training=sae.cfg.to_dict(),
            context_size=context_size,
        )
        self.to(device=sae.W_dec.device)
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc.dtype

    def encode(self, x: Tensor) -> Tensor:
        """Codes [..., d_sae] of activations x [..., d_in], in the SAE's dtype; with
        `a = (x - b_dec) @ W_enc + b_enc` equivalent to `a * (a > threshold)`, or to the k largest positive `a / norms`.
        """
        check_activations(x, self.cfg.d_in)
        x = x.to(self.dtype)
        if self.cfg.apply_b_dec_to_input:
            x = x - self.b_dec
        a = nn.functional.linear(x, self.W_enc.t(), self.b_enc)
        if self.k is None:
            return torch.where(a > self.threshold, a, 0)
        a = a.relu()
        at = (a / self.norms).topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(a).scatter(-1, at, a.gather(-1, at))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Activations [..., d_in] of codes [..., d_sae]."""
        return feature_acts.to(self.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """`decode(encode(x))`, [..., d_in]."""
        return self.decode(self.encode(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SAEBenchSAE:
        exact = self.norms, self.threshold
        super()._apply(fn, recurse)
        if self.threshold.dtype in HALF:
            self.norms, self.threshold = (t.to(self.device, torch.float32) for t in exact)
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)
        return self


def fixed(weights: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A parameter of its own memory that is not trained."""
    return nn.Parameter(weights.to(dtype, copy=True), requires_grad=False)
