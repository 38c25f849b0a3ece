"""What a wheel and an sdist hold, built from a copy of the tree."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "results")


def build(tree, kind, into):
    """The file that the build backend makes of `tree`; no network, no isolation."""
    call = f"from setuptools import build_meta; build_meta.build_{kind}({str(into)!r})"
    done = subprocess.run([sys.executable, "-c", call], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = into.iterdir()
    return made


def names(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Not the working tree: a build writes beside its sources."""
    copy = tmp_path_factory.mktemp("tree") / "sampled-sae"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=NOT_SOURCE)
    return copy


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    return build(tree, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build(tree, "wheel", tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_every_module_and_kernel(wheel):
    kernels = {f"sampled_sae/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")}
    package = ROOT / "sampled_sae"
    # rglob does not follow the link to kernels/.
    modules = {str(f.relative_to(ROOT)) for f in package.rglob("*.py") if (package / "kernels") not in f.parents}
    assert len(kernels) >= 2
    assert {"sampled_sae/sae.py", "sampled_sae/impl/torch/stream.py"} <= modules
    held = {name for name in names(wheel) if name.endswith(".py")}
    assert held == modules | kernels


def test_wheel_holds_what_pages_are_made_of(wheel):
    assets = {str(f.relative_to(ROOT)) for f in (ROOT / "sampled_sae" / "pages" / "assets").iterdir()}
    assert {f.rpartition(".")[2] for f in assets} == {"css", "html", "js"}
    assert assets <= names(wheel)


def test_wheel_is_typed_and_claims_no_other_top_level_name(wheel):
    held = names(wheel)
    assert "sampled_sae/py.typed" in held
    assert {name.split("/")[0] for name in held if ".dist-info/" not in name} == {"sampled_sae"}


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = {n.split("/")[-1]: archive.read(n).decode() for n in archive.namelist() if ".dist-info/" in n}
    assert "sampled-sae = sampled_sae.cli:main" in text["entry_points.txt"]
    for extra in ("lm", "plot", "peers", "test"):
        assert f"Provides-Extra: {extra}\n" in text["METADATA"]
    assert "Requires-Dist: torch" in text["METADATA"]


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    assert {"README.md", "setup.py", "pyproject.toml", "LICENSE", "kernels"} <= {f.name for f in folder.iterdir()}
    (tmp_path / "wheel").mkdir()
    again = build(folder, "wheel", tmp_path / "wheel")
    assert again.name == wheel.name
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        for name in names(wheel) | names(again):
            if not name.endswith("/RECORD"):
                assert one.read(name) == other.read(name), name


@pytest.mark.slow
def test_the_wheel_runs_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sampled_sae, sampled_sae.kernels.configs as c, sys; "
        "assert sampled_sae.__file__.startswith(sys.argv[1]); assert c.__file__.startswith(sys.argv[1]); "
        "assert 'kernels' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_link_of_the_checkout():
    link = ROOT / "sampled_sae" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_nothing_heavy_is_loaded_before_it_is_used():
    """Several times what torch takes to load: its compiler, and what spreads tensors over processes."""
    heavy = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint")
    heavy += ("sympy", "triton", "transformers", "matplotlib")
    program = f"""
import sys, torch
before = set(sys.modules)
import sampled_sae, sampled_sae.cli
sae = sampled_sae.SampledSAE(sampled_sae.SampledSAEConfig(d_in=8, d_sae=64, k=4))
sae(torch.randn(32, 8)).loss.backward()
sae.calibrate(torch.randn(32, 8))
sae.eval().encode_sparse(torch.randn(32, 8))
print([name for name in {heavy} if name in sys.modules and name not in before])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
