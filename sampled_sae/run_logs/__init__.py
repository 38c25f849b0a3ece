"""Where the field watches its runs: wandb, TensorBoard and trackio, behind one small protocol."""

from .log_place import KINDS, PROJECT, LogPlace
from .run_log import NO_LOG, RunLog

__all__ = ["KINDS", "NO_LOG", "PROJECT", "LogPlace", "RunLog"]
