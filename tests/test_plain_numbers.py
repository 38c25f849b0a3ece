"""Every number that a user can give becomes an int or a float at the door, or is refused there."""

import json
import math
from dataclasses import asdict, replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from makers import begun_training, make_sae, problem, tokens, write_store

from sampled_sae import ActivationStore, RowAdam, SampledSAE, SampledSAEConfig, TrainConfig, Trainer, formats
from sampled_sae import functional as F
from sampled_sae.bench import Settings
from sampled_sae.support.argument_checks import check_choice, check_integer, check_number, check_positive

WHOLE = [
    *(kind(3) for kind in (np.int8, np.uint16, np.int32, np.int64, np.uint64, np.float32, np.float64, np.longdouble)),
    *(torch.tensor(3, dtype=dtype) for dtype in (torch.uint8, torch.int32, torch.int64, torch.float32)),
    np.array(3),
    Decimal(3),
    Fraction(6, 2),
    3.0,
    3,
]
NUMBERS = [*WHOLE, np.float16(0.5), torch.tensor(0.25, dtype=torch.bfloat16), Decimal("0.5"), Fraction(1, 3), 0.1]
NO_NUMBERS = [True, np.True_, torch.tensor(True), "3", None, 3j, torch.tensor([3]), np.array([3.0]), [3], "nan"]


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_whole_numbers_become_ints(value):
    found = check_integer("n", value, 1)
    assert (type(found), found) == (int, 3)


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
@pytest.mark.parametrize("check", [lambda v: check_number("x", v, 0, 5), lambda v: check_positive("x", v)])
def test_numbers_become_ints_or_floats(value, check):
    found = check(value)
    assert type(found) in (int, float)
    assert found == pytest.approx(float(value), abs=0)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize(
    "check",
    [
        lambda v: check_integer("n", v, 0),
        lambda v: check_number("n", v, 0, None),
        lambda v: F.candidate_pool(torch.ones(4), v),
    ],
)
def test_what_is_no_number_is_refused(value, check):
    with pytest.raises((TypeError, ValueError), match=r"(n|size)=.*: must be a (whole|finite) number >= "):
        check(value)


@pytest.mark.parametrize("value", [2**63, 10**400, -1, math.nan, math.inf, np.float64("inf"), Decimal("Infinity")])
@pytest.mark.parametrize("name", ["seed", "dead_after"])
def test_a_whole_number_fits_64_bits(name, value):
    with pytest.raises(ValueError, match=rf"^{name}=.*: must be a whole number >= [01]"):
        SampledSAEConfig(d_in=3, d_sae=4, k=1, **{name: value})


@pytest.mark.parametrize("value", [1.5, np.float32(2.5), Decimal("0.1"), torch.tensor(0.5)], ids=repr)
def test_a_fraction_is_no_whole_number(value):
    for make in (lambda: SampledSAEConfig(d_in=value, d_sae=4, k=1), lambda: TrainConfig(steps=value)):
        with pytest.raises(TypeError, match="must be a whole number >= 1"):
            make()


@pytest.mark.parametrize("value", [1, 0, "no", None, np.array([True]), torch.tensor(True)], ids=repr)
def test_a_switch_is_true_or_false(value):
    with pytest.raises(TypeError, match=r"row_grads=.*: must be True or False"):
        SampledSAEConfig(d_in=3, d_sae=4, k=1, row_grads=value)


