"""SAELens' drivers, logging and files with the accelerated architectures, unchanged."""

import copy
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from saelens_makers import ALL, KINDS, B, D, F, batches, pair, step_input, tokens, trainer, uneven

from sampled_sae.integrations import saelens


def make(kind, **changes):
    """One of ours, uneven."""
    config, settings = ALL[kind]
    torch.manual_seed(0)
    cfg = config(d_in=D, d_sae=F, **{**settings, **changes})
    return uneven(TrainingSAE.from_dict(cfg.to_dict()))


def watch(some_trainer):
    """Records the losses of every step of a trainer."""
    seen, original = [], some_trainer.step

    def step(batch):
        output = original(batch)
        seen.append({name: float(loss.detach()) for name, loss in output.losses.items()})
        return output

    some_trainer.step = step
    return seen


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("kind", KINDS)
def test_fit_gives_the_same_curve(kind, normalize):
    """In float64, where a selection that flips on rounding does not spoil the comparison; features die on the way."""
    data = [batch.double() for batch in batches(40)]
    curves, saes = [], []
    for sae in pair(kind, "float64", normalize_activations=normalize):
        run = trainer(sae, [*data[:5], *data], 40 * B, n_batches_for_norm_estimate=5, dead_feature_window=3)
        curves.append(watch(run))
        saes.append(run.fit())
    assert max(losses["auxiliary_reconstruction_loss"] for losses in curves[0]) > 0
    for expected, losses in zip(*curves):
        assert losses == pytest.approx(expected, rel=1e-6)
    for p, q in zip(saes[0].parameters(), saes[1].parameters()):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-7)
    theirs, ours = (sae.state_dict() for sae in saes)
    assert list(theirs) == list(ours)
    assert saes[0].cfg.metadata.to_dict() == saes[1].cfg.metadata.to_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_in_the_middle_of_training(kind):
    data = [batch.double() for batch in batches(20)]
    theirs, _ = pair(kind, "float64")
    runs = [trainer(copy.deepcopy(theirs), data, 20 * B) for _ in range(2)]
    curves = [watch(run) for run in runs]
    for number, batch in enumerate(data):
        if number == 8:
            saelens.accelerate(runs[1].sae, runs[1].optimizer)
            moment = runs[1].optimizer.state[runs[1].sae.W_enc]["exp_avg"]
            assert moment.stride() == runs[1].sae.W_enc.stride() == (1, D)
        for run in runs:
            run.step(batch)
            run.n_training_steps += 1
    for expected, losses in zip(*curves):
        assert losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_trainer_logs(kind):
    """Firing counts, dead features and the wandb dictionary come from feature_acts."""
    runs = [trainer(sae, [], B) for sae in pair(kind, "float64")]
    logs = []
    for run in runs:
        for batch in batches(3):
            output = run.step(batch.double())
        logs.append(run.build_train_step_log_dict(output, 3 * B))
    assert logs[1] == pytest.approx(logs[0], rel=1e-9)
    assert logs[0]["metrics/l0"] > 2
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        assert torch.equal(getattr(runs[1], name), getattr(runs[0], name))


def test_names_collide_with_none_of_saelens():
    names = {cls.architecture() for cls, _ in ALL.values()}
    assert names == {"sampled", "sampled_batchtopk", "sampled_topk", "sampled_matryoshka_batchtopk"}
    assert names <= set(SAE_TRAINING_CLASS_REGISTRY)
    assert SAE_TRAINING_CLASS_REGISTRY["batchtopk"][0] is KINDS["batchtopk"][0]


