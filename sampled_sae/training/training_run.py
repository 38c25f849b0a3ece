"""`TrainingRun`: one SAE in training, resumed bit for bit. `train_to_end`: the loop over one or several of them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import SampledSAEConfig
from ..optim import RowAdam
from ..sae import SampledSAE, SampledSAEOutput
from ..support.atomic_files import field, write_atomically, write_json, write_text
from ..support.late_values import LateScalars
from .batches import Feed, TrainingBatch
from .train_config import TrainConfig

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"


class TrainingRun:
    """One SAE in training, its optimizer and its folder; the caller fetches the batches.

    Args:
        sae_config, train_config: the SAE and how it is trained; `row_grads` is switched on in training.
        feed: where its batches come from, and the device it is trained on; may be shared by several runs.
        folder: where everything is written.

    Attributes:
        sae, optimizer: what is trained, and by what.
        metrics: the lines of metrics.jsonl so far.
        step: steps done, those before a resumed checkpoint included.
        seconds: spent in those steps. A GPU may still work on one run while the next is timed: there only the
            sum over the runs of a process is exact.

    Raises:
        ValueError: a checkpoint of other settings in the folder, a corrupt one, widths that differ.
    """

    def __init__(self, sae_config: SampledSAEConfig, train_config: TrainConfig, feed: Feed, folder: str | Path) -> None:
        store = feed.store
        if sae_config.d_in != store.d_in:
            raise ValueError(f"d_in={sae_config.d_in}: the activations in {store.folder} have {store.d_in}")
        self.config = train_config
        self.feed = feed
        self.folder = Path(folder)
        self.row_grads = sae_config.row_grads
        self.sae = SampledSAE(replace(sae_config, row_grads=sae_config.impl != "reference"), device=feed.device)
        self.optimizer = RowAdam(
            self.sae,
            lr=train_config.lr,
            clip=train_config.clip,
            mode=train_config.adam,
            moments=getattr(torch, train_config.moments),
        )
        self.step = 0
        self.seconds = 0.0
        self.metrics: list[dict[str, float]] = []
        self._losses = LateScalars()
        if (self.folder / CHECKPOINT).exists():
            self._load()
        else:
            with torch.no_grad():
                self.sae.b_dec.copy_(feed.batch(0).median)

    def train_on(self, batch: TrainingBatch) -> dict[str, float] | None:
        """One step; `batch` is number `self.step` of the feed. Returns the line of metrics where one is due.

        Raises:
            FloatingPointError: a loss that is NaN or inf. On a CPU it is the loss of this step, and the weights stay as
                they were. A GPU's loss arrives later, so that there it may be that of the step before.
        """
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.step)
        out = self.sae(batch.x)
        self._losses.put(self.step, out.loss)
        self._check_losses()
        out.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - start
        if self.step % self.config.log_every and self.step < self.config.steps:
            return None
        self.metrics.append(self._measure(batch, out))
        return self.metrics[-1]

    def save(self) -> None:
        """Writes the checkpoint and the metrics so far, each atomically.

        Raises:
            FloatingPointError: a loss so far is NaN or inf; nothing is written.
        """
        self._check_losses(wait=True)
        state = {
            "settings": self._settings(),
            "step": self.step,
            "seconds": self.seconds,
            "sae": self.sae.state_dict(),
            "generator": self.sae.generator.get_state(),
            "pool": self.sae.memory.pool.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "metrics": self.metrics,
        }
        write_atomically(self.folder / CHECKPOINT, lambda path: torch.save(state, path))
        write_text(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in self.metrics))

    def finish(self, x: Tensor) -> None:
        """Calibrates the threshold to L0 = k on x [n, d_in]; writes the SAE and run.json."""
        # Saved with the row_grads that was asked for: another optimizer that trains it on needs dense gradients.
        self.sae.cfg = replace(self.sae.cfg, row_grads=self.row_grads)
        self.sae.eval()
        self.sae.calibrate(x)
        self.sae.save_pretrained(self.folder)
        manifest = {k: v for k, v in self.feed.store.manifest.items() if k not in ("shards", "settings")}
        run = {
            "train": asdict(self.config),
            "activations": manifest,
            "tokens": self.step * self.config.batch_size,
        }
        write_json(self.folder / "run.json", run)

    def _measure(self, batch: TrainingBatch, out: SampledSAEOutput) -> dict[str, float]:
        """One line of metrics.jsonl. FVU is that of the batch; no time, so that runs compare bit for bit."""
        self._check_losses(wait=True)
        norm = self.optimizer.grad_norm
        return {
            "step": self.step,
            "tokens": self.step * self.config.batch_size,
            "lr": self.config.lr_at(self.step - 1),
            "loss": float(out.loss.detach()),
            "mse": float(out.mse.detach()),
            "aux": float(out.aux.detach()),
            "fvu": float(out.mse.detach()) / batch.variance if batch.variance else math.nan,
            "l0": out.codes.l0(),
            "dead_share": float(self.sae.dead.float().mean()),
            "threshold": float(self.sae.threshold),
            "grad_norm": math.nan if norm is None else float(norm),
        }

    def _check_losses(self, wait: bool = False) -> None:
        for step, loss in self._losses.arrived(wait):
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss={loss} at step {step}; the last checkpoint in {self.folder} is intact")

    def _settings(self) -> dict[str, Any]:
        """What a checkpoint must have been made with. Model and layer too: their shards may be of equal sizes."""
        manifest = self.feed.store.manifest
        return {
            "sae": self.sae.cfg.to_dict(),
            "train": asdict(self.config),
            "activations": {name: manifest.get(name) for name in ("model", "layer", "source", "scale")},
            "data": manifest["shards"],
        }

    def _load(self) -> None:
        path = self.folder / CHECKPOINT
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path}: truncated or not a checkpoint ({type(error).__name__}: {error})") from error
        if not isinstance(state, dict) or "settings" not in state:
            raise ValueError(f"{path}: not a checkpoint of sampled-sae")
        for part, now in self._settings().items():
            then = field(path, state["settings"], part, type(now))
            if then != now:
                differ = [f for f in now if then.get(f) != now[f]] if isinstance(now, dict) else [part]
                raise ValueError(f"{path}: made with other settings ({part}: {', '.join(differ)}); use another folder")
        self.step = field(path, state, "step", int, 0)
        self.seconds = field(path, state, "seconds", float, 0)
        self.metrics = field(path, state, "metrics", list)
        try:
            self.sae.load_state_dict(field(path, state, "sae", dict))
            self.sae.generator.set_state(field(path, state, "generator", Tensor))
            self.sae.memory.pool.load_state_dict(field(path, state, "pool", dict), self.feed.device)
            self.optimizer.load_state_dict(field(path, state, "optimizer", dict))
        except (LookupError, AttributeError, TypeError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{path}: damaged, it does not fit its own settings ({said})") from error


def train_to_end(runs: Mapping[str, TrainingRun], progress: bool) -> None:
    """Trains runs of one TrainConfig, starting from the smallest of their steps; a run ahead waits for the others.

    At the end each run is saved, calibrated and written out. `runs` is name -> run.

    Raises:
        FloatingPointError: a loss that is NaN or inf, with the run's name where there are several.
    """
    config = next(iter(runs.values())).config
    first = min(run.step for run in runs.values())
    for run in runs.values():
        run.sae.train()
    bar = tqdm(total=config.steps, initial=first, disable=not progress, unit="step", dynamic_ncols=True)
    with bar:
        for t in range(first, config.steps):
            lines = []
            for name, run in runs.items():
                if run.step > t:
                    continue
                try:
                    line = run.train_on(run.feed.batch(t))
                    if run.step % config.checkpoint_every == 0 and run.step < config.steps:
                        run.save()
                except FloatingPointError as error:
                    if len(runs) == 1:
                        raise
                    raise FloatingPointError(f"{name}: {error}, and so are those of the others") from None
                if line is not None:
                    lines.append(line)
            if lines:
                bar.set_postfix(_summary(lines), refresh=False)
            bar.update()
    for run in runs.values():
        run.save()
    # One feed after another: the tokens of each take up to CALIBRATION_TOKENS * d_in floats.
    for feed in {id(run.feed): run.feed for run in runs.values()}.values():
        x = feed.calibration()
        for run in runs.values():
            if run.feed is feed:
                run.finish(x)


def _summary(lines: list[dict[str, float]]) -> dict[str, str]:
    """For the progress bar: the values of one run, or smallest and largest over several."""
    shown = {"loss": ("loss", ".4g"), "L0": ("l0", ".1f"), "FVU": ("fvu", ".3f"), "dead": ("dead_share", ".1%")}
    found = {}
    for label, (name, form) in shown.items():
        ends = {format(pick(line[name] for line in lines), form): None for pick in (min, max)}
        found[label] = "–".join(ends)
    return found
