"""What the processes of a mesh compute, and the same by one process on all tokens; results are plain tensors."""

import torch
from makers import make_sae
from torch.distributed.device_mesh import init_device_mesh

from sampled_sae import RowAdam
from sampled_sae.distributed import parallelize


def mesh_of(shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "feature"))


def batches(counts, steps, d=12, whole_numbers=False, dtype=torch.float64, seed=5):
    """For each step a list of the tokens of each rank of the data dimension."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for step in range(steps):
        of_step = counts[step % len(counts)]
        x = torch.randn(sum(of_step), d, generator=generator, dtype=torch.float64)
        x = (2 * x).round() if whole_numbers else x
        made.append(list(x.to(dtype).split(of_step)))
    return made


def batches_of(settings, counts, steps, whole_numbers=False):
    """As `batches`, of the width and in the dtype that an SAE of these settings reads."""
    width = settings.get("d_in", 12) * settings.get("layers", 1)
    return batches(counts, steps, width, whole_numbers, settings.get("dtype", torch.float64))


def start(settings, whole_numbers=False):
    """silent: a number among the settings by which all features are kept from being active."""
    sae = make_sae(**{name: value for name, value in settings.items() if name != "silent"})
    with torch.no_grad():
        sae.b_enc.sub_(settings.get("silent", 0))
    if whole_numbers:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in sae.parameters():
                p.copy_(torch.randint(-2, 3, p.shape, generator=generator))
    return sae


def spread(shape, settings, whole_numbers=False):
    """(SAE over a mesh, its rank among the processes that hold other tokens)."""
    sae = parallelize(start(settings, whole_numbers), mesh_of(shape))
    return sae, sae.layout.mesh.data.rank


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def rows_of(sae, name):
    """The dense gradient [F, ...] of this process, from rows or from the parameter; None where there is none."""
    parameter = sae.get_parameter(name)
    local = sae.layout.local
    grad = parameter.grad
    if grad is not None:
        grad = local(grad)
        return grad.t() if name == "W_enc" else grad
    weight = local(parameter)
    total = torch.zeros_like(weight.t() if name == "W_enc" else weight, memory_format=torch.contiguous_format)
    for part in sae.row_grads:
        if part.name == name and part.rows.grad is not None:
            total.index_add_(0, part.features, part.rows.grad.to(total.dtype))
    return total


def target_of(sae, x):
    """What a transcoder is to reconstruct from tokens x; None for an SAE."""
    if not sae.cfg.is_transcoder:
        return None
    generator = torch.Generator().manual_seed(9)
    mixed = x @ torch.randn(x.shape[1], sae.cfg.width_out, generator=generator, dtype=torch.float64).to(x)
    return mixed.detach() + mixed.detach().square()


def optimizer_of(sae, kind):
    if kind == "sgd":
        return torch.optim.SGD(sae.parameters(), lr=1e-2)
    if kind == "adam":
        return torch.optim.Adam(sae.parameters(), lr=1e-2)
    mode, _, moments = kind.partition(" ")
    return RowAdam(sae, lr=1e-2, mode=mode, moments=torch.bfloat16 if moments == "bfloat16" else None)


def train(sae, data, kind, rank, optimizer=None):
    """One line a step: loss, kept entries, gradients here, threshold."""
    optimizer = optimizer if optimizer is not None else optimizer_of(sae, kind)
    lines = []
    for of_step in data:
        x = torch.cat(of_step) if rank is None else of_step[rank]
        out = sae(x, target_of(sae, x))
        out.loss.backward()
        line = {"loss": out.loss.detach(), "mse": out.mse.detach(), "aux": out.aux.detach()}
        line |= {"tokens": out.codes.tokens, "features": out.codes.features, "values": out.codes.values.detach()}
        line |= {"x_hat": out.x_hat.detach()}
        line |= {name: rows_of(sae, name).clone() for name, _ in sae.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        if kind in ("sgd", "adam"):
            sae.normalize_decoder()
        lines.append({**line, "threshold": sae.threshold.clone()})
    return lines


def state(sae):
    found = {name: whole(t.detach()).clone() for name, t in sae.state_dict().items()}
    return found


def train_on_mesh(shape, settings, counts, steps, kind, whole_numbers=False):
    """The lines and the end state of this process, with where it stands."""
    sae, rank = spread(shape, settings, whole_numbers)
    mesh, optimizer = sae.layout.mesh, optimizer_of(sae, kind)
    lines = train(sae, batches_of(settings, counts, steps, whole_numbers), kind, rank, optimizer)
    local = {name: sae.layout.local(p).clone() for name, p in sae.named_parameters()}
    for name, p in sae.named_parameters():
        local |= {f"{name} {moment}": sae.layout.local(t).clone() for moment, t in tensors(optimizer.state[p])}
    return {
        "lines": lines,
        "state": state(sae),
        "local": local,
        "data": mesh.data.rank,
        "feature": mesh.feature.rank,
        "first": sae.layout.weights.first,
    }


def tensors(state):
    return [(name, t) for name, t in state.items() if isinstance(t, torch.Tensor)]


def train_alone(settings, counts, steps, kind, whole_numbers=False):
    sae = start(settings, whole_numbers)
    lines = train(sae, batches_of(settings, counts, steps, whole_numbers), kind, None)
    return {"lines": lines, "state": state(sae)}


def close(found, expected, where, tolerance):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{where}: {text}")


def compare(alone, ranks, counts, tolerance=1e-12, of_lines=None):
    """The processes of a mesh against one process, and against each other.

    of_lines: the tolerance of losses and gradients, where it is not that of the end state.
    """
    of_lines = of_lines or tolerance
    for step, expected in enumerate(alone["lines"]):
        of_step = counts[step % len(counts)]
        starts = [sum(of_step[:i]) for i in range(len(of_step))]
        found = [rank["lines"][step] for rank in ranks]
        assert pairs_of(ranks, step, starts) == sorted(zip(expected["tokens"].tolist(), expected["features"].tolist()))
        for name in {"loss", "mse", "aux", "threshold", "b_dec", "W_skip"} & expected.keys():
            for line in found:
                close(line[name], expected[name], f"step {step}, {name}", of_lines)
                assert torch.equal(line[name], found[0][name]), (step, name)
        for rank, line in zip(ranks, found):
            start = starts[rank["data"]]
            tokens = slice(start, start + of_step[rank["data"]])
            close(line["x_hat"], expected["x_hat"][tokens], f"step {step}, x_hat", of_lines)
            for name in ("W_enc", "b_enc", "W_dec"):
                features = slice(rank["first"], rank["first"] + len(line[name]))
                close(line[name], expected[name][features], f"step {step}, {name}", of_lines)
    for rank in ranks:
        for name, t in alone["state"].items():
            close(rank["state"][name], t, name, tolerance)
        twin = next(other for other in ranks if other["feature"] == rank["feature"])
        for name, t in rank["local"].items():
            # the features of a process are those of its twin, what all hold is that of the first one
            same = ranks[0] if name.split()[0] in ("b_dec", "W_skip") else twin
            assert torch.equal(t, same["local"][name]), f"{name} differs between processes"


def pairs_of(ranks, step, starts):
    """The kept (token, feature) pairs of all processes."""
    pairs = []
    for rank in ranks:
        line = rank["lines"][step]
        pairs += zip((line["tokens"] + starts[rank["data"]]).tolist(), line["features"].tolist())
    return sorted(pairs)
