"""States as JSON: what JSON has words for as it is, anything else to the bit all the same."""

import json

import pytest
import torch

from sampled_sae.support.json_states import as_json, of_json


def test_plain_states_are_to_be_read():
    state = {"first": 3, "lanes": [{"ids": [1, 2], "epoch": None, "norm": 0.1 + 0.2}]}
    assert as_json(state) is state
    assert of_json("there", json.loads(json.dumps(as_json(state)))) == state


@pytest.mark.parametrize(
    "value", [torch.tensor([1.5, -0.0]), b"bytes", (1, None), {1: 2}, float("inf")], ids=lambda v: type(v).__name__
)
def test_other_states_come_back_as_they_were(value):
    (found,) = of_json("there", json.loads(json.dumps(as_json({"value": value}), allow_nan=False))).values()
    assert type(found) is type(value)
    assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value


@pytest.mark.parametrize("cut", [lambda text: text[:-4], lambda text: "?" + text, lambda text: ""])
def test_damage_is_named(cut):
    ((name, text),) = as_json({"value": (1, 2)}).items()
    with pytest.raises(ValueError, match=r"checkpoint\.json: stream: damaged"):
        of_json("checkpoint.json: stream", {name: cut(text)})
