"""`Trainer`: one SAE trained on a store of activations."""

from __future__ import annotations

from pathlib import Path

import torch

from ..config import SampledSAEConfig
from ..sae import SampledSAE
from .activation_store import ActivationStore
from .batches import Feed
from .train_config import TrainConfig
from .training_loop import train_to_end
from .training_run import TrainingRun


class Trainer(TrainingRun):
    """Trains a SampledSAE and writes it to `folder`; a kill loses at most `checkpoint_every` steps.

    Writes `checkpoint.pt` (weights, optimizer, step), `metrics.jsonl` (a line every `log_every` steps, at once), and at
    the end the SAE itself (`config.json`, `sae.safetensors`) and `run.json`. Started on a folder that holds a
    checkpoint of the same settings, it goes on from there; the result equals that of an uninterrupted run.

    Args:
        sae_config, train_config: the SAE and how it is trained; `row_grads` is switched on in training, and
            `input_scale` becomes that of the store.
        store: activations to train on.
        folder: where everything is written.
        device: where the SAE is trained; a checkpoint may be loaded on another.

    Raises:
        ValueError: a checkpoint of other settings in the folder, a corrupt one, widths that differ, no such device.
    """

    def __init__(
        self,
        sae_config: SampledSAEConfig,
        train_config: TrainConfig,
        store: ActivationStore,
        folder: str | Path,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(
            sae_config, train_config, Feed(store, train_config.batch_size, train_config.seed, device), folder
        )
        self.store = store
        self.stream = self.feed.stream

    def run(self, progress: bool = True) -> SampledSAE:
        """Trains to the end, calibrates the threshold to L0 = k, saves; returns the SAE in evaluation mode.

        Raises:
            FloatingPointError: a loss that is NaN or inf, or an aux loss out of all bounds; the checkpoint stays.
            Interrupted: Ctrl-C or SIGTERM; the checkpoint is that of the last step.
            BlockingIOError: another process trains in this folder.
        """
        train_to_end({"": self}, progress)
        return self.sae
