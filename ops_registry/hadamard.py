"""The random Hadamard transform of NVFP4's recipe: 16 elements along the last dimension, with fixed signs."""

import torch
from torch import Tensor

from .arithmetic import compute_dtype

SIZE = 16
# The signs of TransformerEngine's NVFP4 recipe, get_wgrad_sign_vector: bit i is set where element i is negated.
NEGATED = 0b1101_0111_1110_1000


def transformed(x: Tensor) -> Tensor:
    """``x' = x diag(signs) H / 4`` for groups of 16, with Sylvester's H; in float32 (or float64).

    The transform is orthogonal: two operands that are transformed alike have the product that they had. A sum of 16 is
    made in four steps of sums and differences of two elements, which are 1, 2, 4 and 8 apart, and divided last: so have
    all kernels the same bits.
    """
    dtype, n = compute_dtype(x.dtype), torch.arange(SIZE, device=x.device)
    y = x.to(dtype).unflatten(-1, (-1, SIZE))
    y = torch.where(NEGATED >> n & 1 == 1, -y, y).unflatten(-1, (2, 2, 2, 2))
    sign = (1 - 2 * n[:2]).to(dtype)
    for dim in (-1, -2, -3, -4):  # elementwise, so that the result lies in memory as x does
        y = y.flip(dim) + y * sign.view(2, *[1] * (-1 - dim))
    return (y * 0.25).flatten(-5)


def is_transformed(args: tuple[object, ...]) -> bool:
    """Whether the arguments of an operator ask for the transform, by the one flag among them."""
    return any(argument is True for argument in args)
