"""The interpreter without repeated work gives what Triton's own gives, to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from makers import TOPK, gradients, make_sae, state_of, tokens

pytest.importorskip("triton")

import triton
from quick_interpreter import is_plain

from sampled_sae import RowAdam

HERE = Path(__file__).parent
RULES = [{"l": 3.0}, {"l": 2.0, "score": "entropy", "select": "token"}, TOPK, {"l": None, "screen": "bf16"}]
AUX = {"aux_coefficient": 0.5, "dead_after": 4, "k_aux": 2, "aux_pool": 7}


def results():
    """{what: tensor} of two steps by each rule, in float32 and in bfloat16 alike."""
    found = {}
    for i, rule in enumerate(RULES):
        sae = make_sae(torch.float32, impl="triton", d_sae=48, row_grads=i % 2 == 0, **AUX, **rule)
        optimizer = RowAdam(sae, lr=0.01, mode="dense" if i % 2 else "decayed")
        for step in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=i == 2):
                out = sae(tokens(7, 12, dtype=torch.float32, seed=step))
            out.loss.backward()
            if not sae.cfg.row_grads:
                found |= {f"{i} {step} gradient of {name}": grad for name, grad in gradients(sae).items()}
            optimizer.step()
            found |= {f"{i} {step} {name}": t.detach() for name, t in zip("tfv", out.codes.entries())}
            found |= {f"{i} {step} loss": out.loss.detach(), f"{i} {step} aux": out.aux.detach()}
        found |= {f"{i} {name}": value for name, value in state_of(sae).items()}
    return found


@pytest.mark.slow
@pytest.mark.every_triton
@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
def test_results_are_those_of_tritons_own(tmp_path):
    assert not is_plain()
    code = "import sys, torch, test_quick_interpreter as here; torch.set_num_threads(1); assert here.is_plain(); "
    code += "torch.save(here.results(), sys.argv[1])"
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "plain.pt")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    plain, quick = torch.load(tmp_path / "plain.pt"), results()
    assert quick.keys() == plain.keys()
    assert [name for name, value in plain.items() if not torch.equal(quick[name], value)] == []
    assert all(quick[f"{i} 1 aux"] > 0 for i in range(len(RULES)))
