"""`python -m benchmarks.study real`: rows on a store of activations."""

import shlex
import shutil

import pytest
import torch
from makers import D, write_store
from safetensors.torch import save_file

from benchmarks import study
from benchmarks.study_parts import real, report_real
from benchmarks.study_parts.probing import area_under_roc, logistic
from benchmarks.study_parts.rows import Rows
from benchmarks.study_parts.sharing import shared, topics_jaccard
from benchmarks.study_parts.training import train_ours
from benchmarks.study_parts.variants import BATCHES, DEAD, DENSE, PARTS, REAL, TIME
from sampled_sae import SampledSAE, SampledSAEConfig, TrainConfig
from sampled_sae.training.activation_store import ActivationStore

MADE_AT = ("cpu_seconds", "date")


def options_of(folder, *more):
    store = folder / "acts"
    if not store.exists():
        write_store(store, n=(3000,), n_holdout=300)
    small = ["--features", "64", "--k", "4", "--tokens", "4096", "--threads", "1"]
    return ["real", str(store), "--name", "made", *small, *places(folder), *more]


def places(folder):
    return ["--out", str(folder / "out"), "--folder", str(folder / "kept")]


def rows_of(folder, part=""):
    return Rows(folder / "out" / f"real_made{part}.csv").rows


def without(row, *names):
    return {name: value for name, value in row.items() if name not in (*MADE_AT, *names)}


def test_rows_on_a_store_come_once_and_come_out_the_same_again(tmp_path, capsys):
    begin = options_of(tmp_path, "--seeds", "0", "--only")
    study.main([*begin, "batchtopk", "sample-l2-l4", "topk"])
    batch, drawn, topk = before = rows_of(tmp_path)
    assert [row["tokens"] for row in before] == [4096] * 3
    assert batch["fvu"] == batch["threshold_fvu"] == batch["pool_fvu"]
    assert drawn["pool_features"] == 16
    assert 0 < drawn["threshold_fvu"] != drawn["batch_fvu"]
    assert topk["inference"] == "token"
    assert topk["threshold_fvu"] is None
    study.main([*begin, "batchtopk", "topk"])
    assert "2 of 2 rows" in capsys.readouterr().out
    command = shlex.split(drawn["command"])
    assert command[:3] == ["python", "-m", "benchmarks.study"]
    study.main([*command[3:], "--threads", "1", *places(tmp_path)])
    for old, new in zip(before, rows_of(tmp_path), strict=True):
        assert without(new) == without(old)


def test_stages_make_the_row_of_both(tmp_path):
    begin = options_of(tmp_path, "--seeds", "1", "--only", "top-l2-l2")
    study.main([*begin, "--stage", "measure"])
    assert not rows_of(tmp_path)
    study.main([*begin, "--stage", "train"])
    assert not rows_of(tmp_path)
    study.main([*begin, "--stage", "measure"])
    [measured] = rows_of(tmp_path)
    study.main([*begin, "--again"])
    assert without(measured) == without(rows_of(tmp_path)[0])
    assert measured["cpu_seconds"] >= 0


def test_probes_of_labelled_activations(tmp_path):
    torch.manual_seed(0)
    options = options_of(tmp_path, "--seeds", "0", "--only")
    # a class of the first task is told by a direction of its own, those of the second by nothing
    labels = torch.arange(80) % 2
    x = torch.randn(80, 3, D)
    told = x + 9 * labels[:, None, None] * torch.nn.functional.one_hot(torch.tensor(3), D)
    folder = tmp_path / "kept" / "real_made"
    folder.mkdir(parents=True)
    tasks = {"topic.x": told, "topic.labels": labels, "void.x": x, "void.labels": labels.clone()}
    save_file({name: t.contiguous() for name, t in tasks.items()}, folder / "labelled.safetensors")
    study.main([*options, DENSE, "batchtopk"])
    dense, row = rows_of(tmp_path)
    assert dense["probe_topic"] > 0.99 > 0.75 > dense["probe_void"]
    for mode in ("threshold", "batch"):
        assert row[f"{mode}_probe_topic_20"] > 0.99 > 0.75 > row[f"{mode}_probe_void_20"]
        assert row[f"{mode}_probe_5"] == (row[f"{mode}_probe_topic_5"] + row[f"{mode}_probe_void_5"]) / 2
        assert 0 < row[f"{mode}_topics_jaccard"] < 1


def test_an_unknown_sae_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"--only none: must be of activations, batchtopk"):
        study.main(["real", str(tmp_path), "--name", "x", "--only", "none"])


def test_every_rule_is_there_once():
    configs = [SampledSAEConfig(576, 8192, 32, **v.rule) for v in REAL.values() if v.name != DENSE and not v.nested]
    assert len({(c.l, c.score, c.pool, c.select) for c in configs}) == len(configs)


