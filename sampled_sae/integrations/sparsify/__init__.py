"""sparsify (`pip install eai-sparsify`): its SparseCoder and Trainer on our encoder and decoder.

    with patch_sparsify():
        Trainer(cfg, dataset, model).fit()

Its files are read and written by `sampled_sae.formats`.
"""

from .patch import SparsifyPatch, patch_sparsify

__all__ = ["SparsifyPatch", "patch_sparsify"]
