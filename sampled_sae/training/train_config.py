"""`TrainConfig`: how an SAE is trained, as one frozen dataclass that checks itself; the k and l of each step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..config import SampledSAEConfig
from ..optim import MODES
from ..support.argument_checks import (
    check_budget,
    check_choice,
    check_integer,
    check_number,
    check_positive,
    set_fields,
)
from ..support.html_table import config_table

PRECISIONS = ("auto", "bf16", "tf32", "fp32")
DECODER_STARTS = ("random", "tokens")


@dataclass(frozen=True)
class TrainConfig:
    """How an SAE is trained.

    Args:
        steps: batches to train on.
        batch_size: tokens a batch; changes what is learned, since pool and selection are made for a batch.
        lr: peak learning rate of Adam.
        warmup: share of the steps, at the start, over which lr rises to its peak.
        decay: share of the steps, at the end, over which lr falls towards 0.
        clip: largest gradient norm.
        adam: RowAdam's mode, "dense", "lazy" or "decayed".
        moments: dtype of RowAdam's moments, "float32" or "bfloat16".
        precision: of the operands of products, "bf16", "tf32" or "fp32"; weights, sums and gradients are float32.
            "auto" is "bf16" where the Triton form computes on a GPU, else "fp32". A run goes on in the precision it
            has begun in; one that device or implementation do not have is an error.
        seed: of the order of the tokens.
        checkpoint_every, log_every: steps between checkpoints and lines of metrics.jsonl.
        k_start, l_start: the k and l of the first step, which go linearly to those of the SAE; from its own when None.
        schedule_steps: steps until they are the SAE's own; needed with `k_start` or `l_start`, and at most `steps`.
        decoder_start: what decoder rows, and encoder columns with them, begin as: "random" directions, or those from
            b_dec to "tokens" of the training, drawn by the SAE's seed; for stored activations and no transcoder.
    """

    steps: int = 1000
    batch_size: int = 2048
    lr: float = 1e-3
    warmup: float = 0.05
    decay: float = 0.2
    clip: float = 1.0
    adam: str = "dense"
    moments: str = "float32"
    precision: str = "auto"
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 10
    k_start: float | None = None
    l_start: float | None = None
    schedule_steps: int | None = None
    decoder_start: str = "random"

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "checkpoint_every", "log_every")
        plain: dict[str, Any] = {name: check_integer(name, getattr(self, name), 1) for name in counts}
        plain["seed"] = check_integer("seed", self.seed, 0)
        choices = {"adam": MODES, "moments": ("float32", "bfloat16"), "precision": PRECISIONS}
        choices["decoder_start"] = DECODER_STARTS
        for name, allowed in choices.items():
            plain[name] = check_choice(name, getattr(self, name), allowed)
        for name, most in (("lr", None), ("clip", None), ("warmup", 1), ("decay", 1)):
            plain[name] = check_number(name, getattr(self, name), 0, most)
        if self.k_start is not None:
            plain["k_start"] = check_positive("k_start", self.k_start)
        if self.l_start is not None:
            plain["l_start"] = check_number("l_start", self.l_start, 1, None)
        if self.schedule_steps is not None:
            plain["schedule_steps"] = check_integer("schedule_steps", self.schedule_steps, 1)
        set_fields(self, plain)
        self._check_schedule()

    def _check_schedule(self) -> None:
        starts = [name for name in ("k_start", "l_start") if getattr(self, name) is not None]
        if self.schedule_steps is None:
            if starts:
                raise ValueError(f"schedule_steps=None: must be given with {' and '.join(starts)}")
            return
        if not starts:
            raise ValueError(f"schedule_steps={self.schedule_steps}: needs k_start or l_start, which it leads from")
        if self.schedule_steps > self.steps:
            raise ValueError(
                f"schedule_steps={self.schedule_steps}: must be at most {self.steps}, the steps of the training, which "
                "would end before k and l are those of the SAE"
            )

    def _repr_html_(self) -> str:
        return config_table(self)

    @property
    def is_scheduled(self) -> bool:
        """Whether k or l change in this training."""
        return self.schedule_steps is not None

    def lr_at(self, step: int) -> float:
        """lr of step 0, 1, ...: linear warm-up, constant, linear decay."""
        up = (step + 1) / max(1, round(self.warmup * self.steps))
        down = (self.steps - step) / max(1, round(self.decay * self.steps))
        return self.lr * min(1.0, up, down)


def check_schedule(config: SampledSAEConfig, train: TrainConfig) -> None:
    """ValueError where an SAE cannot begin with the k and l of `train`; names the argument."""
    if train.l_start is not None and config.l is None:
        raise ValueError(
            f"l_start={train.l_start!r}: an SAE without an l has the whole dictionary from its first step; leave it out"
        )
    if train.k_start is not None:
        try:
            check_budget(train.k_start, None, config.d_sae, config.select)
        except ValueError as error:
            raise ValueError(str(error).replace("k=", "k_start=", 1)) from None


def config_at(config: SampledSAEConfig, train: TrainConfig, step: int) -> SampledSAEConfig:
    """`config` with the k and l of step 0, 1, ...: linear from `k_start` and `l_start` to its own, then its own.

    With select="token" k is rounded to a whole number. A pool that is kept for `pool_every` steps has one k and l.
    """
    if train.schedule_steps is None or step >= train.schedule_steps:
        return config
    share = (step // config.pool_every * config.pool_every) / train.schedule_steps
    k, l = config.k, config.l
    if train.k_start is not None:
        k = train.k_start + share * (k - train.k_start)
        k = round(k) if config.select == "token" else k
    if train.l_start is not None and l is not None:
        l = train.l_start + share * (l - train.l_start)
    return replace(config, k=k, l=l)
