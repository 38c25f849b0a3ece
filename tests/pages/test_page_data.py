"""What a page says of features, against the dense codes of all tokens."""

import pytest
import torch
from torch.nn import functional as nnf

from sampled_sae import ActivationStore, CodesStore, load_inference
from sampled_sae.formats.portable import silent
from sampled_sae.inference.encode_corpus import encode_corpus
from sampled_sae.lm import load_model
from sampled_sae.lm.logit_lens import final_norm, logit_lens, token_texts
from sampled_sae.pages.activity import Activity
from sampled_sae.pages.choice import FeatureChoice
from sampled_sae.pages.contexts import AFTER, BEFORE, CorpusText, quantile_tokens, top_tokens
from sampled_sae.pages.feature_details import nearest
from sampled_sae.pages.feature_page import shards_of
from sampled_sae.pages.loss_shares import loss_shares
from sampled_sae.training.activation_store import StoredActivations


@pytest.fixture(scope="module")
def store(root):
    return ActivationStore.open(root / "acts")


@pytest.fixture(scope="module")
def sae(root):
    return load_inference(root / "run", say=silent)


@pytest.fixture(scope="module")
def codes(store, sae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    encode_corpus(sae, StoredActivations(store), folder, progress=False)
    return CodesStore.open(folder)


@pytest.fixture(scope="module")
def activity(codes):
    return Activity.read(codes, len(codes.tokens))


@pytest.fixture(scope="module")
def text(codes):
    return CorpusText.read(codes, len(codes.tokens))


@pytest.fixture(scope="module")
def dense(store, sae):
    return torch.cat([sae.encode(store.shard(i)) for i in range(len(store.tokens))])


def test_columns_are_those_of_the_dense_codes(activity, dense):
    assert torch.equal(activity.counts, (dense != 0).sum(0))
    assert torch.equal(activity.maxima, dense.amax(0))
    torch.testing.assert_close(activity.sums, dense.double().sum(0))
    assert activity.l0 == pytest.approx(float((dense != 0).sum(1).double().mean()))
    tokens = torch.tensor([[0, 5], [len(dense) - 1, 7]])
    for feature in (0, 17, 63):
        assert torch.equal(activity.at(tokens, feature), dense[tokens, feature])
        column = dense[:, feature]
        order = column.sort(descending=True, stable=True).indices[: int((column != 0).sum())]
        assert torch.equal(activity.tokens[activity.ranked(feature)], order)
    strongest = activity.strongest(3)
    expected = dense.topk(3, dim=0).values.t()
    assert torch.equal(torch.where(strongest < 0, 0, activity.values[strongest.clamp(min=0)]), expected)


def test_company_counts_tokens_of_both(activity, dense):
    active = (dense != 0).long()
    both = active.t() @ active
    both.fill_diagonal_(0)
    for feature in range(activity.d_sae):
        assert torch.equal(activity.together(feature), both[feature])


def test_a_corpus_on_which_nothing_is_active():
    activity = Activity(torch.empty(0), torch.empty(0, dtype=torch.int64), 5, 3)
    assert activity.counts.tolist() == activity.maxima.tolist() == activity.together(1).tolist() == [0, 0, 0]
    assert activity.strongest(2).tolist() == [[-1, -1]] * 3


def test_contexts_have_the_rows_own_words_and_activations(activity, text, store, dense):
    rows = torch.cat([store.token_shard(i).places.rows for i in range(len(store.tokens))])
    word_of = torch.arange(100) + 1000
    place = {(int(r), int(p)): t for t, (r, p) in enumerate(zip(text.token_rows, text.positions))}
    feature = int(activity.counts.argmax())
    tokens = top_tokens(activity, text, feature, 6)
    assert torch.equal(tokens, text.first_of_each_row(activity.tokens[activity.ranked(feature)])[:6])
    for token, found in zip(tokens.tolist(), text.windows(activity, feature, tokens, word_of)):
        row, position = int(text.token_rows[token]), int(text.positions[token])
        assert (found["row"], found["position"]) == (row, position)
        first = max(0, position - BEFORE)
        ids = rows[row, first : position + AFTER + 1]
        assert found["words"] == (ids + 1000).tolist()
        assert first + found["at"] == position
        own = {i: float(dense[place[row, first + i], feature]) for i in range(len(ids)) if (row, first + i) in place}
        on = [[i, pytest.approx(value, rel=1e-3)] for i, value in own.items() if value]
        assert found["on"] == on
        assert found["value"] == pytest.approx(float(dense[token, feature]), rel=1e-3)


def test_quarters_hold_what_they_say(activity, dense):
    feature = int(activity.counts.argmax())
    quarters = [dense[tokens, feature] for tokens in quantile_tokens(activity, feature, 3)]
    assert [len(quarter) for quarter in quarters] == [3, 3, 3, 3]
    assert float(quarters[0][0]) == float(dense[:, feature].max())
    everything = torch.cat(quarters)
    assert torch.equal(everything, everything.sort(descending=True).values)
    few = int(activity.counts.argmin())
    assert sum(map(len, quantile_tokens(activity, few, 3))) <= int(activity.counts[few])


def test_the_loss_rises_by_what_a_feature_carries(sae, store, codes, dense):
    shares = loss_shares(sae, store, codes, len(codes.tokens))
    x = torch.cat([store.shard(i) for i in range(len(store.tokens))]).double()
    W_dec, b_dec = sae.W_dec.double(), sae.b_dec.double()

    def fvu(c):
        x_hat = (c.double() @ W_dec + b_dec) / sae.cfg.input_scale
        return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())

    assert shares.fvu == pytest.approx(fvu(dense), rel=1e-5)
    for feature in range(0, 64, 7):
        without = dense.clone()
        without[:, feature] = 0
        assert float(shares.rise[feature]) == pytest.approx(fvu(without) - fvu(dense), abs=1e-6)


