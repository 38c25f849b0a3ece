"""A training that begins with the weights of an SAE there is, in place of drawn ones."""

from __future__ import annotations

import torch

from ..config import SampledSAEConfig
from ..impl.decoder_rows import layer_norms
from ..impl.given_tokens import divided, multiplied
from ..pretrained import SKIP, WEIGHT_NAMES
from ..sae import SampledSAE
from ..support.argument_checks import check_finite
from ..support.checksums import tensors_crc32

# what normalize_decoder leaves of a row's norm
_UNIT = 1e-5


def check_initial(initial: SampledSAE, config: SampledSAEConfig) -> str:
    """The fingerprint of the weights, where an SAE of this config can begin with them.

    Raises:
        TypeError, ValueError: no SampledSAE, or one of other sizes or with NaN or inf.
    """
    if not isinstance(initial, SampledSAE):
        raise TypeError(f"init_from={type(initial).__name__}: must be a SampledSAE")
    for name in ("d_in", "d_out", "d_sae", "layers"):
        ours, theirs = getattr(config, name), getattr(initial.cfg, name)
        if ours != theirs:
            raise ValueError(f"{name}={ours}: init_from has {theirs}; give the training the same")
    if initial.cfg.skip and not config.skip:
        raise ValueError("skip=False: init_from has a skip, which would be lost; give the training one")
    known = (*WEIGHT_NAMES, SKIP) if initial.cfg.skip else WEIGHT_NAMES
    names = {name for name, _ in initial.named_parameters()}
    if names != set(known):
        raise ValueError(f"init_from: has {', '.join(sorted(names))}; must have {', '.join(known)} alone")
    tensors = {name: initial.layout.whole(getattr(initial, name)).detach().cpu() for name in known}
    for name, tensor in tensors.items():
        check_finite(tensor, f"init_from: {name}")
    scales = repr(initial.cfg.input_scale)
    scales += f" and {initial.cfg.output_scale!r}" if initial.cfg.is_transcoder else ""
    return f"{tensors_crc32(tensors)} at {scales}"


@torch.no_grad()
def begin_with(sae: SampledSAE, initial: SampledSAE) -> None:
    """Puts the weights of `initial` into `sae`, which then reconstructs as it does wherever the same entries are kept.

    Their units become those of `sae`, whose `input_scale` may be another: with q the ratio of the two, x q instead of
    x gives codes and reconstructions times q where both biases are multiplied by it. Decoder rows become unit vectors,
    which training keeps, and each encoder row is multiplied by the norm of its decoder row; of a crosscoder by the sum
    of its norms over the layers. The layers of a crosscoder may each have their q: codes stay, and the weights move.
    Where one SAE subtracts b_dec from its input and the other does not, b_dec W_enc moves into b_enc or out of it.

    A transcoder has a ratio of its outputs too, p: codes come out times p in place of q, for which the encoder is
    multiplied by p / q, as the skip is. One without a skip may go on with one, of zeros.
    """
    W_enc, b_enc, W_dec, b_dec = (initial.layout.whole(getattr(initial, name)).to(sae.W_enc) for name in WEIGHT_NAMES)
    ratio = 1.0
    if isinstance(sae.cfg.input_scale, tuple) or isinstance(initial.cfg.input_scale, tuple):
        q = divided(multiplied(torch.ones_like(b_dec), sae.cfg.input_scale), initial.cfg.input_scale)
        W_enc, W_dec, b_dec = W_enc / q[:, None], W_dec * q, b_dec * q
    else:
        ratio = sae.cfg.input_scale / initial.cfg.input_scale
    centres, centred = sae.cfg.apply_b_dec_to_input, initial.cfg.apply_b_dec_to_input
    if centres != centred:
        b_enc = b_enc + (1 if centres else -1) * (b_dec @ W_enc)
    if sae.cfg.is_transcoder:
        of_codes, ratio = ratio, sae.cfg.output_scale / initial.cfg.output_scale
        W_enc = W_enc * (ratio / of_codes)
        if sae.W_skip is not None:
            sae.W_skip.zero_()
            if initial.cfg.skip:
                sae.W_skip.copy_(initial.layout.whole(initial.W_skip).to(sae.W_skip) * (ratio / of_codes))
    norms = layer_norms(W_dec, sae.cfg.layers).sum(1)
    norms = torch.where((norms - 1).abs().le(_UNIT) | norms.eq(0), torch.ones_like(norms), norms)
    sae.W_enc.copy_(W_enc * norms)
    sae.b_enc.copy_(b_enc * norms * ratio)
    sae.W_dec.copy_(W_dec / norms[:, None])
    sae.b_dec.copy_(b_dec * ratio)
