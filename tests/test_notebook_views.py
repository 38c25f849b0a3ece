"""What a notebook shows of codes and configs."""

import html
import re
from dataclasses import dataclass

import pytest
import torch
from makers import make_sae, tokens

from sampled_sae import InferenceConfig, SampledSAEConfig, SparseCodes, TrainConfig
from sampled_sae.support.html_table import config_table, html_table


def cells(text):
    """The rows of a table, each a list of unescaped cells."""
    rows = re.findall(r"<tr>(.*?)</tr>", text, flags=re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", row, flags=re.DOTALL)] for row in rows]


def test_codes_show_the_strongest_features_of_the_first_tokens():
    dense = torch.zeros(10, 50)
    dense[0, :9] = torch.arange(1.0, 10)
    dense[1, 40] = 0.5
    head, first, second, third, *_, last = cells(SparseCodes.from_dense(dense)._repr_html_())
    assert head == ["token", "strongest features"]
    assert first == ["0", "8: 9, 7: 8, 6: 7, 5: 6, 4: 5, 3: 4, 3 more"]
    assert second == ["1", "40: 0.5"]
    assert third == ["2", ""]
    assert last == ["...", "2 more tokens"]
    assert "SparseCodes(shape=(10, 50), kept=10, l0=1.00)" in SparseCodes.from_dense(dense)._repr_html_()


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_codes_of_a_step_with_gradients(impl):
    sae = make_sae(torch.float32, impl=impl)
    out = sae(tokens(5, 12, dtype=torch.float32))
    rows = cells(out.codes._repr_html_())[1:]
    assert [int(row[0]) for row in rows] == list(range(5))
    dense = out.codes.to_dense()
    for token, row in enumerate(rows):
        strongest = re.match(r"(\d+): ", row[1])
        assert (dense[token].max() == 0) if strongest is None else int(strongest[1]) == int(dense[token].argmax())


CONFIGS = [
    (SampledSAEConfig(d_in=3, d_sae=8, k=2, l=3), ["l"]),
    (InferenceConfig(d_in=3, d_sae=8, rule="topk", k=2), ["k"]),
    (TrainConfig(steps=7), ["steps"]),
]


@pytest.mark.parametrize(("config", "changed"), CONFIGS, ids=lambda value: type(value).__name__)
def test_configs_show_every_field_and_mark_what_is_not_the_default(config, changed):
    rows = cells(config._repr_html_())
    assert {row[0]: row[1] for row in rows} == {name: repr(value) for name, value in vars(config).items()}
    assert [row[0] for row in rows if row[2] == "*"] == changed


def test_nothing_in_a_table_is_markup():
    hostile = '<img src=x onerror="alert(1)">&'

    @dataclass
    class Config:
        name: str = ""

    for text in (html_table(hostile, [[hostile]], [hostile]), config_table(Config(hostile))):
        assert "<img" not in text
        assert html.escape(hostile) in text or html.escape(repr(hostile)) in text


def test_codes_without_tokens_show_themselves():
    none = torch.zeros(0, dtype=torch.int64)
    codes = SparseCodes(torch.zeros(0), none, none, (0, 5))
    assert repr(codes) == "SparseCodes(shape=(0, 5), kept=0, l0=nan)"
    assert "shape=(0, 5)" in codes._repr_html_()
