"""Every file that a command reads, damaged: a field less, one of another type, a part cut off. One sentence each."""

import functools
import json
import math
import random
from copy import deepcopy

import pytest
import torch
from cli_places import assert_one_sentence, full, places, pristine  # noqa: F401
from safetensors.torch import load_file, save_file

from sampled_sae.training.checkpoint import write_checkpoint

VALUES = [None, "x", -1, 0, 1.5, 10**30, True, [], {}, [[]], float("nan"), float("inf"), "../x"]
OTHER_TENSORS = (torch.zeros(1), torch.full((2, 2), math.nan), torch.ones((), dtype=torch.int64))
# which command reads which file
READS = {
    "store/manifest.json": ["verify", "train", "evaluate", "sweep", "export {sae} {new} --activations {store}"],
    "sae/config.json": ["evaluate", "export", "verify {sae}"],
    "run/config.json": ["export {run} {new}"],
    "run/run.json": ["export {run} {new}", "evaluate {run} {store} --splice-rows 0"],
    "imported/origin.json": ["export {imported} {new}"],
    "harvested/manifest.json": ["harvest {harvested}", "train {harvested} {new}"],
    "swept/l2_l2/metrics.jsonl": ["sweep {store} {swept}", "look {swept}"],
    "swept/l2_l2/result.json": ["sweep {store} {swept}"],
    "swept/l2_l2/evaluation.json": ["look {swept}/l2_l2 {store} --no-model"],
    "swept/sweep.json": ["look {swept}", "look {swept} {store} --no-model"],
    "encoded/manifest.json": ["encode {store} {encoded}", "verify {encoded}", "look {sae} {encoded} --no-model"],
    "peer/cfg.json": ["import", "encode {store} {new} --sae {peer}"],
    "dl/config.json": ["import {dl} {new}", "encode {store} {new} --sae {dl}"],
    "sparsify/cfg.json": ["import {sparsify} {new}", "encode {store} {new} --sae {sparsify}"],
    "model/config.json": ["harvest"],
}
TENSORS = {
    "store/shard_00000.safetensors": ["train"],
    "store/holdout.safetensors": ["evaluate", "evaluate {sae} {store} --model {model} --splice-rows 2"],
    "sae/sae.safetensors": ["evaluate", "export"],
    "encoded/codes_00000.safetensors": [
        "encode {store} {encoded}",
        "verify {encoded}",
        "look {sae} {encoded} --no-model",
    ],
    "peer/sae_weights.safetensors": ["import", "encode {store} {new} --sae {peer}"],
    "peer/sampled_sae.safetensors": ["import"],
    "dl/ae.pt": ["import {dl} {new}"],
    "sparsify/sae.safetensors": ["import {sparsify} {new}"],
    "run/checkpoint.pt": ["train {store} {run}", "verify {run}"],
    "harvested/shard_00000.safetensors": ["train {harvested} {new}"],
    "model/model.safetensors": ["harvest"],
}


def fields(value, at=()):
    """The place of every field of a JSON value; of lists the first and the last entry."""
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = [(i, value[i]) for i in sorted({0, len(value) - 1})] if value else []
    else:
        return
    for key, held in inner:
        yield (*at, key)
        yield from fields(held, (*at, key))


def changed(value, at, change):
    """A copy with the field at this place changed: `change(holder, key)`."""
    copy = deepcopy(value)
    holder = copy
    for key in at[:-1]:
        holder = holder[key]
    change(holder, at[-1])
    return copy


def delete(holder, key):
    del holder[key]


def put(new):
    return lambda holder, key: holder.__setitem__(key, new)


def damages_of_json(text):
    """(what was done, the new text)."""
    value = json.loads(text)
    for at in fields(value):
        yield f"without {at}", json.dumps(changed(value, at, delete))
        for new in VALUES:
            yield f"{at}={new!r}", json.dumps(changed(value, at, put(new)))
    for new in VALUES:
        yield f"all of it {new!r}", json.dumps(new)
    yield "cut", text[: len(text) // 2]
    yield "empty", ""
    yield "deep", '{"a":' * 100_000
    yield "long number", '{"format": ' + "9" * 5000 + "}"
    yield "binary", "\x00\x01"


def damages_of_bytes(content):
    yield "cut", content[: len(content) // 2]
    yield "one byte short", content[:-1]
    yield "empty", b""
    yield "a long header", b"\xff" * 8 + content[8:]
    yield "text", b"neither tensors nor a zip"
    yield "other header", content[:8] + content[8:].replace(b"F32", b"F8X", 1).replace(b"shape", b"shapf", 1)


def damages_of_tensors(state):
    """Of a dict of tensors, and dicts and numbers beside them."""
    for at in fields(state):
        yield f"without {at}", changed(state, at, delete)
        for new in (None, "x", -1, [], {}, *OTHER_TENSORS):
            yield f"{at}={new!r}", changed(state, at, put(new))


def some(damages, count, seed):
    """So many, drawn."""
    found = list(damages)
    return random.Random(seed).sample(found, min(count, len(found)))


def hold(file, write, name, commands, fresh, capsys):
    for text in commands:
        root = fresh()
        write(root / file)
        try:
            assert_one_sentence(full(text, root), root, capsys)
        except AssertionError as error:
            raise AssertionError(f"{file} {name}: {error}") from None


AMOUNTS = pytest.mark.parametrize(
    "count", [pytest.param(3, marks=pytest.mark.everyday), pytest.param(12, marks=pytest.mark.slow)]
)


@AMOUNTS
@pytest.mark.parametrize("file", READS)
def test_json(file, count, pristine, places, capsys):  # noqa: F811
    for name, text in some(damages_of_json((pristine / file).read_text()), count, file):
        hold(file, lambda path, text=text: path.write_text(text), name, READS[file], places, capsys)


@AMOUNTS
@pytest.mark.parametrize("file", TENSORS)
def test_tensors(file, count, pristine, places, capsys):  # noqa: F811
    content = (pristine / file).read_bytes()
    for name, damaged in some(damages_of_bytes(content), min(count, 3), file):
        hold(file, lambda path, damaged=damaged: path.write_bytes(damaged), name, TENSORS[file], places, capsys)
    is_torch = not file.endswith(".safetensors")
    state = torch.load(pristine / file, weights_only=True) if is_torch else load_file(pristine / file)
    for name, damaged in some(damages_of_tensors(state), count, file):
        if is_torch:
            write = functools.partial(write_torch, damaged)
        elif all(isinstance(value, torch.Tensor) for value in damaged.values()):
            write = functools.partial(save_file, damaged)
        else:
            continue
        hold(file, write, name, TENSORS[file], places, capsys)


def write_torch(state, path):
    """With the checksum of a checkpoint, where it is one: so that what it holds is read."""
    if path.name == "checkpoint.pt":
        write_checkpoint(path, state)
    else:
        torch.save(state, path)
