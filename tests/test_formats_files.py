"""What a peer's file may hold: thresholds and k of every kind, older layouts, later changes, and what is refused."""

import json

import pytest
import torch
from format_makers import cfg, changed_tensors, put, rule_for, tensors_of, trained, trainer, without_extra
from makers import cut, make_sae, tokens
from safetensors.torch import load_file, save_file

from sampled_sae import formats


def negated(folder):
    changed_tensors(folder, "saelens", lambda t: t.update({name: -value for name, value in t.items()}))


@pytest.mark.parametrize("change", [cfg(k=9), cfg(apply_b_dec_to_input=False), negated])
def test_files_that_have_changed_since_the_export_count_alone(tmp_path, change):
    said = []
    formats.export(trained(dead_after=9, l=None, select="token"), tmp_path, to="saelens")
    assert formats.load(tmp_path, say=said.append).cfg.dead_after == 9
    assert said == ["configuration and training state are those that were exported"]
    change(tmp_path)
    loaded = formats.load(tmp_path, say=said.append)
    assert "sampled_sae.safetensors is of other weights" in said[1]
    assert not loaded.tokens_since_active.any()
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


def test_another_k_is_said_where_the_threshold_was_set_for_the_old_one(tmp_path):
    formats.export(trained(), tmp_path, to="saelens")
    for prepare in (lambda f: f, without_extra):
        said = []
        loaded = formats.load(prepare(tmp_path), k=5.0, say=said.append)
        assert repr(loaded.cfg.k) == "5"
        assert said[-1] == "k=5.0 in place of 4: the threshold stays as it is; calibrate(x) sets it for this k"
        formats.load(tmp_path, k=4, say=said.append)
        assert "in place of" not in said[-1]


@pytest.mark.parametrize("unset", [0.0, -1.0])
def test_a_threshold_that_was_never_set(tmp_path, unset):
    """-1 is what dictionary_learning's trainers start with."""
    sae, said = make_sae(torch.float32), []
    sae.threshold.fill_(unset)
    formats.export(sae, tmp_path / "d", to="dictionary_learning", say=said.append)
    assert "the threshold was never set" in said[0]
    assert float(tensors_of(tmp_path / "d", "dictionary_learning")["threshold"]) == -1
    formats.export(sae, tmp_path / "s", to="saelens")
    assert not tensors_of(tmp_path / "s", "saelens")["threshold"].any()
    assert float(formats.load(tmp_path / "s").threshold) == unset
    loaded = formats.load(without_extra(tmp_path / "d"), say=said.append)
    assert (float(loaded.threshold), int(loaded.threshold_steps)) == (0, 0)
    assert "call calibrate(x)" in said[-1]


def test_a_threshold_below_zero_is_zero_in_their_files(tmp_path):
    sae = trained()
    sae.threshold.fill_(-0.5)
    for to in ("saelens", "dictionary_learning"):
        formats.export(sae, tmp_path / to, to=to)
        assert not tensors_of(tmp_path / to, to)["threshold"].any()


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


# SAELens' files from before its release 6; tests/peers hold them against its own reader.
OLD = {"d_in": 12, "d_sae": 96, "dtype": "float32", "hook_point": "blocks.2.hook_z", "hook_layer": 2}


def test_a_topk_of_saelens_from_before_release_6(tmp_path):
    """Nothing names the architecture; of the factors that some versions wrote, those of 1 say nothing."""
    sae, said = trained(l=None, select="token"), []
    formats.export(sae, tmp_path, to="saelens")
    old = {**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "normalize_activations": False}
    (without_extra(tmp_path) / "cfg.json").write_text(json.dumps(old))
    put("saelens", scaling_factor=torch.ones(96))(tmp_path)
    loaded = formats.read(tmp_path, say=said.append)
    assert (loaded.sae.cfg.k, loaded.sae.cfg.select, loaded.sae.cfg.l) == (4, "token", None)
    assert torch.equal(loaded.sae.W_enc, sae.W_enc)
    assert loaded.origin == formats.Origin(layer=2, hook_name="blocks.2.hook_z")
    assert any("reshape_activations='hook_z'" in line for line in said)
    (tmp_path / "cfg.json").write_text(json.dumps({**old, "activation_fn_kwargs": {}}))
    with pytest.raises(ValueError, match="k=None: must be of type int"):
        formats.load(tmp_path)
    put("saelens", scaling_factor=torch.full((96,), 1.1))(tmp_path)
    with pytest.raises(ValueError, match=r"unknown \['scaling_factor'\]"):
        formats.load(tmp_path)


