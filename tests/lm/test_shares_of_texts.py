"""Equal parts of the texts, as several processes read them: every piece once, behind what is held out."""

import json

import pytest
import torch
from small_texts import Numbers, numbered_texts
from tiny_models import llama

from sampled_sae.lm import ModelSource, RowReader, token_rows
from sampled_sae.lm import pieces as pieces_module
from sampled_sae.lm import rows as rows_module

CONTEXT, HELD_OUT = 8, 4


@pytest.fixture(params=[1, 5, 256])
def tokenized_at_once(request, monkeypatch):
    """Pieces that are tokenized before the first of them is needed."""
    monkeypatch.setattr(rows_module, "_BATCH", request.param)


def reader(texts=numbered_texts):
    return RowReader(texts, Numbers(), CONTEXT)


def share(which, of, texts=numbered_texts, held_out=HELD_OUT):
    found = reader(texts).share(which, of)
    found.take(held_out)
    found.deal()
    return found


@pytest.mark.usefixtures("tokenized_at_once")
@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_the_pieces_behind_the_held_out_rows_are_dealt_in_turn(of):
    whole = reader()
    whole.take(HELD_OUT)
    place = whole.state_dict()
    texts = list(numbered_texts())
    for which in range(of):
        ids = list(place["ids"]) if which == 0 else []
        for number in range(place["pieces"], len(texts)):
            if number % of == which:
                ids += [0, *map(int, texts[number].split())]
        found = share(which, of).take(None).flatten().tolist()
        assert found == ids[: len(ids) // CONTEXT * CONTEXT]


def test_one_share_is_the_whole():
    assert torch.equal(share(0, 1).take(None), token_rows(numbered_texts(), Numbers(), CONTEXT)[HELD_OUT:])


@pytest.mark.usefixtures("tokenized_at_once")
def test_a_share_goes_on_from_any_place():
    rows = share(1, 3).take(None)
    going = share(1, 3)
    for done in range(0, len(rows) + 1, 2):
        again = reader().share(1, 3)
        again.load_state_dict(json.loads(json.dumps(going.state_dict())))
        assert torch.equal(again.take(None), rows[done:])
        going.take(2)


def test_what_other_shares_read_is_not_tokenized():
    seen = []

    class Watched(Numbers):
        def __call__(self, texts, **how):
            seen.extend(texts)
            return super().__call__(texts, **how)

    found = RowReader(numbered_texts, Watched(), CONTEXT).share(1, 3)
    found.deal()
    seen.clear()
    found.take(None)
    assert seen == list(numbered_texts())[1::3]


def test_a_long_text_is_dealt_in_pieces(monkeypatch):
    monkeypatch.setattr(pieces_module, "PIECE", 50)
    text = " ".join(str(10 + i % 50) for i in range(200))
    found = [share(which, 2, lambda: [text], 0).take(None).flatten().tolist() for which in range(2)]
    for ids in found:
        assert ids[0] == 0, "a piece begins as a text does"
        assert ids.count(0) > 3
    assert sum(map(len, found)) > 180


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return llama().eval()


def test_a_model_over_a_share_begins_anew_and_goes_on(model):
    def lane():
        return ModelSource(model, reader(lambda: numbered_texts(12)), (1,), batch_size=2, holdout_rows=1).lane(1, 2)

    whole, read, places = lane(), [], []
    for _ in range(12):
        places.append(json.loads(json.dumps(whole.state_dict())))
        read.append(whole.read()[0])
    assert whole.state_dict()["epoch"] > 1
    for i in (0, 2, 7, 11):
        again = lane()
        again.load_state_dict(places[i])
        assert torch.equal(again.read()[0], read[i])


def test_a_share_without_a_row_is_named(model):
    source = ModelSource(model, reader(lambda: numbered_texts(1)), (1,), source="few.txt")
    with pytest.raises(ValueError, match=r"few.txt: no row of 8 tokens to train on in part 2 of 2; take longer texts"):
        source.lane(1, 2).read()
