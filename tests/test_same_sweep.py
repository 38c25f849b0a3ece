"""A sweep goes on with its own activations and language model alone, and keeps its own record."""

from dataclasses import replace

import pytest
from makers import D, harvested

from sampled_sae import SampledSAEConfig, TrainConfig
from sampled_sae.cli import main
from sampled_sae.support.atomic_files import read_json, write_json
from sampled_sae.training.sweep import EVALUATION, RESULT, SpliceSource, run_sweep

SAE = SampledSAEConfig(d_in=D, d_sae=96, k=3, l=2.0)
TRAIN = TrainConfig(steps=6, batch_size=64, checkpoint_every=6, log_every=2)
OPTIONS = ["--features", "96", "--k", "3", "--steps", "6", "--batch-size", "64", "--quiet"]


WEIGHTS = {"weights_sha256": "ab" * 32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "another"}, r"\(activations: model\): model was 'made', is 'another'"),
        ({"layer": 3}, r"\(activations: layer\): layer was 0, is 3"),
        ({"source": "other"}, r"\(activations: source\): source was 'made', is 'other'"),
        ({"settings": WEIGHTS}, r"\(activations: weights_sha256\)"),
    ],
)
def test_a_sweep_does_not_go_on_with_other_activations(tmp_path, changes, message):
    run_sweep({"a": SAE}, TRAIN, harvested(tmp_path / "a"), tmp_path / "sweep", progress=False)
    before = (tmp_path / "sweep" / "results.csv").read_bytes()
    other = harvested(tmp_path / "b", **changes)
    with pytest.raises(ValueError, match=rf"a.result\.json: made with other settings {message}"):
        run_sweep({"a": SAE, "b": replace(SAE, seed=1)}, TRAIN, other, tmp_path / "sweep", progress=False)
    assert (tmp_path / "sweep" / "results.csv").read_bytes() == before
    assert not (tmp_path / "sweep" / "b").exists()


def source(loaded, **about):
    """A language model in which every reconstruction costs the same."""

    def load():
        loaded.append(about)
        return lambda reconstruct: {"predicted_tokens": 7, "ce_clean": 1.0, "loss_recovered_zero": float("nan")}

    return SpliceSource(about, load, lambda measure: measure)


@pytest.mark.parametrize("other", [{"model": "b", "rows": 4}, {"model": "a", "rows": 5}, None])
def test_a_sweep_does_not_go_on_with_another_model_or_other_rows(tmp_path, other):
    store, loaded = harvested(tmp_path / "a"), []
    given = {"model": "a", "rows": 4}
    first = run_sweep({"a": SAE}, TRAIN, store, tmp_path / "sweep", source(loaded, **given), progress=False)
    assert loaded == [given]
    again = run_sweep({"a": SAE}, TRAIN, store, tmp_path / "sweep", source(loaded, **given), progress=False)
    assert again == first, "NaN among the results too"
    loaded.clear()
    with pytest.raises(ValueError, match=r"result\.json: made with other settings \(splice"):
        run_sweep({"a": SAE}, TRAIN, store, tmp_path / "sweep", other and source(loaded, **other), progress=False)
    assert loaded == [], "known before the model is loaded"


def test_a_sweep_in_python_knows_the_model_of_its_evaluator(tmp_path):
    class Evaluator:
        """As SpliceEvaluator."""

        def __init__(self, model):
            self.about = {"model": model, "rows": 3}

        def evaluate(self, reconstruct):
            return {"ce_clean": 1.0}

    store = harvested(tmp_path / "a")
    run_sweep({"a": SAE}, TRAIN, store, tmp_path / "s", Evaluator("one").evaluate, progress=False)
    run_sweep({"a": SAE}, TRAIN, store, tmp_path / "s", Evaluator("one").evaluate, progress=False)
    with pytest.raises(ValueError, match=r"\(splice: model\): model was 'one', is 'two'"):
        run_sweep({"a": SAE}, TRAIN, store, tmp_path / "s", Evaluator("two").evaluate, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"together": 0}, "together=0"),
        ({"device": "cuda:99"}, "device='cuda:99'"),
        ({"train": replace(TRAIN, batch_size=501)}, "batch_size=501: must be at most 500"),
        ({"configs": {"a:b": SAE}}, "the name must be that of a folder"),
        ({"configs": {"a": SAE, "b": replace(SAE, d_in=8)}}, "d_in=8: the activations in"),
    ],
)
def test_what_a_sweep_can_know_it_knows_before_the_model_is_loaded(tmp_path, changes, message):
    loaded = []
    given = {"configs": {"a": SAE}, "train": TRAIN, **changes}
    store = harvested(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        run_sweep(store=store, folder=tmp_path / "sweep", splice=source(loaded), progress=False, **given)
    assert loaded == []
    assert not (tmp_path / "sweep").exists()


def test_evaluate_on_a_member_breaks_neither_the_sweep_nor_its_table(tmp_path, capsys):
    store, out = harvested(tmp_path / "a"), tmp_path / "sweep"
    command = ["sweep", str(store.folder), str(out), *OPTIONS, "--ls", "1,2", "--scores", "l2", "--splice-rows", "0"]
    assert main(command) == 0
    table = (out / "results.csv").read_bytes()
    for name in ("l1_l2", "topk"):
        assert main(["evaluate", str(out / name), str(store.folder), "--splice-rows", "0", "--batch-size", "7"]) == 0
        assert "settings" not in read_json(out / name / EVALUATION)
    assert read_json(out / "topk" / EVALUATION) != read_json(out / "topk" / RESULT)
    capsys.readouterr()
    assert main([*command[:3], *[o for o in command[3:] if o != "--quiet"]]) == 0
    assert capsys.readouterr().out.count("already evaluated") == 3
    assert (out / "results.csv").read_bytes() == table


def test_a_sweep_of_an_earlier_version_is_refused_and_kept(tmp_path):
    store = harvested(tmp_path / "a")
    run_sweep({"a": SAE}, TRAIN, store, tmp_path / "sweep", progress=False)
    old = read_json(tmp_path / "sweep" / "a" / RESULT)
    old["settings"] = {"sae": old["settings"]["sae"], "train": old["settings"]["train"], "spliced": False}
    write_json(tmp_path / "sweep" / "a" / EVALUATION, old)
    (tmp_path / "sweep" / "a" / RESULT).unlink()
    with pytest.raises(ValueError, match=r"a.evaluation\.json: made with other settings \(activations\)"):
        run_sweep({"a": SAE}, TRAIN, store, tmp_path / "sweep", progress=False)
    assert read_json(tmp_path / "sweep" / "a" / EVALUATION) == old


def test_no_plots_is_said_before_the_training(tmp_path, capsys, monkeypatch):
    store = harvested(tmp_path / "a")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = ["sweep", str(store.folder), str(tmp_path / "s"), *[o for o in OPTIONS if o != "--quiet"]]
    assert main([*command, "--ls", "2", "--scores", "l2", "--no-topk", "--splice-rows", "0"]) == 0
    out = capsys.readouterr().out
    assert out.index("No plots without matplotlib") < out.index("training in")
    assert not list((tmp_path / "s").glob("*.png"))
