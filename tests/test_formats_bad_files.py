"""Bad files and bad arguments of the conversions: what is wrong is named, and nothing is written."""

import pytest
import torch
from format_makers import cfg, put, rule_for, trained, trainer, without_extra
from safetensors.torch import save_file

from sampled_sae import formats


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def recorded(**values):
    """What SAELens keeps of the training."""
    return cfg(metadata={"training_architecture": "sampled_sae", "training_architecture_details": values})


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
