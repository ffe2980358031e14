"""The dtype of an operator's arithmetic, and its quotient in aten ops."""

import torch
from torch import Tensor

from .formats import FP8Format


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic of an operator: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def code_dtype(format: FP8Format) -> torch.dtype:
    """The dtype of a format's codes: uint8 to 8 bits, uint16 to 16, the most that codes have."""
    return torch.uint8 if format.code_bytes == 1 else torch.uint16


def constant(value: float, like: Tensor) -> Tensor:
    """A number, 0-d, of the dtype and the device of like.

    What new_full makes of a tensor that vmap batches is batched too, and of 0-d tensors torch takes the first example
    where they meet others, also of an empty batch (torch 2.13).
    """
    return torch.full((), value, dtype=like.dtype, device=like.device)


def divide(x: Tensor, scale: Tensor, rounding: str | None = None) -> Tensor:
    """x / scale in the compute dtype, correctly rounded, or as good as that for the rounding to come.

    Without a rounding it is correctly rounded.
    """
    dtype = compute_dtype(x.dtype)
    if x.is_cuda and dtype == torch.float32:
        # Inductor's float32 `/` on CUDA is not IEEE, its float64 `/` is. The quotient of two 24-bit numbers is a
        # midpoint of float32 numbers, normal or not, or 2^-49 away from it, so a float64 quotient rounds to float32 as
        # the exact one does. The cheaper product with a reciprocal is off by at most 2^-52: enough but for quotients
        # that are midpoints. Those are below 2^-126, at most half the quantum of any format that does not need float64:
        # ties to even give zero.
        if rounding == "nearest_ties_to_even":
            return (x.double() * scale.double().reciprocal()).float()
        return (x.double() / scale.double()).float()
    if torch.compiler.is_compiling():
        # Inductor drops a division by 1 and puts the tags of the quotient on its dividend. Where that is the input of a
        # checkpointed region, the tag says to compute it again, and the compilation fails. A division by -1 stays.
        return x.to(dtype).neg() / scale.to(dtype).neg()
    return x.to(dtype) / scale.to(dtype)
