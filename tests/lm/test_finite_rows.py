"""Activations that are not finite, in a model that is trained on as it works: the rows are named."""

import pytest
import torch
from small_texts import Numbers, numbered_texts
from tiny_models import llama

from sampled_sae.lm import ModelSource, RowReader, token_rows

CONTEXT = 8


def source(model, **options):
    return ModelSource(model, RowReader(numbered_texts, Numbers(), CONTEXT), (1,), source="texts.txt", **options)


def test_a_model_without_finite_activations_is_refused_at_once():
    broken = llama()
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"activations of layer 1 are not finite \(NaN or inf\) in rows \[0\]"):
        source(broken)


@pytest.mark.parametrize(("holdout_rows", "what"), [(12, ", held out,"), (7, ""), (0, "")])
def test_rows_are_named_by_their_numbers_in_the_texts(small_llama, holdout_rows, what):
    bad = token_rows(numbered_texts(), Numbers(), CONTEXT, 12)[10]

    def breaks(module, args, output):
        return torch.stack([x * torch.nan if torch.equal(row, bad) else x for row, x in zip(args[0], output)])

    small_llama.get_input_embeddings().register_forward_hook(breaks)
    found = source(small_llama, batch_size=3, holdout_rows=holdout_rows)
    where = rf"activations of layer 1{what} are not finite \(NaN or inf\) in rows \[10\] of texts\.txt"
    with pytest.raises(ValueError, match=where):
        found.holdout() if what else [found.read() for _ in range(4)]
