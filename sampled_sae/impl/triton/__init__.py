"""`impl="triton"`: the layer from the kernels, without a [B, F] tensor and without a look at the device.

W is W_enc.T, [F, d], contiguous. Products are cuBLAS's where the kernels do not fold them into something smaller;
everything that is chosen, the kept entries above all, is chosen on the device in tensors of a size known before.
"""
