"""Processes of tests that are forked from one that has imported what they need, and start in a moment."""

import gc
import importlib.util
import multiprocessing
import os
import runpy
import sys

import torch

from sampled_sae.training import feed

PRELOADED = ["torch", "torch.distributed.tensor", "torch.distributed.checkpoint", "sampled_sae.cli", "huggingface_hub"]
# for the words of tests/word_models.py
PRELOADED += ["transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"]
PRELOADED += ["transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_tokenizers"]
# for the workers of benchmarks
PRELOADED += [f"benchmarks.peers.{name}" for name in ("saelens", "sparsify", "dictionary_learning")]
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def forked():
    """The context of `multiprocessing` for them. What is not installed is not imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED + ["triton"] * INTERPRETS)
    return context


def be_quick():
    """What each does first, and pytest: one thread, a quick interpreter, calibrations on few tokens after training."""
    torch.set_num_threads(1)
    feed.CALIBRATION_TOKENS = 600
    if INTERPRETS:
        from quick_interpreter import make_quick

        make_quick()
    gc.freeze()  # garbage is what tests make: that of all imports takes long to look through


def run_forked(log, function, *arguments):
    """(exit status, output) of a process that calls a function; the status is what it returns."""
    process = forked().Process(target=logged, args=(log, function, *arguments))
    process.start()
    process.join()
    return process.exitcode, log.read_text()


def logged(log, function, *arguments):
    """The target of a process whose standard streams are a file."""
    write_to(log)
    be_quick()
    status = function(*arguments)
    sys.stdout.flush()
    os._exit(status)


def write_to(log):
    """The standard streams of this process, and of those that it starts, from now on."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))


def script(path, *arguments):
    """A script as `python path arguments` runs it."""
    sys.argv = [str(path), *map(str, arguments)]
    runpy.run_path(str(path), run_name="__main__")
    return 0
