"""Language models small enough to make in a test."""

import pytest

transformers = pytest.importorskip("transformers")

VOCABULARY, D, LAYERS, CONTEXT = 61, 16, 4, 12


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=D,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
        )
    )


def gpt_neox():
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=D,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            initializer_range=0.3,
        )
    )


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=D, n_layer=LAYERS, n_head=2, n_positions=32, initializer_range=0.3
        )
    )


def bert():
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=D,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )


def mpnet():
    return transformers.MPNetForMaskedLM(
        transformers.MPNetConfig(
            vocab_size=VOCABULARY,
            hidden_size=D,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )
