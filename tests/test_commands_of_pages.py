"""Every command that README, docs/ and benchmarks/ show exists, with these options."""

import re
import shlex
from pathlib import Path

import pytest

from sampled_sae.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = {page.name: page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
# these name options of ours alone, but for FOREIGN
OF_COMMANDS = ("README.md", "usage.md", "family.md", "activations.md", "inference.md", "scale.md", "drop-in.md")
FOREIGN = {"--max-restarts"}
BENCHMARKS = ROOT / "benchmarks"
TABLES_OF_RESULTS = re.compile(r"<!-- table: .*?<!-- end -->", flags=re.DOTALL)
FENCED = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)


def shell_lines(text):
    """The lines of its shell blocks, those that go on as one, without comments."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        yield from (line.split("#")[0].strip() for line in block.replace("\\\n", " ").splitlines())


def in_code_font(text):
    """What stands between backticks, outside blocks and the tables that a command writes, each as one line."""
    for code in re.findall(r"`([^`]+)`", FENCED.sub("", TABLES_OF_RESULTS.sub("", text))):
        yield " ".join(code.split())


def whole_commands():
    for text in PAGES.values():
        for line in shell_lines(text):
            ours = re.search(r"(?:^|-m )sampled[-_]sae (.+)", line)
            if ours:
                yield ours[1]


def options_of(line):
    return re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)


def options_in_the_text():
    """(page, command or None, option)."""
    names = build_parser().commands()
    for page, text in PAGES.items():
        for code in in_code_font(text):
            name = code.removeprefix("sampled-sae ").split()[0]
            if name in names:
                yield from ((page, name, option) for option in options_of(code))
            elif code.startswith("--") and page in OF_COMMANDS:
                yield from ((page, None, option) for option in options_of(code) if option not in FOREIGN)


def commands_of_benchmarks():
    pages = [PAGES["which-l.md"], (BENCHMARKS / "README.md").read_text(encoding="utf-8")]
    for text in pages:
        for line in [*shell_lines(text), *in_code_font(text)]:
            found = re.search(r"python (?:-m )?(benchmarks[./]\S+)(.*)", line)
            if found:
                yield found[1], found[2]


def test_there_are_commands_to_look_at():
    assert len(set(whole_commands())) > 25
    assert len(set(options_in_the_text())) > 60
    assert len(set(commands_of_benchmarks())) > 20


@pytest.mark.parametrize("command", sorted(set(whole_commands())))
def test_commands_of_the_pages_parse(command):
    build_parser().parse_args(shlex.split(command))


def test_options_in_the_text_exist():
    commands = build_parser().commands()
    has = {name: set(command._option_string_actions) for name, command in commands.items()}
    has[None] = set().union(*has.values())
    assert sorted({found for found in options_in_the_text() if found[2] not in has[found[1]]}, key=str) == []


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`sampled-sae ([a-z| ]+)", PAGES["README.md"]))))
def test_commands_named_in_the_readme_exist(command):
    for name in command.split("|"):
        assert name.split()[0] in build_parser().commands()


def test_commands_of_benchmarks_exist():
    """The file, and each option as a word of the sources, as on the command line or as a name of Python."""
    sources = "\n".join(file.read_text(encoding="utf-8") for file in BENCHMARKS.rglob("*.py"))
    missing = []
    for program, arguments in sorted(set(commands_of_benchmarks())):
        path = ROOT / program.removesuffix(".py").replace(".", "/")
        if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
            missing.append(program)
        words = {option: option.removeprefix("--").replace("-", "[-_]") for option in options_of(arguments)}
        missing += [f"{program} {o}" for o, word in words.items() if not re.search(f'"(--)?{word}"', sources)]
    assert missing == []
