"""Trainings on a language model at work, whose activations are stored nowhere."""

import json

import pytest
import torch
from makers import same_weights
from small_texts import Numbers, numbered_texts
from tiny_models import VOCABULARY, D, llama

from sampled_sae import ActivationStore, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.lm import (
    HookPoint,
    ModelSource,
    RowReader,
    SpliceEvaluator,
    capture,
    harvest,
    harvest_mlp,
    load_model,
    token_rows,
)
from sampled_sae.lm import rows as rows_module
from sampled_sae.residual_stream.hook_points import mlp_points
from sampled_sae.residual_stream.hooks import capture_layers
from sampled_sae.training.activation_stream import ActivationStream
from sampled_sae.training.iterator_source import IteratorSource
from sampled_sae.training.sae_group import SAEGroup
from sampled_sae.training.streamed_batches import StreamedBatches
from sampled_sae.training.training_run import METRICS

SAE = SampledSAEConfig(d_in=D, d_sae=48, k=3, l=2.0)
TRAIN = TrainConfig(steps=12, batch_size=32, checkpoint_every=5, log_every=1, lr=3e-3)
CONTEXT = 8


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return llama().eval()


def reader(texts=numbered_texts):
    return RowReader(texts, Numbers(), CONTEXT)


def parts(model, layers=(1,), texts=numbered_texts, buffer_tokens=128, **options):
    options = {"batch_size": 3, "drop_tokens": (0,), **options}
    return ActivationStream(ModelSource(model, reader(texts), layers, **options), buffer_tokens).parts


def test_a_reader_gives_the_rows_of_token_rows_and_goes_on_from_any_place(monkeypatch):
    monkeypatch.setattr(rows_module, "_BATCH", 4)
    rows = token_rows(numbered_texts(), Numbers(), CONTEXT)
    whole, taken = reader(), []
    while len(found := whole.take(7)):
        taken.append(found)
        again = reader()
        again.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        done = sum(map(len, taken))
        assert torch.equal(again.take(None), rows[done:])
    assert torch.equal(torch.cat(taken), rows)


def test_a_place_is_found_without_tokenizing_again():
    first = reader()
    first.take(100)
    again, seen = reader(), []
    tokenize = again._tokenizer
    again._tokenizer = lambda texts, **options: seen.extend(texts) or tokenize(texts, **options)
    again._tokenizer.get_vocab = tokenize.get_vocab
    again.load_state_dict(first.state_dict())
    again.take(1)
    assert len(seen) <= 150 - first.state_dict()["pieces"]


def test_several_layers_come_of_one_pass(model):
    rows = token_rows(numbered_texts(), Numbers(), CONTEXT, 4)
    passes = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad(), capture_layers(model, [2, 0]) as found:
        model(input_ids=rows, use_cache=False)
    assert len(passes) == 1
    handle.remove()
    for layer in (0, 2):
        with torch.no_grad(), capture(model, layer) as captured:
            model(input_ids=rows, use_cache=False)
        assert torch.equal(found[layer], captured.value)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_stream_gives_the_tokens_that_a_harvest_stores(model, tmp_path):
    rows = token_rows(numbered_texts(), Numbers(), CONTEXT)
    harvest(model, rows, 1, tmp_path, batch_size=3, drop_tokens=(0,), progress=False)
    store = ActivationStore.open(tmp_path)
    stored = torch.cat([store.shard(i) for i in range(len(store.tokens))])
    source, made = ModelSource(model, reader(), (1,), batch_size=3, drop_tokens=(0,)), []
    while sum(map(len, made)) < len(stored):
        made.append(source.read()[0])
    assert torch.equal(torch.cat(made), stored)
    source.read()
    assert source.state_dict()["epoch"] == 1, "and from the first row again"


