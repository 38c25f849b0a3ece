"""Tokenizers of whole words for the tiny models of tests."""

import pytest


def save_word_tokenizer(folder, words, split="Whitespace"):
    """In `folder`: <|endoftext|> is 0, <unk> is 1, then the words; skips the test where transformers is missing."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["<|endoftext|>", "<unk>", *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = getattr(tokenizers.pre_tokenizers, split)()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>").save_pretrained(folder)


def save_word_llama(folder, words, split="Whitespace", **changes):
    """In `folder`: a Llama of drawn weights, and its tokenizer. changes: other values for its config."""
    transformers = pytest.importorskip("transformers")
    save_word_tokenizer(folder, words, split)
    sizes = {"vocab_size": len(words) + 2, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(**{**sizes, **heads, **changes})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
