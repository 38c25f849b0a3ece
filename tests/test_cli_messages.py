"""What the commands say: the option's own name, the nearest one, one sentence for every kind of failure."""

import argparse
import errno
import functools
import json
import os
import re
import resource
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from cli_places import FOLDERS, full, places, pristine  # noqa: F401
from forked import run_forked
from safetensors import SafetensorError

from sampled_sae import __version__, cli
from sampled_sae.cli import build_parser, convert, main
from sampled_sae.cli.errors import in_options
from sampled_sae.support.atomic_files import field, read_json, write_atomically

COMMANDS = build_parser().commands()
PARSER_OF_REFUSED = functools.cache(build_parser)
OPTIONS = [
    (name, action)
    for name, parser in COMMANDS.items()
    for action in parser._actions
    if action.option_strings and not isinstance(action, argparse._HelpAction)
]
NUMBERS = [(name, action) for name, action in OPTIONS if action.type in (int, float)]
# a free text that only the code behind the option judges
JUDGED = ("impl", "device", "adam", "moments", "scores", "texts", "model")


@pytest.fixture
def one_parser(monkeypatch):
    """One for all lines that it refuses itself: it takes longer to make than they take to read."""
    monkeypatch.setattr(cli, "build_parser", PARSER_OF_REFUSED)


def of(pairs):
    return pytest.mark.parametrize(
        ("name", "action"), pairs, ids=[f"{name} {action.option_strings[-1]}" for name, action in pairs]
    )


def failing(line, capsys):
    """(status, standard error) of a command that fails."""
    capsys.readouterr()
    try:
        status = main(line)
    except SystemExit as end:
        status = end.code
    err = capsys.readouterr().err
    assert status in (1, 2), err
    assert "Traceback" not in err
    assert "unexpected error" not in err
    return status, err


@pytest.mark.one_in(3)
@of(NUMBERS)
def test_a_number_out_of_range_names_its_option(name, action, places, capsys):  # noqa: F811
    option = action.option_strings[-1]
    more = " --to dictionary_learning --inference topk" if name == "export" else ""
    status, err = failing([*full(name + more, places()), f"{option}=-7"], capsys)
    assert status == 1
    assert f"{option} -7" in err
    assert f"{action.dest}=" not in err


@of([(name, action) for name, action in OPTIONS if action.dest in JUDGED and not action.choices])
def test_a_word_that_is_none_names_its_option(name, action, places, capsys):  # noqa: F811
    option = action.option_strings[-1]
    line = full(name, places())
    if action.dest == "model" and name == "train":
        line = [name, *line[2:], "--layer=0", f"--texts={places() / 'texts.jsonl'}"]  # in the place of the activations
    elif action.dest == "texts" and name == "sweep":
        line = [name, *line[2:], "--layer=0", "--model=smollm2-135m"]
    elif action.dest == "model" and name not in ("harvest", "encode", "look"):
        line += ["--splice-rows=1", "--insist"]
    _, err = failing([*line, f"{option}=nonsense"], capsys)
    assert f"{option} 'nonsense'" in err


@of([(name, action) for name, action in OPTIONS if action.type not in (None, str, Path) and action.dest != "scores"])
def test_what_is_no_number_names_its_option(name, action, one_parser, capsys):
    option = action.option_strings[-1]
    for text in ("abc", "", "nan", "inf", "1e400", "1,,2", "9" * 5000):
        status, err = failing([name, *FOLDERS.get(name, ()), f"{option}={text}"], capsys)
        assert status == 2
        assert err.startswith(f"sampled-sae {name}: {option} '")
        assert "must be" in err
        assert len(err) < 200


@of([(name, action) for name, action in OPTIONS if len(action.option_strings[-1]) > 5])
def test_a_near_miss_of_an_option_is_suggested(name, action, one_parser, capsys):
    option = action.option_strings[-1]
    for miss in (option[:-1], option.replace("--", "-"), option.replace("-", "_").replace("__", "--") + "s"):
        if miss not in {own for _, other in OPTIONS for own in other.option_strings}:
            status, err = failing([name, f"{miss}=1"], capsys)
            assert status == 2
            assert f"{miss} is no option of sampled-sae {name}; did you mean {option}?" in err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_near_miss_of_a_command_is_suggested(name, capsys):
    for miss in (name[:-1], name[1:], name.capitalize()):
        assert f"did you mean {name}?" in failing([miss], capsys)[1]


@pytest.mark.parametrize(("option", "miss", "meant"), [("score", "entrpy", "entropy"), ("pool", "to", "top")])
def test_a_near_miss_of_a_choice_is_suggested(option, miss, meant, capsys):
    _, err = failing(["train", "a", "b", f"--{option}={miss}"], capsys)
    assert f"--{option} '{miss}': must be one of" in err
    assert f"did you mean {meant}?" in err


def test_arguments_are_named_as_options_but_not_what_files_hold():
    options = {"features": "--features", "k": "--k", "select": "--select", "texts": "--texts"}
    assert in_options("d_sae=0: must be", options) == "--features 0: must be"
    assert in_options("k=2.5: select='token' keeps", options) == "--k 2.5: --select 'token' keeps"
    assert in_options("source='x' holds no text", options) == "--texts 'x' holds no text"
    assert in_options("configs['a']: k=0: must be", options) == "configs['a']: --k 0: must be"
    for kept in ("/a/config.json: k=0: must be", "config.json: d_sae=x", "a\\b: k=1", "max_norm=3", "the mark=k"):
        assert in_options(kept, options) == kept


