"""`impl="torch"`: the layer without Triton, and without a [B, F] tensor.

Features stand on rows here: W is W_enc.T, [F, d], contiguous. The dictionary is walked in chunks whose
activations stay in cache; everything after the scores touches the pool alone.
"""
