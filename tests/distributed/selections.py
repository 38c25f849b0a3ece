"""Many batches encoded by their pool and budget: by the processes of a mesh, and by one on all tokens."""

import torch
from cases import batches, mesh_of, start

from sampled_sae.distributed import parallelize


def random_cases(number, data, dtype=torch.float64, screen="off"):
    """(settings, tokens of each process, whether all values are whole numbers, so that they tie)."""
    generator = torch.Generator().manual_seed(11)

    def one_of(values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    made = []
    for i in range(number):
        select = one_of(["batch", "token"])
        settings = {
            "d_sae": one_of([23, 64, 131]),
            "k": one_of([1, 3, 6]) if select == "token" else one_of([0.3, 1, 3.7, 6]),
            "l": one_of([None, 1.0, 2.0, 5.5]),
            "score": one_of(["l2", "l2_squared", "entropy", "uniform"]),
            "pool": one_of(["top", "sample"]),
            "score_tokens": one_of([1.0, 0.4]),
            "select": select,
            "impl": "torch",
            "dtype": dtype,
            "screen": screen,
            "seed": i,
        }
        counts = torch.randint(0, 9, (data,), generator=generator).tolist()
        counts[one_of(range(data))] += 1
        made.append((settings, counts, i % 2 == 0))
    return made


def made(settings, whole_numbers, screen):
    sae = start({**settings, "screen": screen}, whole_numbers)
    # entropy, which no screen scores, does not see a factor: such features would tie, and not nearly
    if settings["screen"] != "off" and not whole_numbers and settings["score"] != "entropy":
        with torch.no_grad():
            tie_nearly(sae.W_enc, sae.b_enc)
    return sae


def tie_nearly(*of_features):
    """Makes every second feature, the last dimension, one that bfloat16 cannot tell from the one before."""
    for weights in of_features:
        n = weights.shape[-1] // 2 * 2
        weights[..., 1:n:2] = weights[..., :n:2] * 1.0001


def of_case(sae, settings, counts, whole_numbers, rank):
    """Two batches, so that the second is searched from the threshold of the first; half the time few are positive."""
    if settings["seed"] % 3 == 0:
        with torch.no_grad():
            sae.layout.local(sae.b_enc).sub_(4)
    found = []
    for of_step in batches([counts], 2, 12, whole_numbers, settings["dtype"], seed=settings["seed"]):
        codes = sae.encode_sparse(torch.cat(of_step) if rank is None else of_step[rank]).detach()
        found.append((codes.tokens, codes.features, codes.values, codes.shape))
    return found


def encode_alone(cases):
    """Without a screen."""
    return [of_case(made(s, whole, "off"), s, counts, whole, None) for s, counts, whole in cases]


def encode_on_mesh(shape, cases):
    mesh = mesh_of(shape)
    found = []
    for settings, counts, whole in cases:
        sae = parallelize(made(settings, whole, settings["screen"]), mesh)
        found.append(of_case(sae, settings, counts, whole, sae.layout.mesh.data.rank))
    return sae.layout.mesh.data.rank, found