def test_version_and_no_command(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"sampled-sae {__version__}\n"
    assert "COMMAND" in failing([], capsys)[1]


@pytest.mark.parametrize("line", [["--debug", "export", "no", "b"], ["evaluate", "no", "b", "--debug"]])
def test_debug_before_and_after_the_command_shows_where(line, capsys):
    more = ["--to", "saelens"] if "export" in line else []
    assert main([*line, *more]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)")
    assert err.splitlines()[-1].endswith(".json: no such file")
    assert main([*(part for part in line if part != "--debug"), *more]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_quiet_leaves_errors_and_results(places, capsys):  # noqa: F811
    root = places()
    for text in ("harvest", "train", "sweep {store} {empty}", "export {sae} {missing}", "import {dl} {broken}/a"):
        assert main([*full(text, root), "--quiet"]) == 0
        assert capsys.readouterr() == ("", "")
    assert main(["--quiet", *full("evaluate {run} {store}", root)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    shown = dict(line.split(": ", 1) for line in said.out.splitlines())
    assert shown == {name: str(v) for name, v in json.loads((root / "run" / "evaluation.json").read_text()).items()}
    assert main([*full("train {missing} {new}", root), "--quiet"]) == 1
    assert "missing/manifest.json: no such file" in capsys.readouterr().err


def stops_with(error):
    def write(path):
        path.write_bytes(b"half")
        raise error

    return write


FULL = "unexpected pos 576 vs 534"
STOPPED = [
    (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), errno.EDQUOT),
    (RuntimeError(f"[enforce fail at inline_container.cc:672] . {FULL}"), errno.ENOSPC),
    (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), errno.EFBIG),
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
]


@pytest.mark.parametrize(("error", "number"), STOPPED, ids=lambda value: str(value)[:30])
def test_a_write_that_is_stopped_names_the_file_and_leaves_the_old_one(error, number, tmp_path):
    (tmp_path / "kept").write_text("old")
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "kept"))) as caught:
        write_atomically(tmp_path / "kept", stops_with(error))
    assert caught.value.errno == number
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"kept": "old"}
    with pytest.raises(RuntimeError, match="a fault"):
        write_atomically(tmp_path / "kept", stops_with(RuntimeError("a fault")))


@pytest.mark.parametrize("command", ["train", "export", "harvest", "import"])
def test_a_file_that_may_not_grow_is_said_in_one_line(command, places, capsys):  # noqa: F811
    """Stands for a full disk: a limit on the size of files stops a write in the same way."""
    line = [*full(command, places()), "--quiet", *(["--features=4096"] if command == "train" else [])]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        _, err = failing(line, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.fullmatch(rf"sampled-sae {command}: .*/new/\S+: File too large\n", err)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train --features=1000000000000", "--features 1000000000000"),
        ("sweep --features=1000000000000000000", "--features 1000000000000000000"),
        ("bench --features=1000000000000", "--features 1000000000000"),
        ("bench --batch=1000000000000000", "--batch 1000000000000000"),
    ],
)
def test_more_memory_than_there_is(text, words, places, capsys):  # noqa: F811
    name, option = text.split()
    status, err = failing([*full(name, places()), option], capsys)
    assert status == 1
    assert "not enough memory" in err
    assert words in err


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyError("x"), 1, "unexpected error, KeyError: 'x'; run again with --debug"),
        (AttributeError("no a"), 1, "unexpected error, AttributeError: no a"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 1, "not enough memory (CUDA out of memory"),
        (OverflowError("Python int too large to convert to C long"), 1, "a number is too large"),
        (RuntimeError("Storage size calculation overflowed with sizes=[1]"), 1, "a number is too large"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "a/b: No space left on device"),
        (ValueError("two\nlines"), 1, "two lines"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_every_kind_of_error_is_one_line(error, status, words, monkeypatch, capsys):
    def fails(args):
        raise error

    monkeypatch.setattr(convert, "export", fails)
    assert main(["export", "a", "b", "--to", "saelens"]) == status
    err = capsys.readouterr().err
    assert err.startswith(f"sampled-sae export: {words}")
    assert err.count("\n") == 1


def read_by_nobody(line):
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    with redirect_stdout(open(1, "w", closefd=False)) as given:
        status = main(line)
        given.flush()  # as Python does at its end
        return status


def test_a_reader_that_leaves_ends_it_without_a_word(tmp_path):
    assert run_forked(tmp_path / "log", read_by_nobody, full("bench", Path())) == (1, "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
        ("[1]", "must hold a JSON object, holds a list"),
    ],
)
def test_json_that_is_none(text, words, tmp_path):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"a.json: {words}"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("values", "kind", "least", "words"),
    [
        ({}, int, 0, "a: n=None: must be of type int"),
        ({"n": True}, int, 0, "a: n=True: must be of type int"),
        ({"n": 1.0}, (int, type(None)), 0, "a: n=1.0: must be of type int or null"),
        ({"n": -1}, int, 0, "a: n=-1: must be a finite number >= 0"),
        ({"n": float("nan")}, float, 0, "a: n=nan: must be a finite number"),
        ({"n": "1"}, float, 0, "a: n='1': must be of type float"),
        ([1], int, 0, r"a: \[1\]: must be an object with the field 'n'"),
    ],
)
def test_fields(values, kind, least, words):
    with pytest.raises(ValueError, match=words):
        field("a", values, "n", kind, least)
    assert field("a", {"n": 3}, "n", float, 3) == 3
    assert field("a", {}, "n", (str, type(None))) is None
