"""Input and output of an MLP in one pass, a transcoder trained on them, and spliced in its place."""

import copy

import pytest
import torch
from makers import make_sae, tokens
from tiny_models import CONTEXT, D, gpt2, gpt_neox, llama, mpnet

from sampled_sae import ActivationStore, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.lm.mlp import harvest_mlp, mlp_of, transcode_with, transcoded_cross_entropy
from sampled_sae.lm.mlp import mlp_activations as activations


@pytest.mark.parametrize("make", [llama, gpt_neox, gpt2], ids=lambda make: make.__name__)
def test_what_is_stored_is_what_the_mlp_reads_and_writes(make, rows, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    pair = harvest_mlp(model, rows, 2, tmp_path, holdout_rows=3, rows_per_shard=5, batch_size=4, drop_tokens=())
    x, y = (torch.cat([store.shard(i) for i in range(2)]) for store in (pair.x, pair.target))
    assert pair.tokens == [5 * (CONTEXT - 1), 3 * (CONTEXT - 1)]
    assert len(pair.holdout()[0]) == 3 * (CONTEXT - 1)
    with torch.no_grad():
        torch.testing.assert_close(mlp_of(model, 2)(x), y)
        seen = [(a, b) for _, a, b in activations(model, rows[:8], 2)]
    torch.testing.assert_close(torch.cat([a[:, 1:].flatten(0, 1) for a, _ in seen]), x)
    assert ActivationStore.open(tmp_path / "inputs").manifest["source"].endswith("inputs of the MLP of block 2 of ")
    assert not mlp_of(model, 2)._forward_hooks
    with pytest.raises(ValueError, match="inputs: must be new or empty"):
        harvest_mlp(model, rows, 2, tmp_path)


def test_tokens_are_left_out_of_both(small_llama, rows, tmp_path):
    id_, most = int(rows[0, 3]), 1.0
    pair = harvest_mlp(small_llama, rows, 1, tmp_path, drop_tokens=[id_], drop_first=False, max_norm_ratio=most)
    _, x, y = next(activations(small_llama, rows, 1, len(rows)))
    left = rows != id_
    limit = most * y[:8][left[:8]].norm(dim=-1).median()
    left &= y.norm(dim=-1) <= limit
    torch.testing.assert_close(pair.x.shard(0), x[left])
    torch.testing.assert_close(pair.target.shard(0), y[left])


def test_the_mlp_itself_loses_nothing_and_zeros_all(small_llama, rows):
    same = transcoded_cross_entropy(small_llama, rows, 1, copy.deepcopy(mlp_of(small_llama, 1)))
    logits = small_llama(input_ids=rows).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert same["ce_clean"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert same["ce_spliced"] == pytest.approx(same["ce_clean"], abs=1e-5)
    assert same["loss_recovered_zero"] == pytest.approx(1, abs=1e-3)
    nothing = transcoded_cross_entropy(small_llama, rows, 1, torch.zeros_like)
    assert nothing["ce_spliced"] == nothing["ce_zero"] != nothing["ce_clean"]
    assert nothing["loss_recovered_zero"] == 0


def test_a_transcoder_of_an_mlp(small_llama, rows, tmp_path, short_calibration):
    pair = harvest_mlp(small_llama, rows.repeat(6, 1), 1, tmp_path / "acts", holdout_rows=4)
    config = SampledSAEConfig(d_in=D, d_sae=64, k=12, l=None, d_out=D, skip=True)
    sae = Trainer(config, TrainConfig(steps=150, batch_size=60, lr=1e-2), pair, tmp_path / "run").run(progress=False)
    found = transcoded_cross_entropy(small_llama, rows, 1, transcode_with(sae))
    assert found["loss_recovered_mean"] > 0.5
    x = tokens(9, D, dtype=torch.float32)
    torch.testing.assert_close(transcode_with(sae)(x), sae(x, x).x_hat)


def test_what_cannot_be_is_named(small_llama, rows, tmp_path):
    with pytest.raises(ValueError, match="sae: is no transcoder"):
        transcode_with(make_sae())
    with pytest.raises(ValueError, match="predicts no next token"):
        transcoded_cross_entropy(mpnet(), rows, 1, torch.zeros_like)
    with pytest.raises(ValueError, match=r"layer=9"):
        harvest_mlp(small_llama, rows, 9, tmp_path)
    small_llama.model.layers[1].mlp.down_proj.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="outputs of its MLP are not finite"):
        harvest_mlp(small_llama, rows, 1, tmp_path)
    assert not (tmp_path / "inputs" / "manifest.json").exists()
    del small_llama.model.layers[1]._modules["mlp"]
    with pytest.raises(ValueError, match="has no MLP by the name of mlp"):
        mlp_of(small_llama, 1)
