"""Rows of tokens from real tokenizers: cuts of long texts, frames of encoders, chats, and no reading ahead."""

import random
from itertools import count, islice

import pytest
import torch
from tiny_models import transformers

from sampled_sae.lm import pieces as pieces_module
from sampled_sae.lm import rows as rows_module
from sampled_sae.lm import token_rows

tokenizers = pytest.importorskip("tokenizers")
models, normalizers, pre_tokenizers = tokenizers.models, tokenizers.normalizers, tokenizers.pre_tokenizers

SAMPLE = "the quick brown fox, it jumps over 12 lazy dogs.\nand then? it runs; a fox is a fox"
WORDS = SAMPLE.split()


def trained(model, trainer, pre_tokenizer=None, normalizer=None, **special):
    tokenizer = tokenizers.Tokenizer(model)
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([SAMPLE] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def gpt_like():
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    return trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False), eos_token="<|endoftext|>")


def llama_like(prefix):
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], max_token_length=8
    )
    steps = [normalizers.Replace(" ", "▁")]
    steps = [normalizers.Prepend("▁"), *steps] if prefix else steps
    return trained(
        models.BPE(unk_token="<unk>"),
        trainer,
        pre_tokenizers.Split("▁", "merged_with_next"),
        normalizers.Sequence(steps),
        unk_token="<unk>",
        eos_token="</s>",
    )


def bert_like():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = trained(
        models.WordPiece(unk_token="[UNK]"),
        tokenizers.trainers.WordPieceTrainer(vocab_size=300, special_tokens=special),
        pre_tokenizers.BertPreTokenizer(),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def long_text(characters, seed=0):
    draw = random.Random(seed)
    text = ""
    while len(text) < characters:
        text += draw.choice(WORDS) + draw.choice([" ", " ", " ", "  ", "\n", "\n\n", " \n "])
    return text.strip()


@pytest.mark.parametrize("make", [gpt_like, lambda: llama_like(True), lambda: llama_like(False), bert_like])
@pytest.mark.parametrize("in_parts", [False, True])
def test_cuts_leave_the_tokens_as_they_are(monkeypatch, make, in_parts):
    tokenizer = make()
    text = long_text(5000)
    want = token_rows([text, "a fox", text[:1000]], tokenizer, 16)
    monkeypatch.setattr(pieces_module, "PIECE", 256)
    sizes = []
    real = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, some, **more: sizes.extend(map(len, some)) or real(self, some, **more)
    )
    given = (text[at : at + 37] for at in range(0, len(text), 37)) if in_parts else text
    assert torch.equal(token_rows([given, "a fox", text[:1000]], tokenizer, 16), want)
    assert max(sizes) <= 256


@pytest.mark.parametrize("text", ["x" * 1000, "fox\n" * 300, "a" + " " * 900 + "b", " \n" * 20 + "fox"])
def test_texts_without_single_spaces_are_cut_somewhere(monkeypatch, text):
    monkeypatch.setattr(pieces_module, "PIECE", 50)
    tokenizer = gpt_like()
    pieces = [piece for _, piece in pieces_module._pieces([text], tokenizer)]
    assert "".join(pieces) == text.rstrip()
    assert all(0 < len(piece) <= 50 for piece in pieces)


def test_no_more_is_read_than_the_rows_need():
    tokenizer = gpt_like()
    asked = count()
    texts = (f"{SAMPLE} {next(asked)}" for _ in count())
    rows = token_rows(texts, tokenizer, 32, limit=10)
    assert rows.shape == (10, 32)
    assert next(asked) <= 300
    parts = count()
    endless = (f"{SAMPLE} {next(parts)} " for _ in count())
    assert token_rows([endless], tokenizer, 32, limit=10).shape == (10, 32)
    assert next(parts) * len(SAMPLE) <= 2 * rows_module._BATCH_CHARACTERS


