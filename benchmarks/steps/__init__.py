"""Whole training steps: which candidates at which sizes is data, and one harness times them."""
