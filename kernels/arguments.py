"""What the kernels ask of their arguments, said once."""

from typing import NamedTuple

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
COPIES = (torch.bfloat16, torch.float16)


class Spread(NamedTuple):
    """How far z_ij + b_j may be from z^_ij + b_j, where a product z^ stands for z.

    That is norms_i of_norms_j + errors_i of_errors_j + of_bias_j, and margins are in it.
    norms, errors: fp32 [B]. of_norms, of_errors, of_bias: fp32 [C].
    """

    norms: torch.Tensor
    errors: torch.Tensor
    of_norms: torch.Tensor
    of_errors: torch.Tensor
    of_bias: torch.Tensor


def rows_are_contiguous(matrix: torch.Tensor) -> bool:
    """Whether neighbours in a row are neighbours in memory; PyTorch leaves the stride of a single column open."""
    return matrix.shape[1] <= 1 or matrix.stride(1) == 1


def contiguous_rows(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if rows_are_contiguous(matrix) else matrix.contiguous()


def check_vector(name: str, vector: torch.Tensor, dtype: torch.dtype, length: int | None = None) -> None:
    """Raise unless `vector` is contiguous, of this dtype and of this length, if one is given."""
    if vector.ndim != 1 or vector.dtype != dtype or not vector.is_contiguous() or length not in (None, len(vector)):
        shape = "[N]" if length is None else f"[{length}]"
        raise ValueError(f"{name} must be contiguous {dtype} {shape}, got {vector.dtype} {list(vector.shape)}")


def listed_or_first(features: torch.Tensor | int, length: int) -> tuple[torch.Tensor | None, int]:
    """So many features as kernels take them: int64 [length], or the first of them where they stand in a row."""
    if not isinstance(features, torch.Tensor):
        return None, features
    check_vector("features", features, torch.int64, length)
    return features, 0


def check_list(values: torch.Tensor, keys: torch.Tensor, count: torch.Tensor) -> None:
    """Raise unless these are such as entries are appended to."""
    check_vector("values", values, torch.float32)
    check_vector("keys", keys, torch.int64, len(values))
    check_vector("count", count, torch.int64, 1)


def check_matrix(name: str, matrix: torch.Tensor) -> None:
    """Raise unless `matrix` is one, of a supported dtype."""
    if matrix.ndim != 2 or matrix.dtype not in FLOATS:
        raise ValueError(f"{name} must be a matrix in fp32, bf16 or fp16, got {matrix.dtype} {list(matrix.shape)}")


def check_weights(W: torch.Tensor) -> None:
    """Raise unless W [F, d] is a matrix of a supported dtype with contiguous rows."""
    check_matrix("W", W)
    if not rows_are_contiguous(W):
        raise ValueError("the weights of each feature must be contiguous: pass W_enc.t() of a feature-major W_enc")


def check_encoder(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, scale: torch.Tensor | None) -> None:
    """Raise unless x [B, d], W [F, d], b [F] and scale [F] are such as the kernels read."""
    if x.ndim != 2 or W.ndim != 2 or x.shape[1] != W.shape[1]:
        raise ValueError(f"x [B, d] and W [F, d] expected, got {list(x.shape)} and {list(W.shape)}")
    if x.dtype != W.dtype or x.dtype not in FLOATS:
        raise ValueError(f"x and W must both be fp32, bf16 or fp16, got {x.dtype} and {W.dtype}")
    check_weights(W)
    check_features(b, scale, W.shape[0])


def check_products(z: torch.Tensor, b: torch.Tensor | None, scale: torch.Tensor | None) -> None:
    """Raise unless z [B, C], b [C] and scale [C] are such as the kernels read."""
    if z.ndim != 2 or z.dtype != torch.float32 or not rows_are_contiguous(z):
        raise ValueError(f"z must be fp32 [B, C] with contiguous rows, got {z.dtype} {list(z.shape)}")
    check_features(b, scale, z.shape[1])


def check_features(b: torch.Tensor | None, scale: torch.Tensor | None, length: int) -> None:
    """Raise unless what is added to each feature and multiplies it are contiguous vectors of this length."""
    for name, vector in (("b", b), ("scale", scale)):
        if vector is None:
            continue
        if vector.shape != (length,) or vector.dtype not in FLOATS or not vector.is_contiguous():
            raise ValueError(f"{name} must be contiguous, [{length}], got {vector.dtype} {list(vector.shape)}")


def check_block(
    z: torch.Tensor, b: torch.Tensor | None, scale: torch.Tensor | None, copy: torch.Tensor | None = None
) -> None:
    """What every function that selects inside a block of products asks of its arguments."""
    if z.ndim != 2 or z.dtype != torch.float32 or not z.is_contiguous():
        raise ValueError(f"z must be contiguous fp32 [B, P], got {z.dtype} {list(z.shape)}")
    check_features(b, scale, z.shape[1])
    check_copy(copy, z)


def check_copy(copy: torch.Tensor | None, of: torch.Tensor) -> None:
    """Raise unless a second result in 16 bits has room for the first."""
    if copy is not None and (copy.shape != of.shape or copy.dtype not in COPIES or not copy.is_contiguous()):
        shape = list(of.shape)
        raise ValueError(f"copy must be contiguous bf16 or fp16 {shape}, got {copy.dtype} {list(copy.shape)}")


def spread_arguments(spread: Spread | None, n_tokens: int, n_features: int) -> tuple[torch.Tensor | None, ...]:
    """As kernels take them; raise unless the vectors of a spread are of this many tokens and features."""
    if spread is None:
        return (None,) * len(Spread._fields)
    for name, vector in spread._asdict().items():
        check_vector(f"spread.{name}", vector, torch.float32, n_features if name.startswith("of_") else n_tokens)
    return tuple(spread)
