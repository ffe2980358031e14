"""The random Hadamard transform of NVFP4's recipe: 16 elements along the contraction, with fixed signs."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ops_registry.aten import compute_dtype

SIZE = 16
# The signs of TransformerEngine's NVFP4 recipe, get_wgrad_sign_vector.
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def hadamard(x: Tensor) -> Tensor:
    """``x' = x diag(signs) H / 4`` in blocks of 16 of the last dimension, which zeros fill up; float32 (or float64).

    H is Sylvester's matrix, so this is orthogonal: two operands that are transformed alike have the product that they
    had. Four stages of sums and differences of elements 8, 4, 2 and 1 apart: an order of additions that every device
    and compiler keeps, which a product with H does not promise.
    """
    missing = -x.shape[-1] % SIZE
    x = pad(x, (0, missing)) if missing else x
    x = x.to(compute_dtype(x.dtype)).unflatten(-1, (-1, SIZE)) if x.shape[-1] else x.unsqueeze(-1)
    x = x * torch.tensor(SIGNS, dtype=x.dtype, device=x.device)
    for half in (8, 4, 2, 1):
        pairs = x.unflatten(-1, (-1, 2, half))
        first, second = pairs.unbind(-2)
        x = torch.stack((first + second, first - second), -2).flatten(-3)
    return (x * 0.25).flatten(-2)
