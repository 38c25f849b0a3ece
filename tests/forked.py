"""Processes of tests that are forked from one that has imported what they need, and start in a moment."""

import importlib.util
import multiprocessing
import os

import torch

PRELOADED = ["torch", "torch.distributed.tensor", "torch.distributed.checkpoint", "sampled_sae.cli", "huggingface_hub"]
# for the words of tests/word_models.py
PRELOADED += ["transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"]
PRELOADED += ["transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_tokenizers"]
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def forked():
    """The context of `multiprocessing` for them. What is not installed is not imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED + ["triton"] * INTERPRETS)
    return context


def be_quick():
    """What each does first: one thread, and the interpreter of `tests/conftest.py`."""
    torch.set_num_threads(1)
    if INTERPRETS:
        from quick_interpreter import make_quick

        make_quick()
