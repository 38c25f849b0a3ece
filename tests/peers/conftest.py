"""Tests against the peers' own packages; `make test` runs them in an environment that has all of them."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    # sparsify's own switch, read when it is imported: its Triton decoder cannot run on a CPU
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

collect_ignore_glob = [] if importlib.util.find_spec("sae_lens") else ["*"]
