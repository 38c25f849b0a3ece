"""The module under torch.compile, and in wrappers of torch.distributed."""

import copy
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from makers import gradients, make_sae, tokens
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

RULES = [{"d_sae": 128, "l": 4.0}, {"l": None}, {"l": None, "input_scale": 0.37, "groups": (10, 40, 96)}]
WORLD = 2


@pytest.mark.parametrize("rule", [*RULES, {"l": 4.0, "select": "token", "score": "entropy"}], ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
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


def wrapped_worker(rank, folder):
    """What a training step and an evaluation say in two wrappers."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    said = []
    for wrap in (DistributedDataParallel, lambda sae: FullyShardedDataParallel(sae, device_id=torch.device("cpu"))):
        wrapped = wrap(make_sae(dtype=torch.float32))
        try:
            wrapped(tokens(10, 12, dtype=torch.float32))
        except RuntimeError as error:
            said.append(str(error))
    try:
        fully_shard(make_sae(dtype=torch.float32), mesh=init_device_mesh("cpu", (WORLD,)))
    except NotImplementedError as error:
        said.append(str(error))
    torch.save(said, f"{folder}/{rank}.pt")
    dist.barrier()
    # torch 2.13 can hang in DDP's destructor, which joins gloo's thread while holding the lock that it waits for.
    os._exit(0)


def test_wrappers_that_would_train_by_another_rule_are_refused(tmp_path):
    """Each process would select in its own batch. `fully_shard` refuses by itself: W_enc is not contiguous."""
    multiprocessing.spawn(wrapped_worker, args=(str(tmp_path),), nprocs=WORLD)
    for rank in range(WORLD):
        ddp, fsdp, sharded = torch.load(tmp_path / f"{rank}.pt")
        for name, said in (("DistributedDataParallel", ddp), ("FullyShardedDataParallel", fsdp)):
            assert said.startswith(name)
            assert "sampled_sae.distributed.parallelize(sae, mesh)" in said
        assert "non-contiguous" in sharded
