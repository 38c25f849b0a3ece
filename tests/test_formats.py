"""Conversions to the peers' files and back, without the peers: round trips, meaning of the files, errors, commands."""

import json
import subprocess
import sys

import pytest
import torch
from makers import make_sae, tokens, write_store
from safetensors.torch import load_file, save_file

from sampled_sae import SampledSAE, formats
from sampled_sae.cli import main

RULES = {
    "l=1": {"l": 1.0},
    "l=4, entropy": {"l": 4.0, "score": "entropy", "threshold_decay": 0.9, "aux_pool": 7, "dead_after": 30},
    "batchtopk": {"l": None, "seed": 3},
    "topk": {"l": None, "select": "token"},
    "token in a pool": {"l": 2.0, "select": "token"},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FILES = {
    "saelens": ("sae_weights.safetensors", "cfg.json"),
    "dictionary_learning": ("ae.pt", "config.json"),
    "sparsify": ("sae.safetensors", "cfg.json"),
}
OURS = ("config.json", "sae.safetensors")


def trained(dtype=torch.float32, **rule):
    """An SAE with decoder rows away from unit norm, counts of idle tokens and a calibrated threshold."""
    sae = make_sae(dtype, **rule)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, 96).to(dtype).unsqueeze(1))
    for seed in range(2):
        sae(tokens(9, 12, dtype=dtype, seed=seed))
    sae.calibrate(tokens(200, 12, dtype=dtype, seed=7))
    return sae


def rule_for(to):
    """sparsify takes SAEs with a threshold only when told to."""
    return {"inference": "topk"} if to == "sparsify" else {}


def tensors_of(folder, to):
    file = folder / FILES[to][0]
    return torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)


