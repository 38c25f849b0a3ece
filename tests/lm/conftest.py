import json

import pytest
import torch
from tiny_models import CONTEXT, SIZES, SPECIAL, VOCABULARY, WORDS, gpt2, gpt_neox, llama, tiny, transformers, words


@pytest.fixture(params=[llama, gpt_neox, gpt2], ids=lambda make: make.__name__)
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


@pytest.fixture
def small_llama():
    torch.manual_seed(0)
    return llama().eval()


@pytest.fixture
def rows():
    return torch.randint(0, VOCABULARY, (11, CONTEXT), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """A Llama whose tokenizer begins each text with <s>."""
    folder = tmp_path_factory.mktemp("causal")
    made = words(["<pad>", "<s>", "</s>", "<unk>", "<x>"], "<unk>")
    tokenizers = pytest.importorskip("tokenizers")
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    tiny("Llama", "CausalLM", **SIZES, num_key_value_heads=1, bos_token_id=1, eos_token_id=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT with the tokenizer of its kind: cls and sep around each text, no bos, no eos."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    transformers.BertTokenizer(str(vocabulary)).save_pretrained(folder)
    torch.manual_seed(0)
    tiny("Bert", "MaskedLM", **SIZES, pad_token_id=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    draw = torch.Generator().manual_seed(1)
    lines = (" ".join(WORDS[i] for i in torch.randint(0, 40, (9,), generator=draw).tolist()) for _ in range(80))
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file
