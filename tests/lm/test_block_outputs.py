"""What a block returns: the structures that are read, and one sentence for every other output."""

from dataclasses import dataclass

import pytest
import torch
from tiny_models import CONTEXT, D
from transformers.utils import ModelOutput

from sampled_sae.lm import SpliceEvaluator, capture, replace


@dataclass
class BlockOutput(ModelOutput):
    hidden_states: torch.Tensor | None = None
    attentions: torch.Tensor | None = None


class Returning(torch.nn.Module):
    """A block that returns its output in another structure; the model around it unpacks it again."""

    def __init__(self, block, pack):
        super().__init__()
        self.block, self.pack = block, pack

    def forward(self, *args, **kwargs):
        return self.pack(self.block(*args, **kwargs))


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda x: (x, None), lambda out: out[0]),
        (lambda x: [x, None], lambda out: out[0]),
        (lambda x: {"attentions": None, "hidden_states": x}, lambda out: out["hidden_states"]),
        (lambda x: BlockOutput(hidden_states=x), lambda out: out.hidden_states),
    ],
    ids=["tuple", "list", "dict", "ModelOutput"],
)
def test_structures_that_blocks_return(small_llama, rows, pack, unpack):
    with capture(small_llama, 1) as captured:
        small_llama(input_ids=rows)
    want, clean = captured.value, small_llama(input_ids=rows).logits
    small_llama.model.layers[1] = Returning(small_llama.model.layers[1], pack)
    small_llama.model.layers[2].register_forward_pre_hook(lambda module, args: (unpack(args[0]), *args[1:]))
    with capture(small_llama, 1) as captured:
        small_llama(input_ids=rows)
    assert torch.equal(captured.value, want)
    with replace(small_llama, 1, lambda x: x.clone()):
        assert torch.equal(small_llama(input_ids=rows).logits, clean)
    with replace(small_llama, 1, torch.zeros_like):
        assert not torch.allclose(small_llama(input_ids=rows).logits, clean)
    evaluator = SpliceEvaluator(small_llama, rows, 1, scale=1.0)
    assert evaluator.evaluate(lambda x: x)["ce_spliced"] == pytest.approx(evaluator.ce_clean, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda x: x[:, :-1], [11, CONTEXT - 1, D]),
        (lambda x: x.repeat(1, 1, 2), [11, CONTEXT, 2 * D]),
        (lambda x: x.transpose(0, 1), [CONTEXT, 11, D]),
        (lambda x: x > 0, [11, CONTEXT, D]),
        (lambda x: None, "NoneType"),
    ],
)
def test_any_other_output_is_refused(small_llama, rows, change, found):
    small_llama.model.layers[2] = Returning(small_llama.model.layers[2], change)
    said = str(found).replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ValueError, match=f"block 2 of LlamaForCausalLM returns {said}, not"), capture(small_llama, 2):
        small_llama(input_ids=rows)
