"""Which parts each implementation has: found by their names, so that a misspelled one would be missing in silence."""

from dataclasses import fields

import pytest

from sampled_sae.impl.interface import PARTS, implementation

# of many processes scores and selections are made of these, of one step its errors
OPTIONAL = {"column_statistics", "use_block", "search", "take_kept", "seen_columns", "squared_errors", "level_errors"}


def test_what_need_not_be_there():
    interface = fields(implementation("torch"))
    assert {part.name for part in interface if part.name in PARTS and part.default is None} == OPTIONAL


@pytest.mark.parametrize(("name", "missing"), [("reference", OPTIONAL), ("torch", set()), ("triton", set())])
def test_every_other_part_is_there(name, missing):
    found = implementation(name)
    assert {part for part in PARTS if getattr(found, part) is None} == missing