CONFIGS = {
    "numpy": {
        "d_in": np.int64(12),
        "d_sae": np.int64(96),
        "k": np.float32(3),
        "l": np.float64(2),
        "score": np.str_("entropy"),
        "pool_every": np.int32(2),
        "k_aux": np.uint8(4),
        "aux_pool": np.int64(16),
        "dead_after": np.int64(300),
        "threshold_decay": np.float32(0.5),
        "score_tokens": np.float16(0.5),
        "aux_coefficient": np.float32(0.25),
        "apply_b_dec_to_input": np.True_,
        "seed": np.uint64(7),
        "input_scale": np.float64(0.5),
    },
    "torch": {
        "d_in": torch.tensor(12),
        "d_sae": torch.tensor(96),
        "k": torch.tensor(3),
        "l": torch.tensor(2.0),
        "aux_coefficient": torch.tensor(0.25),
        "seed": torch.tensor(7),
    },
    "others": {"d_in": 12.0, "d_sae": Fraction(96), "k": Decimal(3), "l": Fraction(5, 2), "seed": 2**63 - 1},
}
TRAIN = {"steps": np.int64(6), "batch_size": torch.tensor(50), "lr": np.float32(0.01), "clip": Decimal(1)}
TRAIN |= {"warmup": Fraction(1, 10), "seed": np.int64(2**62), "log_every": 2.0, "moments": np.str_("float32")}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_sae_of_any_numbers_is_trained_resumed_and_saved(tmp_path, kind):
    store = ActivationStore.open(write_store(tmp_path / "store"))
    config, train = SampledSAEConfig(**CONFIGS[kind]), TrainConfig(**TRAIN)
    for values in (config.to_dict(), asdict(train)):
        assert {type(value) for value in values.values()} <= {int, float, str, bool, type(None)}
        assert json.loads(json.dumps(values)) == values
    begun_training(config, train, store, tmp_path / "run", steps=1)
    resumed = Trainer(config, train, store, tmp_path / "run")
    assert resumed.step == 1
    resumed.run(progress=False)
    loaded = SampledSAE.from_pretrained(tmp_path / "run")
    assert loaded.cfg == replace(config, input_scale=0.5)
    assert (loaded.cfg.d_sae, loaded.cfg.k) == (96, 3)


def test_what_the_functions_and_methods_take():
    t = {name: value.float() for name, value in problem(20, 12, 96).items()}
    encoder = (t["x"], t["W_enc"], t["b_enc"])
    expected = F.sampled_topk(*encoder, k=3, l=2.5).to_dense()
    for k, l in ((np.int64(3), np.float32(2.5)), (torch.tensor(3), Decimal("2.5")), (Fraction(3), Fraction(5, 2))):
        assert torch.equal(F.sampled_topk(*encoder, k=k, l=l).to_dense(), expected)
    for size in (2.0, np.int64(2), torch.tensor(2)):
        assert F.candidate_pool(torch.arange(5.0), size).tolist() == [3, 4]
    sae = make_sae()
    for l0 in (np.float32(2.5), Decimal("2.5"), Fraction(5, 2), torch.tensor(2.5)):
        assert sae.calibrate(tokens(64, 12), l0) == sae.calibrate(tokens(64, 12), 2.5)


def test_what_an_optimizer_keeps_can_be_saved():
    sae = make_sae(torch.float32)
    numbers = {"lr": np.float32(0.01), "betas": (Decimal("0.9"), np.float64(0.99)), "eps": Fraction(1, 10**8)}
    optimizer = RowAdam(sae, weight_decay=torch.tensor(0.0), clip=np.float64(2), mode=np.str_("lazy"), **numbers)
    group = optimizer.state_dict()["param_groups"][0]
    assert all(type(value) in (int, float) for value in (group["lr"], *group["betas"], group["eps"], optimizer.clip))
    assert type(optimizer.mode) is str
    with pytest.raises(ValueError, match=r"betas\[1\]=1.0: must be below 1"):
        RowAdam(sae, betas=(0.9, Decimal(1)))


def test_what_formats_and_sizes_take(tmp_path):
    sae = make_sae(torch.float32, l=None, select="token")
    formats.export(sae, tmp_path / "a", to="sparsify", k=np.int64(3), scale=np.float32(0.5))
    formats.export(sae, tmp_path / "b", to="sparsify", k=3, scale=0.5)
    assert (tmp_path / "a" / "cfg.json").read_bytes() == (tmp_path / "b" / "cfg.json").read_bytes()
    loaded = formats.load(tmp_path / "a", k=torch.tensor(2.0), scale=Fraction(1, 4))
    assert (loaded.cfg.k, type(loaded.cfg.k), loaded.cfg.input_scale) == (2, int, 0.25)
    size = Settings(batch=np.int64(8), rounds=2.0, seconds=Decimal(1))
    assert (type(size.batch), type(size.rounds), type(size.seconds)) == (int, int, float)


def test_a_choice_comes_back_as_pythons_own():
    assert type(check_choice("score", np.str_("l2"), ("l1", "l2"))) is str
    for value in (np.array(["l2"]), ["l2"], 1, None):
        with pytest.raises(ValueError, match=r"score=.*: must be one of 'l1', 'l2'"):
            check_choice("score", value, ("l1", "l2"))
