"""Trainings without a store by several processes: each reads its share, and together they train what one does."""

import json
import random
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from cases import mesh_of, whole
from launching import COMMON, OPTIONS, Mishap, files, launch
from makers import tokens
from safetensors.torch import load_file
from small_texts import Numbers, numbered_texts
from test_commands import assert_close, weights
from tiny_harvest import CONTEXT, VOCABULARY, D, Tiny
from word_models import save_word_llama
from workers import PATIENCE

from sampled_sae import SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.cli import main
from sampled_sae.lm import ModelSource, RowReader
from sampled_sae.support import output_folder
from sampled_sae.support.all_ranks import ALONE, ranks_of
from sampled_sae.training import block_space, fitting
from sampled_sae.training.activation_stream import ActivationStream
from sampled_sae.training.iterator_source import IteratorSource
from sampled_sae.training.streamed_batches import StreamedBatches

BATCH = "sampled_sae.training.streamed_batches:StreamedBatches.batch"
WORDS = [f"w{i}" for i in range(40)]


def tiny_stream(layers=(0, 1)):
    reader = RowReader(partial(numbered_texts, 60, vocabulary=VOCABULARY), Numbers(), CONTEXT)
    return ActivationStream(ModelSource(Tiny(), reader, layers, batch_size=2, drop_tokens=(0,), holdout_rows=3), 120)


def batches_of(lanes, shape=None):
    """(part of every batch, its rows, batches of the calibration, scale, place) of this process, or of one alone."""
    ranks = ALONE if shape is None else ranks_of(mesh_of(shape))
    found = StreamedBatches(tiny_stream().pair(), 25, 3, 12, lanes, ranks)
    with found.reading_ahead():
        batches = [found.batch(t) for t in range(12)]
    return batches, found.rows, found.calibration_batches(100), found.scales, found.state_dict()


@pytest.mark.parametrize(("shape", "lanes"), [((2, 1), 2), ((2, 1), 3), ((1, 2), 1), ((3, 1), 2)], ids=str)
def test_parts_make_the_batches_of_one_process(workers, shape, lanes):
    alone = batches_of(lanes)
    ranks = workers.run(shape[0] * shape[1], batches_of, lanes, shape)
    for t, batch in enumerate(alone[0]):
        assert torch.equal(torch.cat([batches[t] for batches, *_ in ranks]), batch)
    ends = [end for _, rows, *_ in ranks for end in rows]
    assert (ends[0], ends[-1], ends[1:-1:2]) == (0, 25, ends[2::2])
    for of_rank in ranks:
        assert of_rank[2:] == alone[2:]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A model of words, and texts of them."""
    folder, draw = tmp_path_factory.mktemp("words"), random.Random(0)
    torch.manual_seed(0)
    save_word_llama(folder / "model", WORDS)
    texts = [" ".join(draw.choices(WORDS, k=draw.randrange(3, 20))) for _ in range(90)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def command(words, out, *more, layer="1", texts="texts.jsonl"):
    argv = ["train", out, "--model", words / "model", "--texts", words / texts, "--layer", layer, "--context", "8"]
    how = ["--buffer-tokens", "128", "--model-batch-size", "2", "--holdout-rows", "9", "--splice-rows", "5"]
    return [str(part) for part in [*argv, *how, *OPTIONS, *more]]


@pytest.fixture(scope="module")
def two(words, tmp_path_factory):
    """The folder of an undisturbed run of two processes, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    said = launch(folder, 2, [part for part in command(words, folder / "run") if part != "--quiet"])
    return folder / "run", said


