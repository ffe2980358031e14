"""Layouts: an output lies as ``torch.empty_like(x)`` does, and a scale is walked as it broadcasts."""

from collections.abc import Callable, Iterable
from functools import cmp_to_key
from typing import Any

import torch
from torch import Tensor

from .modes import SEED


def with_layout_of_input(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The formula with its output laid out as ``torch.empty_like(x)``, which broadcasting alone does not promise."""

    def kernel(x: Tensor, *args: Any) -> Tensor:
        result = formula(x, *args)
        return torch.empty_like(x, dtype=result.dtype).copy_(result)

    return kernel


def in_order_of_memory(formula: Callable[..., Tensor], check: Callable[..., Any]) -> Callable[..., Tensor]:
    """The formula of a pointwise operator on x with its dimensions in the order of memory.

    For Inductor, which fails on the CPU where one kernel walks a tensor and its transpose as blocks. check raises for
    arguments in the order in which they were given.
    """

    def kernel(x: Tensor, *args: Any) -> Tensor:
        check(x, *args)
        order = order_in_memory(x)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if order == list(range(x.ndim)) or any(t.dtype == SEED for t in tensors):  # a seed counts in row-major order
            return formula(x, *args)
        ordered = [in_order(arg, order) if isinstance(arg, Tensor) and arg.ndim else arg for arg in args]
        return in_order(formula(in_order(x, order), *ordered), inverse(order))

    return kernel


def order_in_memory(x: Tensor) -> list[int]:
    """The dimensions of x from the largest stride to the smallest; those that a compiler cannot compare stay."""

    def compare(a: int | torch.SymInt, b: int | torch.SymInt) -> int:
        return is_known(b > a) - is_known(a > b)

    def is_known(larger: bool | torch.SymBool) -> bool:
        if isinstance(larger, bool):
            return larger
        return torch.fx.experimental.symbolic_shapes.statically_known_true(larger)

    strides: list[int] = list(x.stride())
    return sorted(range(x.ndim), key=lambda dim: cmp_to_key(compare)(strides[dim]))


def inverse(order: list[int]) -> list[int]:
    """The order that takes the dimensions back."""
    return sorted(range(len(order)), key=order.__getitem__)


def in_order(t: Tensor, order: list[int]) -> Tensor:
    """t, which broadcasts to a tensor of dimensions in order, with its own permuted so."""
    return t[(None,) * (len(order) - t.ndim)].permute(order)


def laid_out_as(out: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with the strides of out: itself where it has them."""
    return tensor if tensor.stride() == out.stride() else torch.empty_like(out, dtype=tensor.dtype).copy_(tensor)


def strides_over(ndim: int, shape: Iterable[int], strides: Iterable[int]) -> list[int]:
    """The strides with which a tensor of this shape walks when it is broadcast to ndim dimensions."""
    own = [0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)]
    return [*[0] * (ndim - len(own)), *own]
