"""Pools and kept entries of several processes are those of one on all tokens, ties and empty processes included."""

import pytest
import torch
from cases import batches, mesh_of, spread, start, target_of
from selections import encode_alone, encode_on_mesh, random_cases, tie_nearly

from sampled_sae import SampledSAE

SETTINGS = {"l": 2.0, "impl": "torch"}


@pytest.mark.parametrize(
    ("shape", "number"),
    [((2, 1), 24), ((3, 1), 24), ((1, 3), 24), ((2, 2), 24)]
    + [pytest.param(shape, 24, marks=pytest.mark.slow) for shape in ((4, 1), (1, 4), (1, 2))],
    ids=str,
)
def test_kept_entries_are_those_of_one_process(workers, shape, number):
    assert_same_entries(workers, shape, random_cases(number, shape[0]), 1e-12)


@pytest.mark.parametrize(
    ("shape", "number"),
    [((2, 1), 16), ((1, 3), 16), ((2, 2), 16)]
    + [pytest.param(shape, 40, marks=pytest.mark.slow) for shape in ((3, 1), (1, 2))],
    ids=str,
)
def test_a_screen_changes_none_of_them(workers, shape, number):
    assert_same_entries(workers, shape, random_cases(number, shape[0], torch.float32, "bf16"), 1e-5)


def pools(sae, data, rank):
    """Which of all features are candidates in each batch."""
    with torch.no_grad():
        tie_nearly(sae.layout.local(sae.W_enc), sae.layout.local(sae.b_enc))
    found = []
    for of_step in data:
        pool = sae._find_pool(sae._encoder_of(torch.cat(of_step) if rank is None else of_step[rank], by_batch=True))
        found.append(pool.members if pool.taken is None else pool.members[pool.taken])
    return found


def opened_on_mesh(shape, rule, x):
    """The share of columns that a screen opens to find a pool."""
    sae, rank = spread(shape, rule)
    encoder = sae._encoder_of(x[rank], by_batch=True)
    sae._find_pool(encoder)
    return encoder.operands.screen.looks.shares()["columns"]


@pytest.mark.slow
def test_columns_whose_score_is_known_are_not_opened(workers):
    """Features that surely fire have one score, which ties with that of the last candidate."""
    rule = {
        "k": 2,
        "l": 1.0,
        "impl": "triton",
        "dtype": torch.float32,
        "screen": "bf16",
        "d_sae": 24,
        "score": "uniform",
    }
    x = batches([[64, 64]], 2, dtype=torch.float32)[0]
    assert max(workers.run(2, opened_on_mesh, (2, 1), rule, x)) < 0.5


def pools_on_mesh(shape, rules, data):
    saes = [spread(shape, rule) for rule in rules]
    first = saes[0][0].layout.weights.first
    return [[members + first for members in pools(sae, data, rank)] for sae, rank in saes]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 1), (2, 2)], ids=str)
def test_nor_does_that_of_the_triton_form(workers, shape):
    """An odd number of candidates takes one of two columns that are all but the same."""
    common = {"k": 5, "l": 1.0, "impl": "triton", "dtype": torch.float32, "screen": "bf16", "d_sae": 24}
    drawn = {"score": "l2_squared", "pool": "sample"}
    each = [{}, {}, drawn, drawn, {"score": "uniform"}]
    rules = [{**common, "seed": seed, **rule} for seed, rule in enumerate(each)]
    data = batches([[9, 5], [6, 0]], 2, dtype=torch.float32)
    ranks = workers.run(shape[0] * shape[1], pools_on_mesh, shape, rules, data)
    for i, rule in enumerate(rules):
        for step, expected in enumerate(pools(start({**rule, "screen": "off"}), data, None)):
            of_features = ranks[: shape[1]]  # of one set of tokens
            assert torch.equal(torch.cat([found[i][step] for found in of_features]), expected), (rule, step)
            assert all(torch.equal(found[i][step], ranks[j % shape[1]][i][step]) for j, found in enumerate(ranks))


