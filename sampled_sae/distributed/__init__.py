"""One SAE over many processes: `parallelize`. docs/scale.md says how to run it and what travels."""

from .parallel import accounted, parallelize
from .ranks import Sent, Traffic

__all__ = ["Sent", "Traffic", "accounted", "parallelize"]
