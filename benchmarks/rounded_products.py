"""A GPU's bfloat16 products on a CPU: operands are rounded to bfloat16, products summed in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# the operands of each product that the PyTorch form makes, forward and backward
OPERANDS = {
    "aten::mm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::sparse_sampled_addmm": (1, 2),
    "aten::_embedding_bag": (0,),
    "aten::_embedding_bag_forward_only": (0,),
}


class RoundedProducts(TorchDispatchMode):
    """While it is on, products take float32 operands as bfloat16 ones; sums, weights and results stay float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        # a weighted sum of rows, as for b_dec's gradient, is float32 on a GPU too
        is_sum = name == "aten::mm" and len(args[0]) == 1
        for i in () if is_sum else OPERANDS.get(name, ()):
            # a sparse matrix is the weights of a sum of rows, which stay as they are
            if isinstance(args[i], Tensor) and args[i].dtype == torch.float32 and args[i].layout == torch.strided:
                args = (*args[:i], args[i].bfloat16().float(), *args[i + 1 :])
        return func(*args, **(kwargs or {}))
