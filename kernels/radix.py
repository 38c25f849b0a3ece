"""The n-th largest of non-negative fp32 values by radix selection on their bits, which sort as int32, NaN highest.

Four passes of 8 bits read 4N bytes each (the first writes as many where it activates) and count the digits of
the entries that share the prefix found so far; every program of a pass picks the digit of the pass before from
its histogram, which costs no launch. Each program owns one of at most SPANS equal spans of consecutive entries, so
ties are settled in flat order from SPANS counts. The last pass counts each span's entries above and within the last
prefix, so that only spans with entries within it are read again for the exact counts. Offsets and histograms are
int64; counts of a span are int32 (N / SPANS entries). Integer atomics: the same result in every run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sampled_sae.kernels.activation import activation
from sampled_sae.kernels.configs import architecture, given, launch, radix_config

PASSES = tl.constexpr(4)
# of each pass: 256 bins, then the prefix of the digits before, and how many entries remain to be found
WIDTH = tl.constexpr(258)


class Cut(NamedTuple):
    """What `find_cut` found, for `cut_of_span` in kernels that are launched with `config` and `TILES`.

    histograms: int64 [PASSES, WIDTH]. counts: of the entries above the cut and equal to it, by span, int32 [2, SPANS].
    """

    histograms: torch.Tensor
    counts: torch.Tensor
    config: triton.Config
    TILES: int

    def programs(self, N: int) -> tuple[int]:
        return (triton.cdiv(N, self.TILES * self.config.kwargs["BLOCK"]),)


@triton.jit
def sort_bits(b_v):
    """fp32 >= 0 as int32 in the same order: -0.0 becomes 0, and all NaN one value that leaves room for + 1."""
    return tl.minimum(b_v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)


@triton.jit
def pick_digit(b_count, remaining):
    """The digit of the remaining-th largest entry, and how many of those are left to find within the digit."""
    b_from = tl.cumsum(b_count, reverse=True)  # [256]
    digit = tl.sum((b_from >= remaining).to(tl.int32)) - 1
    return digit, remaining - tl.sum(tl.where(tl.arange(0, 256) > digit, b_count, 0))


@triton.jit
def picked(histograms, PASS: tl.constexpr):
    """Prefix up to the digit of PASS, int32, and entries left to find within it, int64."""
    p_pass = histograms + PASS * WIDTH
    b_count = tl.load(p_pass + tl.arange(0, 256))  # [256]
    digit, remaining = pick_digit(b_count, tl.load(p_pass + 257))
    return (tl.load(p_pass + 256) * 256 + digit).to(tl.int32), remaining


@triton.jit
def span_of_program(N, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """Flat index of its first entry, int64, and how many entries it has, int32."""
    start = tl.program_id(0).to(tl.int64) * (TILES * BLOCK)
    return start, tl.minimum(N - start, TILES * BLOCK).to(tl.int32)


@triton.jit(do_not_specialize=["n"])
def count_digits_kernel(
    values,
    b,
    scale,
    histograms,
    counts,
    N,
    P,
    n,
    PASS: tl.constexpr,
    ACTIVATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    SPANS: tl.constexpr,
):
    i_s = tl.program_id(0)
    start, length = span_of_program(N, TILES, BLOCK)
    p_pass = histograms + PASS * WIDTH
    if PASS == 0:
        prefix, remaining = 0, n
    else:
        prefix, remaining = picked(histograms, PASS - 1)
    if i_s == 0:
        tl.store(p_pass + 256, prefix)
        tl.store(p_pass + 257, remaining)

    # the sign bit is 0: a shift by 31 leaves the empty prefix of the first pass
    SHIFT: tl.constexpr = 31 if PASS == 0 else 32 - 8 * PASS
    above = 0
    within = 0
    b_count = tl.zeros([256], dtype=tl.int32)  # [256]
    for i in range(0, TILES):
        o_v = i * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        m_v = o_v < length  # [BLOCK]
        p_v = values + start + o_v  # [BLOCK]
        b_v = tl.load(p_v, mask=m_v, other=0.0)  # [BLOCK]
        if ACTIVATE:
            o_f = ((start % P).to(tl.int32) + o_v) % P  # [BLOCK]
            b_v = activation(b_v, b, scale, o_f, m_v, HAS_BIAS, HAS_SCALE)  # [BLOCK]
            tl.store(p_v, b_v, mask=m_v)
        b_u = sort_bits(b_v)  # [BLOCK]
        m_prefix = m_v & ((b_u >> SHIFT) == prefix)  # [BLOCK]
        b_digit = (b_u >> (24 - 8 * PASS)) & 255  # [BLOCK]
        if PASS == PASSES - 1:
            # both counts in one sum: neither passes BLOCK < 2**15
            both = tl.sum(((b_u >> SHIFT) > prefix).to(tl.int32) + (m_prefix.to(tl.int32) << 16))
            above += both & 0xFFFF
            within += both >> 16
            # few tiles hold an entry that shares 24 bits with the cut
            if both >= 1 << 16:
                b_count += tl.histogram(b_digit, 256, mask=m_prefix)  # [256]
        else:
            b_count += tl.histogram(b_digit, 256, mask=m_prefix)  # [256]
    if PASS == PASSES - 1:
        tl.store(counts + i_s, above)
        tl.store(counts + SPANS + i_s, within)
    p_bin = p_pass + tl.arange(0, 256)  # [256]
    tl.atomic_add(p_bin, b_count.to(tl.int64), mask=b_count > 0, sem="relaxed")


@triton.jit
def count_cut_kernel(values, histograms, counts, N, TILES: tl.constexpr, BLOCK: tl.constexpr, SPANS: tl.constexpr):
    """Counts above and within the last prefix become counts above the cut and equal to it."""
    p_above = counts + tl.program_id(0)
    if tl.load(p_above + SPANS) > 0:
        cut, _ = picked(histograms, PASSES - 1)
        start, length = span_of_program(N, TILES, BLOCK)
        above = 0
        equal = 0
        for i in range(0, TILES):
            o_v = i * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
            m_v = o_v < length  # [BLOCK]
            b_u = sort_bits(tl.load(values + start + o_v, mask=m_v, other=0.0))  # [BLOCK]
            above += tl.sum((b_u > cut).to(tl.int32))
            equal += tl.sum((m_v & (b_u == cut)).to(tl.int32))
        tl.store(p_above, above)
        tl.store(p_above + SPANS, equal)


@triton.jit
def cut_of_span(
    values, histograms, counts, N, POSITIVE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, SPANS: tl.constexpr
):
    """What a program that writes its span needs to know; POSITIVE keeps no zeros.

    The cut; the index in the span before which entries equal to it are kept; how many entries are kept before
    this span; how many in all. Only the span in which the ties run out is read for that index.
    """
    i_s = tl.program_id(0)
    cut, ties = picked(histograms, PASSES - 1)
    if POSITIVE:
        ties = tl.where(cut > 0, ties, 0)
    o_s = tl.arange(0, SPANS)  # [SPANS]
    m_s = o_s < tl.cdiv(N, TILES * BLOCK)  # [SPANS]
    b_above = tl.load(counts + o_s, mask=m_s, other=0).to(tl.int64)  # [SPANS]
    b_ties = tl.load(counts + SPANS + o_s, mask=m_s, other=0).to(tl.int64)  # [SPANS]
    equal_before = tl.sum(tl.where(o_s < i_s, b_ties, 0))
    equal_here = tl.sum(tl.where(o_s == i_s, b_ties, 0))
    kept_before = tl.sum(tl.where(o_s < i_s, b_above, 0)) + tl.minimum(equal_before, ties)

    start, length = span_of_program(N, TILES, BLOCK)
    left = ties - equal_before
    end = tl.where(left > 0, length, 0)
    if (left > 0) & (left < equal_here):
        end = 0
        # small tiles, for the scan takes many registers
        SMALL: tl.constexpr = BLOCK // 8
        for i in range(0, 8 * TILES):
            o_v = i * SMALL + tl.arange(0, SMALL)  # [SMALL]
            m_v = o_v < length  # [SMALL]
            b_u = sort_bits(tl.load(values + start + o_v, mask=m_v, other=0.0))  # [SMALL]
            b_equal = (m_v & (b_u == cut)).to(tl.int32)  # [SMALL]
            b_rank = tl.cumsum(b_equal)  # [SMALL]
            end = tl.maximum(end, tl.max(tl.where((b_equal > 0) & (b_rank <= left), o_v + 1, 0)))
            left -= tl.sum(b_equal)
    return cut, end, kept_before, tl.sum(b_above) + ties


@triton.jit
def is_kept(b_u, o_v, cut, end):
    """Those above the cut, and those equal to it that stand before `end`."""
    return b_u >= tl.where(o_v < end, cut, cut + 1)


def find_cut(values: torch.Tensor, n: int, b: torch.Tensor | None = None, scale: torch.Tensor | None = None) -> Cut:
    """The n-th largest of contiguous fp32 values, for 1 <= n <= values.numel(), and the counts around it.

    values [N] are >= 0; values [B, P] are a raw product, which is first changed in place to relu(values + b) * scale.
    """
    cut, N = find_digits(values, n, b, scale), values.numel()
    launch(count_cut_kernel, cut.config, cut.programs(N), (values, cut.histograms, cut.counts, N), TILES=cut.TILES)
    return cut


def find_digits(values: torch.Tensor, n: int, b: torch.Tensor | None = None, scale: torch.Tensor | None = None) -> Cut:
    """`find_cut` for the n-th largest itself, `picked` from the histograms; the counts are not yet those of the cut."""
    N = values.numel()
    config = radix_config(architecture(values.device))
    BLOCK, SPANS = config.kwargs["BLOCK"], config.kwargs["SPANS"]
    # a power of two, so that a varying N compiles few kernels
    TILES = triton.next_power_of_2(triton.cdiv(N, BLOCK * SPANS))
    histograms = torch.zeros(PASSES.value, WIDTH.value, dtype=torch.int64, device=values.device)
    counts = torch.empty(2, SPANS, dtype=torch.int32, device=values.device)
    cut = Cut(histograms, counts, config, TILES)
    grid = cut.programs(N)
    for i in range(PASSES.value):
        launch(
            count_digits_kernel,
            config,
            grid,
            (values, b, scale, histograms, counts, N, values.shape[-1], n),
            PASS=i,
            ACTIVATE=values.ndim == 2 and i == 0,
            **given(bias=b, scale=scale),
            TILES=TILES,
        )
    return cut