def test_parts_hold_different_saes():
    names = [name for part in PARTS.values() for name in part]
    assert len(set(names)) == len(names)
    for part, variants in PARTS.items():
        assert all((variant.of in REAL) == (part != "rules") for variant in variants.values())


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A study, and what its trainings begin with: (TrainConfig, config, decoder rows) of `trained(variant, seed)`."""
    store = ActivationStore.open(write_store(tmp_path / "acts", n=(3000,), n_holdout=300))
    made = real.RealStudy(store, real.Setup(64, 4, 40_960, 3e-3, None, None, tmp_path), None)

    class BegunError(Exception):
        pass

    def train_ours(config, train, batches, begin, aligned, rows):
        raise BegunError(config, train, begin, rows)

    monkeypatch.setattr(real, "train_ours", train_ours)

    def begin(variant, seed=0):
        with pytest.raises(BegunError) as stopped:
            made.trained(variant, seed)
        return stopped.value.args

    return made, begin


def test_what_a_variant_changes_of_a_training(begun):
    _, begin = begun
    plain, train, _, rows = begin(REAL["top-l2-l4"])
    assert (train.steps, train.batch_size, train.lr, train.adam, rows) == (40, 1024, 3e-3, "dense", None)
    longer, more, _, _ = begin(TIME["top-l2-l4-longer"])
    assert (longer, more.steps) == (plain, 100)
    assert begin(TIME["batchtopk-tokens-longer"])[1].steps == 100
    assert begin(TIME["batchtopk-tokens-longer"])[3] is not None
    _, small, _, _ = begin(BATCHES["top-l2-l4-b256"])
    assert (small.steps, small.batch_size, small.lr) == (160, 256, 1.5e-3)
    assert begin(DEAD["batchtopk-decayed"])[1].adam == "decayed"
    assert plain.dead_after == 2048
    assert begin(DEAD["batchtopk-soon"])[0].dead_after == 5 * 1024


def test_decoders_that_begin_at_tokens(begun):
    study_of, begin = begun
    _, _, origin, rows = begin(DEAD["batchtopk-tokens"], 1)
    assert rows.shape == (64, D)
    towards = torch.nn.functional.normalize(study_of.start * study_of.store.scale - origin, dim=1)
    nearest = (rows @ towards.T).max(1)
    assert torch.allclose(nearest.values, torch.ones(64), atol=1e-5)
    assert len(nearest.indices.unique()) == 64
    assert not torch.equal(rows, begin(DEAD["batchtopk-tokens"], 2)[3])


def test_training_from_given_rows_by_a_mode_of_adam():
    config = SampledSAEConfig(D, 32, 4, l=2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 64, D, generator=generator)
    given = torch.nn.functional.normalize(torch.randn(32, D, generator=generator), dim=1)
    still = train_ours(config, TrainConfig(6, 64, lr=0), x, torch.zeros(D), rows=given)
    assert torch.allclose(still.W_dec, given, atol=1e-6)
    assert torch.allclose(still.W_enc.T, given, atol=1e-6)
    modes = [
        train_ours(config, TrainConfig(6, 64, lr=1e-2, adam=mode), x, torch.zeros(D)) for mode in ("dense", "decayed")
    ]
    assert not torch.equal(modes[0].W_dec, modes[1].W_dec)


def test_pairs_of_seeds_and_tables(tmp_path):
    out = tmp_path / "out"
    study.main(options_of(tmp_path, "--seeds", "0", "1", "--only", "batchtopk", "topk"))
    study.main(options_of(tmp_path, "--seeds", "0", "--part", "dead", "--only", "batchtopk-aligned"))
    kept = tmp_path / "kept" / "real_made" / "saes"
    # what agrees with itself wholly
    shutil.copytree(kept / "batchtopk_4096_0", kept / "batchtopk_4096_2")
    study.main(["pairs", "--name", "made", "--tokens", "4096", *places(tmp_path)])
    pairs = {(row["name"], row["seed"]): row for row in rows_of(tmp_path, "_pairs")}
    assert set(pairs) == {("batchtopk", "0-1"), ("batchtopk", "0-2"), ("batchtopk", "1-2"), ("topk", "0-1")}
    itself = pairs["batchtopk", "0-2"]
    assert [itself[name] for name in ("cosine", "shared", "shared_entries")] == pytest.approx([1, 1, 1])
    assert 0 < pairs["batchtopk", "0-1"]["cosine"] < 1
    [aligned] = rows_of(tmp_path, "_dead")
    assert aligned["alignment"] > rows_of(tmp_path)[0]["alignment"]
    made = report_real.tables(out)
    quality = made[out / "real_made.md"]
    fvu = [row["fvu"] for row in rows_of(tmp_path) if row["name"] == "topk"]
    assert f"| topk | 2 | {sum(fvu) / 2:.3f} ±{abs(fvu[0] - fvu[1]) / 2:.3f} |" in quality
    assert "| batchtopk | 2 |" in made[out / "real_made_inference.md"]
    # nothing was probed
    assert not [path.name for path, text in made.items() if "probe" in text]
    assert "topk" in made[out / "real_made_shared.md"]
    lines = made[out / "real_made_dead.md"].splitlines()
    assert [line.split("|")[1:3] for line in lines[2:4]] == [[" batchtopk ", " 2 "], [" batchtopk-aligned ", " 1 "]]


def test_a_table_of_batches_has_each_rule_by_size(tmp_path):
    def put(part, *names):
        rows = Rows(tmp_path / f"real_made{part}.csv")
        for name in names:
            variant = {**REAL, **BATCHES}[name]
            rows.put({"name": name, "seed": 0, "tokens": 5, "batch_size": variant.batch_size, "threshold_fvu": 0.5})

    put("", "top-l2-l16", "batchtopk", "top-l2-l4")
    put("_batches", "batchtopk-b4096", "top-l2-l16-b256", "batchtopk-b256")
    # there are no other rules to tell apart
    [(path, text)] = report_real.tables(tmp_path).items()
    assert path.name == "real_made_batches.md"
    lines = text.splitlines()
    shown = [line.split("|")[1].strip() for line in lines if line.startswith("| ") and "---" not in line]
    ours = [f"batchtopk-b{size}" for size in (256, 1024, 4096)]
    assert shown == ["SAE", *ours, "top-l2-l4-b1024", "top-l2-l16-b256", "top-l2-l16-b1024"]


def test_a_table_of_longer_trainings_says_what_they_cost(tmp_path):
    for part, name, seconds in (("", "batchtopk", 10.0), ("_time", "batchtopk-longer", 25.0)):
        row = {"name": name, "seed": 0, "tokens": 5, "batch_size": 1024, "threshold_fvu": 0.5, "cpu_seconds": seconds}
        Rows(tmp_path / f"real_made{part}.csv").put(row)
    [(_, text)] = report_real.tables(tmp_path).items()
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| ")]
    at = cells[0].index("CPU seconds")
    assert [(line[1], line[at]) for line in cells[2:]] == [("batchtopk", "10"), ("batchtopk-longer", "25")]


@pytest.mark.parametrize(("fvus", "ticks"), [((0.11, 0.22), [0.12, 0.15, 0.2]), ((1.5, 2.0), [])])
def test_the_ticks_of_a_plot_lie_among_its_points(tmp_path, fvus, ticks):
    pytest.importorskip("matplotlib")
    from benchmarks.study_parts.plots import real_tradeoff

    rows = Rows(tmp_path / "real_made.csv")
    for l, fvu in zip((4, 16), fvus, strict=True):
        about = {"name": f"top-l2-l{l}", "seed": 0, "tokens": 5, "l": l, "pool": "top"}
        rows.put({**about, "threshold_fvu": fvu, "threshold_first_share": 0.5})
    [axis] = real_tradeoff(rows).axes
    assert list(axis.get_xticks()) == ticks


def test_aligned_training_keeps_the_inner_product():
    config = SampledSAEConfig(D, 32, 4, l=None)
    x = torch.randn(6, 64, D, generator=torch.Generator().manual_seed(0))
    sae = train_ours(config, TrainConfig(6, 64, lr=1e-2), x, torch.zeros(D), aligned=True)
    assert torch.allclose((sae.W_enc.T * sae.W_dec).sum(1), torch.ones(32), atol=1e-5)
    free = train_ours(config, TrainConfig(6, 64, lr=1e-2), x, torch.zeros(D))
    assert not torch.allclose((free.W_enc.T * free.W_dec).sum(1), torch.ones(32), atol=1e-2)


@pytest.mark.parametrize("n", [40, 400])
def test_logistic_regression_is_where_its_gradient_is_zero(n):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    y = (x @ torch.tensor([1.0, -2, 0], dtype=torch.float64) + torch.randn(n, generator=generator) > 0.5).double()
    w = logistic(x, y)
    error = torch.sigmoid(x @ w[:-1] + w[-1]) - y
    assert torch.allclose(x.T @ error + w[:-1], torch.zeros(3, dtype=torch.float64), atol=1e-6)
    assert abs(float(error.sum())) < 1e-6


def test_area_under_roc_counts_ties_half():
    scores, is_in = torch.tensor([1.0, 2, 2, 3, 0]), torch.tensor([True, True, False, False, False])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[is_in] for b in scores[~is_in]]
    assert area_under_roc(scores, is_in) == pytest.approx(float(sum(pairs)) / len(pairs))


def test_first_features_and_topics_by_hand():
    """Six features of one size: five tokens have the first alone, one has all the others."""
    sae = SampledSAE(SampledSAEConfig(6, 6, 0.25, l=None)).eval()
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(6))
        sae.W_enc.copy_(torch.eye(6))
    x = torch.eye(6)[[0, 0, 0, 0, 0, 1]]
    x[5, 1:] = 1
    sae.calibrate(x, l0=10 / 6)
    found = shared(sae, sae.encode_sparse, x, batch_size=6)
    squares = float((x - x.mean(0)).square().sum())
    assert found["first_share"] == pytest.approx(1 - 5 / squares)
    assert found["rare_entries"] == 0
    assert found["rare_size"] is None
    z = torch.tensor([[4.0, 4, 1, 0], [0, 5, 5, 0]])
    assert topics_jaccard(z, torch.tensor([0, 1])) == pytest.approx(2 / 3)
    assert topics_jaccard(torch.tensor([[9.0, 0.5], [0, 9]]), torch.tensor([0, 1])) == 0
