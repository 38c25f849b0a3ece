"""Language models small enough to make in a test."""

import pytest

transformers = pytest.importorskip("transformers")

VOCABULARY, D, LAYERS, CONTEXT = 61, 16, 4, 12
# of those with a tokenizer of their own
WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZES = {"num_hidden_layers": LAYERS, "vocab_size": 45, "max_position_embeddings": 32}


def tiny(name, task, **given):
    """Of an architecture whose config has the usual names."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": D,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        # the tests draw ids from the whole vocabulary, none of them special
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config = getattr(transformers, f"{name}Config")(**{**sizes, **given})
    return getattr(transformers, f"{name}For{task}")(config)


def llama():
    return tiny("Llama", "CausalLM", num_key_value_heads=1, initializer_range=0.3)


def gpt_neox():
    return tiny("GPTNeoX", "CausalLM", initializer_range=0.3)


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=D, n_layer=LAYERS, n_head=2, n_positions=32, initializer_range=0.3
        )
    )


def bert():
    return tiny("Bert", "MaskedLM", max_position_embeddings=32)


def mpnet():
    return tiny("MPNet", "MaskedLM", max_position_embeddings=32)


def words(special, unknown):
    """A tokenizer of WORDS and the special ones."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=unknown))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made
