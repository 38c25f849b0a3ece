"""Small crosscoders, their rules and their activations."""

import torch
from makers import make_sae, tokens

L, D = 3, 4
RULES = [
    {"l": 3.0},
    {"l": 3.0, "select": "token", "score": "entropy"},
    {"l": None, "input_scale": (0.5, 2.0, 1.0)},
    {"l": None, "select": "token", "apply_b_dec_to_input": True},
    {"l": 2.0, "groups": (10, 40, 96), "input_scale": 0.37},
]


def make(dtype=torch.float64, **changes):
    """A crosscoder of L layers of width D, as `make_sae`."""
    return make_sae(dtype, **{"d_in": D, "layers": L, **changes})


def batch(*shape, dtype=torch.float64, seed=1):
    """Activations [..., L, D]."""
    return tokens(*shape, L, D, dtype=dtype, seed=seed)


def scaled(sae, x):
    """x [..., L, D] as the layer computes with it, [B, L * D]."""
    by_layer = torch.tensor(sae.cfg.input_scale, dtype=torch.float64).expand(L)
    return (x * by_layer[:, None].to(x.dtype)).flatten(-2).flatten(0, -2)
