"""No command line made of the documented options ends in a traceback, and none that fails changes what was there.

The options are those of the parser, so that a new one takes part by itself.
"""

import argparse
from pathlib import Path

import pytest
from cli_places import FOLDERS, SMALL, assert_one_sentence, paths_in, places, pristine  # noqa: F401
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sampled_sae.cli import build_parser

COMMANDS = build_parser().commands()
PLACES = ["{store}", "{sae}", "{run}", "{new}", "{peer}", "{model}", "{texts}", "{missing}", "{empty}", "{file}"]
PLACES += ["{broken}", "{new}/a/b", "{file}/a"]
WHOLE = ["0", "1", "2", "3", "7", "-1", "1000000000000", "-9223372036854775808", str(10**18), str(10**30), "9" * 5000]
FRACTIONS = ["0", "1", "2", "0.5", "1.5", "-1", "1e-300", "1e300", "1e400", "nan", "-inf", "1e9"]
WORDS = [
    "",
    "abc",
    "none",
    "1,,2",
    "1,2",
    "1e3",
    "ü",
    "0x10",
    "1_0",
    " 2 ",
    "a b",
    "l2",
    "entropy,l2",
    "auto",
    "cuda:7",
]
# what would take a tiny run to minutes, or a model from elsewhere
TOO_MUCH = {
    "steps": ["2", "3", "0"],
    "model": ["{model}", "{missing}", "{empty}", "{file}", "{broken}", "{sae}", ""],
    "texts": ["{texts}", "{missing}", "{empty}", "{file}", "{broken}", "{model}", "", "hf:", "wiki-xx"],
}
# examples where all tests run, by what they cost; 80 of the others
EXAMPLES = {"check": 12, "bench": 40, "sweep": 40}


def values(action):
    """What may stand behind an option, right or wrong."""
    if action.dest in TOO_MUCH:
        return st.sampled_from(TOO_MUCH[action.dest])
    pool = {int: WHOLE, float: FRACTIONS, Path: PLACES}.get(action.type, [*WORDS, *FRACTIONS, *PLACES[-3:]])
    return st.sampled_from([*pool, "", "abc", *map(str, action.choices or ())]) | st.integers(-3, 40).map(str)


@st.composite
def command_lines(draw, name):
    folders = FOLDERS.get(name, ())
    line = [name]
    for folder in folders:
        line.append(draw(st.sampled_from(PLACES)) if draw(st.integers(0, 7)) == 0 else f"{{{folder}}}")
    line += SMALL.get(name, "").split()
    options = [a for a in COMMANDS[name]._actions if a.option_strings and not isinstance(a, argparse._HelpAction)]
    for action in draw(st.lists(st.sampled_from(options), min_size=1, max_size=4, unique_by=lambda a: a.dest)):
        line.append(action.option_strings[-1])
        if action.nargs != 0:
            line[-1] += "=" + draw(values(action))
    return line


@pytest.mark.parametrize(
    "share", [pytest.param(12, marks=pytest.mark.everyday), pytest.param(1, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_line_ends_in_a_traceback(name, share, places, capsys):  # noqa: F811
    @settings(
        max_examples=EXAMPLES.get(name, 80) // share,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(command_lines(name))
    def check(line):
        root = places()
        assert_one_sentence([part.format(**paths_in(root)) for part in line], root, capsys)

    check()