def test_nearest_rows_are_those_of_all_cosines(sae, monkeypatch):
    monkeypatch.setattr("sampled_sae.pages.feature_details.BLOCK", 500)
    features = torch.tensor([3, 40, 63])
    cosines, found = nearest(sae.W_dec, features, 4)
    every = nnf.normalize(sae.W_dec, dim=1)
    every = every @ every.t()
    every.fill_diagonal_(-2)
    expected = every[features].topk(4)
    torch.testing.assert_close(cosines, expected.values)
    assert torch.equal(found, expected.indices)


def test_nearest_rows_of_any_length():
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    lengths = torch.logspace(-30, 30, 20)[:, None]
    for found, wanted in zip(nearest(rows * lengths, torch.arange(20), 3), nearest(rows, torch.arange(20), 3)):
        assert torch.allclose(found.double(), wanted.double(), atol=1e-6)


def test_the_lens_is_the_models_own_head(root, sae):
    model, tokenizer = load_model(str(root / "model"))
    lens = logit_lens(model, sae.W_dec, 3)
    with torch.no_grad():
        logits = model.lm_head(model.model.norm(sae.W_dec))
    torch.testing.assert_close(lens.raised, logits.topk(3).values)
    assert torch.equal(lens.raised_ids, logits.topk(3).indices)
    assert torch.equal(lens.lowered_ids, logits.topk(3, largest=False).indices)
    assert final_norm(model) is model.model.norm
    with pytest.raises(ValueError, match=r"directions=\[64, 5\]: must be \[P, 12\]"):
        logit_lens(model, sae.W_dec[:, :5], 3)
    assert token_texts(tokenizer, [2, 3, 99]) == ["</script><img/src=x/onerror=document.title='hacked'>", "w0", "#99"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0:3", [0, 1, 2]), ("4,1", [1, 4]), ("all", [0, 1, 2, 3, 4]), ("top:2", [2, 4]), ("top", [0, 2, 4])],
)
def test_a_choice_names_its_features(text, expected):
    weight = torch.tensor([1.0, 0, 5, 0, 2])
    assert FeatureChoice.parse(text).of(weight).tolist() == expected
    drawn = FeatureChoice.parse("random:2").of(weight, seed=3)
    assert len(drawn) == 2
    assert set(drawn.tolist()) < {0, 2, 4}
    assert torch.equal(drawn, FeatureChoice.parse("random:2").of(weight, seed=3))


@pytest.mark.parametrize("text", ["", "top:", "top:0", "3:3", "5:2", "-1", "1,,2", "1.5", "all:3", "0:" + "9" * 40])
def test_what_is_no_choice_is_refused(text):
    with pytest.raises(ValueError, match=r"^choice=.*: must be top, top:N, random"):
        FeatureChoice.parse(text)


def test_a_feature_that_is_not_there_is_named():
    for text in ("3:6", "2,5"):
        with pytest.raises(ValueError, match="choice=5: the SAE has 5 features, from 0 to 4"):
            FeatureChoice.parse(text).of(torch.ones(5))


def test_shards_hold_the_tokens_wanted():
    assert [shards_of([10, 10, 10], wanted) for wanted in (1, 10, 11, 30, 99)] == [1, 1, 2, 3, 3]
