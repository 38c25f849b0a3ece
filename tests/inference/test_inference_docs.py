"""The Python and the commands of docs/inference.md run."""

import re
import sys
from pathlib import Path

import pytest
import torch
from makers import write_store
from published_makers import Hub, write_gemma_scope

from sampled_sae import CodesStore
from sampled_sae.cli import build_parser, main

TEXT = (Path(__file__).parents[2] / "docs" / "inference.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL) for line in block.splitlines()]


def test_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path / "hub", tmp_path / "cache"))
    folder = write_gemma_scope(tmp_path / "hub" / "google")
    load, from_tensors, read = PYTHON
    names = {}
    exec(compile(load, "docs/inference.md", "exec"), names)
    assert names["x_hat"].shape == names["x"].shape
    torch.testing.assert_close(names["a"], names["sae"].encode(names["x"])[:, [3, 17]])
    pasted = {}  # it stands by itself
    exec(compile(from_tensors, "docs/inference.md", "exec"), pasted)
    assert pasted["some"].shape == pasted["x"].grad.shape
    write_store(tmp_path / "acts")
    folder.rename(tmp_path / "my_sae")
    for command in (COMMANDS[0], COMMANDS[2]):
        assert main([*command.split()[1:], *(["--insist"] if "encode" in command else [])]) == 0
    assert isinstance(CodesStore.open("codes"), CodesStore)
    capsys.readouterr()
    exec(compile(read, "docs/inference.md", "exec"), names)
    assert names["density"].shape == (96,)
    assert capsys.readouterr().out.count("\n") == min(5, len(names["values"]))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    build_parser().parse_args(command.split()[1:])
