"""The k and l of each step of a training."""

from __future__ import annotations

from dataclasses import replace

from ..config import SampledSAEConfig
from ..support.argument_checks import check_budget
from .train_config import TrainConfig


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


def is_scheduled(train: TrainConfig) -> bool:
    """Whether k or l change in this training."""
    return train.schedule_steps is not None
