"""Ctrl-C and SIGTERM: the step is finished and saved, one line says so, and the run goes on to the same bits."""

import json
import os
import signal
import threading

import pytest
from forked import forked, logged
from makers import D, same_weights

from sampled_sae import SAEGroup, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.cli import main
from sampled_sae.support.interruption import Interrupted, Interruption, terminable
from sampled_sae.training.batches import ShuffledStream
from sampled_sae.training.checkpoint import CHECKPOINT, read_checkpoint
from sampled_sae.training.training_run import METRICS

SAE = SampledSAEConfig(d_in=D, d_sae=96, k=3, l=2.0)
TRAIN = TrainConfig(steps=24, batch_size=64, checkpoint_every=100, log_every=2)
OPTIONS = ["--features", "96", "--k", "3", "--steps", "24", "--batch-size", "64", "--checkpoint-every", "100"]
OPTIONS += ["--log-every", "2", "--quiet", "--threads", "1"]


@pytest.fixture(autouse=True)
def usual_signals():
    """As in a terminal: a suite that a shell runs in the background starts with SIGINT ignored."""
    before = {
        number: signal.signal(number, handler)
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL))
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(monkeypatch, number, step, times=1):
    """The process sends itself a signal while it makes the batch of a step."""
    whole = ShuffledStream.batch

    def batch(stream, t):
        if t == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return whole(stream, t)

    monkeypatch.setattr(ShuffledStream, "batch", batch)


@pytest.mark.one_in(5)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("step", [1, 8, 23])
def test_a_signal_in_training_saves_and_the_run_goes_on(store, tmp_path, monkeypatch, capsys, number, status, step):
    out = tmp_path / "run"
    command = ["train", str(store.folder), str(out), *OPTIONS]
    send(monkeypatch, number, step)
    assert main(command) == status
    monkeypatch.undo()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"stopped by {number.name}: step {step + 1} of 24 is saved in {out}; the same command" in line
    assert {path.name for path in out.iterdir()} == {CHECKPOINT, METRICS}
    assert read_checkpoint(out / CHECKPOINT)["step"] == step + 1
    assert main(command) == 0
    assert main(["train", str(store.folder), str(tmp_path / "whole"), *OPTIONS]) == 0
    for file in (METRICS, "sae.safetensors"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(store, tmp_path, monkeypatch, capsys, number):
    send(monkeypatch, number, 5, times=2)
    assert main(["train", str(store.folder), str(tmp_path / "run"), *OPTIONS]) == 128 + number
    assert not (tmp_path / "run" / CHECKPOINT).exists()
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_a_signal_in_a_sweep_saves_every_member_of_the_group(store, tmp_path, monkeypatch, capsys):
    out = tmp_path / "sweep"
    command = ["sweep", str(store.folder), str(out), *OPTIONS, "--ls", "1,2", "--scores", "l2", "--together", "2"]
    command += ["--splice-rows", "0"]
    send(monkeypatch, signal.SIGTERM, 9)
    assert main(command) == 143
    monkeypatch.undo()
    assert [read_checkpoint(out / name / CHECKPOINT)["step"] for name in ("l1_l2", "l2_l2")] == [10, 10]
    assert not (out / "topk").exists()
    assert "step 10 of 24 is saved in" in capsys.readouterr().err
    assert main(command) == 0
    assert main([*command[:2], str(tmp_path / "whole"), *command[3:]]) == 0
    for name in ("l1_l2", "l2_l2", "topk"):
        assert (out / name / METRICS).read_bytes() == (tmp_path / "whole" / name / METRICS).read_bytes()


def test_in_python_it_is_a_keyboard_interrupt(store, tmp_path, monkeypatch):
    send(monkeypatch, signal.SIGINT, 3)
    group = SAEGroup({"a": SAE, "b": SAE}, TRAIN, store, tmp_path)
    with pytest.raises(Interrupted, match=r"step 4 of 24 is saved in \S+a, \S+b;") as caught:
        group.run(progress=False)
    assert isinstance(caught.value, KeyboardInterrupt)
    monkeypatch.undo()
    saes = SAEGroup({"a": SAE, "b": SAE}, TRAIN, store, tmp_path).run(progress=False)
    assert same_weights(saes["a"], Trainer(SAE, TRAIN, store, tmp_path / "alone").run(progress=False))


def waits(pipe, command):
    """The command line in a process that says when it makes the batch of step 5, and waits there for an answer."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    whole = ShuffledStream.batch

    def batch(stream, t):
        if t == 5:
            pipe.send("step 5")
            pipe.recv()
        return whole(stream, t)

    ShuffledStream.batch = batch
    return main(command)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_and_its_exit_status(store, tmp_path, number, status):
    """Its metrics can be read while it runs."""
    out = tmp_path / "run"
    options = [option for option in OPTIONS if option != "--quiet"]
    ours, theirs = forked().Pipe()
    command, log = ["train", str(store.folder), str(out), *options], tmp_path / "log"
    process = forked().Process(target=logged, args=(log, waits, theirs, command))
    process.start()
    theirs.close()
    assert ours.recv() == "step 5"
    assert [json.loads(line)["step"] for line in (out / METRICS).read_text().splitlines()] == [2, 4]
    os.kill(process.pid, number)
    ours.send("go on")
    process.join()
    errors = log.read_text()
    assert process.exitcode == status, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(f"sampled-sae train: stopped by {number.name}: step 6 of 24 is saved in ")
    assert read_checkpoint(out / CHECKPOINT)["step"] == 6


def test_metrics_beyond_the_checkpoint_are_dropped_when_the_run_goes_on(store, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    whole = ShuffledStream.batch
    trainer = Trainer(SAE, TrainConfig(**{**vars(TRAIN), "checkpoint_every": 6}), store, tmp_path / "run")

    def batch(stream, t):
        if t == 11:
            raise Killed
        return whole(stream, t)

    monkeypatch.setattr(ShuffledStream, "batch", batch)
    with pytest.raises(Killed):
        trainer.run(progress=False)
    monkeypatch.undo()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10]
    (tmp_path / "run" / METRICS).open("a").write('{"step": 1')
    again = Trainer(SAE, trainer.config, store, tmp_path / "run")
    assert again.step == 6
    again.run(progress=False)
    Trainer(SAE, trainer.config, store, tmp_path / "whole").run(progress=False)
    assert (tmp_path / "run" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()


def test_handlers_come_back_and_what_is_ignored_stays_so():
    before = signal.getsignal(signal.SIGTERM)
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.number is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.number == signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(Interrupted, match="stopped by SIGTERM"), terminable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_training_runs_as_ever(store, tmp_path):
    done = []
    thread = threading.Thread(
        target=lambda: done.append(Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False))
    )
    thread.start()
    thread.join()
    assert len(done) == 1
