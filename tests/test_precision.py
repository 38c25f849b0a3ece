"""Precision of a training's products: what is taken, what a resumed run compares, and torch's own switches."""

import json
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from makers import D, begun_training, same_weights, tokens

from sampled_sae import RowAdam, SAEGroup, SampledSAE, SampledSAEConfig
from sampled_sae import functional as F
from sampled_sae.cli import main
from sampled_sae.support.float32_products import float32_products, tf32_allowed
from sampled_sae.training.checkpoint import CHECKPOINT, read_checkpoint, write_checkpoint
from sampled_sae.training.precision import resolve_precision
from sampled_sae.training.sweep import run_sweep
from sampled_sae.training.train_config import TrainConfig
from sampled_sae.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("shortest_calibration", "switches")

BF16 = torch.autocast("cpu", torch.bfloat16)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SAE = SampledSAEConfig(d_in=D, d_sae=32, k=3, l=2.0, dead_after=10**6)
TRAIN = TrainConfig(steps=2, batch_size=8, lr=3e-3, log_every=1, checkpoint_every=2)
backends = torch.backends
# of a backend; torch's own `backends.mkldnn` sets that of all
OF_BACKENDS = [type(backends.mkldnn.matmul)(name, "all") for name in ("cuda", "mkldnn")]


@pytest.fixture
def shortest_calibration(monkeypatch):
    monkeypatch.setattr("sampled_sae.training.feed.CALIBRATION_TOKENS", 8)


def reset():
    torch.set_float32_matmul_precision("highest")
    for switch in (backends, *OF_BACKENDS, backends.cuda.matmul, backends.mkldnn.matmul):
        switch.fp32_precision = "none"


@pytest.fixture
def switches():
    """As they are when torch is imported, and again afterwards."""
    reset()
    yield
    reset()


def put(switch, value):
    """A step of a mix: by name of the switch."""
    if switch == "old":
        torch.set_float32_matmul_precision(value)
    elif switch == "older":
        backends.cuda.matmul.allow_tf32 = value
    else:
        own = {"cuda": backends.cuda.matmul, "cudnn": backends.cudnn, "mkldnn": OF_BACKENDS[1]}
        {"all": backends, **own}[switch].fp32_precision = value


# what a user has set, in this order, and whether products on a GPU then take TF32
MIXES = [
    ((), False),
    ((("old", "high"),), True),
    ((("old", "medium"),), True),
    ((("older", True),), True),
    ((("cuda", "tf32"),), True),
    ((("all", "tf32"),), True),
    ((("cuda", "ieee"),), False),
    ((("all", "ieee"),), False),
    ((("old", "high"), ("cuda", "ieee")), False),
    ((("old", "high"), ("all", "ieee")), True),
    ((("older", True), ("all", "ieee")), True),
    ((("cuda", "tf32"), ("older", False)), False),
    ((("all", "tf32"), ("old", "highest")), False),
    ((("all", "tf32"), ("cuda", "ieee")), False),
    ((("all", "ieee"), ("cuda", "tf32")), True),
    ((("all", "tf32"), ("cuda", "tf32")), True),
    ((("older", True), ("all", "tf32")), True),
    ((("cudnn", "tf32"),), True),
    ((("cudnn", "ieee"), ("all", "tf32")), False),
    ((("cudnn", "tf32"), ("cuda", "tf32")), True),
    ((("mkldnn", "tf32"),), False),
    ((("mkldnn", "bf16"), ("old", "high")), True),
]


@pytest.mark.parametrize(("mix", "expected"), MIXES, ids=str)
def test_every_mix_of_switches_is_read(mix, expected):
    for step in mix:
        put(*step)
    assert tf32_allowed() == expected


@pytest.mark.parametrize(("mix", "expected"), MIXES, ids=str)
def test_scores_work_with_every_mix(mix, expected):
    """The Triton form asks, to leave products in TF32 to cuBLAS."""
    pytest.importorskip("triton")
    x, W, b = tokens(3, 4, dtype=torch.float32), tokens(4, 5, dtype=torch.float32), torch.zeros(5)
    scores = F.column_scores(x, W, b, impl="torch")
    for step in mix:
        put(*step)
    torch.testing.assert_close(F.column_scores(x, W, b, impl="triton"), scores)


def shown(mix, choice=None):
    """What the switches say after a mix and a choice, and what they say where another is set then."""
    said = []
    for after in (None, backends, *OF_BACKENDS):
        for value in ("ieee", "tf32"):
            reset()
            for step in mix:
                put(*step)
            if choice is not None:
                choice()
            if after is not None:
                after.fp32_precision = value
            switches = (backends, *OF_BACKENDS, backends.cuda.matmul, backends.mkldnn.matmul)
            said.append([switch.fp32_precision for switch in switches])
    return said


@pytest.mark.parametrize(("mix", "_"), MIXES, ids=str)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_choice_leaves_every_switch_as_it_was(device, precision, mix, _):
    def fail():
        with suppress(KeyError), float32_products(precision, device):
            if device == CUDA:
                assert tf32_allowed() == (precision == "tf32")
            raise KeyError

    assert shown(mix, fail) == shown(mix)


def test_a_choice_on_a_cpu_is_that_of_its_own_switch():
    def choose():
        with float32_products("ieee", CPU):
            assert backends.mkldnn.matmul.fp32_precision == "ieee"
            assert tf32_allowed()

    medium = [("old", "medium")]
    assert shown(medium, choose) == shown(medium)
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize(
    ("precision", "device", "impl", "expected"),
    [
        ("auto", CPU, "torch", "fp32"),
        ("auto", CPU, "triton", "fp32"),
        ("auto", CUDA, "triton", "bf16"),
        ("auto", CUDA, "torch", "fp32"),
        ("bf16", CUDA, "triton", "bf16"),
        ("bf16", CPU, "triton", "bf16"),
        ("fp32", CUDA, "triton", "fp32"),
        ("fp32", CPU, "reference", "fp32"),
    ],
)
def test_what_a_precision_stands_for(precision, device, impl, expected):
    assert resolve_precision(precision, device, impl) == expected


