"""Training one SAE on a store of activations, resumable to the bit."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .config import SampledSAEConfig
from .data import ActivationStore, ShuffledStream
from .files import write_atomically, write_json, write_text
from .optim import RowAdam
from .sae import SampledSAE, SampledSAEOutput
from .validate import check_integer, check_number

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
CALIBRATION_TOKENS = 65_536


@dataclass(frozen=True)
class TrainConfig:
    """How an SAE is trained.

    Args:
        steps: batches to train on.
        batch_size: tokens a batch; part of the method, since scores and selection are the batch's.
        lr: peak learning rate of Adam.
        warmup: share of the steps over which lr rises from 0.
        decay: share of the steps, at the end, over which lr falls to 0.
        clip: largest gradient norm.
        seed: of the order of the tokens.
        checkpoint_every, log_every: steps between checkpoints and lines of metrics.jsonl.
    """

    steps: int = 1000
    batch_size: int = 2048
    lr: float = 1e-3
    warmup: float = 0.05
    decay: float = 0.2
    clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "log_every"):
            check_integer(name, getattr(self, name), 1)
        check_integer("seed", self.seed, 0)
        check_number("lr", self.lr, 0, None)
        check_number("clip", self.clip, 0, None)
        check_number("warmup", self.warmup, 0, 1)
        check_number("decay", self.decay, 0, 1)

    def lr_at(self, step: int) -> float:
        """lr of step 0, 1, ...: linear warm-up, constant, linear decay."""
        up = (step + 1) / max(1, round(self.warmup * self.steps))
        down = (self.steps - step) / max(1, round(self.decay * self.steps))
        return self.lr * min(1.0, up, down)


class Trainer:
    """Trains a SampledSAE and keeps `folder` such that a kill loses at most `checkpoint_every` steps.

    Writes `checkpoint.pt` (weights, optimizer, step), `metrics.jsonl` (a line every `log_every` steps), and at
    the end the SAE itself (`config.json`, `sae.safetensors`) and `run.json`. Started on a folder that holds a
    checkpoint of the same settings, it goes on from there, and the result equals that of an uninterrupted run.

    Args:
        sae_config, train_config: what and how; `row_grads` is switched on.
        store: activations.
        folder: where everything is written.

    Raises:
        ValueError: a checkpoint of other settings in the folder, a corrupt one, widths that differ.
    """

    def __init__(
        self,
        sae_config: SampledSAEConfig,
        train_config: TrainConfig,
        store: ActivationStore,
        folder: str | Path,
    ) -> None:
        if sae_config.d_in != store.d_in:
            raise ValueError(f"d_in={sae_config.d_in}: the activations in {store.folder} have {store.d_in}")
        self.config = train_config
        self.store = store
        self.folder = Path(folder)
        self.stream = ShuffledStream(store, train_config.batch_size, train_config.seed)
        self.sae = SampledSAE(replace(sae_config, row_grads=sae_config.impl != "reference"))
        self.optimizer = RowAdam(self.sae, lr=train_config.lr, clip=train_config.clip)
        self.step = 0
        self.metrics: list[dict[str, float]] = []
        if (self.folder / CHECKPOINT).exists():
            self._load()
        else:
            self.sae.init_b_dec(self.stream.batch(0))

    def run(self, progress: bool = True) -> SampledSAE:
        """Trains to the end, calibrates the threshold to L0 = k, saves; returns the SAE in evaluation mode."""
        self.sae.train()
        bar = tqdm(total=self.config.steps, initial=self.step, disable=not progress, unit="step", dynamic_ncols=True)
        with bar:
            while self.step < self.config.steps:
                self._train_step(bar)
                if self.step % self.config.checkpoint_every == 0 and self.step < self.config.steps:
                    self.save()
        self.save()
        self._finish()
        return self.sae

    def save(self) -> None:
        """Writes the checkpoint and the metrics so far, each atomically."""
        state = {
            "settings": self._settings(),
            "step": self.step,
            "sae": self.sae.state_dict(),
            "generator": self.sae.generator.get_state(),
            "optimizer": self.optimizer.state_dict(),
            "metrics": self.metrics,
        }
        write_atomically(self.folder / CHECKPOINT, lambda path: torch.save(state, path))
        write_text(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in self.metrics))

    def _train_step(self, bar: Any) -> None:
        x = self.stream.batch(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.step)
        out = self.sae(x)
        if not math.isfinite(float(out.loss.detach())):
            raise FloatingPointError(
                f"loss={float(out.loss)} at step {self.step}; the last checkpoint in {self.folder} is intact"
            )
        out.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.step % self.config.log_every == 0 or self.step == self.config.steps:
            line = self._measure(x, out)
            self.metrics.append(line)
            bar.set_postfix(
                loss=f"{line['loss']:.4g}",
                L0=f"{line['l0']:.1f}",
                FVU=f"{line['fvu']:.3f}",
                dead=f"{line['dead_share']:.1%}",
                refresh=False,
            )
        bar.update()

    def _measure(self, x: Tensor, out: SampledSAEOutput) -> dict[str, float]:
        """One line of metrics.jsonl. FVU is that of the batch; no time, so that runs compare bit for bit."""
        variance = float((x - x.mean(0)).square().sum(1).mean())
        norm = self.optimizer.grad_norm
        return {
            "step": self.step,
            "tokens": self.step * self.config.batch_size,
            "lr": self.config.lr_at(self.step - 1),
            "loss": float(out.loss.detach()),
            "mse": float(out.mse.detach()),
            "aux": float(out.aux.detach()),
            "fvu": float(out.mse.detach()) / variance if variance else math.nan,
            "l0": out.codes.l0(),
            "dead_share": float(self.sae.dead.float().mean()),
            "threshold": float(self.sae.threshold),
            "grad_norm": math.nan if norm is None else float(norm),
        }

    def _settings(self) -> dict[str, Any]:
        return {
            "sae": self.sae.cfg.to_dict(),
            "train": asdict(self.config),
            "data": self.store.manifest["shards"],
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
            then = state["settings"].get(part)
            if then != now:
                differ = [f for f in now if then.get(f) != now[f]] if isinstance(now, dict) else [part]
                raise ValueError(f"{path}: made with other settings ({part}: {', '.join(differ)}); use another folder")
        self.sae.load_state_dict(state["sae"])
        self.sae.generator.set_state(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.metrics = state["metrics"]

    def _finish(self) -> None:
        x = [self.stream.batch(t) for t in range(-(-CALIBRATION_TOKENS // self.config.batch_size))]
        self.sae.eval()
        self.sae.calibrate(torch.cat(x)[:CALIBRATION_TOKENS])
        self.sae.save_pretrained(self.folder)
        manifest = {k: v for k, v in self.store.manifest.items() if k not in ("shards", "settings")}
        run = {
            "train": asdict(self.config),
            "activations": manifest,
            "tokens": self.step * self.config.batch_size,
        }
        write_json(self.folder / "run.json", run)