def assert_same_entries(workers, shape, cases, tolerance):
    results = workers.run(shape[0] * shape[1], encode_on_mesh, shape, cases)
    for i, (expected, (settings, counts, _)) in enumerate(zip(encode_alone(cases), cases)):
        for step, (tokens, features, values, (n_tokens, n_features)) in enumerate(expected):
            for rank, found in results:
                first = sum(counts[:rank])
                mine = (tokens >= first) & (tokens < first + counts[rank])
                where = f"case {i}, {settings}, counts {counts}, batch {step}, rank {rank}"
                ours = found[i][step]
                assert ours[3] == (counts[rank], n_features), where
                assert torch.equal(ours[0], tokens[mine] - first), where
                assert torch.equal(ours[1], features[mine]), where
                torch.testing.assert_close(ours[2], values[mine], rtol=tolerance, atol=tolerance)
            assert n_tokens == sum(counts)


# of all processes, not of the tokens here
WHOLE = ("b_dec", "W_dec", "W_enc", "calibrated", "members", "mse")
USED = {
    "pool": SETTINGS,
    "topk": {**SETTINGS, "l": None, "select": "token"},
    "fixed set": {**SETTINGS, "inference": "pool", "inference_pool": 30},
    "transcoder": {**SETTINGS, "d_out": 7, "skip": True, "output_scale": 0.6, "inference": "batch"},
}


def use(sae, x):
    """What the rest of the module makes of tokens x."""
    target = target_of(sae, x)
    sae.init_b_dec(x, target)
    found = {name: sae.layout.whole(getattr(sae, name)).clone() for name in ("b_dec", "W_dec", "W_enc")}
    found["calibrated"] = sae.calibrate(x, 2.5)
    if sae.cfg.inference == "pool":
        found["members"] = sae.layout.whole(sae.inference_members)
    sae.eval()
    found["codes"] = sae.encode(x).detach()
    sparse = sae.encode_sparse(x)
    found["sparse"] = sparse.to_dense().detach()
    found["decoded"] = sae.decode(sparse, x).detach()
    found["decoded from dense"] = sae.decode(found["codes"], x).detach()
    out = sae(x, target)
    found["mse"], found["x_hat"] = out.mse.detach(), out.x_hat.detach()
    found["above"] = sae.encode_above_threshold(x).to_dense().detach()
    return found


def use_on_mesh(shape, counts, settings, folder):
    sae, rank = spread(shape, settings)
    found = use(sae, batches([counts], 1)[0][rank])
    sae.save_pretrained(folder)
    return rank, found


@pytest.mark.parametrize(("shape", "counts"), [((2, 1), [9, 0]), ((1, 2), [9]), ((2, 2), [9, 4])], ids=str)
@pytest.mark.parametrize("settings", USED.values(), ids=USED)
def test_the_rest_of_the_module(workers, tmp_path, shape, counts, settings):
    x = torch.cat(batches([counts], 1)[0])
    expected = use(start(settings), x)
    for rank, found in workers.run(shape[0] * shape[1], use_on_mesh, shape, counts, settings, tmp_path):
        assert found.keys() == expected.keys()
        tokens = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        for name, value in expected.items():
            value = value if name in WHOLE else value[tokens]
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    saved = SampledSAE.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(saved.encode(x), expected["codes"], rtol=1e-9, atol=1e-11)


def faults(shape):
    """What is said of a batch that cannot be computed; a good one goes through afterwards."""
    sae, _ = spread(shape, SETTINGS)
    (x, *_), said = batches([[5]], 1)[0], []
    bad = x.clone()
    bad[2, 1] = torch.nan
    last = sae.layout.mesh.rank == shape[0] * shape[1] - 1
    for given in (bad if last else x, x[:, :7] if last else x, x[:0], x[: 4 if last else 5]):
        try:
            sae(given)
            said.append(None)
        except ValueError as error:
            said.append(str(error))
    sae(x).loss.backward()
    return said


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=str)
def test_a_batch_that_one_process_refuses_is_refused_by_all(workers, shape):
    first, last = workers.run(2, faults, shape)
    where = "in batch 1 of sampled_sae.distributed"
    assert first[0] == f"x: rank 1 refused its tokens {where} (NaN, inf, a wrong shape: it says why)"
    assert last[0] == f"rank 1, {where}: x: 1 of 60 values are NaN or inf, the first at (2, 1)"
    assert "rank 1 refused" in first[1]
    assert "d_in=12" in last[1]
    assert "no process has a token" in first[2]
    assert first[2] == last[2]
    if shape == (1, 2):
        assert first[3] == last[3]
        assert "[5, 4] tokens on the processes of the dimension 'feature'" in first[3]
    else:
        assert first[3] is None


