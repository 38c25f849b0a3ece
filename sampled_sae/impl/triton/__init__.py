"""`impl="triton"`: the layer from Triton kernels and cuBLAS products, as `torch.library` operators `sampled_sae::*`.

Nothing reads a value back to the host: sizes follow from the shapes and the budget alone, so a step can be compiled
whole and captured in a CUDA graph.
"""
