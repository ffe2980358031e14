"""Layouts: an output lies as ``torch.empty_like(x)`` does, and a scale is walked as it broadcasts."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def with_layout_of_input(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The formula with its output laid out as ``torch.empty_like(x)``, which broadcasting alone does not promise."""

    def kernel(x: Tensor, *args: Any) -> Tensor:
        result = formula(x, *args)
        return torch.empty_like(x, dtype=result.dtype).copy_(result)

    return kernel


def strides_over(ndim: int, shape: Iterable[int], strides: Iterable[int]) -> list[int]:
    """The strides with which a tensor of this shape walks when it is broadcast to ndim dimensions."""
    own = [0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)]
    return [*[0] * (ndim - len(own)), *own]
