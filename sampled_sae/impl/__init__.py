"""The layer's implementations behind one interface: `torch/`, `triton/` and the specification."""
