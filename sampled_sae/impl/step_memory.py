"""What one training step leaves for the next and no state dict holds."""

from __future__ import annotations

from ..support.late_values import FiniteInputs
from ..support.reused_memory import Workspace
from .dead_features import IdleTokens
from .hints import ThresholdHints
from .pool import KeptPool
from .rounded_tokens import Looks
from .rounded_weights import RoundedWeights
from .row_gradients import RowSource


class StepMemory:
    """One object a layer.

    Attributes:
        hints: where searches start. pool: the candidate pool that `pool_every` keeps. idle: a bound on the tokens since
            a feature was selected. inputs, targets: the checks for NaN, inf and what is too large for a loss.
            workspace: memory for gradients. rounded: weights in the 16 bits of products.
    """

    def __init__(self) -> None:
        self.hints = ThresholdHints()
        self.pool = KeptPool(every=1)
        self.idle = IdleTokens()
        self.looks: Looks | None = None
        self.inputs = FiniteInputs(squares=True)
        self.targets = FiniteInputs("target", squares=True)
        self.workspace = Workspace()
        self.rounded = RoundedWeights()

    def rows(self, keep: bool = False) -> RowSource:
        """Where this step's gradients of rows go."""
        return RowSource(keep, self.workspace, self.rounded)

    def forget(self) -> None:
        """What belongs to weights that are no longer there."""
        self.hints.forget()
        self.pool.reset()
        self.rounded.forget()
