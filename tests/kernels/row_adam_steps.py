"""Steps of the row-Adam kernel from a state."""

import torch

from sampled_sae.kernels.row_adam import row_adam_

MODES = ["dense", "lazy", "decayed"]
RULE = {"factor": None, "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
DECODER = {"weight_decay": 0.1, "project": True, "renormalize": True}


def start(F, d, device, moments=torch.float32, seed=0):
    """Weight of unit rows, moments, last."""
    weight = torch.randn(F, *(() if d is None else (d,)), generator=torch.Generator().manual_seed(seed))
    if d is not None:
        weight /= weight.norm(dim=1, keepdim=True)
    zeros = torch.zeros_like(weight, dtype=moments)
    return [t.to(device) for t in (weight, zeros, zeros.clone(), torch.zeros(F, dtype=torch.int32))]


def gradients(shape, steps, device, dtype=torch.float32, seed=1):
    """(features, rows) of each step, other features each time; one of two rows or more is zero."""
    F, d, T = shape
    make = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        rows = torch.randn(T, *(() if d is None else (d,)), generator=make)
        if T > 1:
            rows[T // 2] = 0
        found.append((torch.randperm(F, generator=make)[:T].to(device), rows.to(device, dtype)))
    return found


def ours(state, grads, mode, **rule):
    """weight, exp_avg, exp_avg_sq and last after these steps from `state`."""
    weight, exp_avg, exp_avg_sq, last = (t.clone() for t in state)
    step = torch.zeros((), device=weight.device)
    for features, rows in grads:
        step += 1
        row_adam_(
            weight,
            exp_avg,
            exp_avg_sq,
            rows.clone(),
            features,
            step,
            mode=mode,
            last=last if mode == "decayed" else None,
            **(RULE | rule),
        )
    assert step == len(grads)
    return weight, exp_avg, exp_avg_sq, last
