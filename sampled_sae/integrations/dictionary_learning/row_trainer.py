"""What the trainers share: dictionary_learning's step without a [B, F] tensor, on gradients of touched rows."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from dictionary_learning.trainers import top_k
from dictionary_learning.trainers.trainer import SAETrainer, get_lr_schedule
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ...codes import SparseCodes
from ...impl.dead_features import IdleTokens
from ...impl.hints import Rule
from ...impl.interface import implementation
from ...impl.pool import Pool, PoolRule, find_pool
from ...impl.row_guard import guard_rows
from ...optim import RowAdam
from ...support.argument_checks import check_activations, check_device, check_integer, check_number
from ..replaced import has_other_methods, methods_of
from .dictionaries import SampledDictionary
from .step import (
    LossLog,
    StepInputs,
    average_threshold,
    mean_smallest_of_tokens,
    project_decoder_rows,
    share_of_variance,
    unexplained,
)

# attributes of a trainer that its configuration names
SHOWN = (
    *("lr", "steps", "auxk_alpha", "warmup_steps", "decay_start", "threshold_beta", "threshold_start_step"),
    *("top_k_aux", "k", "device", "layer", "lm_name", "wandb_name", "submodule_name"),
)


class RowTrainer(SAETrainer):
    """What the trainers here share. The arguments are those of dictionary_learning's trainers.

    A step is theirs: decoder gradient projected, gradients clipped to 1.0, Adam, decoder rows of unit norm. With
    the same seed and data losses and weights agree with theirs up to rounding.

    Args:
        steps: batches to train on.
        activation_dim, dict_size: d and F.
        k: average number of active features a token, a whole number.
        layer, lm_name, submodule_name: what the activations come from; for the configuration only.
        dict_class: dictionary_learning's class or the one here; the one here is made in either case.
        lr: peak learning rate; 2e-4 / sqrt(dict_size / 2^14) when absent.
        auxk_alpha: weight of the dead-feature loss.
        warmup_steps, decay_start: lr rises from 0 over `warmup_steps`, falls to 0 from `decay_start` on.
        threshold_beta, threshold_start_step: decay of the running mean that is the inference threshold, and the
            step after which it starts.
        seed: of the initial weights.
        device: a GPU if there is one, when absent.
        wandb_name: name of the run.

    Attributes:
        ae: the dictionary that is trained.
        config: the same dict each time, so that what `trainSAE` puts there stays.
        dead_feature_threshold: tokens without being active after which a feature is dead.
        top_k_aux: features a token in the dead-feature loss.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """

    dictionary: type[SampledDictionary]
    trainer_class: str
    _methods: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith(__name__.rpartition(".")[0]):
            cls._methods = methods_of(cls, ("get_auxiliary_loss", "update_threshold"), "dictionary_learning")

    rule: Mapping[str, Any] = MappingProxyType({})
    adam: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        steps: int,
        activation_dim: int,
        dict_size: int,
        k: int,
        layer: int,
        lm_name: str,
        dict_class: type | None = None,
        lr: float | None = None,
        auxk_alpha: float = 1 / 32,
        warmup_steps: int = 1000,
        decay_start: int | None = None,
        threshold_beta: float = 0.999,
        threshold_start_step: int = 1000,
        seed: int | None = None,
        device: str | None = None,
        wandb_name: str | None = None,
        submodule_name: str | None = None,
    ) -> None:
        SAETrainer.__init__(self, seed)  # not that of the class whose trainer this is
        activation_dim = check_integer("activation_dim", activation_dim, 1)
        dict_size, k = check_integer("dict_size", dict_size, 1), check_integer("k", k, 1)
        steps = check_integer("steps", steps, 1)
        warmup_steps = check_integer("warmup_steps", warmup_steps, 0)
        if layer is None or lm_name is None:
            raise ValueError(f"layer={layer!r}, lm_name={lm_name!r}: both must be given")
        if dict_class not in (None, self.dictionary, self.dictionary.peer):
            raise ValueError(f"dict_class={dict_class!r}: must be {self.dictionary.__name__}")
        check_lr_schedule(steps, warmup_steps, decay_start)
        auxk_alpha = check_number("auxk_alpha", auxk_alpha, 0, None)
        threshold_beta = check_number("threshold_beta", threshold_beta, 0, 1)
        self.layer = layer
        self.lm_name = lm_name
        self.submodule_name = submodule_name
        self.wandb_name = self.dictionary.__name__ if wandb_name is None else wandb_name
        self.steps = steps
        self.decay_start = decay_start
        self.warmup_steps = warmup_steps
        self.k = k
        self.auxk_alpha = auxk_alpha
        self.threshold_beta = threshold_beta
        self.threshold_start_step = threshold_start_step
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(self.device)
        if seed is not None:
            torch.manual_seed(seed)
        self.ae = self.make_dictionary(activation_dim, dict_size, k, seed or 0)
        # 1 / sqrt(F), from 2e-4 at 2^14: the scaling law of arXiv 2406.04093
        self.lr = 2e-4 / (dict_size / 2**14) ** 0.5 if lr is None else lr
        self.optimizer = RowAdam(self.ae.sae, lr=self.lr, **self.adam)
        self.scheduler = LambdaLR(self.optimizer, get_lr_schedule(steps, warmup_steps, decay_start=decay_start))
        self.dead_feature_threshold = 10_000_000
        self.top_k_aux = activation_dim // 2
        self.num_tokens_since_fired = self.ae.sae.tokens_since_active
        self.logging_parameters = ["effective_l0", "dead_features", "pre_norm_auxk_loss"]
        self.effective_l0: float = -1
        self.dead_features: int | Tensor = -1
        self.pre_norm_auxk_loss: float | Tensor = -1
        shown = {name: getattr(self, name) for name in SHOWN}
        self._config = {"trainer_class": self.trainer_class, "dict_class": self.dictionary.__name__, **shown}
        self._config |= {"seed": seed, "activation_dim": activation_dim, "dict_size": dict_size}
        self._memory = self.ae.sae.memory

    def make_dictionary(self, activation_dim: int, dict_size: int, k: int, seed: int) -> SampledDictionary:
        """What is trained."""
        return self.dictionary(activation_dim, dict_size, k, self.device, seed=seed, **self.rule)

    @property
    def config(self) -> dict[str, Any]:
        return self._config

    def loss(self, x: Tensor, step: int | None = None, logging: bool = False) -> Any:
        """The loss of activations x [..., d], 0-dim; its `backward()` leaves gradients for `self.optimizer` alone.

        Moves the dead-feature counts, and the threshold after `threshold_start_step`.

        Args:
            step: number of the step.
            logging: give a `LossLog` instead, with features [B, F] and losses as numbers, of what a step on this
                batch would see, and move nothing.

        Raises:
            ValueError, TypeError: wrong shape or dtype, an empty batch, NaN or inf.

        Where `ae.encode`, `ae.decode`, `get_auxiliary_loss` or `update_threshold` was overridden or replaced,
        dictionary_learning's own loss is computed, from all activations.
        """
        others = self.ae.has_other_methods() or has_other_methods(self, self._methods)
        if others or not self.trains_all():
            return super().loss(self._tokens(x), step, logging)
        self.ae.hear_k()
        sae = self.ae.sae
        inputs = self._inputs(x, logging)
        encoder, members = inputs.encoder, None if inputs.pool is None else inputs.pool.members
        hints = None if logging else self._memory.hints
        codes = inputs.parts.select(encoder, members, Rule(sae.cfg.k, sae.cfg.select), hints)
        x_hat, l2_loss, more = self.reconstruct(inputs, codes)
        if not logging and step is not None and step > self.threshold_start_step:
            self.move_threshold(inputs, codes, step - self.threshold_start_step - 1)
        dead = self._dead_after(codes, logging)
        auxk_loss = self._auxiliary_loss(inputs, (encoder.x - x_hat).detach(), dead)
        loss = l2_loss + self.auxk_alpha * auxk_loss
        if not logging:
            self.effective_l0 = self.k if sae.cfg.select == "batch" else sae.cfg.k
            sae.row_grads += encoder.rows.gradients
            return loss
        self.effective_l0 = codes.l0()
        f = codes.to_dense().view(*x.shape[:-1], -1)
        losses = {"l2_loss": l2_loss.item(), "auxk_loss": auxk_loss.item(), "loss": loss.item()}
        losses |= {name: value.item() for name, value in more.items()}
        return LossLog(encoder.x.view(x.shape), x_hat.view(x.shape), f, losses)

    def trains_all(self) -> bool:
        """Whether every feature may be active."""
        return True

    def reconstruct(self, inputs: StepInputs, codes: SparseCodes) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(the reconstruction of the batch [B, d], its loss, what is logged of it besides)."""
        sae, encoder = self.ae.sae, inputs.encoder
        x_hat = inputs.parts.decode(codes, sae.W_dec, sae.b_dec, encoder.rows)
        return x_hat, (encoder.x - x_hat).square().sum(-1).mean(), {}

    def update(self, step: int, x: Tensor) -> Tensor:
        """One training step on activations x [..., d]; before step 0 b_dec is set to their geometric median.

        Returns:
            The loss, 0-dim without gradient: `float()` of it waits for a GPU, nothing else here does before a
            feature may be dead.
        """
        if step == 0:
            self._init_b_dec(x)
        if getattr(self.optimizer, "sae", self.ae.sae) is not self.ae.sae:
            raise RuntimeError("ae: was replaced; its optimizer is the old one's, make a new trainer")
        loss = self.loss(x, step=step)
        loss.backward()
        project_decoder_rows(self.ae.sae)
        self.ae.sae.project_decoder_grad()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return loss.detach()

    def _tokens(self, x: Tensor) -> Tensor:
        """x as [B, d] on the dictionary's device, in its dtype."""
        check_activations(x, self.ae.activation_dim)
        flat = x.reshape(-1, self.ae.activation_dim).to(self.device, self.ae.sae.W_enc.dtype)
        self._memory.inputs.check(flat)
        return flat

    @torch.no_grad()
    def _init_b_dec(self, x: Tensor) -> None:
        flat = self._tokens(x)
        median = getattr(self, "geometric_median", top_k.geometric_median)(flat)
        if bool(torch.isfinite(median).all()):
            self.ae.b_dec.copy_(median)
        else:  # theirs divides by zero where a token is the median
            self.ae.sae.init_b_dec(flat)

    def _inputs(self, x: Tensor, logging: bool) -> StepInputs:
        sae = self.ae.sae
        parts = implementation(sae.impl_in_use)
        guard_rows(sae)
        rows = self._memory.rows(keep=True)
        encoder = parts.encoder(self._tokens(x), sae.W_enc.t(), sae.b_enc, sae.b_dec, None, rows)
        generator = sae.generator.clone_state() if logging else sae.generator

        def find() -> Pool | None:
            return find_pool(parts, encoder.operands.in_full(), PoolRule.of(sae.cfg), generator)

        pool = find() if logging else self._memory.pool.next(find)
        return StepInputs(parts, encoder, pool, logging)

    def _auxiliary_loss(self, inputs: StepInputs, residual: Tensor, dead: Tensor | None) -> Tensor:
        """The share of the residual's variance that the dead features leave unexplained, 0-dim."""
        self.dead_features = 0 if dead is None else dead.sum()
        self.pre_norm_auxk_loss = -1
        if self.auxk_alpha == 0 or dead is None:
            return residual.new_zeros(())
        missed = unexplained(self.ae.sae, inputs, residual, dead, self.top_k_aux)
        if missed is None:
            return residual.new_zeros(())
        self.pre_norm_auxk_loss = missed.detach()
        return share_of_variance(missed, residual)

    @torch.no_grad()
    def _dead_after(self, codes: SparseCodes, logging: bool) -> Tensor | None:
        """bool [F]: dead with this batch counted, which is kept unless `logging`; None where surely no feature is."""
        counts, idle = self.num_tokens_since_fired, self._memory.idle
        if logging:
            counts, idle = counts.clone(), IdleTokens()
        idle.count_(counts, codes.active_mask(), codes.shape[0])
        after = self.dead_feature_threshold
        return counts >= after if idle.reaches(counts, after) else None

    def move_threshold(self, inputs: StepInputs, codes: SparseCodes, steps: int) -> None:
        """Toward the smallest kept activation, in the batch or a token; `steps`: 0 where it starts."""
        by_batch = self.ae.sae.cfg.select == "batch"
        smallest = codes.smallest() if by_batch else mean_smallest_of_tokens(codes)
        average_threshold(self.ae.sae, smallest, self.threshold_beta)


def check_lr_schedule(steps: int, warmup_steps: int, decay_start: int | None) -> None:
    if warmup_steps >= steps:
        raise ValueError(f"warmup_steps={warmup_steps!r}: must be below steps={steps}")
    if decay_start is not None and not warmup_steps < decay_start < steps:
        raise ValueError(f"decay_start={decay_start!r}: must lie between warmup_steps={warmup_steps} and steps={steps}")