@pytest.mark.parametrize(
    ("precision", "device", "impl", "message"),
    [
        ("bf16", CPU, "torch", "'bf16': impl='torch' multiplies float32"),
        ("bf16", CUDA, "reference", "'bf16': impl='reference' multiplies float32"),
        ("tf32", CPU, "torch", "'tf32': needs an NVIDIA GPU .* this is cpu"),
        ("tf32", CPU, "triton", "'tf32': needs an NVIDIA GPU .* this is cpu"),
    ],
)
def test_what_cannot_be_had_is_refused(precision, device, impl, message):
    with pytest.raises(ValueError, match=message):
        resolve_precision(precision, device, impl)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="precision='half': must be"):
        TrainConfig(precision="half")


def trained_by_hand(store):
    """The steps of TRAIN under autocast in a loop of one's own."""
    sae = SampledSAE(replace(SAE, impl="triton", row_grads=True, input_scale=store.scale))
    feed = Trainer(SAE, TRAIN, store, store.folder / "unused").feed
    sae.b_dec.data.copy_(feed.batch(0).median)
    optimizer = RowAdam(sae, lr=TRAIN.lr)
    for t in range(TRAIN.steps):
        for group in optimizer.param_groups:
            group["lr"] = TRAIN.lr_at(t)
        with BF16:
            out = sae(feed.batch(t).x, scaled=True)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return sae


@pytest.fixture(params=["trainer", "group", "command"])
def train(request, store, tmp_path):
    """A function of impl and precision that trains, by each of the ways to do so, and reads the SAE."""

    def run(impl, precision):
        folder = tmp_path / f"{impl} {precision}"
        sae, config = replace(SAE, impl=impl), replace(TRAIN, precision=precision)
        if request.param == "trainer":
            Trainer(sae, config, store, folder).run(progress=False)
        elif request.param == "group":
            SAEGroup({folder.name: sae}, config, store, tmp_path).run(progress=False)
        else:
            options = "--features 32 --k 3 --l 2 --dead-after 1000000 --steps 2 --batch-size 8 --lr 3e-3 --log-every 1"
            options += f" --checkpoint-every 2 --impl {impl} --precision {precision}"
            assert main(["train", str(store.folder), str(folder), *options.split(), "--quiet"]) == 0
        return SampledSAE.from_pretrained(folder), json.loads((folder / "run.json").read_text())

    return run


def test_bf16_is_that_of_autocast(train, store):
    pytest.importorskip("triton")
    found, run = train("triton", "bf16")
    assert run["train"]["precision"] == "bf16"
    for name, p in trained_by_hand(store).named_parameters():
        assert torch.equal(found.get_parameter(name), p), name


def test_auto_is_fp32_on_a_cpu(train):
    (found, run), (expected, _) = train("torch", "auto"), train("torch", "fp32")
    assert run["train"]["precision"] == "fp32"
    assert same_weights(found, expected)


def test_fp32_is_fp32_whatever_stands_around_it(store, tmp_path, monkeypatch):
    """Autocast and torch's switch, which is then what it was."""
    seen = []
    forward = SampledSAE.forward

    def noted(self, *args, **options):
        seen.append((backends.mkldnn.matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
        return forward(self, *args, **options)

    monkeypatch.setattr(SampledSAE, "forward", noted)
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", torch.bfloat16):
        Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False)
    assert seen == [("ieee", False)] * TRAIN.steps
    assert backends.mkldnn.matmul.fp32_precision == "bf16"


def test_a_run_goes_on_in_its_precision_alone(store, tmp_path):
    pytest.importorskip("triton")
    sae = replace(SAE, impl="triton")
    begun_training(sae, replace(TRAIN, precision="bf16"), store, tmp_path / "run", steps=1)
    with pytest.raises(ValueError, match=r"\(train: precision\): precision was 'bf16', is 'fp32'"):
        Trainer(sae, TRAIN, store, tmp_path / "run")
    assert Trainer(sae, replace(TRAIN, precision="bf16"), store, tmp_path / "run").step == 1


def test_a_run_of_an_earlier_version_goes_on_in_fp32(store, tmp_path):
    path = tmp_path / "run" / CHECKPOINT
    begun_training(SAE, TRAIN, store, path.parent, steps=1)
    state = read_checkpoint(path)
    del state["settings"]["train"]["precision"]
    write_checkpoint(path, state)
    assert Trainer(SAE, TRAIN, store, path.parent).step == 1
    assert Trainer(SAE, replace(TRAIN, precision="fp32"), store, path.parent).step == 1


def test_a_sweep_of_an_earlier_version_is_not_done_again(store, tmp_path):
    said = []
    run_sweep({"a": SAE}, TRAIN, store, tmp_path / "s", progress=False)
    path = tmp_path / "s" / "a" / "result.json"
    result = json.loads(path.read_text())
    assert result["settings"]["train"].pop("precision") == "fp32"
    path.write_text(json.dumps(result))
    run_sweep({"a": SAE}, TRAIN, store, tmp_path / "s", progress=False, say=said.append)
    assert said == ["[1/1] a: already evaluated"]


def test_the_command_says_what_is_wrong(store, tmp_path, capsys):
    options = ["--features", "48", "--k", "3", "--batch-size", "32", "--steps", "1"]
    assert main(["train", str(store.folder), str(tmp_path / "run"), *options, "--precision", "tf32"]) == 1
    assert "--precision" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