@pytest.mark.slow
def test_a_second_import_in_one_process():
    code = """
        import importlib, sys
        import sampled_sae.integrations.saelens as first
        importlib.reload(first)
        for name in [n for n in sys.modules if n.startswith("sampled_sae.integrations")]:
            del sys.modules[name]
        import sampled_sae.integrations.saelens as again
        from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY as registry
        assert registry["sampled"] == (again.SampledTrainingSAE, again.SampledTrainingSAEConfig)
        registry["sampled"] = registry["batchtopk"]  # as another package might
        try:
            importlib.reload(again)
        except ValueError as error:
            assert "sampled already registered" in str(error)
        else:
            raise AssertionError("another package's class was replaced")
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize("kind", ALL)
def test_config_survives_its_dictionary(kind):
    config, settings = ALL[kind]
    cfg = config(d_in=D, d_sae=F, decoder_init_norm=0.3, **settings)
    again = TrainingSAEConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert type(again) is config
    assert again.to_dict() == cfg.to_dict()


@pytest.mark.parametrize("kind", ALL)
def test_checkpoint_loads_and_goes_on(kind, tmp_path):
    """A trainer that stops, is saved and loaded takes the same steps as one that does not."""
    data = batches(12)
    whole = trainer(make(kind), data, 12 * B)
    expected = watch(whole)
    whole.fit()
    first = trainer(make(kind), data[:6], 6 * B)
    first.fit()
    first.save_checkpoint("half", tmp_path)
    sae = TrainingSAE.load_from_disk(tmp_path / "half")
    assert type(sae) is type(first.sae)
    assert sae.W_enc.stride() == (1, D)
    second = trainer(sae, data[6:], 12 * B)
    second.load_trainer_state(tmp_path / "half")
    losses = watch(second)
    second.fit()
    assert len(losses) == 6
    for got, wanted in zip(losses, expected[6:]):
        assert got == pytest.approx(wanted, rel=1e-3)


@pytest.fixture(scope="module")
def inference_saves(tmp_path_factory):
    """{(kind, rescale): (trained SAE, architecture, codes, output)}, the last three from a process without us."""
    folder = tmp_path_factory.mktemp("saves")
    torch.save(batches(1, seed=9)[0], folder / "x.pt")
    saes = {}
    for kind in ALL:
        for rescale in (True, False):
            run = trainer(make(kind, rescale_acts_by_decoder_norm=rescale), batches(20), 20 * B)
            saes[kind, rescale] = run.fit().eval()
            run.sae.save_inference_model(folder / f"{kind}-{rescale}")
    code = """
        import pathlib, sys, torch
        from sae_lens import SAE
        folder = pathlib.Path(sys.argv[1])
        x, out = torch.load(folder / "x.pt"), {}
        for path in folder.iterdir():
            if path.is_dir():
                sae = SAE.load_from_disk(path)
                with torch.no_grad():
                    out[path.name] = (sae.cfg.architecture(), sae.encode(x), sae(x))
        assert "sampled_sae" not in sys.modules
        torch.save(out, folder / "out.pt")
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), str(folder)], check=True)
    out = torch.load(folder / "out.pt")
    return {(kind, rescale): (sae, *out[f"{kind}-{rescale}"]) for (kind, rescale), sae in saes.items()}


@pytest.mark.slow
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", ALL)
def test_inference_save_loads_without_this_package(kind, rescale, inference_saves):
    sae, architecture, codes, out = inference_saves[kind, rescale]
    assert architecture == ("topk" if kind == "topk" else "jumprelu")
    x = batches(1, seed=9)[0]
    with torch.no_grad():
        if kind.startswith("sampled") or kind == "topk":
            expected = sae.encode(x)
        else:
            norm = sae.W_dec.norm(dim=1) if rescale else torch.ones(F)
            a = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * norm
            expected = a * (a > sae.topk_threshold)
        torch.testing.assert_close(codes, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out, sae.decode(expected), rtol=1e-4, atol=1e-4)
    assert (codes > 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_accelerated_files_are_saelens_own(kind, tmp_path):
    """The same bytes as SAELens writes, for checkpoints and for inference, though W_enc lies transposed in memory."""
    for sae, folder in zip(pair(kind), (tmp_path / "theirs", tmp_path / "ours")):
        sae.save_model(folder / "training")
        sae.save_inference_model(folder / "inference")
    for name in ("training", "inference"):
        for file in ("sae_weights.safetensors", "cfg.json"):
            assert (tmp_path / "ours" / name / file).read_bytes() == (tmp_path / "theirs" / name / file).read_bytes()
    again = TrainingSAE.load_from_disk(tmp_path / "ours" / "training")
    assert type(again) is KINDS[kind][0]


def test_command_line_knows_the_architectures():
    cfg = _parse_cfg_args(["--architecture", "sampled", "--l", "2.5", "--score", "entropy", "--d_in", "8"])
    assert isinstance(cfg.sae, saelens.SampledTrainingSAEConfig)
    assert (cfg.sae.l, cfg.sae.score, cfg.sae.d_in) == (2.5, "entropy", 8)


def test_trainer_output_is_what_saelens_calls_it():
    output = make("sampled").training_forward_pass(step_input(tokens()))
    assert output.feature_acts.shape == (B, F)
    assert output.feature_acts.is_coalesced()
    assert output.sae_out.shape == (B, D)
    assert set(output.losses) == {"mse_loss", "auxiliary_reconstruction_loss"}
