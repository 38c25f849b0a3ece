"""`RowAdam`: clip, project, Adam and renormalise a SampledSAE in one walk over its rows.

A gradient given as rows is never made dense. Where the SAE runs on Triton in float32 a fused kernel does the walk
(kernels/row_adam.py) and nothing waits for the device, else PyTorch's fused Adam (impl/torch/row_adam.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .impl.adam_step import AdamStep, Moments, ParameterGradient, rows_first
from .impl.interface import Implementation
from .support.argument_checks import check_choice, check_number
from .support.cuda_graphs import capturing
from .support.late_values import LateScalars
from .support.reused_memory import on_huge_pages

if TYPE_CHECKING:
    from .sae import SampledSAE

MODES = ("dense", "lazy", "decayed")
MOMENTS = (None, torch.float32, torch.bfloat16)


class RowAdam(Optimizer):
    """Adam for a `SampledSAE`, with `cfg.row_grads=True` or without.

    One step: clip the global gradient norm; remove from W_dec's gradient the part parallel to each decoder
    row; Adam; unit decoder rows. (Of a crosscoder the part that changes the sum of a feature's norms over the layers,
    and that sum 1.) In mode "dense" equivalent to `clip_grad_norm_(sae.parameters(), clip)`,
    `sae.project_decoder_grad()`, `torch.optim.Adam(sae.parameters(), fused=True).step()`,
    `sae.normalize_decoder()`.

    Args:
        sae: the SampledSAE; one parameter group for each parameter, so that each may have its own lr.
        lr, betas, eps, weight_decay: as in torch.optim.Adam.
        clip: largest global gradient norm, None for no clipping.
        mode: what happens to rows (features) without gradient in a step.
            "dense": their moments decay and they go on moving, as in torch.optim.Adam.
            "lazy": they stand still, as in torch.optim.SparseAdam; bias correction counts all steps.
            "decayed": they stand still, and when a gradient comes their moments are first multiplied by
            beta^(steps without one): the moments are those of "dense".
            Weight decay acts, and enters the moments, only when a row moves.
        moments: dtype of the moments of W_enc and W_dec beside float32 weights; torch.bfloat16 halves their
            memory and is rounded stochastically. None for that of the weights.
        keep_rounded: where the SAE runs on Triton with products of 16 bits (autocast), keep the rounded weights that
            they take from step to step and write them as rows move, so that no step has to round all of W_enc and
            W_dec. Then nothing else may write to weights in a way that autograd does not see, such as `.data`.

    The projection takes decoder rows to be of unit norm, as `normalize_decoder()` makes them. With `cfg.row_grads`
    call `zero_grad()` after `step()` or before the forward pass: between forward and backward it would drop the rows.
    Their norms come with them, and clipping knows of no change by `grad.data` or an exchange of torch.distributed.

    Raises:
        TypeError: an `sae` that is none, or whose parameters something else than `parallelize` has spread (FSDP).
        RuntimeError: by `step()`, with `cfg.row_grads`, where the rows were dropped, where a `GradScaler` steps, and
            where something else has changed `b_dec.grad` after `backward()` (`clip_grad_norm_`, a division), for that
            cannot have changed the rows. By `step()` where a parameter of the SAE was replaced.

    Attributes:
        grad_norm: the global norm of the last step's gradient before clipping, 0-dim tensor.
    """

    takes_rows = True

    def __init__(
        self,
        sae: SampledSAE,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
        mode: str = "dense",
        moments: torch.dtype | None = None,
        keep_rounded: bool = False,
    ) -> None:
        lr = check_number("lr", lr, 0, None)
        eps = check_number("eps", eps, 0, None)
        weight_decay = check_number("weight_decay", weight_decay, 0, None)
        betas = check_number("betas[0]", betas[0], 0, 1), check_number("betas[1]", betas[1], 0, 1)
        for i, beta in enumerate(betas):
            if beta == 1:
                raise ValueError(f"betas[{i}]={beta!r}: must be below 1")
        if clip is not None:
            clip = check_number("clip", clip, 0, None)
        mode = check_choice("mode", mode, MODES)
        if moments not in MOMENTS:
            raise ValueError(f"moments={moments!r}: must be one of {', '.join(map(str, MOMENTS))}")
        names = {name for name, _ in sae.named_parameters()}
        if names - {"W_skip"} != {"W_enc", "b_enc", "W_dec", "b_dec"}:
            raise TypeError(f"sae={type(sae).__name__}: must be a SampledSAE (of a wrapped one, the module inside)")
        spread = [name for name, p in sae.named_parameters() if type(sae.layout.local(p.data)) is not Tensor]
        if spread:
            kind = type(getattr(sae, spread[0]).data).__name__
            raise TypeError(
                f"sae.{spread[0]} is a {kind}: RowAdam needs whole tensors, or an SAE that "
                "sampled_sae.distributed.parallelize has spread; use another optimizer"
            )
        if moments is not None and sae.W_enc.dtype != torch.float32:
            raise ValueError(f"moments={moments!r}: needs weights in float32, these are {sae.W_enc.dtype}")
        groups = [{"params": [p], "name": name} for name, p in sae.named_parameters()]
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.sae = sae
        self.clip = clip
        self.mode = mode
        self.moments = moments
        self.grad_norm: Tensor | None = None
        sae.memory.rounded.kept = keep_rounded
        self._watch_b_dec()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.sae.row_grads = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        grads = self._collect()
        factor = self._clip_factor({name: grad.norm() for name, grad in grads.items() if grad})
        moved = [(i, group, grad) for i, group in enumerate(self.param_groups) if (grad := grads[group["name"]])]
        if moved:
            torch._foreach_add_([self._begun(group, grad.weight)["step"] for _, group, grad in moved], 1)
        for i, group, grad in moved:
            self._update(i, group, grad, factor)
        return loss

    def allocate(self) -> None:
        """Makes the moments, of 0, before the first step: for what fills a state in place, as
        `torch.distributed.checkpoint` does."""
        for group in self.param_groups:
            weight = self.sae.layout.local(group["params"][0].detach())
            self._begun(group, rows_first(group["name"], weight))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, whatever memory layout the moments were saved in."""
        super().load_state_dict(state_dict)
        layout = self.sae.layout
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            parameter = group["params"][0]
            # from the original: torch has given all but the step the parameter's dtype
            for name, value in state_dict["state"].get(saved["params"][0], {}).items():
                value, kind = value.detach().to(parameter.device, copy=True), group["name"]
                if name == "last":
                    value = layout.adopt(value, "b_enc")
                if name in ("exp_avg", "exp_avg_sq"):
                    local = layout.local(layout.adopt(value, kind))
                    moment = rows_first(kind, local).to(self._moment_dtype(group)).contiguous()
                    value = layout.like(rows_first(kind, moment), kind)
                self.state[parameter][name] = value

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which in torch would lose what is not in the base class."""
        own = ("sae", "clip", "mode", "moments", "grad_norm")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_left"):  # a copy: load_state_dict comes here too
            self._watch_b_dec()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by GradScaler: to be told of it in `step`, which refuses, where it does not see the rows."""
        return self.sae.cfg.row_grads or bool(self.sae.row_grads)

    @property
    def _parts(self) -> Implementation:
        return self.sae.layout.parts(self.sae.impl_in_use)

    def _moment_dtype(self, group: dict[str, Any]) -> torch.dtype:
        matrix = group["name"] in ("W_enc", "W_dec")
        return self.moments if self.moments is not None and matrix else group["params"][0].dtype

    def _watch_b_dec(self) -> None:
        """Remembers in what state backward leaves b_dec.grad, which all that edits gradients edits too."""
        self._left: tuple[int, Tensor] | None = None  # its version, and a copy: GradScaler.unscale_ moves no version
        self._edits = LateScalars()
        me = weakref.ref(self)

        def remember(b_dec: Tensor) -> None:
            optimizer = me()
            if optimizer is not None and optimizer.sae.row_grads and b_dec.grad is not None:
                optimizer._left = b_dec.grad._version, optimizer.sae.layout.local(b_dec.grad).detach().clone()

        if self.sae.b_dec.requires_grad:
            self.sae.b_dec.register_post_accumulate_grad_hook(remember)

    def _check_gradients(self) -> None:
        sae = self.sae
        for group in self.param_groups:
            if group["params"][0] is not getattr(sae, group["name"]):
                raise RuntimeError(f"RowAdam: sae.{group['name']} was replaced since; make a new RowAdam(sae)")
        b_dec = sae.b_dec.grad
        if hasattr(self, "found_inf"):
            raise RuntimeError("row_grads=True: GradScaler does not unscale row gradients; set row_grads=False")
        gone = sae.cfg.row_grads and not sae.row_grads and sae.W_dec.requires_grad
        if gone and sae.W_dec.grad is None and b_dec is not None:
            raise RuntimeError(
                "row_grads=True: the rows' gradients were dropped by a zero_grad() between forward and backward; "
                "call it after step(), or before the forward pass"
            )
        if sae.row_grads and b_dec is not None and self._was_edited(b_dec):
            raise RuntimeError(
                "row_grads=True: b_dec.grad was changed after backward (clip_grad_norm_, a division, unscale_), and "
                "those in sae.row_grads were not; set row_grads=False, or RowAdam's clip"
            )

    def _was_edited(self, b_dec: Tensor) -> bool:
        """Whether its gradient is another than backward left; of a GPU's values this is known one step later."""
        if self._left is None:
            return False
        version, left = self._left
        if not capturing():
            now, left = (t.contiguous().view(torch.int16) for t in (self.sae.layout.local(b_dec), left))
            self._edits.put(0, (now != left).any())  # by bits: NaN, another thing and not this one's, equals itself
        edits = [edited for _, edited in self._edits.arrived()]
        return version != b_dec._version or any(edits)

    def _collect(self) -> dict[str, ParameterGradient]:
        local = self.sae.layout.local
        grads = {}
        for name, parameter in ((g["name"], g["params"][0]) for g in self.param_groups):
            dense = None if parameter.grad is None else local(parameter.grad)
            grads[name] = ParameterGradient(name, local(parameter.detach()), dense)
        for part in self.sae.row_grads:
            if part.rows.grad is not None:
                grads[part.name].add(part)
        for grad in grads.values():
            grad.merge(self._parts.union)
        return grads

    def _clip_factor(self, norms: dict[str, Tensor]) -> Tensor | None:
        """What gradients of such norms are multiplied by, so that the global one is at most `clip`: None for 1."""
        if not norms:
            return None
        exact = {name: norm.to(torch.promote_types(norm.dtype, torch.float32)) for name, norm in norms.items()}
        self.grad_norm = self._parts.totals.norm(exact)
        return None if self.clip is None else (self.clip / (self.grad_norm + 1e-6)).clamp(max=1.0)

    def _mode_of(self, name: str) -> str:
        # every element of these has a gradient in every step
        return self.mode if name not in ("b_dec", "W_skip") else "dense"

    def _begun(self, group: dict[str, Any], weight: Tensor) -> dict[str, Any]:
        """The state of a parameter, made where there is none yet; `weight` is the part of it here, features first."""
        state, layout, name = self.state[group["params"][0]], self.sae.layout, group["name"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            like = weight.new_empty(0, dtype=self._moment_dtype(group))
            for moment in ("exp_avg", "exp_avg_sq"):
                zeros = rows_first(name, on_huge_pages(like, *weight.shape).zero_())
                state[moment] = layout.like(zeros, name)
        if self._mode_of(name) == "decayed" and "last" not in state:
            # in a state that another mode has left behind, every row has just moved
            last = state["step"].to(torch.int32).expand(weight.shape[0]).clone()
            state["last"] = layout.like(last, "b_enc")
        return state

    def _rounded_copy(self, name: str, weight: Tensor) -> Tensor | None:
        """What the implementation is to write beside the weights: the kernel does, where nothing comes after it."""
        alone = self.sae.impl_in_use == "triton" and self.sae.cfg.layers == 1
        return self.sae.memory.rounded.following(name, weight) if alone else None

    def _update(self, index: int, group: dict[str, Any], grad: ParameterGradient, factor: Tensor | None) -> None:
        weight, layout = grad.weight, self.sae.layout
        state, mode = self.state[group["params"][0]], self._mode_of(grad.name)
        step = AdamStep(
            number=state["step"],
            factor=factor,
            lr=group["lr"] if isinstance(group["lr"], Tensor) else float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            mode=mode,
            project=grad.name == "W_dec",
            renormalize=grad.name == "W_dec",
            seed=index,
            layers=self.sae.cfg.layers,
            copy=self._rounded_copy(grad.name, weight),
        )
        exp_avg, exp_avg_sq = (rows_first(grad.name, layout.local(state[name])) for name in ("exp_avg", "exp_avg_sq"))
        moments = Moments(exp_avg, exp_avg_sq, layout.local(state["last"]) if mode == "decayed" else None)
        # Rows are worked on in memory order: a weight of another layout as a copy.
        rows = weight.contiguous()
        self._parts.row_adam_(rows, moments, grad.values(), grad.features(), step)
        if rows is not weight:
            weight.copy_(rows)
        self.sae.memory.rounded.moved(grad.name, weight, followed=step.copy is not None)
