"""`TrainingRun`: one SAE in training, resumed bit for bit."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from ..config import SampledSAEConfig
from ..optim import RowAdam
from ..run_logs import NO_LOG, LogPlace, RunLog
from ..sae import SampledSAE, SampledSAEOutput
from ..support.atomic_files import append_text, json_line, write_text
from ..support.late_values import LateScalars
from .feed import Feed, TrainingBatch
from .fitting import check_fits, check_room, check_variance, check_width
from .graphed_steps import GraphedSteps
from .initial_weights import begin_with, check_initial
from .precision import forward_in, settled, step_in
from .resuming import load, save, saved
from .run_folder import RunFolder
from .same_settings import identity
from .token_start import begin_at_tokens, starts_at_tokens
from .train_config import TrainConfig, check_schedule, config_at

METRICS = "metrics.jsonl"
# The aux loss is a share of the residual's variance: some ones at most, and more where that variance is rounding.
LARGEST_AUX = 1e6


class TrainingRun:
    """One SAE in training, its optimizer and its folder; the caller fetches the batches.

    Args:
        sae_config, train_config: the SAE and how it is trained; `row_grads` is switched on in training, and
            `input_scale` becomes that of the store.
        feed: where its batches come from, and the device it is trained on; may be shared by several runs.
        folder: where everything is written.
        init_from: an SAE whose weights it begins with, in place of drawn ones; left as it is.

    Attributes:
        sae, optimizer: what is trained, and by what.
        config: `train_config` with the precision that "auto" stands for here.
        metrics: the lines of metrics.jsonl so far.
        graphed: what takes whole steps as one, where that was asked for.
        log: where the lines of metrics go besides; open once the steps have begun, and closed by the caller.
        step: steps done, those before a resumed checkpoint included.
        seconds: spent in those steps. A GPU may still work on one run while the next is timed: there only the
            sum over the runs of a process is exact.

    Raises:
        ValueError: a checkpoint of other settings in the folder, a damaged one, an SAE of another training without its
            checkpoint, widths that differ, a folder that cannot be written to, activations that (all but) do not vary,
            a precision that this SAE cannot have on this device.
    """

    def __init__(
        self,
        sae_config: SampledSAEConfig,
        train_config: TrainConfig,
        feed: Feed,
        folder: str | Path,
        init_from: SampledSAE | None = None,
    ) -> None:
        check_width(sae_config, feed.store)
        check_schedule(sae_config, train_config)
        self.config = train_config = settled(train_config, sae_config, feed.device)
        self.feed = feed
        self.folder = Path(folder)
        self.init = None if init_from is None else check_initial(init_from, sae_config)
        at_tokens = starts_at_tokens(train_config, sae_config, feed, init_from)
        self._ranks = ranks = feed.ranks
        check_room(sae_config, train_config, feed, self.folder)
        found = saved(self.folder, ranks)
        if found is not None:
            with ranks.together():
                feed.begin_at(str(found[0]), found[1].get("stream"))
        check_fits(sae_config, feed)
        self.row_grads = sae_config.row_grads
        scaled = replace(sae_config, input_scale=feed.scale, output_scale=feed.output_scale)
        self.target = replace(scaled, row_grads=sae_config.impl != "reference")
        self.sae = SampledSAE(self.target, device=feed.device)
        if init_from is not None:
            begin_with(self.sae, init_from)
        elif at_tokens and found is None:
            with ranks.together():
                begin_at_tokens(self.sae, feed)
        if ranks.mesh is not None:
            from ..distributed import parallelize  # which loads seconds of torch

            parallelize(self.sae, ranks.mesh)
        self.optimizer = RowAdam(
            self.sae,
            lr=train_config.lr,
            clip=train_config.clip,
            mode=train_config.adam,
            moments=getattr(torch, train_config.moments),
            keep_rounded=True,
        )
        self._set = self.target
        self.step = 0
        self.seconds = 0.0
        self.metrics: list[dict[str, float]] = []
        self.log: RunLog = NO_LOG
        self._log_place: tuple[LogPlace, str] | None = None
        self.graphed: GraphedSteps | None = None
        self._losses, self._aux = LateScalars(), LateScalars()
        self._written = RunFolder(self.folder, ranks)
        if found is not None:
            load(self, *found)
        else:
            with ranks.together():
                self._written.check_same(self._about(), self._saved_config())
            self._begin(feed.batch(0), init_from is None)

    def _begin(self, batch: TrainingBatch, drawn: bool) -> None:
        """With the first batch: b_dec follows from it where the weights are drawn."""
        check_variance(batch, self.config.batch_size, self.feed.store.where)
        if drawn and batch.target is not None:
            self.sae.init_b_dec(batch.x, batch.target, scaled=True)
        elif drawn:
            with torch.no_grad():
                self.sae.layout.local(self.sae.b_dec).copy_(batch.median)

    def follow_schedule(self, step: int) -> None:
        """The SAE computes by the k and l of a step.

        Raises:
            ValueError: its config is none that this training has set.
        """
        if self.sae.cfg != self._set:
            changed = [f.name for f in fields(self._set) if getattr(self.sae.cfg, f.name) != getattr(self._set, f.name)]
            values = "; ".join(f"{n} was {getattr(self._set, n)!r}, is {getattr(self.sae.cfg, n)!r}" for n in changed)
            raise ValueError(
                f"sae.cfg was changed in mid-training ({values}): a checkpoint could not go on from it; k_start and "
                "l_start of TrainConfig change k and l, and init_from begins another training"
            )
        config = config_at(self.target, self.config, step)
        if config != self._set:
            self.sae.cfg = self._set = config

    def train_on(self, batch: TrainingBatch) -> dict[str, float] | None:
        """One step; `batch` is number `self.step` of the feed. Returns the line of metrics where one is due.

        Raises:
            ValueError: `sae.cfg` was changed since the step before.
            FloatingPointError: a loss that is NaN or inf. On a CPU it is the loss of this step, and the weights stay as
                they were. A GPU's loss arrives later, so that there it may be that of the step before.
        """
        start = time.perf_counter()
        self.follow_schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.step)
        precision, device = self.config.precision, self.feed.device
        with step_in(precision, device):
            if self.graphed is not None:
                out = self.graphed(batch.x, batch.target)
                self._watch(out)
            else:
                with forward_in(precision, device):
                    out = self.sae(batch.x, batch.target, scaled=True)
                self._watch(out)
                out.loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - start
        if self.step % self.config.log_every and self.step < self.config.steps:
            return None
        self.metrics.append(self._measure(batch, out))
        return self.metrics[-1]

    def show_in(self, place: LogPlace | None, member: str = "") -> None:
        """Lets the lines of metrics go to `place` too, in a sweep under the member's name."""
        if not isinstance(place, (LogPlace, NoneType)):
            raise TypeError(f"log={place!r}: must be a sampled_sae.run_logs.LogPlace, such as LogPlace('wandb')")
        self._log_place = None if place is None else (place, member)

    def start_metrics(self) -> None:
        """metrics.jsonl with the lines up to this step: those that a killed process wrote beyond are dropped.

        Raises:
            ValueError: the place that shows the run refuses it.
            BlockingIOError: another process has written a checkpoint or an SAE since this run looked for one.
        """
        if not self._ranks.first:
            return
        self._written.check_unchanged()
        write_text(self.folder / METRICS, "".join(map(json_line, self.metrics)))
        if self._log_place is not None:
            place, member = self._log_place
            about = {"sae": self.sae.cfg.to_dict(), "train": asdict(self.config)}
            about["activations"] = identity(self.feed.store.manifest)
            self.log = place.open(self.folder, about, self.step, member)

    def write_metrics(self, line: dict[str, float]) -> None:
        """One line behind the others, there to be read at once."""
        if self._ranks.first:
            append_text(self.folder / METRICS, json_line(line))
            self.log.metrics(self.step, line)

    def save(self) -> None:
        """Writes the checkpoint, atomically.

        Raises:
            FloatingPointError: a loss so far is NaN or inf; nothing is written.
        """
        self._check_losses(wait=True)
        save(self)
        self._written.look()

    def finish(self, x: Tensor) -> None:
        """Calibrates the threshold to L0 = k on x [n, d_in], scaled; writes the SAE and run.json."""
        self.sae.cfg = self._set = self._saved_config()
        self.sae.eval()
        self.sae.calibrate(x, scaled=True)
        self._written.write(self.sae, {**self._about(), "tokens": self.step * self.config.batch_size})

    def _saved_config(self) -> SampledSAEConfig:
        """With the row_grads that was asked for: another optimizer that trains the SAE on needs dense gradients."""
        return replace(self.target, row_grads=self.row_grads)

    def _about(self) -> dict[str, Any]:
        """What run.json says of the training, whatever its length."""
        manifest = self.feed.about
        kept = {name: value for name, value in manifest.items() if name not in ("shards", "settings")}
        activations = {**kept, **identity(manifest)}
        return {"train": asdict(self.config), "activations": activations, "init": self.init}

    def _measure(self, batch: TrainingBatch, out: SampledSAEOutput) -> dict[str, float]:
        """One line of metrics.jsonl. FVU is that of the batch; no time, so that runs compare bit for bit."""
        self._check_losses(wait=True)
        norm, cfg = self.optimizer.grad_norm, self.sae.cfg
        rule = {"k": cfg.k, "l": math.nan if cfg.l is None else cfg.l} if self.config.is_scheduled else {}
        return {
            "step": self.step,
            "tokens": self.step * self.config.batch_size,
            "lr": self.config.lr_at(self.step - 1),
            "loss": float(out.loss.detach()),
            "mse": float(out.mse.detach()),
            "aux": float(out.aux.detach()),
            "fvu": float(out.mse.detach()) / batch.variance if batch.variance else math.nan,
            **{f"fvu_layer_{i}": fvu for i, fvu in enumerate(batch.fvu_of_layers(out.x_hat.detach(), cfg.layers))},
            "l0": self._ranks.total(out.codes.count()) / self.config.batch_size,
            "dead_share": float(self.sae.dead.float().mean()),
            "threshold": float(self.sae.threshold),
            "grad_norm": math.nan if norm is None else float(norm),
            **rule,
        }

    def _watch(self, out: SampledSAEOutput) -> None:
        """Sends the losses of this step to the host, and checks those that have arrived."""
        self._losses.put(self.step, out.loss)
        self._aux.put(self.step, out.aux)
        self._check_losses()

    def _check_losses(self, wait: bool = False) -> None:
        intact = f"the last checkpoint in {self.folder} is intact"
        for step, loss in self._losses.arrived(wait):
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss={loss} at step {step}; {intact}")
        for step, aux in self._aux.arrived(wait):
            if aux > LARGEST_AUX:
                raise FloatingPointError(
                    f"aux={aux:.3g} at step {step}: the residuals of this batch are all but the same, as where tokens "
                    f"are copies of each other; leave repeated tokens out of {self.feed.store.where}; {intact}"
                )
