"""Active features of published SAEs: our search, SAELens' own encode, eager PyTorch and torch.compile.

    .venv/peers/bin/python -m benchmarks.inference --out benchmarks/results/inference.json --within 500

Each gives the codes of the same tokens by a threshold for each feature (JumpReLU); ours as `SparseCodes`, the others as
a matrix [B, F]. Times are multiples of the encoder product, `torch.mm` into memory that exists, in the dtype of the
weights and beside each sample; memory is the peak above what is held, in units of one float32 [B, F], and how much of
it are the codes that come out. "32 features" asks for chosen features alone. A candidate whose codes are not those of
float64 on some tokens, but for entries within rounding of their threshold, gets no figure but the reason.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import Row, product, spread_columns
from benchmarks.record import SIZE, Record, markdown, parser
from benchmarks.workloads import REHEARSAL, Workload
from sampled_sae.bench import activations, peak_of
from sampled_sae.codes import SparseCodes
from sampled_sae.inference.config import InferenceConfig
from sampled_sae.inference.inference_sae import InferenceSAE
from sampled_sae.support.reused_memory import forget_scratch
from sampled_sae.support.timing import check_memory, interleaved

MOST_ENTRIES = 1 << 26  # of [B, F], so that a matrix of codes fits beside the weights
TOKENS, FEWEST_TOKENS = 1024, 64
# F, d, L0; torch.compile takes part at the first
SIZES = ((1 << 16, 768, 20), (1 << 16, 768, 100), (1 << 16, 2304, 20), (1 << 14, 768, 20))
SIZES += ((1 << 18, 768, 20), (1 << 20, 768, 20), (1 << 20, 2304, 20))
DTYPES = ("float32", "bfloat16")
CHOSEN = 32
CHECKED_TOKENS = 4
# features that are made, or checked, at once
CHUNK = 1 << 14
# seconds at most at one size
LONGEST = 60.0
# tokens whose products take as long as making the weights, and what is checked
PREPARED = 256
SCREENS = {"ours": "auto", "ours, no screen": "off"}
# relative to the largest activation: what rounding may move, by dtype of the weights
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
COLUMNS = {
    **SIZE,
    "dtype": "{dtype}",
    "candidate": "{candidate}",
    "ms": "{ms:.4g}",
    "/ product": "{ratio:.2f}",
    "p20–p80": "{ratio_p20:.2f}–{ratio_p80:.2f}",
    "peak / [B, F]": "{peak_extra_memory:.3f}",
    "of it codes": "{codes_memory:.3f}",
}


class Setup(NamedTuple):
    """x [B, d] and W [F, d] of one dtype, b and threshold float32 [F]."""

    x: Tensor
    W: Tensor
    b: Tensor
    threshold: Tensor

    def chosen(self) -> Tensor:
        """A few features at even distances."""
        n = len(self.W)
        return torch.arange(min(CHOSEN, n), device=self.W.device) * n // min(CHOSEN, n)

    def tensors(self) -> dict[str, Tensor]:
        """Of an SAE; decoder and encoder share their memory, of which there is not always enough for two."""
        W, b_dec = self.W, torch.zeros(self.W.shape[1], device=self.W.device)
        return {"W_enc": W.t(), "b_enc": self.b, "W_dec": W, "b_dec": b_dec, "threshold": self.threshold}


def sizes(device: str) -> list[Workload]:
    found = []
    for F, d, k in SIZES:
        B = max(FEWEST_TOKENS, min(TOKENS, MOST_ENTRIES // F)) * (8 if device == "cuda" else 1)
        found.append(Workload(f"d={d}, F={F}, L0={k}", B, d, F, k))
    return found


@torch.no_grad()
def setup(w: Workload, dtype: torch.dtype, device: str) -> Setup:
    """Random features of unit norm, each with the threshold that a k/F of its activations exceed."""
    generator = torch.Generator(device).manual_seed(1)
    x = activations(w.B, w.d, 0).to(device, dtype)
    W = torch.empty(w.F, w.d, dtype=dtype, device=device)
    drawn = torch.randn(min(CHUNK, w.F), w.d, generator=generator, device=device)
    drawn = torch.nn.functional.normalize(drawn, dim=1)
    for rows in W.split(CHUNK):
        # other features from the same numbers, which take long to draw
        signs = torch.randint(0, 2, (w.d,), generator=generator, device=device) * 2 - 1
        rows.copy_(drawn[: len(rows)] * signs)
    b = 0.01 * torch.randn(w.F, generator=generator, device=device)
    some = x[: max(2, min(64, w.B))].float()
    above = float(torch.special.ndtri(torch.tensor(1 - w.k / w.F, dtype=torch.float64)))
    spreads = torch.cat([(some @ rows.float().t()).std(0) for rows in W.split(CHUNK)])
    return Setup(x, W, b, above * spreads + b)


def eager(x: Tensor, W: Tensor, b: Tensor, threshold: Tensor) -> Tensor:
    a = torch.relu(x @ W.t() + b)
    return a * (a > threshold)


def candidates(s: Setup, w: Workload, impl: str, compiled: bool) -> dict[str, Callable[[], Any]]:
    """Name -> what is timed. What is not installed, or has no memory, raises when it is first called."""
    configs = {name: InferenceConfig(w.d, w.F, "jumprelu", impl=impl, screen=how) for name, how in SCREENS.items()}
    made = {name: InferenceSAE(config, s.tensors()) for name, config in configs.items()}
    b, threshold = s.b.to(s.W.dtype), s.threshold.to(s.W.dtype)
    theirs = cache(partial(saelens, s, w))
    calls: dict[str, Callable[[], Any]] = {
        **{name: lambda sae=sae: sae.encode_sparse(s.x) for name, sae in made.items()},
        "ours, 32 features": lambda: made["ours"].encode(s.x, features=s.chosen()),
        "SAELens": lambda: theirs().encode(s.x),
        "eager PyTorch": lambda: eager(s.x, s.W, b, threshold),
    }
    if compiled:
        form = torch.compile(eager, dynamic=False)
        calls["torch.compile"] = lambda: form(s.x, s.W, b, threshold)
    return calls


def saelens(s: Setup, w: Workload) -> Any:
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

    dtype = str(s.W.dtype).removeprefix("torch.")
    options = {"dtype": dtype, "apply_b_dec_to_input": False}
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=w.d, d_sae=w.F, device="meta", **options))
    state = {name: t if name.startswith("W") else t.to(s.W.dtype) for name, t in s.tensors().items()}
    sae.load_state_dict(state, assign=True)
    return sae


@torch.no_grad()
def exact_activations(s: Setup) -> Tensor:
    """float64, of a few tokens, [CHECKED_TOKENS, F] at most."""
    x = s.x[:CHECKED_TOKENS].double()
    parts = [x @ W.double().t() for W in s.W.split(CHUNK)]
    return torch.cat(parts, 1) + s.b


def wrong(a: Tensor, s: Setup, found: Any, columns: Tensor | None) -> str | None:
    """Why codes are not those of the rule on the tokens whose activations are `a`; None where they are, but for
    rounding."""
    given = (found if isinstance(found, Tensor) else found.to_dense())[: len(a)].float()
    threshold = s.threshold
    if columns is not None:
        a, threshold = a[:, columns], threshold[columns]
    margin = ROUNDING[s.W.dtype] * float(a.abs().max())
    expected = torch.where((a > threshold) & (a > 0), a, 0)
    bad = int((((given - expected).abs() > margin) & ((a - threshold).abs() > margin)).sum())
    return f"{bad} codes are not those of the rule" if bad else None


def race(w: Workload, dtype: str, args: argparse.Namespace, seconds: float, compiled: bool) -> list[Row]:
    """The rows of one size, after about so many seconds."""
    start = time.perf_counter()
    kind = getattr(torch, dtype)
    check_memory(w.name, w.F * w.d * kind.itemsize + 5 * 4 * w.B * w.F, args.device)
    s = setup(w, kind, args.device)
    exact = exact_activations(s)
    rows: list[Row] = []
    calls: dict[str, Callable[[], Any]] = {}
    with torch.no_grad():
        for name, call in candidates(s, w, args.impl, compiled).items():
            row = {**w.columns(), "dtype": dtype, "candidate": name}
            try:
                found = call()
                reason = wrong(exact, s, found, s.chosen() if "features" in name else None)
                row |= about_codes(found, w)
                del found
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"[:200]
            if reason is None:
                calls[name] = call
            rows.append(row if reason is None else {**row, "reason": reason})
        floor = product(s.x, s.W)
        left = seconds - (time.perf_counter() - start)
        samples = interleaved({"product": floor, **calls}, args.device, args.rounds, left, False)
        for row in rows:
            if (own := samples.get(row["candidate"])) is None:
                continue
            row |= {"ms": spread_columns(own, "ms")["ms"], "product_ms": spread_columns(samples["product"], "ms")["ms"]}
            row |= spread_columns([a / b for a, b in zip(own, samples["product"])], "ratio")
            row |= {"rounds": len(own), "peak_extra_memory": peak(calls[row["candidate"]], args.device, w)}
    return rows


def peak(call: Callable[[], Any], device: str, w: Workload) -> float | None:
    """In units of one float32 [B, F]; None where the system does not tell."""
    forget_scratch()  # what our earlier calls have left to be used again
    found = peak_of(call, device)
    return None if found is None else found / (4 * w.B * w.F)


def about_codes(found: Any, w: Workload) -> Row:
    """Of what a call gives: its memory in the same units, and of a list of entries how many a token has."""
    if isinstance(found, SparseCodes):
        n_bytes, l0 = sum(t.nbytes for t in found.entries()), {"l0": found.l0()}
    else:
        n_bytes, l0 = found.nbytes, {}
    return {**l0, "codes_memory": n_bytes / (4 * w.B * w.F)}


def seconds_of(w: Workload) -> float:
    """What a size takes, in proportion."""
    return w.F * w.d * (w.B + PREPARED)


def markdown_table(result: dict[str, Any]) -> str:
    """Small dictionaries first."""

    def place(row: Row) -> tuple[int, ...]:
        return *(row[name] for name in ("F", "d", "k")), DTYPES.index(row["dtype"])

    return markdown(COLUMNS, sorted(result["rows"], key=place))


def main() -> None:
    command = parser(__doc__, "--out", "--device", "--rehearse", "--within", rounds=7, impl="auto")
    args = command.parse_args()
    record = Record(args, markdown_table)
    cases = [(w, dtype) for w in (REHEARSAL if args.rehearse else sizes(args.device)) for dtype in DTYPES]
    # the largest come first: what they need at least is most of their time, while the others can do with less
    cases.sort(key=lambda case: -seconds_of(case[0]))
    for i, (w, dtype) in enumerate(cases):
        share = min(LONGEST, record.left * seconds_of(w) / sum(seconds_of(later) for later, _ in cases[i:]))
        row = {**w.columns(), "dtype": dtype, "candidate": "all"}
        compiled = not args.rehearse and (w.F, w.d, w.k) == SIZES[0]
        record.attempt([row], partial(race, w, dtype, args, share, compiled), 5.0)


if __name__ == "__main__":
    main()
