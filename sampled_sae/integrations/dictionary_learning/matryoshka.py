"""dictionary_learning's Matryoshka dictionary and its trainer, faster."""

from __future__ import annotations

from itertools import accumulate
from math import isclose
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.trainers import matryoshka_batch_top_k
from torch import Tensor

from ...codes import SparseCodes
from ...formats.dictionary_learning import as_linear, groups_of
from ...impl.levels import level_errors
from ...support.argument_checks import check_integer, check_number
from .dictionaries import BatchTopKSAE, SampledDictionary
from .linear_view import parameter_of_sae
from .peer_files import Names, matrix_sizes
from .row_trainer import RowTrainer
from .step import StepInputs


class MatryoshkaBatchTopKSAE(BatchTopKSAE):
    """dictionary_learning's `MatryoshkaBatchTopKSAE`: a `BatchTopKSAE` whose features come in groups.

    `W_enc` [d, F], `b_enc` [F] and `W_dec` [F, d] are the SAE's parameters. With `active_groups` below their number,
    the features of the groups behind them are never active.

    Args:
        activation_dim, dict_size, k: as in `BatchTopKSAE`.
        group_sizes: numbers of features that add up to dict_size.
        device: of the parameters.
        rule: other fields of the `SampledSAEConfig`.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """

    peer = matryoshka_batch_top_k.MatryoshkaBatchTopKSAE
    names: Names = (
        ("W_enc", "sae.W_enc", False),
        ("b_enc", "sae.b_enc", False),
        ("W_dec", "sae.W_dec", False),
        ("b_dec", "sae.b_dec", False),
        ("threshold", "sae.threshold", False),
    )
    group_sizes: Tensor

    def __init__(
        self,
        activation_dim: int,
        dict_size: int,
        k: int,
        group_sizes: list[int],
        device: torch.device | str | None = None,
        **rule: Any,
    ) -> None:
        sizes = [check_integer(f"group_sizes[{i}]", size, 1) for i, size in enumerate(group_sizes)]
        if sum(sizes) != dict_size:
            raise ValueError(f"group_sizes={group_sizes!r}: must add up to dict_size={dict_size!r}")
        self._sizes = sizes  # before the modules, which begin with it
        super().__init__(activation_dim, dict_size, k, device, groups=tuple(accumulate(sizes)), **rule)
        self.register_buffer("group_sizes", torch.tensor(sizes, device=device))
        self.active_groups = len(sizes)
        self.group_indices = [0, *accumulate(sizes)]

    def made_by_peer(self, activation_dim: int, dict_size: int, k: int) -> Any:
        return self.peer(activation_dim, dict_size, k, self._sizes)

    W_enc = parameter_of_sae("W_enc", "[d, F]. Assigning copies the values.")
    b_enc = parameter_of_sae("b_enc", "[F]. Assigning copies the values.")
    W_dec = parameter_of_sae("W_dec", "[F, d]. Assigning copies the values.")

    @classmethod
    def _shape_in(cls, path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        d_in, d_sae = matrix_sizes(path, tensors, "W_enc", "activation_dim, dict_size")
        groups_of(path, tensors, d_sae)
        as_linear(path, tensors, d_in, d_sae)
        return {"activation_dim": d_in, "dict_size": d_sae, "group_sizes": tensors["group_sizes"].tolist()}

    def _codes(self, x: Tensor, by_threshold: bool) -> SparseCodes | Tensor:
        codes = super()._codes(x, by_threshold)
        if (count := self.group_indices[self.active_groups]) == self.dict_size:
            return codes
        if isinstance(codes, SparseCodes):
            return codes.of_first(count)
        return torch.where(torch.arange(self.dict_size, device=codes.device) < count, codes, 0)


class MatryoshkaBatchTopKTrainer(RowTrainer, matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer):
    """dictionary_learning's `MatryoshkaBatchTopKTrainer`, faster: every kept entry is decoded once.

    Args:
        args, kwargs: those of `BatchTopKTrainer`, by name.
        group_fractions: shares of the features, which add up to 1.
        group_weights: of the groups' losses, whose mean is the loss; 1 / their number when absent.
    """

    dictionary = MatryoshkaBatchTopKSAE
    trainer_class = "MatryoshkaBatchTopKTrainer"

    def __init__(
        self,
        steps: int,
        activation_dim: int,
        dict_size: int,
        k: int,
        layer: int,
        lm_name: str,
        group_fractions: list[float],
        group_weights: list[float] | None = None,
        *args: Any,
        wandb_name: str = "BatchTopKSAE",
        **kwargs: Any,
    ) -> None:
        dict_size = check_integer("dict_size", dict_size, 1)
        for name, values in (("group_fractions", group_fractions), ("group_weights", group_weights or [])):
            for i, value in enumerate(values):
                check_number(f"{name}[{i}]", value, 0, None)
        if not isclose(sum(group_fractions), 1.0):
            raise ValueError(f"group_fractions={group_fractions!r}: must add up to 1")
        sizes = [int(share * dict_size) for share in group_fractions[:-1]]
        self.group_sizes = [*sizes, dict_size - sum(sizes)]
        self.group_fractions = group_fractions
        self.group_weights = [1 / len(self.group_sizes)] * len(self.group_sizes)
        if group_weights is not None:
            self.group_weights = group_weights
        if len(self.group_weights) != len(self.group_sizes):
            raise ValueError(f"group_weights={group_weights!r}: must be as many as group_fractions={group_fractions!r}")
        kwargs |= {"wandb_name": wandb_name}
        super().__init__(steps, activation_dim, dict_size, k, layer, lm_name, *args, **kwargs)
        groups = ("group_fractions", "group_weights", "group_sizes")
        self._config |= {name: getattr(self, name) for name in groups}

    def make_dictionary(self, activation_dim: int, dict_size: int, k: int, seed: int) -> SampledDictionary:
        return self.dictionary(activation_dim, dict_size, k, self.group_sizes, self.device, seed=seed, **self.rule)

    def reconstruct(self, inputs: StepInputs, codes: SparseCodes) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        sae, encoder = self.ae.sae, inputs.encoder
        levels = inputs.parts.decode_levels(codes, sae.W_dec, sae.b_dec, sae.cfg.groups, encoder.rows)
        errors = level_errors(encoder.x, levels).mean(0)
        weighted = errors * torch.tensor(self.group_weights, dtype=errors.dtype, device=errors.device)
        return levels[:, -1], weighted.mean(), {"min_l2_loss": weighted.min(), "max_l2_loss": weighted.max()}

    def trains_all(self) -> bool:
        """Whether no group is switched off, which dictionary_learning's own loss sees to."""
        return bool(self.ae.active_groups == len(self.group_sizes))