def test_a_jumprelu_of_saelens_with_the_logarithm_of_its_threshold(tmp_path):
    formats.export(trained(torch.float64), tmp_path, to="saelens")
    threshold = tensors_of(without_extra(tmp_path), "saelens")["threshold"]
    changed_tensors(tmp_path, "saelens", lambda t: t.update(log_threshold=t.pop("threshold").log()))
    (tmp_path / "cfg.json").write_text(json.dumps({**OLD, "architecture": "jumprelu", "normalize_activations": True}))
    said = []
    loaded = formats.load(tmp_path, k=4, say=said.append)
    torch.testing.assert_close(loaded.threshold, threshold[0])
    assert any("this is a training checkpoint" in line for line in said)


def recorded(**values):
    """What SAELens keeps of the training."""
    return cfg(metadata={"training_architecture": "sampled_sae", "training_architecture_details": values})


DL = "dictionary_learning"
BAD = {
    "sl no weights": ("saelens", lambda f: (f / "sae_weights.safetensors").unlink(), "weights.safetensors: no such"),
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
    "sl l": ("saelens", recorded(l=0.5), r"cfg\.json: recorded training: l=0.5: must be a finite number >= 1"),
    "sl old relu": ("saelens", lambda f: (f / "cfg.json").write_text("{}"), "architecture='standard': this package"),
    "dl score": (DL, trainer(sampled_sae={"score": "l3"}), r"config\.json: recorded training: score='l3': must be one"),
    "dl decay": (DL, trainer(threshold_beta=2, sampled_sae={}), "recorded training: threshold_decay=2: must be"),
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
    "sp skip": ("sparsify", cfg(skip_connection=True), "skip_connection=True: a linear skip of an SAE"),
    "sp no skip": ("sparsify", cfg(skip_connection=True, transcode=True), r"tensors missing \['W_skip'\]"),
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
        ({"to": "saelens", "scale": 0}, "scale=0: must be a finite number > 0"),
        ({"to": "saelens", "scale": -1.0}, "scale=-1.0: must be a finite number"),
        ({"to": "sparsify"}, r"sparsify keeps the k largest.*\(--inference topk\)"),
    ]
    for options, words in cases:
        with pytest.raises(ValueError, match=words):
            formats.export(sae, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="k=3: saelens has no place for it beside a threshold"):
        formats.export(sae, tmp_path / "out", to="saelens", k=3)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"no SAE in a known format; must hold sae_weights\.safetensors and cfg\.json"):
        formats.load(tmp_path)
    with pytest.raises(ValueError, match="format='ours': must be one of"):
        formats.load(tmp_path, "ours")


@pytest.mark.parametrize("to", formats.FORMATS)
def test_what_cannot_be_written_leaves_the_earlier_export(tmp_path, to):
    """The error names the SAE, whose files it is not in yet."""
    nan, wide = trained(), trained(torch.float16, apply_b_dec_to_input=False)
    with torch.no_grad():
        nan.W_enc[3, 4] = torch.nan
        wide.b_dec.fill_(60000)
    cases = [
        (nan, {}, r"^sae\.W_enc holds NaN or inf"),
        (trained(torch.float16), {"scale": 1e-6}, r"^scale: b_enc times .* leaves the range of torch\.float16"),
    ]
    if to != "saelens":
        cases.append((wide, {}, r"^b_enc \+ b_dec W_enc, .* leaves the range of torch\.float16"))
    formats.export(trained(dead_after=9), tmp_path / "out", to=to, **rule_for(to))
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    for sae, options, words in cases:
        for folder in (tmp_path / "new", tmp_path / "out"):
            with pytest.raises(ValueError, match=words):
                formats.export(sae, folder, to=to, **rule_for(to), **options)
    assert not (tmp_path / "new").exists()
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


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