def test_what_is_held_out_is_evaluated_as_that_of_a_harvest(model, tmp_path):
    rows = token_rows(numbered_texts(), Numbers(), CONTEXT, 20)
    source = ModelSource(model, reader(), (1, HookPoint("model.layers.2.mlp", "out")), batch_size=3, holdout_rows=5)
    stream = ActivationStream(source, 128)
    first = stream.parts[0].stream.blocks.get(0, 32).parts[0]
    place = source.state_dict()
    x, held = stream.parts[0].holdout()
    assert torch.equal(held, rows[:5])
    assert source.state_dict() == place
    settings = {"batch_size": 3, "holdout_rows": 5, "progress": False}
    harvest(model, torch.cat([rows[5:], rows[:5]]), 1, tmp_path, **settings)
    store = ActivationStore.open(tmp_path)
    torch.testing.assert_close(x, store.holdout()[0])
    assert torch.equal(first[: len(first) // 2], store.shard(0)[: len(first) // 2])
    both = stream.pair().holdout()[0]
    assert torch.equal(both[:, :D], x)
    found = source.splice([0], held).evaluate(lambda x: 0.5 * x)
    assert found == SpliceEvaluator.of_harvest(model, held, store.manifest).evaluate(lambda x: 0.5 * x)
    assert source.splice([0, 1], held).evaluate(lambda x: 0 * x)["loss_recovered_zero"] == 0
    # looked at before the training it is the same, as is the training
    fresh = ModelSource(model, reader(), (1, HookPoint("model.layers.2.mlp", "out")), batch_size=3, holdout_rows=5)
    before = fresh.holdout()[0]
    assert torch.equal(before[0], x)
    read = fresh.read()[0]
    assert torch.equal(read, first[: len(read)])
    assert fresh.state_dict()["max_norms"] == place["max_norms"]
    with pytest.raises(ValueError, match="holdout_rows=0: nothing is held out"):
        parts(model)[0].holdout()
    with pytest.raises(ValueError, match="an iterator, which holds out nothing"):
        ActivationStream(IteratorSource([first]), 8).parts[0].holdout()


def test_held_out_rows_are_the_first_and_never_trained_on(model, tmp_path):
    rows = token_rows(numbered_texts(), Numbers(), CONTEXT, 20)
    source = ModelSource(model, reader(), (1,), batch_size=3, drop_tokens=(), holdout_rows=20)
    everything = ModelSource(model, reader(), (1,), batch_size=1, drop_tokens=())
    for _ in rows:
        everything.read()
    for _ in range(30):
        first = torch.cat([everything.read()[0] for _ in range(3)])
        torch.testing.assert_close(source.read()[0], first)
    with pytest.raises(ValueError, match="no row of 8 tokens to train on behind the 1000 that are held out"):
        ModelSource(model, reader(), (1,), holdout_rows=1000).read()


@pytest.mark.parametrize("step", [3, 10])
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(model, tmp_path, step):
    whole = Trainer(SAE, TRAIN, parts(model)[0], tmp_path / "whole").run(progress=False)
    begun = Trainer(SAE, TRAIN, parts(model)[0], tmp_path / "run")
    for t in range(step):
        begun.train_on(begun.feed.batch(t))
        if begun.step % 5 == 0:
            begun.save()
    seen = []
    resumed = Trainer(
        SAE, TRAIN, parts(model, texts=lambda: (seen.append(1) or t for t in numbered_texts()))[0], tmp_path / "run"
    )
    assert resumed.step == step // 5 * 5
    found = resumed.run(progress=False)
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), whole.state_dict().values()))
    assert (tmp_path / "run" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()
    assert (tmp_path / "run" / "checkpoint.pt").stat().st_size < 100_000, "no activations in it"
    about = json.loads((tmp_path / "run" / "run.json").read_text())["activations"]
    assert (about["layer"], about["context"], about["scale"]) == (1, CONTEXT, resumed.feed.scale)


def test_layers_of_one_pass_equal_layers_of_their_own(model, tmp_path):
    """Where no vector is left out for its norm, by which layers differ."""
    passes = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    both = parts(model, (0, 2), max_norm_ratio=1e6)
    group = SAEGroup({"a": SAE, "b": SAE}, TRAIN, dict(zip("ab", both)), tmp_path / "group").run(progress=False)
    together = len(passes)
    for name, layer in (("a", 0), ("b", 2)):
        passes.clear()
        alone = Trainer(SAE, TRAIN, parts(model, (layer,), max_norm_ratio=1e6)[0], tmp_path / name).run(progress=False)
        assert together == len(passes)
        assert all(torch.equal(x, y) for x, y in zip(group[name].state_dict().values(), alone.state_dict().values()))
    handle.remove()
    with pytest.raises(ValueError, match="a stream of 2 parts"):
        Trainer(SAE, TRAIN, both[0].stream, tmp_path / "c")


def test_texts_are_read_no_further_than_the_training_needs(model):
    read = []

    def endless():
        while True:
            for text in numbered_texts(50):
                read.append(len(text.split()) + 1)
                yield text

    stream = StreamedBatches(parts(model, texts=endless, drop_tokens=())[0], 32, 0, steps=20)
    with stream.reading_ahead():
        for t in range(20):
            stream.batch(t)
        stream.calibration_batches(1)
    # 7 of 8 tokens of a row; beside them what the tokenizer takes at once, of which nothing is run, and half a pass
    batch = rows_module._BATCH * 21
    assert 20 * 32 <= sum(read) <= 20 * 32 * 8 / 7 * 1.5 + batch


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": (9,)}, "layer=9 must be an integer from 0 to 3"),
        ({"layers": ()}, r"layers=\[\]: must be one or more"),
        ({"layers": (1, 1)}, r"layers=\[1, 1\]: must be one or more blocks, none twice"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"drop_tokens": (VOCABULARY,)}, "drop_tokens=61: must be a token id from 0 to 60"),
        ({"max_norm_ratio": 0.5}, "max_norm_ratio=0.5"),
        ({"holdout_rows": -1}, "holdout_rows=-1"),
    ],
)
def test_bad_arguments_are_named(model, options, said):
    with pytest.raises(ValueError, match=said):
        parts(model, **options)


