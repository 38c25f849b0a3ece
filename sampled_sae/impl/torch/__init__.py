"""`impl="torch"`: the layer without Triton, and without a [B, F] tensor.

The dictionary is walked in chunks of features whose activations stay in cache; everything after the scores touches
the pool alone.
"""
