"""overcomplete: a BatchTopKSAE with an untied linear encoder, trained by its train_sae, a batch a call."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.peers.candidate import Candidate, Setup, Weights


def only_the_sae_part() -> None:
    """Lets `overcomplete.sae` be imported without torchvision, timm, scikit-learn and OpenCV.

    The package's own __init__ imports them all, for image models and other decompositions.
    """
    if "overcomplete" in sys.modules:
        return
    spec = importlib.util.find_spec("overcomplete")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("No module named 'overcomplete'")
    package = ModuleType("overcomplete")
    package.__path__ = list(spec.submodule_search_locations)
    optimization = ModuleType("overcomplete.optimization")
    optimization.batched_matrix_nnls = None  # type: ignore[attr-defined]  # its OMP SAE imports the name
    sys.modules |= {"overcomplete": package, "overcomplete.optimization": optimization}


only_the_sae_part()
from overcomplete.sae import BatchTopKSAE, train_sae  # noqa: E402


class Library(Candidate):
    """Has no decoder bias: it is given x - b_dec. Its statistics for logs are switched off."""

    def __init__(self, setup: Setup, weights: Weights) -> None:
        self.setup = setup
        self.centre = weights.b_dec.to(setup.device, copy=True)
        sae = BatchTopKSAE(setup.d, setup.F, top_k=setup.B * setup.k, device=setup.device)
        self.sae = sae.untied(bias=True)
        self.load(weights)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=setup.lr)

    def step(self, x: Tensor) -> Tensor:
        self.set_lr(self.optimizer)
        errors = []

        def criterion(x: Tensor, x_hat: Tensor, pre_codes: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
            mse = (x - x_hat).square().mean()
            errors.append(mse.detach() * self.setup.d)
            return mse

        once = {"nb_epochs": 1, "monitoring": 0, "device": self.setup.device}
        with self.setup.autocast():
            train_sae(self.sae, [x - self.centre], criterion, self.optimizer, **once)
        return errors[0]

    def tensors(self) -> Weights:
        encoder = self.sae.encoder
        return Weights(encoder.weight, encoder.bias, self.sae.dictionary._weights, self.centre)

    def weights(self) -> Weights:
        """With the dictionary's rows of unit norm, as the next step would make them."""
        found = super().weights()
        return found._replace(W_dec=torch.nn.functional.normalize(found.W_dec, dim=1))
