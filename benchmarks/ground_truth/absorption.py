"""Feature absorption where the hierarchy is known: a parent's detector stays silent because a child's one speaks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sampled_sae import SparseCodes

# a parent counts whose detector finds at least this share of the tokens on which no child is active
DETECTED = 0.5


class Absorption:
    """Counts, over batches, when the detectors of parents stay silent.

    A true feature's detector is the SAE's feature nearest to it, of those that stand for it (`metrics.of_decoder`).

    Args:
        children: parent -> its children, numbers of true features.
        matches: int64 [F], which true feature each of the SAE's stands for. cosine: [F, N], as `metrics.cosines`.
    """

    def __init__(self, children: dict[int, list[int]], matches: Tensor, cosine: Tensor) -> None:
        n = cosine.shape[1]
        stands = torch.zeros_like(cosine, dtype=torch.bool)
        stands[torch.arange(len(matches)), matches] = True
        best = cosine.masked_fill(~stands, -1).max(0)
        self.detected = best.values >= 0
        self.detector = best.indices
        self.parents = torch.tensor([p for p in children if self.detected[p]], dtype=torch.int64)
        self.of = torch.zeros(n, len(self.parents))
        for i, parent in enumerate(self.parents.tolist()):
            self.of[children[parent], i] = 1
        self.alone, self.alone_hits, self.with_child, self.absorbed = torch.zeros(4, len(self.parents))

    def add(self, codes: SparseCodes, firing: Tensor) -> None:
        """One batch: codes [B, F], firing bool [B, N]."""
        active = torch.zeros(codes.shape, dtype=torch.bool)
        active[codes.tokens.cpu(), codes.features.cpu()] = True
        parent, heard = firing[:, self.parents], active[:, self.detector[self.parents]]
        child = (firing.float() @ self.of) > 0
        speaks = firing & active[:, self.detector] & self.detected
        child_heard = (speaks.float() @ self.of) > 0
        self.alone += (parent & ~child).sum(0)
        self.alone_hits += (parent & ~child & heard).sum(0)
        self.with_child += (parent & child).sum(0)
        self.absorbed += (parent & child_heard & ~heard).sum(0)

    def result(self) -> dict[str, float | None]:
        """`absorbed`: of the tokens with parent and child, the share where the child's detector is active and the
        parent's is not; mean over the `parents` whose detector finds DETECTED of the tokens where they are alone and
        that are seen with a child. None without such parents."""
        able = (self.alone_hits >= DETECTED * self.alone) & (self.alone > 0) & (self.with_child > 0)
        rate = (self.absorbed / self.with_child)[able]
        return {"absorbed": float(rate.mean()) if len(rate) else None, "parents": int(able.sum())}


def children_of(nodes: Iterable[Any]) -> dict[int, list[int]]:
    """parent -> children, of sae_lens' trees."""
    found: dict[int, list[int]] = {}
    for node in nodes:
        if node.children and node.feature_index is not None:
            found[node.feature_index] = [child.feature_index for child in node.children]
        found |= children_of(node.children)
    return found
