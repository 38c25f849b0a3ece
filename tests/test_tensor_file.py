"""A file written in pieces is the one that safetensors writes at once."""

import pytest
import torch
from safetensors.torch import save_file

from sampled_sae.support.checksums import tensors_crc32
from sampled_sae.support.tensor_file import Kind, Piece, write_pieces

TENSORS = {
    "W": torch.randn(5, 7),
    "a": torch.arange(6).view(2, 3),
    "b": torch.randn(4, 3, 2, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    "half": torch.randn(9).half(),
    "members": torch.randn(11) > 0,
    "scalar": torch.tensor(2.5),
    "short": torch.randn(3, 5).bfloat16(),
    "transposed": torch.randn(6, 4).t(),
}
KINDS = {name: Kind(t.dtype, t.shape) for name, t in TENSORS.items()}


def at_once(path, tensors):
    metadata = {"format": f"some 1 crc32 {tensors_crc32(tensors)}"}
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    return path.read_bytes()


def in_pieces(path, pieces):
    path.touch()
    write_pieces(path, KINDS, pieces, "some 1")
    return path.read_bytes()


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize("dim", [0, 1])
def test_pieces_in_any_order_are_the_whole(tmp_path, size, dim):
    pieces = []
    for name, t in TENSORS.items():
        if t.dim() <= dim:
            pieces.append(Piece(name, t))
        else:
            pieces += [Piece(name, part, dim, i * size) for i, part in enumerate(t.split(size, dim))]
    whole = at_once(tmp_path / "whole", TENSORS)
    assert in_pieces(tmp_path / "pieces", pieces) == whole
    assert in_pieces(tmp_path / "reversed", pieces[::-1]) == whole


def test_a_part_that_is_not_given_is_noticed(tmp_path):
    pieces = [Piece(name, t[1:] if name == "W" else t, 0, int(name == "W")) for name, t in TENSORS.items()]
    with pytest.raises(RuntimeError, match=r"lost: \d+ bytes of the tensors' \d+ were given"):
        in_pieces(tmp_path / "lost", pieces)
