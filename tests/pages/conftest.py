import pytest
from browser import opened
from page_makers import command, make_run

from sampled_sae import load_inference
from sampled_sae.comparison import compare
from sampled_sae.training.activation_store import ActivationStore


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """See `make_run`."""
    return make_run(tmp_path_factory.mktemp("look"))


@pytest.fixture(scope="module")
def browser():
    with opened() as found:
        yield found


@pytest.fixture(scope="session")
def other(root):
    """Another SAE of the same activations, with more features."""
    command("train", root / "acts", root / "other", "--features 80 --k 4 --steps 20 --batch-size 128 --seed 1")
    return root / "other"


@pytest.fixture(scope="session")
def found(root, other):
    a, b = (load_inference(folder, say=lambda line: None) for folder in (root / "run", other))
    return compare(a, b, ActivationStore.open(root / "acts").holdout()[0], same=0.5)


@pytest.fixture(scope="session")
def looked(root):
    command("look", root / "run", root / "acts", "--features top:4 --contexts 2 --out", root / "look%of#a.html")
    return root / "look%of#a.html"
