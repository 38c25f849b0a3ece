"""Several processes measure the loss recovered, each in the rows that are its own, as one does in all of them."""

from types import SimpleNamespace

import pytest
import torch
from cases import mesh_of
from makers import make_sae
from tiny_harvest import CONTEXT, VOCABULARY, D, Tiny
from torch import nn

from sampled_sae.distributed import parallelize
from sampled_sae.lm import SpliceEvaluator
from sampled_sae.support.all_ranks import ranks_of
from sampled_sae.training.evaluation import reconstruct_with

RULES = {
    "threshold": {},
    "fixed set": {"inference": "pool", "inference_pool": 20},
    "batch": {"inference": "batch"},
    "topk": {"select": "token", "l": None, "k": 3},
}


class TinyLM(Tiny):
    """`Tiny` with a head, and how many rows it was given."""

    def __init__(self):
        super().__init__()
        self.head, self.rows = nn.Linear(D, VOCABULARY), 0

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False):
        self.rows += len(input_ids)
        return SimpleNamespace(logits=self.head(super().forward(input_ids)))


def measured(n_rows, shape=None):
    """The figures of each rule, and how many rows the model was given for the last one."""
    mesh, model, found = None if shape is None else mesh_of(shape), TinyLM(), {}
    ranks_of(mesh)
    rows = torch.randint(VOCABULARY, (n_rows, CONTEXT), generator=torch.Generator().manual_seed(1))
    x = torch.randn(60, D, generator=torch.Generator().manual_seed(2))
    evaluator = SpliceEvaluator(model, rows, 0, batch_size=4, mesh=mesh)
    for name, rule in RULES.items():
        sae = make_sae(torch.float32, d_in=D, d_sae=40, impl="torch", **rule)
        sae.calibrate(x)
        sae = sae if mesh is None else parallelize(sae, mesh)
        model.rows = 0
        found[name] = evaluator.evaluate(reconstruct_with(sae.eval()))
    return found, model.rows


@pytest.mark.parametrize(("n_rows", "shape"), [(11, (2, 1)), (9, (1, 2)), (6, (2, 2)), (2, (3, 1))], ids=str)
def test_the_figures_are_those_of_one_process(workers, n_rows, shape):
    expected, rows = measured(n_rows)
    results = workers.run(shape[0] * shape[1], measured, n_rows, shape)
    for found, _ in results:
        for rule, figures in expected.items():
            assert found[rule] == pytest.approx(figures, rel=1e-5), rule
    assert rows == n_rows == sum(of_rank for _, of_rank in results)
