"""What might be faster than the configurations of kernels/configs.py, table by table."""

from __future__ import annotations

from triton import Config

from sampled_sae.kernels.configs import INTERPRETED, tile

INTERPRETER = bool(INTERPRETED.value)

if INTERPRETER:
    TILES_16 = TILES_32 = (tile(32, 32, 16, 4, 1),)
    FOLDS = (Config({"BT": 16, "BF": 32}),)
    CHUNK_SCORES = (Config({"BT": 4, "BF": 64, "STEPS": 2}),)
    CHUNK_FILTER = (Config({"BT": 4, "BF": 64}),)
    SEGMENT_SUM = (Config({"BE": 8, "BD": 16, "PIECE": 32}),)
    ENTRY_DOTS = (Config({"BE": 4, "BD": 16}),)
    RADIX = (Config({"BLOCK": 128, "SPANS": 4}),)
    WARPS = (2,)
    ADAM_SHAPES = ((128, 1),)
else:
    TILES_16 = (
        tile(128, 128, 64, 4, 3),
        tile(128, 128, 64, 4, 4),
        tile(128, 128, 64, 8, 3),
        tile(128, 256, 64, 8, 3),
        tile(128, 256, 64, 8, 4),
        tile(256, 128, 64, 8, 3),
        tile(64, 256, 64, 4, 4),
        tile(128, 128, 32, 4, 5),
    )
    TILES_32 = (
        tile(64, 64, 32, 4, 3),
        tile(128, 64, 16, 4, 3),
        tile(128, 128, 16, 8, 3),
        tile(64, 128, 32, 4, 3),
        tile(128, 128, 32, 8, 3),
    )
    FOLDS = tuple(Config({"BT": t, "BF": f}, num_warps=4, num_stages=1) for t, f in ((16, 64), (32, 128), (64, 64)))
    CHUNK_SCORES = tuple(
        Config({"BT": t, "BF": f, "STEPS": s}, num_warps=w, num_stages=n)
        for t, f, s, w, n in ((16, 128, 8, 4, 2), (32, 128, 8, 4, 3), (16, 256, 16, 8, 2), (8, 256, 32, 4, 3))
    )
    CHUNK_FILTER = tuple(
        Config({"BT": t, "BF": f}, num_warps=w) for t, f, w in ((8, 128, 1), (4, 256, 1), (8, 256, 4), (16, 128, 4))
    )
    SEGMENT_SUM = tuple(
        Config({"BE": e, "BD": d, "PIECE": p}, num_warps=w)
        for e, d, p, w in ((4, 256, 256, 1), (16, 256, 256, 2), (8, 512, 256, 2), (8, 256, 128, 1), (8, 256, 512, 1))
    )
    ENTRY_DOTS = tuple(
        Config({"BE": e, "BD": d}, num_warps=w) for e, d, w in ((4, 256, 4), (16, 256, 4), (8, 512, 4), (8, 256, 8))
    )
    RADIX = tuple(
        Config({"BLOCK": b, "SPANS": c}, num_warps=w)
        for b, c, w in ((1024, 2048, 4), (2048, 1024, 8), (4096, 1024, 8), (4096, 2048, 16))
    )
    WARPS = (1, 2, 4, 8, 16)
    ADAM_SHAPES = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 32))
