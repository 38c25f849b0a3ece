"""k-sparse probing: how well a few features of an SAE, chosen on the training items, tell a class from the others.

After the protocol of sae-probes and SAEBench: the k features whose means differ most between the class and the rest, a
logistic regression on them, its area under the ROC curve on other items. An item's codes are the mean over its tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.study_parts.labelled_activations import Task
from sampled_sae import SparseCodes

KS = (1, 2, 5, 20)
BATCH = 1024
Encode = Callable[[Tensor], SparseCodes]


def probed(codes: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """`probe_TASK_K`: the mean over the classes of a task; `probe_K`: the mean over tasks.

    codes: task -> (`pooled` codes [n, F], labels [n]).
    """
    found = {f"probe_{name}_{k}": _mean_over_classes(z, labels, k) for name, (z, labels) in codes.items() for k in KS}
    means = {f"probe_{k}": sum(found[f"probe_{name}_{k}"] for name in codes) / len(codes) for k in KS}
    return found | means


def probed_dense(tasks: list[Task]) -> dict[str, float]:
    """`probe_TASK` and `probe`: by all dimensions of the activations, what a probe of features is held against."""
    found = {f"probe_{task.name}": _mean_over_classes(task.x.mean(1), task.labels, None) for task in tasks}
    return {**found, "probe": sum(found.values()) / len(found)}


def pooled(encode: Encode, x: Tensor) -> Tensor:
    """x [n, p, d] to the mean codes of each item, [n, F]."""
    p = x.shape[1]
    parts = []
    for part in x.split(max(1, BATCH // p)):
        codes = encode(part.flatten(0, 1))
        values, tokens, features = codes.entries()
        z = torch.zeros(len(part), codes.shape[1])
        z.index_put_((tokens // p, features), values.detach().float() / p, accumulate=True)
        parts.append(z)
    return torch.cat(parts)


def _mean_over_classes(z: Tensor, labels: Tensor, k: int | None) -> float:
    classes = labels.unique().tolist()
    # of two classes one says all
    areas = [_area_of_class(z, labels == one, k) for one in (classes[1:] if len(classes) == 2 else classes)]
    return sum(areas) / len(areas)


def _area_of_class(z: Tensor, is_in: Tensor, k: int | None) -> float:
    half = len(z) // 2
    train, test = slice(half), slice(half, None)
    if k is not None:
        difference = z[train][is_in[train]].mean(0) - z[train][~is_in[train]].mean(0)
        z = z[:, difference.abs().topk(k).indices]
    mean, std = z[train].mean(0), z[train].std(0).clamp_min(1e-9)
    z = ((z - mean) / std).double()
    w = logistic(z[train], is_in[train].double())
    return area_under_roc(z[test] @ w[:-1] + w[-1], is_in[test])


def logistic(x: Tensor, y: Tensor, steps: int = 12) -> Tensor:
    """Weights and bias [d + 1] of the regression of y in {0, 1} [n] on x [n, d] with the penalty ||w||^2 / 2 (C = 1),
    by Newton's method."""
    x = torch.cat((x, torch.ones_like(x[:, :1])), 1)
    penalty = torch.ones(x.shape[1], dtype=x.dtype)
    penalty[-1] = 0
    w = torch.zeros_like(penalty)
    for _ in range(steps):
        p = torch.sigmoid(x @ w)
        gradient = x.T @ (p - y) + penalty * w
        hessian = (x.T * (p * (1 - p))) @ x + torch.diag(penalty + 1e-9)
        w = w - torch.linalg.solve(hessian, gradient)
    return w


def area_under_roc(scores: Tensor, is_in: Tensor) -> float:
    """Chance that an item of the class scores above one of the rest, ties counted half."""
    inside, outside = scores[is_in], scores[~is_in].sort().values
    below = torch.searchsorted(outside, inside) + torch.searchsorted(outside, inside, right=True)
    return float(below.double().mean() / (2 * len(outside)))
