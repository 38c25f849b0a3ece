"""Whether a CUDA graph is being captured."""

import torch


def capturing() -> bool:
    """True where what the host does now is done once, and replays repeat only what the device does."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
