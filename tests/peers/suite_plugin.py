"""A pytest plugin under which a peer's own tests run on our step, whatever they construct: `-p suite_plugin`."""

import os


def accelerate_all():
    """Every training SAE of SAELens' TopK family is accelerated when its constructor is done."""
    from sampled_sae.integrations.saelens import accelerate
    from sampled_sae.integrations.saelens.accelerated import FAST_FORMS

    def wrapped(cls, init):
        def __init__(self, *args, **kwargs):
            init(self, *args, **kwargs)
            if type(self) is cls:
                accelerate(self)

        return __init__

    for cls in FAST_FORMS:
        cls.__init__ = wrapped(cls, cls.__init__)


def pytest_configure(config):
    if os.environ["SUITE"] == "saelens":
        accelerate_all()
    else:
        from sampled_sae.integrations.sparsify import patch_sparsify

        patch_sparsify()
