"""`sampled_sae.safetensors`: what a peer's files have no place for, so that ours -> theirs -> ours loses nothing.

The peers' loaders open their own files by name and ignore this one. It is used only as long as the peer's files hold
what they held when it was written.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import MEMBERS, SampledSAEConfig
from ..pretrained import check_members, tensor_shapes
from ..support.argument_checks import check_scales
from ..support.atomic_files import field, write_atomically
from .origin import Origin
from .portable import IN_UNITS, PortableSAE, rescaled

if TYPE_CHECKING:
    from ..sae import SampledSAE

FILE = "sampled_sae.safetensors"
KEY = "sampled-sae"
VERSION = 1


@dataclass(frozen=True)
class Supplement:
    """Configuration and state of an exported SAE, and the fingerprint of the files that they belong to.

    Attributes:
        config: of the exported SAE.
        scale: factor of the activations that the export folded into the weights.
        fingerprint: of what the peer's files hold.
        tensors: `threshold`, `threshold_steps`, `tokens_since_active`, the fixed set of `inference="pool"`, and those
            weights that the peer's files do not give back bit for bit.
        origin: what the SAE reads.
    """

    config: SampledSAEConfig
    scale: float | tuple[float, ...]
    fingerprint: str
    tensors: dict[str, Tensor]
    origin: Origin

    @classmethod
    def of(cls, sae: SampledSAE, packed: PortableSAE, scale: float | tuple[float, ...], origin: Origin) -> Supplement:
        """For an SAE whose exported files read as `packed`."""
        tensors = {name: getattr(sae, name).detach().cpu() for name in tensor_shapes(sae.cfg)}
        back = packed.read_at(scale, sae.cfg.output_scale)
        for name, t in back.weights.items():
            if same_bits(tensors[name], t):
                del tensors[name]
        return cls(sae.cfg, scale, packed.fingerprint(), tensors, origin)

    def state(self, portable: PortableSAE, scale: float | tuple[float, ...]) -> dict[str, Tensor]:
        """The state dict of the exported SAE, to be fed activations times `scale`; `portable` is what the files hold.

        Raises:
            ValueError: a bias that leaves the range of its dtype.
        """
        state = {**portable.read_at(self.scale, self.config.output_scale).state(), **self.tensors}
        if isinstance(scale, tuple) or isinstance(self.scale, tuple):
            return state
        return state | rescaled({name: state[name] for name in IN_UNITS}, scale / self.scale)

    def write(self, folder: Path) -> None:
        about = {
            "version": VERSION,
            "scale": self.scale,
            "fingerprint": self.fingerprint,
            "config": self.config.to_dict(),
            "origin": asdict(self.origin),
        }
        tensors = {name: t.contiguous() for name, t in self.tensors.items()}
        write_atomically(folder / FILE, lambda path: save_file(tensors, path, {KEY: json.dumps(about)}))

    @classmethod
    def read(cls, folder: Path) -> Supplement | None:
        """None where the folder has none.

        Raises:
            ValueError: a truncated or foreign file.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about: dict[str, Any] = json.loads((file.metadata() or {})[KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: truncated or not of sampled-sae ({error}); delete it to do without") from None
        if field(path, about, "version", int) != VERSION:
            raise ValueError(f"{path}: version={about['version']!r}: this package reads {VERSION}")
        fingerprint, scale = field(path, about, "fingerprint", str), about.get("scale")
        try:
            config = SampledSAEConfig.from_dict(field(path, about, "config", dict))
            scale = check_scales("scale", scale, config.layers)
            origin = Origin(**about.get("origin", {})).checked(path)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: {error}; delete it to do without") from None
        shapes = tensor_shapes(config)
        for name, t in tensors.items():
            if tuple(t.shape) != shapes.get(name):
                raise ValueError(f"{path}: {name} is {tuple(t.shape)}, its configuration says {shapes.get(name)}")
            if not torch.isfinite(t).all():
                raise ValueError(f"{path}: {name} holds NaN or inf; delete the file to do without")
        if config.inference == "pool":
            if MEMBERS not in tensors:
                raise ValueError(f"{path}: tensor {MEMBERS!r} is missing; delete the file to do without")
            check_members(path, tensors[MEMBERS], config)
        return cls(config, scale, fingerprint, tensors, origin)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether a and b are equal bit for bit: 0 and -0 differ."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.view(whole), b.view(whole))