def out_of_memory(shape):
    sae, _ = spread(shape, SETTINGS)
    (x, *_), said = batches([[5]], 1)[0], None
    with pytest.MonkeyPatch.context() as patch:
        if sae.layout.mesh.rank == 1:
            patch.setattr("sampled_sae.impl.layer_parts.tokens_and_goal", lambda *args: torch.empty(1 << 60))
        try:
            sae(x)
        except (RuntimeError, ValueError) as error:
            said = str(error)
    sae(x).loss.backward()
    return said


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=str)
def test_a_process_without_memory_for_its_batch_stops_all(workers, shape):
    first, last = workers.run(2, out_of_memory, shape)
    assert "x: rank 1 refused its tokens" in first
    assert "memory" in last


def encoded_alone(bad_rank):
    """What each way to encode says of NaN that one process was given, or how many entries it has of good tokens."""
    sae, rank = spread((2, 2), SETTINGS)
    sae.calibrate(batches([[5, 5]], 1)[0][rank])
    sae.eval()
    x, said = batches([[5, 4]], 1)[0][rank], []
    bad = x.clone()
    bad[2, 1] = torch.nan
    for encode in (sae.encode, sae.encode_sparse, sae.encode_above_threshold):
        for given in (bad if sae.layout.mesh.rank == bad_rank else x, x):
            try:
                said.append(encode(given).shape[0])
            except ValueError as error:
                said.append(str(error))
    return said


def test_nan_of_one_process_stops_the_encoding_of_those_that_share_its_tokens(workers):
    results = workers.run(4, encoded_alone, 3)
    assert [len(said) for said in results] == [6] * 4
    for said in results[:2]:
        assert all(isinstance(n, int) for n in said)
    for found, fault in (
        (results[2][::2], "x: rank 3 refused its tokens"),
        (results[3][::2], "x: 1 of 48 values are NaN"),
    ):
        assert all(fault in text for text in found)
    assert all(isinstance(n, int) for said in results[2:] for n in said[1::2])


def faulty_targets(shape):
    sae, rank = spread(shape, {**SETTINGS, "d_out": 7})
    x = batches([[5] * shape[0]], 1)[0][rank]
    target = target_of(sae, x)
    bad = target.clone()
    bad[2, 1] = torch.nan
    last, said = sae.layout.mesh.rank == 1, []
    for given in (bad if last else target, None if last else target):
        try:
            sae(x, given)
        except ValueError as error:
            said.append(str(error))
    sae(x, target).loss.backward()
    return said


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=str)
def test_targets_that_one_process_refuses_are_refused_by_all(workers, shape):
    first, last = workers.run(2, faulty_targets, shape)
    assert all("rank 1 refused" in text for text in first)
    assert [len(first), len(last)] == [2, 2]
    assert "target: 1 of 35 values are NaN or inf" in last[0]
    assert "target=None: a transcoder" in last[1]


def refusals():
    from torch.distributed.device_mesh import init_device_mesh

    from sampled_sae.distributed import parallelize

    mesh, said = mesh_of((1, 2)), []
    for sae, given in (
        (torch.nn.Linear(2, 2), mesh),
        (start(SETTINGS), 3),
        (start(SETTINGS), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))),
        (start({**SETTINGS, "impl": "reference"}), mesh),
        (start({**SETTINGS, "d_sae": 1, "k": 1, "l": None}), mesh),
        (spread((1, 2), SETTINGS)[0], mesh),
    ):
        try:
            parallelize(sae, given)
        except (TypeError, ValueError) as error:
            said.append(str(error))
    return said


def test_what_cannot_be_spread(workers):
    named = ["sae=Linear", "mesh=int", "mesh.mesh_dim_names=('tp',)", "impl='reference'", "d_sae=1"]
    named += ["sae: is spread"]
    for said in workers.run(2, refusals):
        assert [text[: len(name)] for text, name in zip(said, named)] == named
