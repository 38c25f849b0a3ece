"""The pages say what is there: rooms of docs/architecture.md, paths and links in every page, functions in tables."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from sampled_sae import __version__

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sampled_sae"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = sorted(page for folder in (".", "docs", "kernels", "benchmarks") for page in (ROOT / folder).glob("*.md"))
# a page may cite what a command writes, not only what is there
WRITTEN = ("runs/", "trained/", ".venv/")
NOT_ROOMS = ("build", "dist", "runs", "__pycache__")


def tree_of_the_page():
    """The paths of the page's tree, in its order: two spaces a level, the name before the first space."""
    (block,) = re.findall(r"## The rooms\n.*?```\n(.*?)```", ARCHITECTURE, flags=re.DOTALL)
    above, paths = [], []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[:depth], line.split()[0].rstrip("/")]
        paths.append("/".join(above))
    return paths


def rooms_of_the_tree():
    """Folders at the top, folders with modules in the package, files at its root."""
    top = {f.name for f in ROOT.iterdir() if f.is_dir() and not f.name.startswith(".") and f.suffix != ".egg-info"}
    inside = {f.parent for f in PACKAGE.rglob("*.py")} | {*PACKAGE.glob("*.py"), PACKAGE / "kernels"}
    return top - set(NOT_ROOMS) | {str(f.relative_to(ROOT)) for f in inside}


def test_every_room_is_named_and_every_named_room_exists():
    assert sorted(tree_of_the_page()) == sorted(rooms_of_the_tree())


def imported_by(file):
    """The modules of the package that `file` imports when it is loaded, as paths without suffix."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        names = (node.module or "").split(".")
        if not node.level and names[0] != PACKAGE.name:
            continue
        base = (file.parents[node.level - 1] if node.level else ROOT).joinpath(*names)
        for name in node.names:
            inner = base / name.name
            yield inner if inner.is_dir() or inner.with_suffix(".py").is_file() else base


def room(path):
    """The file or folder at the root of the package that `path` belongs to."""
    inside = path.relative_to(PACKAGE).parts
    name = inside[0].removesuffix(".py") if inside else "__init__"
    return f"sampled_sae/{name}.py" if (PACKAGE / f"{name}.py").is_file() else f"sampled_sae/{name}"


def imports_between_rooms():
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]
    pairs = {(room(file), room(path)) for file in files for path in imported_by(file)}
    return {(above, below) for above, below in pairs if above != below}


def test_imports_point_down_the_page():
    order = {path: i for i, path in enumerate(tree_of_the_page())}
    pairs = imports_between_rooms()
    assert {("sampled_sae/sae.py", "sampled_sae/impl"), ("sampled_sae/lm", "sampled_sae/training")} <= pairs
    assert [pair for pair in pairs if order[pair[0]] > order[pair[1]]] == []


def test_the_house_is_small_enough_to_draw():
    """At most 20 folders of modules, on at most 10 levels of imports."""
    page = tree_of_the_page()
    inside = [path for path in page if (ROOT / path).is_dir() and path.startswith(PACKAGE.name)]
    assert len(inside) <= 20
    pairs, levels = imports_between_rooms(), {}
    for path in reversed(page):  # those that it imports are below it
        levels[path] = 1 + max((levels[below] for above, below in pairs if above == path), default=0)
    assert max(levels.values()) <= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_in_code_font_exists(page):
    """`a/b.py` from the root of the tree, of the package, of the page's own folder or of the results."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    bases = (ROOT, PACKAGE, page.parent, ROOT / "benchmarks" / "results")
    cited = [c for c in re.findall(r"`([\w.-]+(?:/[\w.-]+)+/?)`", text) if not c.startswith(WRITTEN)]
    assert [c for c in cited if not any((base / c).exists() for base in bases)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def rows_of_the_table():
    """(step, [functions], [kernel files]) of each row of the table of forms."""
    rows = []
    lines = [line for line in ARCHITECTURE.splitlines() if line.startswith("|")]
    assert re.findall(r"`([^`]+)`", lines[0]) == ["reference.py", "impl/torch/", "impl/triton/", "kernels/"]
    for line in lines[2:]:
        step, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        names = [re.findall(r"`([^`]+)`", cell) for cell in cells]
        prefixes = ("sampled_sae.reference.", "sampled_sae.impl.torch.", "sampled_sae.impl.triton.")
        rows.append((step, [prefix + name for prefix, cell in zip(prefixes, names) for name in cell], names[3]))
    return rows


@pytest.mark.parametrize(("step", "functions", "kernels"), rows_of_the_table(), ids=str)
def test_every_form_in_the_table_exists(step, functions, kernels):
    assert len(functions) >= 3
    for path in functions:
        module, name = path.rsplit(".", 1)
        assert callable(getattr(importlib.import_module(module), name)), path
    for file in kernels:
        assert (ROOT / "kernels" / file).is_file(), file


def test_the_table_has_every_step():
    steps = {int(step.split(",")[0]) for step, _, _ in rows_of_the_table()}
    assert steps == set(range(1, 9))


def test_every_step_of_the_method_is_in_the_reference():
    """docs/method.md numbers its steps 1 to 8, and so do the docstrings of reference.py."""
    method = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    reference = (PACKAGE / "reference.py").read_text(encoding="utf-8")
    assert re.findall(r"^\*\*(\d)\. ", method, flags=re.MULTILINE) == [*"12345678"]
    assert set(re.findall(r'"""Step (\d)', reference)) == {*"12345678"}


def test_the_version_stands_in_one_place():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, flags=re.MULTILINE) == [__version__]
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
