"""The module under torch.compile and DistributedDataParallel."""

import copy
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from makers import gradients, make_sae, tokens
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

RULES = [{"d_sae": 128, "l": 4.0}, {"l": None}, {"l": None, "input_scale": 0.37}]
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


def ddp_worker(rank, folder):
    """Gradients of a rank's own batch, averaged by DDP; two steps, so that the second finds its buckets set."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for i, rule in enumerate(RULES):
        sae = make_sae(**rule)
        ddp = DistributedDataParallel(sae)
        for step in range(2):
            sae.zero_grad()
            ddp(tokens(10, 12, seed=10 * rank + step)).loss.backward()
        result = {"grads": gradients(sae), "strides": {n: p.grad.stride() for n, p in sae.named_parameters()}}
        torch.save(result, f"{folder}/{i}-{rank}.pt")
    dist.barrier()
    # torch 2.13 can hang in DDP's destructor, which joins gloo's thread while holding the lock that it waits for.
    os._exit(0)


def test_ddp_averages_the_gradients(tmp_path):
    multiprocessing.spawn(ddp_worker, args=(str(tmp_path),), nprocs=WORLD)
    for i, rule in enumerate(RULES):
        alone = []
        for rank in range(WORLD):
            sae = make_sae(**rule)
            sae(tokens(10, 12, seed=10 * rank + 1)).loss.backward()
            alone.append(gradients(sae))
        for rank in range(WORLD):
            found = torch.load(tmp_path / f"{i}-{rank}.pt")
            assert found["strides"]["W_enc"] == (1, 12)
            for name, gradient in found["grads"].items():
                torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / WORLD)
                assert not torch.allclose(gradient, alone[rank][name])
