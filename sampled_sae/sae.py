"""`SampledSAE`: the layer as a module."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .codes import SparseCodes
from .config import SampledSAEConfig
from .impl.dead_features import AuxRule
from .impl.encoder import Encoder
from .impl.hints import Rule
from .impl.interface import Implementation, implementation, resolve_impl
from .impl.pool import Pool, PoolRule, find_pool
from .impl.row_gradients import RowGradient, RowSource
from .impl.row_guard import guard_rows
from .impl.step_memory import StepMemory
from .pretrained import TENSORS, load_pretrained, save_pretrained
from .support.argument_checks import check_activations, check_number, check_same
from .support.geometric_median import geometric_median


@dataclass
class SampledSAEOutput:
    """What a forward pass gives.

    Attributes:
        loss: mse + aux_coefficient * aux, 0-dim.
        mse: mean over tokens of ||x - x_hat||^2, summed over d_in.
        aux: the dead-feature loss before its coefficient; 0 when no feature is dead and in evaluation.
        x_hat: reconstruction, the shape and dtype of x.
        codes: kept activations, [B, F] with the leading dimensions of x flattened.
    """

    loss: Tensor
    mse: Tensor
    aux: Tensor
    x_hat: Tensor
    codes: SparseCodes


class SampledSAE(nn.Module):
    """Sparse autoencoder that keeps the B*k largest activations inside a pool of k*l scored features.

    Parameters `W_enc` [d_in, d_sae] (each feature's weights contiguous: its memory is that of [d_sae, d_in]),
    `b_enc` [d_sae], `W_dec` [d_sae, d_in], `b_dec` [d_in]. Buffers: `threshold` (0-dim, inference),
    `threshold_steps`, `tokens_since_active` int64 [d_sae].

    In training mode the codes are chosen by the batch, the threshold and the dead-feature counts move. In
    evaluation mode a feature is active where its activation is above `threshold`, whatever else is in the
    batch. Trained from scratch, decoder rows are kept at unit norm by `sampled_sae.optim.RowAdam`, or by
    calling `normalize_decoder()` after another optimizer's step.

    Equivalent, in training mode with l=None, to BatchTopK (arXiv 2412.06410); the pool is arXiv 2508.21324's, read as
    docs/method.md says.

    Args:
        cfg: a `SampledSAEConfig`.
        device, dtype: of the parameters; float32 by default.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    threshold: Tensor
    threshold_steps: Tensor
    tokens_since_active: Tensor

    def __init__(
        self,
        cfg: SampledSAEConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not isinstance(cfg, SampledSAEConfig):
            raise TypeError(f"cfg={cfg!r}: must be a SampledSAEConfig")
        self.cfg = cfg
        device = torch.get_default_device() if device is None else device
        resolve_impl(cfg.impl, device, dtype)
        generator = torch.Generator().manual_seed(cfg.seed)
        rows = torch.randn(cfg.d_sae, cfg.d_in, generator=generator, device="cpu")
        rows = nn.functional.normalize(rows, dim=1).to(device=device, dtype=dtype)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.clone().t())
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, device=device, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in, device=device, dtype=dtype))
        exact = torch.promote_types(dtype, torch.float32)
        self.register_buffer("threshold", torch.zeros((), dtype=exact, device=device))
        self.register_buffer("threshold_steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("tokens_since_active", torch.zeros(cfg.d_sae, dtype=torch.int64, device=device))
        self.row_grads: list[RowGradient] = []
        self.generator = torch.Generator().manual_seed(cfg.seed)
        self.memory = StepMemory(cfg.pool_every)

    @property
    def impl_in_use(self) -> str:
        """The implementation that `cfg.impl` stands for on this device."""
        return resolve_impl(self.cfg.impl, self.W_enc.device, self.W_enc.dtype)

    @property
    def dead(self) -> Tensor:
        """bool [d_sae]: not selected for `cfg.dead_after` tokens."""
        return self.tokens_since_active >= self.cfg.dead_after

    def forward(self, x: Tensor) -> SampledSAEOutput:
        """x [..., d_in] to a `SampledSAEOutput`; in training mode moves threshold and dead-feature counts.

        Raises:
            ValueError, TypeError: wrong shape, dtype or device, an empty batch, NaN or inf. On a GPU NaN and inf
                are reported by the next call but one at the latest, with the number of the call they came in.
        """
        if self.training and self.impl_in_use == "triton" and self.cfg.pool_every == 1:
            return self._train_batch(x)
        return self._forward_uncompiled(x)

    # Sizes depend on the data here: torch.compile would break the graph a dozen times, spend its seconds on the
    # pieces, and (torch 2.13, aot_eager) lose the threshold's update. One break around the layer is right and free.
    @torch.compiler.disable
    def _forward_uncompiled(self, x: Tensor) -> SampledSAEOutput:
        return self._train_batch(x) if self.training else self._evaluate(x)

    def _train_batch(self, x: Tensor) -> SampledSAEOutput:
        c, parts = self.cfg, self._parts
        if c.row_grads and torch.is_grad_enabled():
            guard_rows(self)
        encoder = self._encoder(x, self.memory.rows(c.row_grads))
        pool = self.memory.pool.next(lambda: self._find_pool(encoder))
        codes = parts.select(encoder, None if pool is None else pool.members, Rule(c.k, c.select), self.memory.hints)
        x_hat = parts.decode(codes, self.W_dec, self.b_dec, encoder.rows)
        mse = (encoder.x.to(x_hat.dtype) - x_hat).square().sum(-1).mean()
        aux = mse.new_zeros(())
        may_wait = self.impl_in_use != "triton"
        if c.aux_coefficient > 0 and self.memory.idle.may_reach(self.tokens_since_active, c.dead_after, may_wait):
            rule = AuxRule(c.aux_features, c.aux_pool, c.score)
            aux = parts.aux_loss(encoder, x_hat, self.W_dec, self.dead, rule, None if pool is None else pool.scores)
        self.row_grads += encoder.rows.gradients
        self.memory.idle.count_(self.tokens_since_active, codes)
        self._move_threshold(codes)
        loss = mse + c.aux_coefficient * aux
        return SampledSAEOutput(loss, mse, aux, x_hat.to(x.dtype).view(x.shape), codes)

    def _evaluate(self, x: Tensor) -> SampledSAEOutput:
        encoder = self._encoder(x)
        codes = self._parts.above_threshold(encoder, self.threshold)
        x_hat = self._parts.decode(codes, self.W_dec, self.b_dec)
        mse = (encoder.x.to(x_hat.dtype) - x_hat).square().sum(-1).mean()
        return SampledSAEOutput(mse, mse, mse.new_zeros(()), x_hat.to(x.dtype).view(x.shape), codes)

    @torch.compiler.disable
    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """Codes of x [..., d_in]: by the batch in training mode, by the threshold in evaluation mode."""
        encoder = self._encoder(x)
        if not self.training:
            return self._parts.above_threshold(encoder, self.threshold)
        pool = self._find_pool(encoder)
        members = None if pool is None else pool.members
        return self._parts.select(encoder, members, Rule(self.cfg.k, self.cfg.select), self.memory.hints)

    def encode(self, x: Tensor) -> Tensor:
        """`encode_sparse` as a dense tensor [..., d_sae]; equivalent in evaluation mode to
        `a = relu((x - b_dec) @ W_enc + b_enc); a * (a > threshold)`."""
        return self.encode_sparse(x).to_dense().to(x.dtype).view(*x.shape[:-1], self.cfg.d_sae)

    def decode(self, codes: SparseCodes | Tensor) -> Tensor:
        """Reconstruction [..., d_in] of SparseCodes [B, d_sae] or a dense tensor [..., d_sae]."""
        if isinstance(codes, SparseCodes):
            return functional.decode(codes, self.W_dec, self.b_dec, self.cfg.impl)
        if not isinstance(codes, Tensor):
            raise TypeError(f"codes={type(codes).__name__}: must be SparseCodes or a torch.Tensor")
        if codes.shape[-1] != self.cfg.d_sae:
            raise ValueError(f"codes.shape={tuple(codes.shape)}: the last dimension must be {self.cfg.d_sae}")
        return codes.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    @torch.no_grad()
    def calibrate(self, x: Tensor, l0: float | None = None) -> float:
        """Sets the threshold to the value that gives mean L0 = l0 (default k) on x, and returns it.

        Args:
            x: [..., d_in], activations of the kind the SAE will see; tens of thousands of tokens are enough.
            l0: target, in (0, d_sae].
        """
        encoder = self._encoder(x)
        n_tokens = encoder.shape[0]
        target = self.cfg.k if l0 is None else l0
        check_number("l0", target, 0, self.cfg.d_sae)
        if target == 0:
            raise ValueError(f"l0={target!r}: must be in (0, {self.cfg.d_sae}]")
        n = round(n_tokens * target)
        budget = min(n + 1, n_tokens * self.cfg.d_sae)
        codes = self._parts.select(encoder, None, Rule(budget / n_tokens))
        self.threshold.fill_(float(codes.smallest()) if codes.count() > n else 0.0)
        self.threshold_steps.fill_(max(1, int(self.threshold_steps)))
        return float(self.threshold)

    @torch.no_grad()
    def init_b_dec(self, x: Tensor) -> None:
        """Sets b_dec to the geometric median of activations x [..., d_in], as before a training's first step."""
        self.b_dec.copy_(geometric_median(self._flatten(x)).to(self.b_dec.dtype))

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Unit decoder rows; equivalent to `W_dec /= W_dec.norm(dim=1, keepdim=True)`."""
        self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True).clamp_min_(1e-12))

    @torch.no_grad()
    def project_decoder_grad(self) -> None:
        """Removes from W_dec.grad the part parallel to each decoder row; for optimizers other than RowAdam."""
        if self.W_dec.grad is not None:
            W = nn.functional.normalize(self.W_dec, dim=1)
            self.W_dec.grad.sub_((self.W_dec.grad * W).sum(1, keepdim=True) * W)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; row gradients are dropped too."""
        super().zero_grad(set_to_none)
        self.row_grads = []

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; the next step looks for a pool of the new weights."""
        self.memory.pool.reset()
        return super().load_state_dict(*args, **kwargs)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `sae.safetensors`, each to a temporary name that is then renamed."""
        save_pretrained(Path(folder), self.cfg.to_dict(), {name: getattr(self, name) for name in TENSORS})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], device: torch.device | str | None = None) -> SampledSAE:
        """Reads what `save_pretrained` wrote.

        Raises:
            ValueError: a missing, truncated or foreign file, with its name and what is wrong with it.
        """
        cfg, tensors = load_pretrained(Path(folder))
        sae = cls(SampledSAEConfig.from_dict(cfg), device=device, dtype=tensors["W_enc"].dtype)
        sae.load_state_dict(tensors)
        return sae

    def extra_repr(self) -> str:
        c = self.cfg
        return f"d_in={c.d_in}, d_sae={c.d_sae}, k={c.k}, l={c.l}, score={c.score!r}, impl={self.impl_in_use!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SampledSAE:
        """`.to(bfloat16)` and the like leave the threshold in float32: rounded, it would miss its L0."""
        threshold = self.threshold
        self.memory.forget()
        super()._apply(fn, recurse)
        if self.threshold.dtype in (torch.float16, torch.bfloat16):
            self.threshold = threshold.to(self.threshold.device, torch.float32)
        return self

    def _flatten(self, x: Tensor) -> Tensor:
        check_activations(x, self.cfg.d_in)
        check_same(x=x, W_enc=self.W_enc)
        self.memory.inputs.check(x)
        return x.reshape(-1, self.cfg.d_in)

    def _encoder(self, x: Tensor, rows: RowSource | None = None) -> Encoder:
        b_dec = self.b_dec if self.cfg.apply_b_dec_to_input else None
        return self._parts.encoder(self._flatten(x), self.W_enc.t(), self.b_enc, b_dec, None, rows)

    @property
    def _parts(self) -> Implementation:
        return implementation(self.impl_in_use)

    def _find_pool(self, encoder: Encoder) -> Pool | None:
        return find_pool(self._parts, encoder.operands, PoolRule.of(self.cfg), self.generator)

    @torch.no_grad()
    def _move_threshold(self, codes: SparseCodes) -> None:
        """A running mean of the smallest kept activation that starts at its first value."""
        smallest = codes.smallest().to(self.threshold.dtype)
        moved = self.threshold.lerp(smallest, 1 - self.cfg.threshold_decay)
        moved = torch.where(self.threshold_steps == 0, smallest, moved)
        found = smallest < torch.inf
        self.threshold.copy_(torch.where(found, moved, self.threshold))
        self.threshold_steps.add_(found)
