"""A corpus through an SAE, shard by shard, resumable at any moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ..codes import Entries
from ..support.argument_checks import check_choice, check_integer
from ..support.checksums import tensors_crc32
from ..support.output_folder import check_output_folder, is_leftover, locked
from ..support.token_places import TokenShard
from .codes_files import DTYPES, MANIFEST, CodesWriter, new_manifest, read_manifest
from .inference_sae import InferenceSAE


class TokenSource(Protocol):
    """Activations of a corpus, in shards.

    Attributes:
        d_in: their width.
        about: what they are of, for a reader of the codes: model, layer, source.
        settings: what must be the same for a corpus to be gone on with.
    """

    @property
    def d_in(self) -> int: ...
    @property
    def about(self) -> dict[str, Any]: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def n_shards(self) -> int: ...
    def token_shard(self, i: int) -> TokenShard: ...


class Encoded(NamedTuple):
    """What a call did.

    manifest: as in manifest.json. tokens: those that this call encoded, the rest was there. seconds: for them, of which
    `sae_seconds` in the SAE.
    """

    manifest: dict[str, Any]
    tokens: int
    seconds: float
    sae_seconds: float


def encode_corpus(
    sae: InferenceSAE,
    source: TokenSource,
    folder: str | Path,
    *,
    sae_name: str = "",
    batch_size: int = 4096,
    dtype: str = "float32",
    progress: bool = True,
) -> Encoded:
    """Writes the codes of all tokens of a source (see `codes_files`); a second call goes on where the first stopped.

    Args:
        sae: on the device to compute on, in the dtype of its weights.
        source: `StoredActivations` or `sampled_sae.lm.ModelRows`.
        folder: new or empty, or begun with the same SAE, source and dtype.
        sae_name: as recorded.
        batch_size: tokens at a time.
        dtype: of the stored values, "float32", "float16" or "bfloat16".
        progress: show a progress bar.

    Raises:
        ValueError: another width, a folder with something else in it, values that the dtype cannot hold.
        BlockingIOError: another process is at work in the folder.
    """
    batch_size = check_integer("batch_size", batch_size, 1)
    check_choice("dtype", dtype, tuple(DTYPES))
    path = Path(folder)
    if source.d_in != sae.cfg.d_in:
        raise ValueError(f"sae: d_in={sae.cfg.d_in}, but the activations have {source.d_in}")
    settings = {"sae_crc32": sae_crc32(sae), "sae": sae.cfg.to_dict(), "dtype": dtype, **source.settings}
    for how in ("impl", "screen"):
        del settings["sae"][how]
    check_output_folder(path)
    with locked(path, "encode"):
        new = new_manifest(sae.cfg.d_sae, dtype, settings, {"sae": sae_name, **source.about})
        writer = CodesWriter(path, _begun(path, settings) or new)
        return _write_files(writer, sae, source, batch_size, progress)


def _write_files(
    writer: CodesWriter, sae: InferenceSAE, source: TokenSource, batch_size: int, progress: bool
) -> Encoded:
    start, in_sae, done, dtype = time.perf_counter(), 0.0, 0, writer.manifest["dtype"]
    writer.write_manifest()
    with tqdm(unit="token", unit_scale=True, desc="encode", disable=not progress) as bar:
        for i in range(source.n_shards):
            if writer.written(i) is not None:
                continue
            x, places = source.token_shard(i)
            begun = time.perf_counter()
            entries = _entries(sae, x, batch_size, bar.update)
            in_sae += time.perf_counter() - begun
            if not entries.values.to(DTYPES[dtype]).isfinite().all():
                most = float(entries.values.abs().max())
                raise ValueError(f"dtype={dtype!r} cannot hold these codes, which reach {most:.3g}")
            writer.write_shard(i, entries, len(x), places)
            writer.write_manifest()
            done += len(x)
    writer.write_manifest(complete=True)
    return Encoded(writer.manifest, done, time.perf_counter() - start, in_sae)


@torch.inference_mode()
def _entries(sae: InferenceSAE, x: Tensor, batch_size: int, advance: Callable[[int], Any]) -> Entries:
    """Of activations [n, d] on any device, on the CPU."""
    found = [Entries.none(torch.empty(0))]
    for first in range(0, len(x), batch_size):
        batch = x[first : first + batch_size].to(sae.W_enc.device)
        values, tokens, features = (t.cpu() for t in sae.encode_sparse(batch).entries())
        found.append(Entries(values, tokens + first, features))
        advance(len(batch))
    return Entries(*(torch.cat(parts) for parts in zip(*found)))


def sae_crc32(sae: InferenceSAE) -> str:
    """The checksum of an SAE's tensors, by which a store of codes knows whose they are."""
    return tensors_crc32({name: t.detach().cpu() for name, t in sae.named_buffers()})


def _begun(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a store that these settings began; None in an empty folder.

    Raises:
        ValueError: other settings, or other files.
    """
    if not (folder / MANIFEST).exists():
        if any(not is_leftover(entry.name) for entry in folder.iterdir()):
            raise ValueError(f"folder={str(folder)!r}: must be new or empty, or hold codes of the same corpus")
        return None
    manifest = read_manifest(folder)
    before = manifest["settings"]
    for name in sorted({*before, *settings}):
        if before.get(name) != settings.get(name):
            raise ValueError(
                f"{folder} was begun with {name}={before.get(name)!r}, this call has {name}={settings.get(name)!r}: "
                "use the same settings or another folder"
            )
    return manifest
