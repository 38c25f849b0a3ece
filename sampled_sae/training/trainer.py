"""`Trainer`: one SAE trained on a store of activations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config import SampledSAEConfig
from ..run_logs import LogPlace
from ..sae import SampledSAE
from ..support.all_ranks import ranks_of
from .feed import Feed
from .graphed_steps import GraphedSteps, graph_refusal
from .opening import Readable, as_readable
from .sharded_checkpoint import lanes_of
from .train_config import TrainConfig
from .training_loop import train_to_end
from .training_run import TrainingRun

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Trainer(TrainingRun):
    """Trains a SampledSAE and writes it to `folder`; a kill loses at most `checkpoint_every` steps.

    Writes `checkpoint.pt` (weights, optimizer, step), `metrics.jsonl` (a line every `log_every` steps, at once), and at
    the end the SAE itself (`config.json`, `sae.safetensors`) and `run.json`. Started on a folder that holds a
    checkpoint of the same settings, it goes on from there; the result equals that of an uninterrupted run. A run that
    has ended goes on with more `steps`, its learning rate as in a run of so many.

    With a mesh, all its processes train one SAE: each has its part of every batch, and of the features. All call this
    with the same arguments and a folder that all of them see; the first one writes what is not a checkpoint. An epoch
    is cut into as many lanes as there are processes (`ShuffledStream`), so that each reads its share of the shards. Of
    a stream each reads a share too, or an iterator of its own that it is given.
    A checkpoint may be loaded by another number of them: the lanes, and so the batches, stay those it began with.

    Args:
        sae_config, train_config: the SAE and how it is trained; `row_grads` is switched on in training, and
            `input_scale` becomes that of the store.
        store: activations to train on: an `ActivationStore`, a tensor or array [n, d_in], or the name of a store's
            folder or of a .npy, .safetensors or .pt file (`as_activations`); or a stream, which is stored nowhere: an
            `ActivationStream`, or whatever gives activations [n, d_in] when iterated over (`as_readable`).
        folder: where everything is written.
        device: where the SAE is trained; a checkpoint may be loaded on another.
        mesh: a DeviceMesh of "data", "feature" or both, of all processes; None for a process alone.
        lanes: for a run that begins; one a process when None.
        init_from: an SAE whose weights the training begins with (`begin_with` says in which units), of the same d_in
            and d_sae; `formats.load` reads a peer's. Step, optimizer and counts begin anew.
        log: wandb, TensorBoard or trackio, where the lines of metrics go besides. `self.log` is open from the first
            step of `run` on: give it `result(...)` and `close(failed=False)`.
        graph: capture whole steps in a CUDA graph, so that the host launches one thing a step (`GraphedSteps`).

    Raises:
        ValueError: a checkpoint of other settings in the folder, a corrupt one, widths that differ, no such device, a
            graph of steps that cannot be replayed.
    """

    def __init__(
        self,
        sae_config: SampledSAEConfig,
        train_config: TrainConfig,
        store: Readable,
        folder: str | Path,
        device: torch.device | str = "cpu",
        mesh: DeviceMesh | None = None,
        lanes: int | None = None,
        init_from: SampledSAE | None = None,
        log: LogPlace | None = None,
        graph: bool = False,
    ) -> None:
        ranks = ranks_of(mesh)
        with ranks.accounted():
            lanes = lanes_of([Path(folder)], ranks, lanes)
            with ranks.together():
                self.store = as_readable(store)
                feed = Feed(
                    self.store, train_config.batch_size, train_config.seed, device, ranks, lanes, train_config.steps
                )
            super().__init__(sae_config, train_config, feed, folder, init_from)
        if graph:
            refusal = graph_refusal(self.sae, self.feed.device, self.config.is_scheduled)
            if refusal is not None:
                raise ValueError(f"graph=True: {refusal}")
            self.graphed = GraphedSteps(self.sae, self.optimizer, self.config.precision, self.feed.device)
        self.show_in(log)
        self.stream = self.feed.stream

    def run(self, progress: bool = True) -> SampledSAE:
        """Trains to the end, calibrates the threshold to L0 = k, saves; returns the SAE in evaluation mode.

        Raises:
            FloatingPointError: a loss that is NaN or inf, or an aux loss out of all bounds; the checkpoint stays.
            Interrupted: Ctrl-C or SIGTERM; the checkpoint is that of the last step.
            BlockingIOError: another process trains in this folder.
            RankError: one of these on another rank, or a rank that does not answer; names it.
        """
        train_to_end({"": self}, progress)
        return self.sae
