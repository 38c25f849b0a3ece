"""Two SAEs side by side: which features they share, what each has alone, whether they agree on activations."""

from .agreement import Agreement, agreement
from .compare import Comparison, compare
from .matching import METHODS, Matching, match_features

__all__ = ["METHODS", "Agreement", "Comparison", "Matching", "agreement", "compare", "match_features"]
