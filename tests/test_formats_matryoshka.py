"""Matryoshka SAEs in the peers' files and back."""

import json

import pytest
import torch
from format_makers import (
    OURS,
    changed_config,
    changed_tensors,
    config_of,
    rule_for,
    same_files,
    same_tensors,
    tensors_of,
    trained,
    without_extra,
)

from sampled_sae import formats

GROUPS = {"l": None, "groups": (10, 40, 96)}


@pytest.mark.parametrize("to", formats.FORMATS)
@pytest.mark.parametrize("rule", [GROUPS, {**GROUPS, "select": "token"}], ids=str)
def test_there_and_back(tmp_path, to, rule):
    sae = trained(**rule)
    sae.save_pretrained(tmp_path / "ours")
    formats.export(sae, tmp_path / "theirs", to=to, **rule_for(to))
    formats.load(tmp_path / "theirs").save_pretrained(tmp_path / "back")
    assert same_files(tmp_path / "ours", tmp_path / "back", OURS)


def test_dictionary_learning_has_a_class_of_it(tmp_path):
    formats.export(trained(**GROUPS), tmp_path / "a", to="dictionary_learning")
    state, trainer = tensors_of(tmp_path / "a", "dictionary_learning"), config_of(tmp_path / "a", "dictionary_learning")
    assert trainer["trainer"]["dict_class"] == "MatryoshkaBatchTopKSAE"
    assert state["group_sizes"].tolist() == trainer["trainer"]["group_sizes"] == [10, 30, 56]
    again = formats.load(without_extra(tmp_path / "a"))
    assert again.cfg.groups == (10, 40, 96)
    formats.export(again, tmp_path / "b", to="dictionary_learning")
    assert same_tensors(state, tensors_of(tmp_path / "b", "dictionary_learning"))


def test_groups_of_an_sae_that_others_have_trained(tmp_path):
    """dictionary_learning's tensors say them, SAELens' configuration or what its metadata keep of a training."""
    formats.export(trained(l=None), tmp_path / "a", to="saelens")
    folder = without_extra(tmp_path / "a")
    for widths in ([10, 40], [10, 40, 96]):
        changed_config(folder, "cfg.json", lambda c, w=widths: c.update(metadata=trained_by_saelens(w)))
        assert formats.load(folder, k=4).cfg.groups == (10, 40, 96)
    for widths in ([40, 10], [10, 97], "10", [0.5]):
        changed_config(folder, "cfg.json", lambda c, w=widths: c.update(metadata=trained_by_saelens(w)))
        with pytest.raises(ValueError, match=r"cfg\.json: .*(groups|matryoshka_widths)"):
            formats.load(folder, k=4)


def trained_by_saelens(widths):
    details = {"architecture": "matryoshka_batchtopk", "k": 4, "matryoshka_widths": widths}
    return {"training_architecture": "matryoshka_batchtopk", "training_architecture_details": details}


@pytest.mark.parametrize("sizes", [None, [10, 30], [96, 0], [[96]], [10.5, 85.5], [-10, 106]], ids=str)
def test_group_sizes_that_do_not_fit_name_the_file(tmp_path, sizes):
    formats.export(trained(**GROUPS), tmp_path, to="dictionary_learning")

    def change(state):
        del state["group_sizes"]
        if sizes is not None:
            state["group_sizes"] = torch.tensor(sizes)

    changed_tensors(tmp_path, "dictionary_learning", change)
    with pytest.raises(ValueError, match=r"ae\.pt: group_sizes=.*add up to 96"):
        formats.load(tmp_path)


def test_files_of_others_are_those_of_before(tmp_path):
    formats.export(trained(l=None), tmp_path, to="saelens")
    details = json.loads((tmp_path / "cfg.json").read_text())["metadata"]["training_architecture_details"]
    assert "groups" not in details
