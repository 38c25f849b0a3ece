import pytest
import torch
from tiny_models import CONTEXT, VOCABULARY, gpt2, gpt_neox, llama


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
