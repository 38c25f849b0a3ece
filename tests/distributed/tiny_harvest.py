"""A harvest of a model that needs no library, by all processes there are."""

import os
import sys
from types import SimpleNamespace

import torch
from torch import nn

from sampled_sae.lm import harvest
from sampled_sae.support.all_ranks import ALONE
from sampled_sae.support.launch import launched
from sampled_sae.support.meeting import start

VOCABULARY, CONTEXT, D = 50, 8, 6


class Tiny(nn.Module):
    """Blocks that add something to the residual stream."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=2)
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, input_ids, use_cache=False):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def token_rows():
    return torch.randint(0, VOCABULARY, (22, CONTEXT), generator=torch.Generator().manual_seed(1))


def harvest_tiny(argv):
    """argv: the folder, and how many rows differ from those of the first rank on the others. Exit status."""
    launch = launched()
    ranks = ALONE if launch is None else start(launch, cuda=False, feature_shards=1, timeout=120)
    rows = token_rows()
    if ranks.rank and len(argv) > 1:
        rows[: int(argv[1])] = 0
    settings = {"batch_size": 2, "rows_per_shard": 3, "holdout_rows": 2, "source": "random", "progress": False}
    try:
        harvest(Tiny(), rows, 1, argv[0], mesh=ranks.mesh, drop_tokens=(), **settings)
    except Exception as error:
        if (line := ranks.said_here(error)) is not None:
            print(f"{line}{error}", flush=True)
        sys.stdout.flush()
        os._exit(1)
    ranks.close()
    return 0
