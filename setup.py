"""Packages by hand: `kernels/` stands at the top of the tree and is imported as `sampled_sae.kernels`.

A top-level package named `kernels` would overwrite Hugging Face's package of that name.
"""

from setuptools import setup

setup(
    packages=[
        "sampled_sae",
        "sampled_sae.cli",
        "sampled_sae.comparison",
        "sampled_sae.distributed",
        "sampled_sae.formats",
        "sampled_sae.formats.published",
        "sampled_sae.impl",
        "sampled_sae.impl.torch",
        "sampled_sae.impl.triton",
        "sampled_sae.inference",
        "sampled_sae.integrations",
        "sampled_sae.integrations.dictionary_learning",
        "sampled_sae.integrations.saelens",
        "sampled_sae.integrations.sparsify",
        "sampled_sae.lm",
        "sampled_sae.pages",
        "sampled_sae.residual_stream",
        "sampled_sae.support",
        "sampled_sae.training",
        "sampled_sae.kernels",
    ],
    package_dir={"sampled_sae": "sampled_sae", "sampled_sae.kernels": "kernels"},
    package_data={"sampled_sae": ["py.typed"], "sampled_sae.pages": ["assets/*"]},
)
