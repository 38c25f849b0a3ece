"""The module under torch.compile, and in wrappers of torch.distributed."""

import copy
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import forked
from makers import gradients, make_sae, tokens
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sampled_sae.distributed import parallelize
from sampled_sae.distributed.layout import MeshLayout

RULES = [{"d_sae": 128, "l": 4.0}, {"l": None}, {"l": None, "input_scale": 0.37, "groups": (10, 40, 96)}]
TOKEN = {"l": 4.0, "select": "token", "score": "entropy"}
WORLD = 2
# torch's own sentence of `fully_shard(sae)`, which docs/usage.md explains
PLAIN = "FSDP does not support non-contiguous parameters yet"


def test_what_is_not_compiled_ends_a_graph():
    """Once: what is before the call is one graph, what is after it another, and nothing of the layer is in either."""
    sae, x = make_sae(**RULES[0]).eval(), tokens(12, 12)
    expected = sae.encode_sparse(x).values.sum()
    graphs = []

    def counted(graph, _):
        graphs.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: 2 * sae.encode_sparse(x + 0).values.sum(), backend=counted)
    assert [float(compiled(x)), float(compiled(x))] == [2 * float(expected)] * 2
    assert graphs == [1, 2]


@pytest.mark.parametrize(
    ("backend", "rule"),
    [
        ("aot_eager", RULES[0]),
        *(pytest.param("aot_eager", rule, marks=pytest.mark.slow) for rule in (*RULES[1:], TOKEN)),
        *(pytest.param("eager", rule, marks=pytest.mark.slow) for rule in (*RULES, TOKEN)),
    ],
    ids=str,
)
def test_compiled_step_equals_eager(backend, rule):
    sae = make_sae(aux_coefficient=1.0, dead_after=20, **rule)
    twin = copy.deepcopy(sae)
    torch._dynamo.reset()

    @torch.compile(backend=backend)
    def compiled(x):
        out = twin(2 * x)
        return replace(out, loss=2 * out.loss)

    for seed in range(3):  # the third step has dead features
        x = tokens(12, 12, seed=seed)
        expected, found = sae(2 * x), compiled(x)
        torch.testing.assert_close(found.loss, 2 * expected.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.x_hat, expected.x_hat)
        assert torch.equal(found.codes.features, expected.codes.features)
        for module, out in ((sae, expected), (twin, found)):
            module.zero_grad()
            out.loss.backward()
        for name, gradient in gradients(sae).items():
            torch.testing.assert_close(twin.get_parameter(name).grad, 2 * gradient, rtol=1e-9, atol=1e-12)
    assert expected.aux > 0
    for name in ("threshold", "threshold_steps", "tokens_since_active"):
        assert torch.equal(sae.get_buffer(name), twin.get_buffer(name))
    whole = torch.compile(twin.eval(), backend=backend)
    torch.testing.assert_close(whole(x).x_hat, sae.eval()(x).x_hat)
    torch.testing.assert_close(torch.compile(twin.encode, backend=backend)(x), sae.encode(x))


def in_fsdp(sae):
    return FullyShardedDataParallel(sae, device_id=torch.device("cpu"))


def in_fully_shard(sae):
    return fully_shard(sae, mesh=init_device_mesh("cpu", (WORLD,)), ignored_params={sae.W_enc})


def inside_fully_shard(sae):
    return fully_shard(torch.nn.Sequential(sae), mesh=init_device_mesh("cpu", (WORLD,)), ignored_params={sae.W_enc})


WRAPPERS = {
    "DistributedDataParallel": DistributedDataParallel,
    "FullyShardedDataParallel": in_fsdp,
    "fully_shard": in_fully_shard,
    "FullyShardedDataParallel or fully_shard": inside_fully_shard,
}


def said_in(wrap, sae):
    """What a training step says in a wrapper, or torch's wrapper of the SAE; None where it goes through."""
    try:
        wrap(sae)(tokens(10, 12, dtype=torch.float32))
    except Exception as error:
        return str(error)
    return None


def wrapped_worker(rank, folder):
    """What is said in each wrapper, in `fully_shard` as it stands, and in each around an SAE that is spread."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("data",))
    said = {name: said_in(wrap, make_sae(torch.float32)) for name, wrap in WRAPPERS.items()}
    plain = said_in(lambda sae: fully_shard(sae, mesh=mesh), make_sae(torch.float32))
    spread = {name: said_in(wrap, parallelize(make_sae(torch.float32), mesh)) for name, wrap in WRAPPERS.items()}
    torch.save((said, plain, spread), f"{folder}/{rank}.pt")
    dist.barrier()
    # torch 2.13 can hang in DDP's destructor, which joins gloo's thread while holding the lock that it waits for.
    os._exit(0)


def test_wrappers_that_would_train_by_another_rule_are_refused(tmp_path):
    """Each process would select in its own batch. `fully_shard` refuses by itself: W_enc is not contiguous. What is
    spread already no wrapper of torch takes."""
    forked()
    multiprocessing.start_processes(wrapped_worker, (str(tmp_path),), WORLD, start_method="forkserver")
    for rank in range(WORLD):
        said, plain, spread = torch.load(tmp_path / f"{rank}.pt")
        for name, text in said.items():
            assert text.startswith(name), text
            assert "sampled_sae.distributed.parallelize(sae, mesh)" in text, name
        assert plain.startswith(PLAIN), plain
        assert all(spread.values()), spread


def test_a_spread_layer_in_a_wrapper_that_torch_lets_pass_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda *group: 2)
    layer = make_sae()
    layer._is_fsdp_managed_module = True
    with pytest.raises(RuntimeError, match="`parallelize` has spread the SAE already; leave it out"):
        MeshLayout.guard(None, layer)


def test_the_page_names_the_sentence_of_torch():
    assert PLAIN in " ".join((Path(__file__).parent.parent / "docs" / "usage.md").read_text().split())
