"""wandb and trackio themselves, offline, where they are installed: in the peers' environment wandb is."""

import json
import math
import struct
import time

import pytest
from makers import D

from sampled_sae import SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.run_logs import LogPlace
from sampled_sae.support.atomic_files import read_json, read_json_lines
from sampled_sae.support.interruption import Interrupted

pytestmark = pytest.mark.slow


def a_trainer(store, folder, kind, **options):
    config = SampledSAEConfig(d_in=D, d_sae=64, k=3)
    train = TrainConfig(steps=12, batch_size=64, log_every=3, checkpoint_every=3)
    return Trainer(config, train, store, folder, log=LogPlace(kind, **options))


def told(folder):
    """What metrics.jsonl says that a place was told: {step: values}."""
    lines = [line for _, line in read_json_lines(folder / "metrics.jsonl")]
    return {line["step"]: {f"train/{k}": v for k, v in line.items() if v is not None} for line in lines}


def stopped_and_gone_on(store, folder, kind, **options):
    """A training that a signal stops after step 6, whose checkpoint is of step 3, and that goes on to its end."""
    trainer = a_trainer(store, folder, kind, **options)
    write = trainer.write_metrics

    def stop(line):
        write(line)
        if line["step"] == 6:
            raise Interrupted(2, "stopped")

    trainer.write_metrics = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.run(progress=False)
    trainer.log.close(failed=True)
    second = int(time.time())
    while int(time.time()) == second:  # wandb names the folder of a run by the second in which it began
        time.sleep(0.05)
    again = a_trainer(store, folder, kind, **options)
    assert again.step == 3
    again.run(progress=False)
    again.log.result({"fvu": 0.5, "loss_recovered_zero": math.nan})
    again.log.close(failed=False)


def wandb_records(file):
    """The records of an offline run's file: a head of 7 bytes, and blocks of 32 KiB with parts of records in them."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if at + 7 + length > len(content):
            return  # being written
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def records_of_ended(folder, id, runs):
    """All records of an offline run that was begun so many times. wandb writes them from a process of its own, which
    may be behind: each time ends with an exit."""
    deadline = time.monotonic() + 120  # against a test that hangs
    while time.monotonic() < deadline:
        files = sorted(folder.glob(f"offline-run-*/run-{id}.wandb"))  # their names begin with the time
        records = [record for file in files for record in wandb_records(file)]
        if sum(record.WhichOneof("record_type") == "exit" for record in records) >= runs:
            return records
        time.sleep(0.1)
    raise AssertionError(f"{len(files)} files with {len(records)} records have not ended")


def name_of(item):
    return "/".join(item.nested_key) or item.key


def test_wandb_has_the_run(store, tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_CONFIG_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    stopped_and_gone_on(store, tmp_path / "run", "wandb", project="features", name="wide", tags=("a", "b"))
    assert "gets no more of this run" not in capsys.readouterr().err
    id = read_json(tmp_path / "run" / "log.json")["wandb"]["id"]
    seen, summary, exits = {}, {}, []
    for record in records_of_ended(tmp_path / "run" / "wandb", id, 2):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            shown = (record.run.project, record.run.display_name, list(record.run.tags))
            assert shown == ("features", "wide", ["a", "b"])
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            assert config["sae"]["d_sae"] == 64
        elif kind == "history":
            values = {name_of(item): json.loads(item.value_json) for item in record.history.item}
            seen[values["_step"]] = {k: v for k, v in values.items() if k.startswith("train/")}
        elif kind == "summary":
            summary |= {name_of(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "exit":
            exits.append(record.exit.exit_code)
    assert seen == told(tmp_path / "run")
    assert summary["evaluation/fvu"] == 0.5
    assert "evaluation/loss_recovered_zero" not in summary
    assert exits == [1, 0]


def test_trackio_has_the_run(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    stopped_and_gone_on(store, tmp_path / "run", "trackio", project="features", name="wide", tags=("a",))
    assert "gets no more of this run" not in capsys.readouterr().err
    id = read_json(tmp_path / "run" / "log.json")["trackio"]["id"]
    (run,) = trackio.Api().runs("features")
    assert run.name == f"wide-{id}"
    assert run.config["tags"] == ["a"]
    assert run.config["sae"]["d_sae"] == 64
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    lines = storage.get_logs("features", run.name)
    seen = {line["step"]: {k: v for k, v in line.items() if k.startswith("train/")} for line in lines[:-1]}
    assert seen == told(tmp_path / "run")
    assert (lines[-1]["step"], lines[-1]["evaluation/fvu"]) == (12, 0.5)
