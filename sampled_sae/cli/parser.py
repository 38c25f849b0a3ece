"""The parser of the commands: one line for what it cannot take, and the nearest name where one is misspelt."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from .arguments import number, whole_number


class Parser(argparse.ArgumentParser):
    """Options by their full names; `type=int` and `type=float` take finite numbers of at most 64 bits."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **settings)
        self.register("type", int, whole_number)
        self.register("type", float, number)
        self._replaced: dict[str, str] = {}

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As in argparse, which says that arguments are missing where a name is misspelt: names are looked at first."""
        given = sys.argv[1:] if args is None else args
        for text in given:
            name = text.split("=", 1)[0]
            if name == "--" or name in self.commands():
                break
            if re.match("--?[A-Za-z]", name) and name not in self._option_string_actions:
                self.error(f"{name} is no option of {self.prog}" + nearest(name, self._option_string_actions))
        named = {text.split("=", 1)[0] for text in given}
        absent = [dest for option, dest in self._replaced.items() if option in named]
        self._actions = [action for action in self._actions if action.dest not in absent]
        return super().parse_known_args(given, namespace)

    def replaces(self, option: str, dest: str) -> None:
        """Where the option is given the positional argument is not there, and its value None."""
        self._replaced[option] = dest
        self.set_defaults(**{dest: None})

    def commands(self) -> dict[str, Parser]:
        """The parsers of the commands by name; none for the parser of a command."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return action.choices
        return {}

    def options(self) -> dict[str, str]:
        """Where a value is kept -> the option that sets it."""
        return {action.dest: action.option_strings[-1] for action in self._actions if action.option_strings}

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument ([^:]+): (?=['\"])", r"\1 ", message).removeprefix("argument ")
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists what there is)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            allowed = ", ".join(map(str, action.choices))
            message = f"{value!r}: must be one of {allowed}" + nearest(str(value), map(str, action.choices))
            raise argparse.ArgumentError(action, message)


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; did you mean ...?" where one of the names is near."""
    found = get_close_matches(name, list(names), n=1)
    return f"; did you mean {found[0]}?" if found else ""