def test_a_model_is_loaded_onto_a_device_or_over_several(causal):
    placed, _ = load_model(str(causal), dtype="bfloat16", device="cpu")
    spread, _ = load_model(str(causal), device="auto")
    rows = torch.randint(5, 45, (2, 8))
    for model, dtype in ((placed, torch.bfloat16), (spread, torch.float32)):
        assert next(model.parameters()).dtype == dtype
        source = ModelSource(model, RowReader(lambda: ["w1 w2"] * 9, load_model(str(causal))[1], 8), (0, 2))
        assert [x.dtype for x in source._run(rows)] == [torch.float32] * 2
    with pytest.raises(ValueError, match="device='nowhere'"):
        load_model(str(causal), device="nowhere")


def test_a_transcoder_on_a_stream_is_that_of_a_harvest(model, tmp_path):
    """The same tokens in one block and one shard; order and scales differ, so that tokens and figures are compared."""
    points = mlp_points(model, 1)
    stream = ActivationStream(ModelSource(model, reader(), points, batch_size=3, drop_tokens=(0,)), 128)
    part = stream.pair()
    assert (part.d_in, part.d_out) == (D, D)
    batches = StreamedBatches(part, 32, seed=0, steps=3)
    pair = harvest_mlp(
        model, token_rows(numbered_texts(), Numbers(), CONTEXT), 1, tmp_path / "acts", batch_size=3, drop_tokens=(0,)
    )
    rows = torch.cat([batches.batch(t) for t in range(3)])
    stored = torch.cat([pair.shard(0)[:, :D] * batches.scale, pair.shard(0)[:, D:] * batches.output_scale], dim=1)
    nearest = (rows[:, None] - stored).abs().amax(2).amin(1)
    assert nearest.max() < 1e-5
    assert batches.scale != batches.output_scale
    config = SampledSAEConfig(d_in=D, d_sae=48, k=3, l=2.0, skip=True)

    def trainer(folder):
        source = ModelSource(model, reader(), points, batch_size=3, drop_tokens=(0,))
        return Trainer(config, TRAIN, ActivationStream(source, 128).pair(), tmp_path / folder)

    whole = trainer("whole").run(progress=False)
    killed = trainer("killed")
    for t in range(7):
        killed.train_on(killed.feed.batch(t))
    killed.save()
    resumed = trainer("killed")
    assert resumed.step == 7
    assert same_weights(resumed.run(progress=False), whole)
    assert (whole.cfg.input_scale, whole.cfg.output_scale) == (resumed.feed.scale, resumed.feed.output_scale)
    assert whole.cfg.output_scale == pytest.approx(batches.output_scale, rel=0.1) != 1
    about = json.loads((tmp_path / "whole" / "run.json").read_text())["activations"]
    assert (about["point"], about["target"]["point"]) == tuple(map(str, points))
    with pytest.raises(ValueError, match="x=0, target=2: must be two of the 2 parts"):
        stream.pair(0, 2)
    with pytest.raises(ValueError, match=r"d_out=16: .* has no targets"):
        Trainer(config, TRAIN, stream.parts[0], tmp_path / "other")


def test_a_crosscoder_on_a_stream(model, tmp_path):
    """Layers of the same tokens side by side, each with a scale of its own; to the bit after a kill."""
    config = SampledSAEConfig(d_in=D, d_sae=48, k=3, l=2.0, layers=2)

    def stream():
        return ActivationStream(ModelSource(model, reader(), (0, 2), batch_size=3, drop_tokens=(0,)), 128)

    part, alone = stream().beside(), stream().parts
    assert (part.layers, part.width_in, part.indices) == (2, 2 * D, [0, 1])
    assert part.manifest["layer"] == "0, 2"
    both = StreamedBatches(part, 32, seed=0, steps=TRAIN.steps)
    each = [StreamedBatches(one, 32, seed=0, steps=TRAIN.steps) for one in alone]
    torch.testing.assert_close(both.batch(1), torch.cat([one.batch(1) for one in each], dim=1))
    assert both.scale == tuple(one.scale for one in each)

    def trainer(folder):
        return Trainer(config, TRAIN, stream().beside(), tmp_path / folder)

    whole = trainer("whole").run(progress=False)
    killed = trainer("killed")
    for t in range(7):
        killed.train_on(killed.feed.batch(t))
    killed.save()
    assert same_weights(trainer("killed").run(progress=False), whole)
    assert whole.cfg.input_scale == both.scale
    with pytest.raises(ValueError, match=r"layers=1: .* has 2"):
        Trainer(SAE, TRAIN, stream().beside(), tmp_path / "other")
    one = ActivationStream(ModelSource(model, reader(), (0,), batch_size=3, drop_tokens=(0,)), 128)
    with pytest.raises(ValueError, match=r"parts: of widths \[16\]; must be at least 2"):
        one.beside()
