"""A run to look at, tiny: a model whose vocabulary has a token of markup, its activations and an SAE of them."""

from __future__ import annotations

import base64
import gzip
import json
import random
import re

import numpy as np
import torch
from word_models import save_word_llama

from sampled_sae.cli import main

HOSTILE = "</script><img/src=x/onerror=document.title='hacked'>"
WORDS = [HOSTILE, *(f"w{i}" for i in range(29))]
N_FEATURES = 64


def command(*parts):
    """Runs a command line, which must succeed."""
    assert main(["--quiet", *(word for part in parts for word in str(part).split())]) == 0


def make_run(root):
    """`root`/model, acts, run (trained and evaluated) and bare, activations without text."""
    torch.manual_seed(0)
    save_word_llama(root / "model", WORDS, split="WhitespaceSplit")
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choice(WORDS) for _ in range(60))}) for _ in range(40)]
    (root / "texts.jsonl").write_text("\n".join(lines))
    texts = f"--model {root}/model --texts {root}/texts.jsonl --layer 1 --context 32 --holdout-rows 4"
    command("harvest", root / "acts", texts)
    command(
        "train", root / "acts", root / "run", f"--features {N_FEATURES} --k 4 --steps 40 --batch-size 128 --log-every 2"
    )
    command("evaluate", root / "run", root / "acts", "--splice-rows 2")
    return root


def data_of(html):
    """(the data that a page reads at once, the details of its features)."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.DOTALL)
    parts = re.findall(r'class="part">([^<]*)</script>', html)
    unpacked = [json.loads(gzip.decompress(base64.b64decode(part))) for part in parts]
    return json.loads(text), [one for part in unpacked for one in part]


def column(text, kind="<f4"):
    return np.frombuffer(base64.b64decode(text), kind)