def assert_same_run(found, expected):
    assert_close(weights(found), weights(expected))
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").open()] for f in (found, expected)]
    for ours, theirs in zip(*lines, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    ours, theirs = (json.loads((f / "evaluation.json").read_text()) for f in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == (value if isinstance(value, (str, type(None))) else pytest.approx(value, rel=1e-3)), name


def test_the_command_trains_what_one_process_does(words, two, tmp_path):
    folder, (codes, (first, second)) = two
    assert codes == [0, 0], (first, second)
    assert "2 processes over gloo: the tokens of a batch in 2 parts" in first
    assert "loss recovered" in first
    assert second == ""
    assert main(command(words, tmp_path / "one", "--lanes", "2")) == 0
    assert_same_run(folder, tmp_path / "one")
    assert main(["verify", str(folder)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("mishap", [Mishap(1, BATCH, "killed", call=6), Mishap(0, BATCH, "SIGTERM", call=4)], ids=str)
def test_a_run_that_was_ended_goes_on_to_the_bit(words, two, tmp_path, mishap):
    argv = command(words, tmp_path / "run")
    codes, outputs = launch(tmp_path, 2, argv, mishap)
    assert 0 not in codes
    assert launch(tmp_path, 2, argv)[0] == [0, 0], outputs
    assert files(tmp_path / "run") == files(two[0])


@pytest.mark.slow
def test_one_process_goes_on_with_the_lanes_of_two(words, two, tmp_path):
    argv = command(words, tmp_path / "run")
    assert launch(tmp_path, 2, argv, Mishap(1, BATCH, "killed", call=6))[0][1] == -9
    assert main(argv) == 0
    assert_same_run(tmp_path / "run", two[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "layer", "more"),
    [
        (2, "1", ["--feature-shards", "2"]),
        (4, "1", ["--feature-shards", "2"]),
        (3, "1", []),
        (2, "1", ["--mlp", "--skip"]),
        (2, "0", ["--beside", "1", "--splice-rows", "0"]),
    ],
    ids=["features", "both", "three", "transcoder", "crosscoder"],
)
def test_every_layout_and_kind_trains_what_one_process_does(words, tmp_path, size, layer, more):
    codes, outputs = launch(tmp_path, size, command(words, tmp_path / "run", *more, layer=layer))
    assert codes == [0] * size, outputs
    alone = [part for part in more if part not in ("--feature-shards", "2")]
    assert main(command(words, tmp_path / "one", *alone, "--lanes", str(size), layer=layer)) == 0
    assert_same_run(tmp_path / "run", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("mishap", [None, Mishap(1, BATCH, "killed", call=12)], ids=str)
def test_a_sweep_trains_what_train_does(words, two, tmp_path, mishap):
    places = ["--model", words / "model", "--texts", words / "texts.jsonl", "--layer", "1", "--context", "8"]
    how = ["--buffer-tokens", "128", "--model-batch-size", "2", "--holdout-rows", "9", "--splice-rows", "5"]
    grid = ["--ls", "4,none", "--scores", "l2", "--no-topk", "--together", "1"]
    argv = [str(part) for part in ["sweep", tmp_path / "sweep", *places, *how, *grid, *COMMON]]
    if mishap is not None:
        assert 0 not in launch(tmp_path, 2, argv, mishap)[0]
    codes, outputs = launch(tmp_path, 2, argv)
    assert codes == [0, 0], outputs
    member, run = tmp_path / "sweep" / "l4_l2", two[0]
    assert (member / "sae.safetensors").read_bytes() == (run / "sae.safetensors").read_bytes()
    assert json.loads((member / "evaluation.json").read_text()) == json.loads((run / "evaluation.json").read_text())


@pytest.mark.slow
def test_layers_of_one_pass_train_what_each_does_alone(words, tmp_path):
    codes, outputs = launch(tmp_path, 2, command(words, tmp_path / "runs", layer="0,1"))
    assert codes == [0, 0], outputs
    for layer in "01":
        assert (tmp_path / "runs" / f"layer_{layer}" / "evaluation.json").exists()
        found = load_file(tmp_path / "runs" / f"layer_{layer}" / "sae.safetensors")
        assert launch(tmp_path, 2, command(words, tmp_path / layer, layer=layer))[0] == [0, 0]
        assert_close(found, weights(tmp_path / layer))


@pytest.mark.slow
def test_texts_that_end_early_on_one_rank_begin_anew_there(words, tmp_path):
    """Of three texts the second process has one; of one it has none, and says so."""
    lines = (words / "texts.jsonl").read_text().splitlines(keepends=True)
    long = [" ".join(json.loads(line)["text"] for line in lines[i : i + 20]) for i in (0, 20, 40)]
    (words / "three.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in long))
    (words / "one.jsonl").write_text(json.dumps({"text": long[0]}))
    argv = command(words, tmp_path / "run", "--holdout-rows", "0", "--splice-rows", "0", texts="three.jsonl")
    codes, outputs = launch(tmp_path, 2, argv)
    assert codes == [0, 0], outputs
    argv = command(words, tmp_path / "new", "--holdout-rows", "0", "--splice-rows", "0", texts="one.jsonl")
    codes, outputs = launch(tmp_path, 2, argv)
    assert codes == [1, 1]
    assert outputs[0] == ""
    assert outputs[1].startswith("sampled-sae train: rank 1: ")
    assert "no row of 8 tokens to train on in part 2 of 2" in outputs[1]


SAE = SampledSAEConfig(d_in=D, d_sae=48, k=3, l=2.0)
TRAIN = TrainConfig(steps=10, batch_size=32, checkpoint_every=100, log_every=2, lr=3e-3)


class Placed:
    """An iterator that says where it is, in words that JSON has not."""

    def __init__(self, x):
        self.x, self.at = x, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at >= len(self.x):
            raise StopIteration
        self.at += 7
        return self.x[self.at - 7 : self.at]

    def state_dict(self):
        return {"at": torch.tensor(self.at), "pair": (1, None)}

    def load_state_dict(self, state):
        assert state["pair"] == (1, None)
        self.at = int(state["at"])


def train_on_iterators(folder, seeds, stop, shape):
    """The weights of a training, each process of which has an iterator of its own seed, after so many steps."""
    mesh = mesh_of(shape)
    rank = ranks_of(mesh).rank
    x = 1 + 2 * tokens(900, D, dtype=torch.float32, seed=seeds[rank])
    try:
        trainer = Trainer(SAE, TRAIN, ActivationStream(IteratorSource(Placed(x)), 128), folder, mesh=mesh)
        for t in range(trainer.step, stop):
            trainer.train_on(trainer.feed.batch(t))
        trainer.save()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return {name: whole(tensor).clone() for name, tensor in trainer.sae.state_dict().items()}


def run_on_iterators(argv):
    """Prints what a training says, each process of which has an iterator of its own; argv: a folder, tokens for each.

    In processes that end: one that lives on keeps its part of the exchange that the other one is in.
    """
    folder, *lengths = argv
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    mesh = mesh_of((2, 1))
    rank = ranks_of(mesh).rank
    x = tokens(int(lengths[rank]), D, dtype=torch.float32, seed=rank)
    try:
        Trainer(SAE, TRAIN, ActivationStream(IteratorSource(Placed(x)), 128), folder, mesh=mesh).run(progress=False)
    except (ValueError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}")
    return 0


@pytest.mark.parametrize(("length", "steps"), [(20, 1), (100, 5)], ids=["at once", "later"])
def test_an_iterator_that_ends_early_ends_all_ranks(tmp_path, length, steps):
    codes, (first, second) = launch(tmp_path, 2, [tmp_path / "run", 900, length], target=run_on_iterators)
    assert codes == [0, 0], (first, second)
    said = f"steps=10: the iterator has ended, with tokens for {steps} steps of batch_size=32"
    assert second == f"ValueError: {said}\n"
    assert first == f"RankError: rank 1: {said}\n"


def test_each_process_is_given_an_iterator_of_its_own(workers, tmp_path):
    undisturbed = workers.run(2, train_on_iterators, tmp_path / "whole", (1, 2), 10, (2, 1))
    workers.run(2, train_on_iterators, tmp_path / "run", (1, 2), 4, (2, 1))
    resumed = workers.run(2, train_on_iterators, tmp_path / "run", (1, 2), 10, (2, 1))
    for found in (*undisturbed, *resumed):
        assert all(torch.equal(found[name], tensor) for name, tensor in undisturbed[0].items())
    said = workers.run(2, train_on_iterators, tmp_path / "same", (1, 1), 4, (2, 1))
    assert all("gives ranks 0 and 1 the same activations; each process needs a share" in line for line in said), said
    with pytest.raises(ValueError, match=r"lanes=2: .* is read by the process that it was given to, here are 1"):
        Trainer(SAE, TRAIN, ActivationStream(IteratorSource(tokens(90, D).split(5)), 128), tmp_path / "run")


def room_asked_for(folder, machines, disks=None):
    """Bytes that must be free where a training begins, for the blocks of its stream and for its weights; disks: where
    each process puts its blocks, None for memory."""
    mesh, asked = mesh_of((2, 1)), []
    rank = ranks_of(mesh).rank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_folder, "machine", lambda: machines[rank])
        for module in (block_space, fitting):
            patch.setattr(module, "check_memory", lambda what, needed, *_: asked.append(needed))
        patch.setattr(block_space, "check_output_folder", lambda _, needed: asked.append(needed))
        source = IteratorSource(Placed(tokens(900, D, dtype=torch.float32, seed=rank)))
        Trainer(SAE, TRAIN, ActivationStream(source, 128, disks and disks[rank]), folder, mesh=mesh)
    return asked, [] if disks is None else list(disks[rank].iterdir())


def test_memory_is_asked_for_what_the_processes_of_a_machine_hold(workers, tmp_path):
    blocks, weights = 3 * 4 * 128 * D, 2 * D * 48 * 12
    assert workers.run(2, room_asked_for, tmp_path / "a", "xx") == [([blocks, 2 * weights], [])] * 2
    assert workers.run(2, room_asked_for, tmp_path / "b", "xy") == [([blocks / 2, weights], [])] * 2


@pytest.mark.parametrize(
    ("machines", "disks", "share"), [("xx", "aa", 1), ("xy", "aa", 1), ("xx", "ab", 1), ("xy", "ab", 1 / 2)]
)
def test_a_disk_is_asked_for_what_the_processes_that_share_it_hold(workers, tmp_path, machines, disks, share):
    """Of one machine the same disk, whatever the folder; of several the same folder."""
    folders = [tmp_path / name for name in disks]
    for folder in set(folders):
        folder.mkdir()
    blocks, weights = 2 * 4 * 128 * D, 2 * D * 48 * 12 * (3 - len(set(machines)))
    found = workers.run(2, room_asked_for, tmp_path / "run", machines, folders)
    assert found == [([share * blocks, weights], [])] * 2, "and the files that told who shares it are gone"