@pytest.mark.parametrize("context", [8, 3])
def test_an_encoders_rows_stand_between_cls_and_sep(context):
    tokenizer = bert_like()
    texts = ["the quick fox", "it jumps over dogs.", "a fox"]
    rows = token_rows(texts, tokenizer, context)
    assert (rows[:, 0] == tokenizer.cls_token_id).all()
    assert (rows[:, -1] == tokenizer.sep_token_id).all()
    inner = rows[:, 1:-1].flatten().tolist()
    parts = [tokenizer([text], add_special_tokens=False)["input_ids"][0] for text in texts]
    joined = [*parts[0], tokenizer.sep_token_id, *parts[1], tokenizer.sep_token_id, *parts[2]]
    if context == 8:
        assert inner == joined[: len(inner)]
        assert len(joined) - len(inner) < context
    else:  # a row that ends with its document has its sep already
        assert inner == [token for part in parts for token in part]
    with pytest.raises(ValueError, match="context=2 must be at least 3"):
        token_rows(texts, tokenizer, 2)


def test_roberta_whose_cls_and_sep_are_bos_and_eos_too():
    vocabulary = {"<s>": 0, "</s>": 2, "a": 3, "b": 4}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    assert token_rows(["a b", "b a"], tokenizer, 4).tolist() == [[0, 3, 4, 2], [0, 4, 3, 2]]


def test_a_tokenizer_that_knows_no_letter():
    made = tokenizers.Tokenizer(models.BPE({"<s>": 0, "x": 1}, []))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>")
    assert token_rows(["xxx"], tokenizer, 4).tolist() == [[0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (SAMPLE, "texts='the quick brown.*must be documents, not one string"),
        ([SAMPLE, None], "texts: 'None' must be a string"),
        ([{"text": SAMPLE}], "must be a string, a chat"),
        ([SAMPLE.encode()], "must be a string, a chat"),
        ([["the quick", "brown fox"]], "must be a string, a chat"),
        ([[{"role": "user"}]], "must be a string, a chat"),
    ],
)
def test_what_is_no_document(texts, message):
    with pytest.raises(TypeError, match=message):
        token_rows(texts, gpt_like(), 4)


@pytest.mark.parametrize(("text", "meant"), [("a fox \ud83d", "a fox \ufffd"), ("\ud83d\ude00 a fox", "😀 a fox")])
def test_halves_of_characters(text, meant):
    tokenizer = gpt_like()
    want = token_rows([meant], tokenizer, 4)
    assert torch.equal(token_rows([text], tokenizer, 4), want)
    assert torch.equal(token_rows([[{"role": "user", "content": text}]], tokenizer, 4), want)


CHAT = [{"role": "user", "content": "a fox"}, {"role": "assistant", "content": "it jumps over dogs"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def test_chats_without_a_template_are_their_contents():
    tokenizer = gpt_like()
    parts = [{"role": "user", "content": [{"type": "text", "text": "a fox"}, {"type": "image"}]}, CHAT[1]]
    want = token_rows(["a fox\n\nit jumps over dogs"], tokenizer, 4)
    assert torch.equal(token_rows([CHAT], tokenizer, 4), want)
    assert torch.equal(token_rows([parts], tokenizer, 4), want)
    silent = [CHAT[0], {"role": "assistant", "content": None}, CHAT[1]]
    assert torch.equal(token_rows([silent], tokenizer, 4), want)


def test_chats_go_through_the_template():
    pytest.importorskip("jinja2")
    tokenizer = gpt_like()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = TEMPLATE
    want = token_rows(["<user>a fox<assistant>it jumps over dogs"], tokenizer, 4)
    assert torch.equal(token_rows([CHAT], tokenizer, 4), want)
    tokenizer.chat_template = "{{ raise_exception('system first') }}"
    with pytest.raises(ValueError, match=r"chat template refuses .*a fox.*system first"):
        token_rows([CHAT], tokenizer, 4)


@pytest.mark.parametrize("changes", [{"context": 1}, {"context": 2.5}, {"limit": 0}, {"limit": "3"}])
def test_wrong_numbers(changes):
    arguments = {"context": 4, **changes}
    with pytest.raises((ValueError, TypeError), match=f"{next(iter(changes))}="):
        token_rows(islice(iter([SAMPLE]), 1), gpt_like(), **arguments)