def same_tensors(a, b):
    return set(a) == set(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def same_files(a, b, names):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def without_extra(folder):
    (folder / "sampled_sae.safetensors").unlink()
    return folder


@pytest.mark.parametrize("to", formats.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_ours_to_theirs_to_ours_gives_the_same_files(tmp_path, to, dtype, rule):
    sae = trained(dtype, **RULES[rule])
    sae.save_pretrained(tmp_path / "ours")
    for i, scale in enumerate((1.0, 0.25, 0.37)):
        folder = tmp_path / f"theirs{i}"
        written = formats.export(sae, folder, to=to, scale=scale, **rule_for(to))
        assert sorted(written) == sorted(folder.iterdir())
        formats.load(folder).save_pretrained(tmp_path / f"back{i}")
        assert same_files(tmp_path / "ours", tmp_path / f"back{i}", OURS)


@pytest.mark.parametrize("to", formats.FORMATS)
def test_an_input_that_is_not_centred_comes_back_too(tmp_path, to):
    sae = trained(apply_b_dec_to_input=False, k=4.0)
    sae.save_pretrained(tmp_path / "ours")
    said = []
    formats.export(sae, tmp_path / "theirs", to=to, scale=0.3, say=said.append, **rule_for(to))
    assert any("b_dec W_enc is added to b_enc" in line for line in said) == (to != "saelens")
    formats.load(tmp_path / "theirs").save_pretrained(tmp_path / "back")
    assert same_files(tmp_path / "ours", tmp_path / "back", OURS)


@pytest.mark.parametrize("to", formats.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_theirs_to_ours_to_theirs_keeps_the_tensors(tmp_path, to, dtype, rule):
    formats.export(trained(dtype, **RULES[rule]), tmp_path / "theirs", to=to, **rule_for(to))
    loaded = formats.load(without_extra(tmp_path / "theirs"))
    formats.export(loaded, tmp_path / "again", to=to)
    first, second = (tensors_of(tmp_path / name, to) for name in ("theirs", "again"))
    assert same_tensors(first, second)
    files = [json.loads((tmp_path / name / FILES[to][1]).read_text()) for name in ("theirs", "again")]
    for config in files:
        config.pop("metadata", None)
    assert files[0] == files[1]


@pytest.mark.parametrize("to", formats.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["l=4, entropy", "topk"])
def test_the_peers_files_alone_carry_weights_rule_and_threshold(tmp_path, to, dtype, rule):
    """A scale that is a power of two loses no bit."""
    sae = trained(dtype, **RULES[rule])
    formats.export(sae, tmp_path, to=to, scale=0.5, **rule_for(to))
    loaded = formats.load(without_extra(tmp_path), scale=0.5)
    topk = rule == "topk" or to == "sparsify"
    assert (loaded.cfg.k, loaded.cfg.l, loaded.cfg.select) == (4, None, "token" if topk else "batch")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(loaded, name), getattr(sae, name))
    assert loaded.W_enc.stride() == sae.W_enc.stride()
    if topk and to != "dictionary_learning":
        assert (float(loaded.threshold), int(loaded.threshold_steps)) == (0, 0)
    else:
        # dictionary_learning's threshold is read back into float32 even for float64 weights only where it fits
        assert torch.equal(loaded.threshold, sae.threshold)
        assert int(loaded.threshold_steps) == 1
    assert int(loaded.tokens_since_active.max()) == 0


@pytest.mark.parametrize("to", formats.FORMATS)
def test_any_scale_is_undone_to_an_ulp(tmp_path, to):
    sae = trained()
    formats.export(sae, tmp_path, to=to, scale=0.37, **rule_for(to))
    loaded = formats.load(without_extra(tmp_path), scale=0.37)
    for name in ("b_enc", "b_dec"):
        ours, theirs = getattr(sae, name).detach(), getattr(loaded, name).detach()
        ulp = torch.nextafter(ours.abs(), torch.tensor(torch.inf)) - ours.abs()
        assert ((ours - theirs).abs() <= ulp).all()
    assert torch.equal(loaded.W_enc, sae.W_enc)


def test_a_given_scale_takes_the_place_of_the_exported_one(tmp_path):
    sae = trained()
    formats.export(sae, tmp_path, to="saelens", scale=0.25)
    assert torch.equal(formats.load(tmp_path, scale=1).b_enc, sae.b_enc * 4)
    assert torch.equal(formats.load(tmp_path, scale=0.5).b_dec, sae.b_dec * 2)
    assert torch.equal(formats.load(tmp_path).b_dec, sae.b_dec)


def encoder_of(folder, to):
    """(W_enc, b_enc, W_dec, b_dec, threshold, k) of a peer's folder, float64, as the peer would multiply them."""
    t, config = tensors_of(folder, to), json.loads((folder / FILES[to][1]).read_text())
    if to == "saelens":
        named = (t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"], t.get("threshold"), config.get("k"))
    elif to == "dictionary_learning":
        k = config["trainer"]["k"]
        named = (t["encoder.weight"].T, t["encoder.bias"], t["decoder.weight"].T, t["b_dec"], t["threshold"], k)
    else:
        named = (t["encoder.weight"].T, t["encoder.bias"], t["W_dec"], t["b_dec"], None, config["k"])
    return [v.double() if isinstance(v, torch.Tensor) else v for v in named]


PEER_RULES = [*((to, "topk") for to in formats.FORMATS), ("saelens", "threshold"), ("dictionary_learning", "threshold")]


@pytest.mark.parametrize(("to", "inference"), PEER_RULES)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_the_files_mean_what_the_sae_computes(tmp_path, to, centred, inference, scale):
    sae = trained(torch.float64, l=None, select="token", apply_b_dec_to_input=centred)
    formats.export(sae, tmp_path, to=to, inference=inference, scale=scale)
    W_enc, b_enc, W_dec, b_dec, threshold, k = encoder_of(tmp_path, to)
    x = tokens(31, 12, seed=5)
    a = torch.relu((x / scale - (b_dec if centred or to != "saelens" else 0)) @ W_enc + b_enc)
    if inference == "threshold":
        codes = a * (a > threshold)
    else:
        codes = torch.zeros_like(a).scatter(1, a.topk(k).indices, a.topk(k).values)
    sae.train(inference == "topk")
    expected = sae.encode(x)
    assert 0 < (expected > 0).sum() < expected.numel() / 4
    assert torch.equal(codes > 0, expected > 0)
    torch.testing.assert_close(codes * scale, expected)
    torch.testing.assert_close((codes @ W_dec + b_dec) * scale, sae.decode(expected))


def changed_config(folder, name, change):
    config = json.loads((folder / name).read_text())
    change(config)
    (folder / name).write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        lambda f: changed_config(f, "cfg.json", lambda c: c.update(k=9)),
        lambda f: changed_config(f, "cfg.json", lambda c: c.update(apply_b_dec_to_input=False)),
        lambda f: save_file({n: -t for n, t in tensors_of(f, "saelens").items()}, f / "sae_weights.safetensors"),
    ],
)
def test_files_that_have_changed_since_the_export_count_alone(tmp_path, change):
    said = []
    formats.export(trained(dead_after=9, l=None, select="token"), tmp_path, to="saelens")
    assert formats.load(tmp_path, say=said.append).cfg.dead_after == 9
    assert said == ["configuration and training state are those that were exported"]
    change(tmp_path)
    loaded = formats.load(tmp_path, say=said.append)
    assert loaded.cfg.dead_after == 10_000_000
    assert "sampled_sae.safetensors is of other weights" in said[1]
    assert torch.equal(loaded.W_dec, tensors_of(tmp_path, "saelens")["W_dec"])


def test_k_is_whole_where_it_must_be(tmp_path):
    sae = trained(k=2.5)
    formats.export(sae, tmp_path / "jumprelu", to="saelens")
    assert formats.load(without_extra(tmp_path / "jumprelu")).cfg.k == 2.5
    assert formats.load(tmp_path / "jumprelu", k=3).cfg.k == 3
    for to in ("dictionary_learning", "sparsify", "saelens"):
        for k, shown in ((None, "2.5"), (97, "97"), (0, "0")):
            with pytest.raises(ValueError, match=rf"k={shown}: .*whole numbers in \[1, 96\] only; choose one with"):
                formats.export(sae, tmp_path / to, to=to, inference="topk", k=k)
        assert not (tmp_path / to).exists()
        formats.export(sae, tmp_path / to, to=to, inference="topk", k=3)
        assert formats.load(tmp_path / to).cfg == sae.cfg
        assert formats.load(without_extra(tmp_path / to)).cfg.k == 3


def test_what_inference_auto_chooses():
    choices = {name: formats.inference_rule(trained(**rule).cfg, "auto") for name, rule in RULES.items()}
    assert choices == {name: "topk" if name == "topk" else "threshold" for name in RULES}


def test_a_threshold_that_was_never_set(tmp_path):
    sae, said = make_sae(torch.float32), []
    formats.export(sae, tmp_path / "d", to="dictionary_learning", say=said.append)
    assert "the threshold was never set" in said[0]
    assert float(tensors_of(tmp_path / "d", "dictionary_learning")["threshold"]) == -1
    formats.export(sae, tmp_path / "s", to="saelens")
    assert not tensors_of(tmp_path / "s", "saelens")["threshold"].any()
    loaded = formats.load(without_extra(tmp_path / "d"), say=said.append)
    assert (float(loaded.threshold), int(loaded.threshold_steps)) == (0, 0)
    assert "call calibrate(x)" in said[-1]


def test_a_threshold_for_each_feature(tmp_path):
    sae, said = trained(torch.float64), []
    formats.export(sae, tmp_path, to="saelens")
    file = without_extra(tmp_path) / "sae_weights.safetensors"
    t = load_file(file)
    own = torch.linspace(0.5, 2, 96, dtype=torch.float64) * t["threshold"]
    save_file({**t, "threshold": own}, file)
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors: threshold of each feature.*--rescale-features"):
        formats.load(tmp_path)
    loaded = formats.load(tmp_path, rescale_features=True, say=said.append).eval()
    assert any("features are rescaled" in line for line in said)
    x = tokens(40, 12, seed=4)
    a = torch.relu((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    codes = a * (a > own)
    assert torch.equal(loaded.encode(x) > 0, codes > 0)
    torch.testing.assert_close(loaded.decode(loaded.encode(x)), codes @ t["W_dec"] + t["b_dec"])
    torch.testing.assert_close(loaded.encode(x), codes * (loaded.threshold / own))
    save_file({**t, "threshold": own - own[0]}, file)
    with pytest.raises(ValueError, match="1 of 96 are not positive"):
        formats.load(tmp_path, rescale_features=True)


def test_thresholds_equal_up_to_rounding_are_one(tmp_path):
    sae, said = trained(), []
    formats.export(sae, tmp_path, to="saelens")
    file = without_extra(tmp_path) / "sae_weights.safetensors"
    t = load_file(file)
    t["threshold"][::2] *= 1 + 1e-7
    assert len(t["threshold"].unique()) == 2
    save_file(t, file)
    loaded = formats.load(tmp_path, say=said.append)
    assert float(loaded.threshold) in t["threshold"].tolist()
    assert "equal up to rounding" in said[0]
    t["threshold"][::2] *= 1 + 1e-5
    save_file(t, file)
    with pytest.raises(ValueError, match="threshold of each feature"):
        formats.load(tmp_path)


def test_a_16_bit_threshold_stays_exact_in_the_file(tmp_path):
    sae, said = trained(torch.bfloat16), []
    sae.threshold.fill_(1 + 2**-20)
    formats.export(sae, tmp_path / "exact", to="saelens", say=said.append)
    assert tensors_of(tmp_path / "exact", "saelens")["threshold"].dtype == torch.float32
    assert "SAELens rounds the threshold to bfloat16" in said[0]
    sae.threshold.fill_(1.5)
    formats.export(sae, tmp_path / "short", to="saelens", say=said.append)
    assert tensors_of(tmp_path / "short", "saelens")["threshold"].dtype == torch.bfloat16
    assert len(said) == 1


def test_what_is_read_is_recorded(tmp_path):
    sae = trained()
    origin = formats.Origin("org/model", layer=5, context_size=128)
    formats.export(sae, tmp_path / "s", to="saelens", origin=origin)
    metadata = json.loads((tmp_path / "s/cfg.json").read_text())["metadata"]
    assert metadata["sae_lens_version"] == "6.54.12"
    assert metadata["training_architecture_details"] == sae.cfg.to_dict()
    expected = {"model_name": "org/model", "hook_name": "blocks.5.hook_resid_post", "hook_layer": 5}
    assert expected.items() <= metadata.items()
    formats.export(sae, tmp_path / "d", to="dictionary_learning", origin=formats.Origin("m", 2, hook_name="here"))
    trainer = json.loads((tmp_path / "d/config.json").read_text())["trainer"]
    assert {"lm_name": "m", "layer": 2, "submodule_name": "here", "activation_dim": 12}.items() <= trainer.items()
    assert (trainer["trainer_class"], trainer["dict_class"]) == ("BatchTopKTrainer", "BatchTopKSAE")


def test_two_exports_give_the_same_bytes(tmp_path):
    for to in formats.FORMATS:
        for name in ("a", "b"):
            formats.export(trained(), tmp_path / to / name, to=to, **rule_for(to))
        names = [*FILES[to], "sampled_sae.safetensors"]
        assert same_files(tmp_path / to / "a", tmp_path / to / "b", names)


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def changed_tensors(folder, to, change):
    file, tensors = folder / FILES[to][0], tensors_of(folder, to)
    change(tensors)
    torch.save(tensors, file) if file.suffix == ".pt" else save_file(tensors, file)


def trainer(**values):
    return lambda f: changed_config(f, "config.json", lambda c: c["trainer"].update(values))


def cfg(**values):
    return lambda f: changed_config(f, "cfg.json", lambda c: c.update(values))


def put(to, **values):
    return lambda f: changed_tensors(f, to, lambda t: t.update(values))


DL = "dictionary_learning"
BAD = {
    "sl no weights": (
        "saelens",
        lambda f: (f / "sae_weights.safetensors").unlink(),
        "sae_weights.safetensors: no such",
    ),
    "sl no cfg": ("saelens", lambda f: (f / "cfg.json").unlink(), "cfg.json: no such file"),
    "sl half": ("saelens", lambda f: cut(f / "sae_weights.safetensors", 900), "safetensors: truncated or not a"),
    "sl json": ("saelens", lambda f: cut(f / "cfg.json", 30), "cfg.json: not valid JSON"),
    "sl gated": ("saelens", cfg(architecture="gated"), "architecture='gated': this package reads jumprelu, topk"),
    "sl d_sae": ("saelens", cfg(d_sae=97), r"W_enc is \(12, 96\), must be \(12, 97\)"),
    "sl d_in": ("saelens", cfg(d_in="12"), "cfg.json: d_in='12': must be of type int"),
    "sl bool": ("saelens", cfg(d_sae=True), "cfg.json: d_sae=True: must be of type int"),
    "sl b_dec": ("saelens", cfg(apply_b_dec_to_input=None), "apply_b_dec_to_input=None: must be of type bool"),
    "sl norm": ("saelens", cfg(normalize_activations="layer_norm"), "normalize_activations='layer_norm': must be"),
    "sl extra tensor": ("saelens", put("saelens", r_mag=torch.zeros(3)), r"missing \[\], unknown \['r_mag'\]"),
    "sl topk": ("saelens", cfg(architecture="topk"), r"unknown \['threshold'\]"),
    "sl batchtopk": ("saelens", cfg(architecture="batchtopk"), r"missing \['topk_threshold'\]"),
    "sl nan": ("saelens", put("saelens", b_dec=torch.full((12,), torch.nan)), "b_dec holds NaN or inf"),
    "sl ints": ("saelens", put("saelens", b_enc=torch.zeros(96, dtype=torch.int32)), "b_enc is torch.int32, must be"),
    "sl dtypes": ("saelens", put("saelens", b_enc=torch.zeros(96).half()), "several dtypes: .*b_enc torch.float16"),
    "sl no k": ("saelens", cfg(metadata=None), r"k: the file does not say it; give k= \(--k\)"),
    "dl no weights": (DL, lambda f: (f / "ae.pt").unlink(), "ae.pt: no such file"),
    "dl half": (DL, lambda f: cut(f / "ae.pt", 4000), "ae.pt: truncated or not a state dict"),
    "dl foreign": (DL, lambda f: torch.save([1], f / "ae.pt"), "ae.pt: must hold a state dict of tensors"),
    "dl a module": (DL, lambda f: torch.save(torch.nn.Linear(2, 2), f / "ae.pt"), "ae.pt: truncated or not a state"),
    "dl gated": (DL, trainer(dict_class="GatedAutoEncoder"), "dict_class='GatedAutoEncoder': this package reads"),
    "dl two k": (DL, trainer(k=5), "config.json: trainer.k=5, but ae.pt has k=4"),
    "dl no k": (DL, trainer(k=None), "config.json: k=None: must be of type int"),
    "dl no trainer": (DL, lambda f: (f / "config.json").write_text("{}"), "trainer=None: must be of type dict"),
    "dl turned": (DL, put(DL, **{"decoder.weight": torch.zeros(96, 12)}), r"decoder.weight is \(96, 12\), must be"),
    "sp no weights": ("sparsify", lambda f: (f / "sae.safetensors").unlink(), "sae.safetensors: no such file"),
    "sp transcoder": ("sparsify", cfg(transcode=True), "transcode=True: a transcoder"),
    "sp skip": ("sparsify", cfg(skip_connection=True), "skip_connection=True: a linear skip connection"),
    "sp signed": ("sparsify", cfg(signed=True), "signed=True: selection by absolute value"),
    "sp groupmax": ("sparsify", cfg(activation="groupmax"), "activation='groupmax': this package reads 'topk'"),
    "sp W_skip": ("sparsify", put("sparsify", W_skip=torch.zeros(2, 2)), r"unknown \['W_skip'\]"),
    "sp k": ("sparsify", cfg(k=2.5), "cfg.json: k=2.5: must be of type int"),
    "extra half": ("saelens", lambda f: cut(f / "sampled_sae.safetensors", 80), "truncated or not of sampled-sae"),
    "extra foreign": ("saelens", lambda f: save_file({}, f / "sampled_sae.safetensors"), "truncated or not of sampled"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named(tmp_path, name):
    to, spoil, words = BAD[name]
    formats.export(trained(), tmp_path, to=to, **rule_for(to))
    spoil(tmp_path)
    with pytest.raises(ValueError, match=words):
        formats.load(tmp_path, to)


def test_num_latents_by_the_expansion_factor(tmp_path):
    formats.export(trained(), tmp_path, to="sparsify", inference="topk")
    cfg(num_latents=0, expansion_factor=8)(tmp_path)
    assert formats.load(without_extra(tmp_path)).cfg.d_sae == 96
    cfg(num_latents=0, expansion_factor=7)(tmp_path)
    with pytest.raises(ValueError, match=r"must be \(84, 12\)"):
        formats.load(tmp_path)


def test_bad_arguments(tmp_path):
    sae = trained()
    cases = [
        ({"to": "sae_lens"}, "to='sae_lens': must be one of 'saelens', 'dictionary_learning', 'sparsify'"),
        ({"to": "saelens", "inference": "batch"}, "inference='batch': must be one of 'auto'"),
        ({"to": "saelens", "scale": 0}, "scale=0: must be > 0"),
        ({"to": "saelens", "scale": -1.0}, "scale=-1.0: must be a finite number"),
        ({"to": "sparsify"}, r"sparsify keeps the k largest.*\(--inference topk\)"),
    ]
    for options, words in cases:
        with pytest.raises(ValueError, match=words):
            formats.export(sae, tmp_path / "out", **options)
    half = trained(torch.float16)
    with pytest.raises(ValueError, match=r"scale: b_enc times .* leaves the range of torch\.float16"):
        formats.export(half, tmp_path / "out", to="saelens", scale=1e-6)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"no SAE in a known format; must hold sae_weights\.safetensors and cfg\.json"):
        formats.load(tmp_path)
    with pytest.raises(ValueError, match="format='ours': must be one of"):
        formats.load(tmp_path, "ours")


def test_formats_do_not_overwrite_each_other(tmp_path):
    sae = trained()
    sae.save_pretrained(tmp_path / "ours")
    assert formats.detect(tmp_path / "ours") == "sampled-sae"
    with pytest.raises(ValueError, match=r"SampledSAE\.from_pretrained reads it"):
        formats.load(tmp_path / "ours")
    for to in formats.FORMATS:
        with pytest.raises(ValueError, match="holds an SAE in the format 'sampled-sae'"):
            formats.export(sae, tmp_path / "ours", to=to, **rule_for(to))
        formats.export(sae, tmp_path / to, to=to, **rule_for(to))
        assert formats.detect(tmp_path / to) == to
        formats.export(trained(dead_after=4), tmp_path / to, to=to, **rule_for(to))
        assert formats.load(tmp_path / to).cfg.dead_after == 4
    with pytest.raises(ValueError, match="in the format 'sparsify'"):
        formats.export(sae, tmp_path / "sparsify", to="saelens")
    for file in (tmp_path / "sparsify").iterdir():
        (tmp_path / "saelens" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="files of several formats: saelens, sparsify"):
        formats.load(tmp_path / "saelens")


def test_an_sae_of_the_command_line_there_and_back(tmp_path, capsys):
    sae = trained()
    sae.save_pretrained(tmp_path / "sae")
    activations = {"model": "org/model", "layer": 3, "context": 64, "scale": 0.5}
    (tmp_path / "sae/run.json").write_text(json.dumps({"activations": activations}))
    store = write_store(tmp_path / "store")
    there = ["export", str(tmp_path / "sae"), str(tmp_path / "out"), "--to", "saelens"]
    assert main(there) == 0
    said = capsys.readouterr().out
    assert "trained on activations times 0.5" in said
    assert str(tmp_path / "out/cfg.json") in said
    metadata = json.loads((tmp_path / "out/cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == ("org/model", "blocks.3.hook_resid_post")
    assert main([*there, "--activations", str(store), "--model-name", "m", "--layer", "7"]) == 0
    assert "divided by 0.5" in capsys.readouterr().out
    metadata = json.loads((tmp_path / "out/cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_layer"]) == ("m", 7)
    assert torch.equal(tensors_of(tmp_path / "out", "saelens")["b_dec"], sae.b_dec * 2)
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    assert same_files(tmp_path / "sae", tmp_path / "back", OURS)
    assert "configuration and training state" in capsys.readouterr().out


def test_errors_of_the_commands_exit_with_1(tmp_path, capsys):
    trained().save_pretrained(tmp_path / "sae")
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "sae"), str(out), "--to", "sparsify"]) == 1
    assert "(--inference topk)" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "sae"), str(out), "--to", "sparsify", "--inference", "topk", "--k", "3"]) == 0
    assert main(["import", str(out), str(out)]) == 1
    assert "holds an SAE in the format 'sparsify'" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "nothing"), str(tmp_path / "b")]) == 1
    assert "no SAE in a known format" in capsys.readouterr().err
    assert main(["import", str(out), str(tmp_path / "b"), "--from", "saelens"]) == 1
    assert "sae_weights.safetensors: no such file" in capsys.readouterr().err
    without_extra(out)
    assert main(["import", str(out), str(tmp_path / "b"), "--scale", "2", "--k", "5"]) == 0
    assert SampledSAE.from_pretrained(tmp_path / "b").cfg.k == 5
    assert torch.equal(SampledSAE.from_pretrained(tmp_path / "b").b_dec, trained().b_dec * 2)


def test_the_installed_command(tmp_path):
    trained().save_pretrained(tmp_path / "sae")
    command = [sys.executable, "-m", "sampled_sae", "export", tmp_path / "sae", tmp_path / "out", "--to", DL]
    done = subprocess.run([*command, "--threads", "1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "out/ae.pt") in done.stdout
    assert formats.load(tmp_path / "out").cfg == trained().cfg
