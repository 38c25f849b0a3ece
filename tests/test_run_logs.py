"""wandb, TensorBoard and trackio: what they are told of a run, by stand-ins and by TensorBoard itself."""

import importlib.machinery
import json
import math
import sys
import types

import pytest
from makers import D, write_store

from sampled_sae import ActivationStore, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.cli import main
from sampled_sae.run_logs import KINDS, LogPlace, SteadyLog
from sampled_sae.support.atomic_files import read_json, read_json_lines
from sampled_sae.support.interruption import Interrupted

TRAINING = ["--features", "64", "--k", "3", "--steps", "12", "--batch-size", "64", "--log-every", "3"]


class Run:
    """Of either stand-in."""

    def __init__(self, options):
        self.options, self.lines, self.summary, self.closed = options, [], {}, None

    def log(self, values, step):
        self.lines.append((step, values))

    def finish(self, exit_code=0):
        self.closed = exit_code


class Stand(types.ModuleType):
    """The module of a place that shows runs, as far as it is called."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.runs, self.refusal = [], None

    def init(self, **options):
        if self.refusal:
            raise self.refusal
        self.runs.append(Run(options))
        return self.runs[-1]


@pytest.fixture
def places(monkeypatch):
    made = {name: Stand(name) for name in ("wandb", "trackio")}
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def a_trainer(store, folder, kind="wandb", steps=12, **options):
    config = SampledSAEConfig(d_in=D, d_sae=64, k=3)
    train = TrainConfig(steps=steps, batch_size=64, log_every=3, checkpoint_every=3)
    return Trainer(config, train, store, folder, log=LogPlace(kind, **options))


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_place_is_told_the_lines_of_metrics(kind, places, store, tmp_path):
    trainer = a_trainer(store, tmp_path / "run", kind, project="features", name="wide", tags=("a", "b"))
    trainer.run(progress=False)
    trainer.log.result({"fvu": 0.5, "loss_recovered_zero": math.nan, "threshold": None, "histogram": [1]})
    trainer.log.close(failed=False)
    (run,) = places[kind].runs
    lines = [line for _, line in read_json_lines(tmp_path / "run" / "metrics.jsonl")]
    assert len(lines) == 4
    final = [(12, {"evaluation/fvu": 0.5})] if kind == "trackio" else []
    told = [(line["step"], {f"train/{k}": v for k, v in line.items() if v is not None}) for line in lines]
    assert run.lines == told + final
    assert run.summary == ({"evaluation/fvu": 0.5} if kind == "wandb" else {})
    assert run.closed == 0
    known = read_json(tmp_path / "run" / "log.json")[kind]
    assert known["project"] == run.options["project"] == "features"
    assert run.options["name"] == ("wide" if kind == "wandb" else f"wide-{known['id']}")
    assert run.options["config"]["sae"] == trainer.sae.cfg.to_dict() | {"row_grads": True}
    assert run.options["config"]["train"]["steps"] == 12
    assert run.options["config"]["activations"]["model"] == "made"
    assert (run.options["tags"] if kind == "wandb" else run.options["config"]["tags"]) == ["a", "b"]
    json.dumps(run.options["config"])


def test_tensorboard_files(store, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = a_trainer(store, tmp_path / "run", "tensorboard", tags=("x",))
    trainer.run(progress=False)
    trainer.log.result({"l0": 3.0})
    trainer.log.close(failed=False)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    lines = [line for _, line in read_json_lines(tmp_path / "run" / "metrics.jsonl")]
    for name in ("loss", "fvu", "l0", "dead_share"):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines], name
    assert [(e.step, e.value) for e in events.Scalars("evaluation/l0")] == [(12, 3.0)]
    assert "settings/text_summary" in events.Tags()["tensors"]


def stopped_at(trainer, step):
    """Runs it until a signal comes after that step."""
    write = trainer.write_metrics

    def stop(line):
        write(line)
        if line["step"] == step:
            raise Interrupted(2, "stopped")

    trainer.write_metrics = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.run(progress=False)


def test_a_run_that_goes_on_is_the_same_run(places, store, tmp_path):
    stopped_at(a_trainer(store, tmp_path / "run"), 6)
    again = a_trainer(store, tmp_path / "run")
    assert again.step == 3
    again.run(progress=False)
    first, second = places["wandb"].runs
    assert first.options["id"] == second.options["id"]
    assert [step for step, _ in second.lines] == [6, 9, 12]
    assert second.lines[0] == first.lines[-1], "bit for bit, so that wandb may drop what it has"
    other = a_trainer(store, tmp_path / "other")
    other.run(progress=False)
    assert places["wandb"].runs[-1].options["id"] != first.options["id"]


def test_another_project_or_a_new_training_is_another_run(places, store, tmp_path):
    stopped_at(a_trainer(store, tmp_path / "run"), 6)
    a_trainer(store, tmp_path / "run", project="b").run(progress=False)
    for file in (tmp_path / "run").iterdir():
        if file.name != "log.json":
            file.unlink()
    a_trainer(store, tmp_path / "run", project="b").run(progress=False)
    assert len({run.options["id"] for run in places["wandb"].runs}) == 3


def test_tensorboard_drops_what_lies_beyond_the_checkpoint(store, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = a_trainer(store, tmp_path / "run", "tensorboard")
    stopped_at(first, 6)
    first.log.close(failed=True)
    again = a_trainer(store, tmp_path / "run", "tensorboard")
    again.run(progress=False)
    again.log.close(failed=False)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [3, 6, 9, 12]


def test_a_place_that_fails_does_not_end_the_training(places, store, tmp_path, capsys):
    trainer = a_trainer(store, tmp_path / "run")

    def fails(self, values, step):
        raise ConnectionError("no\nnetwork")

    places["wandb"].init = lambda **options: type("Broken", (Run,), {"log": fails})(options)
    trainer.run(progress=False)
    trainer.log.result({"fvu": 1.0})
    trainer.log.close(failed=False)
    said = capsys.readouterr().err
    assert said == "wandb gets no more of this run (ConnectionError: no network); metrics.jsonl has all of it\n"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_place_that_refuses_the_run_is_known_before_the_first_step(places, store, tmp_path, capsys):
    places["wandb"].refusal = RuntimeError("no API key")
    command = ["train", str(store.folder), str(tmp_path / "run"), *TRAINING, "--log", "wandb", "--quiet"]
    assert main(command) == 1
    wanted = "sampled-sae train: --log 'wandb': the run cannot begin there (RuntimeError: no API key)\n"
    assert capsys.readouterr().err == wanted
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_names_its_extra(kind, monkeypatch, tmp_path, capsys, store):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = ["train", str(store.folder), str(tmp_path / "run"), *TRAINING, "--log", kind]
    assert main(command) == 1
    assert f'--log {kind!r}: needs {kind}: pip install "sampled-sae[{kind}]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_bad_places(places):
    for options, said in (
        ({"kind": "mlflow"}, r"log='mlflow': must be one of 'wandb', 'tensorboard', 'trackio'"),
        ({"kind": "wandb", "project": " "}, r"project=' ': must be a name that is not empty"),
        ({"kind": "wandb", "name": ""}, r"name='': must be a name that is not empty"),
        ({"kind": "wandb", "tags": ("a", "")}, r"tags='': must be a name that is not empty"),
    ):
        with pytest.raises(ValueError, match=said):
            LogPlace(**options)


def test_train_and_sweep_by_command(places, store, tmp_path, capsys):
    options = [*TRAINING, "--log", "wandb", "--log-project", "p", "--log-tags", "a,b", "--quiet"]
    assert main(["train", str(store.folder), str(tmp_path / "run"), *options]) == 0
    (run,) = places["wandb"].runs
    result = read_json(tmp_path / "run" / "evaluation.json")
    assert run.options["name"] == "run"
    assert run.summary["evaluation/fvu"] == result["fvu"]
    assert run.closed == 0

    sweep = ["sweep", str(store.folder), str(tmp_path / "sweep"), *options, "--ls", "2,none", "--scores", "l2"]
    assert main([*sweep, "--log-name", "s", "--splice-rows", "0"]) == 0
    members = {run.options["name"]: run for run in places["wandb"].runs[1:]}
    assert sorted(members) == ["s/batchtopk", "s/l2_l2", "s/topk"]
    for name, run in members.items():
        assert run.options["project"] == "p"
        assert [step for step, _ in run.lines] == [3, 6, 9, 12]
        wanted = read_json(tmp_path / "sweep" / name.removeprefix("s/") / "evaluation.json")
        assert run.summary["evaluation/l0"] == wanted["l0"]
        assert run.closed == 0


def test_a_training_that_fails_closes_its_run_as_failed(places, store, tmp_path, monkeypatch, capsys):
    def explode(self, batch):
        raise FloatingPointError("loss=nan at step 1")

    monkeypatch.setattr(Trainer, "train_on", explode)
    command = ["train", str(store.folder), str(tmp_path / "run"), *TRAINING, "--log", "wandb", "--quiet"]
    assert main(command) == 1
    assert places["wandb"].runs[0].closed == 1


def test_nothing_is_told_after_the_end():
    told = []

    class Log:
        def metrics(self, step, values):
            told.append(values)

        def result(self, values):
            told.append(values)

        def close(self, failed):
            told.append(failed)

    log = SteadyLog(Log(), "mine")
    log.metrics(1, {"a": 1.0, "b": math.inf, "c": True, "d": "x"})
    log.close(failed=True)
    log.metrics(2, {"a": 2.0})
    log.close(failed=False)
    assert told == [{"a": 1.0}, True]


def test_train_ends_with_a_line_of_what_was_measured(store, tmp_path, capsys):
    command = ["train", str(store.folder), str(tmp_path / "run"), *TRAINING]
    assert main(command) == 0
    result = read_json(tmp_path / "run" / "evaluation.json")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"done: threshold {result['threshold']:.4g}, FVU {result['fvu']:.4f}, L0 {result['l0']:.2f}, "
        f"loss recovered not measured, SAE in {tmp_path / 'run'}"
    )
    bare = ActivationStore.open(write_store(tmp_path / "bare", holdout=None))
    assert main(["train", str(bare.folder), str(tmp_path / "other"), *TRAINING]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f", FVU and L0 and loss recovered not measured, SAE in {tmp_path / 'other'}")
    assert not (tmp_path / "other" / "evaluation.json").exists()


def test_options_of_a_log_without_one_are_refused(store, tmp_path, capsys):
    with pytest.raises(TypeError, match=r"log='wandb': must be a sampled_sae.run_logs.LogPlace"):
        Trainer(SampledSAEConfig(d_in=D, d_sae=64, k=3), TrainConfig(batch_size=64), store, tmp_path, log="wandb")
    for option in ("project", "name", "tags"):
        assert main(["train", str(store.folder), str(tmp_path / "run"), *TRAINING, f"--log-{option}", "a"]) == 1
        assert f"--log-{option} 'a': goes with --log" in capsys.readouterr().err
