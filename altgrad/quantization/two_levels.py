"""Scales in a format of their own, under a scale of the tensor or alone: NVFP4's two levels, and published variants."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ops_registry.arithmetic import compute_dtype, constant, divide
from ops_registry.autograd import differentiated
from ops_registry.scales import block_level

from .formats import FP8Format
from .granularity import PerTensor
from .magnitudes import amax
from .ops import dequantize, quantize

ARITHMETICS = ("exact", "transformer_engine")
FOUR_OVER_SIX = 1.5  # amax becomes 4 instead of 6
# A scale of the tensor is at least 2^-126, and its product with one of a group at least 2^-149.
_SMALLEST_NORMAL = 2.0**-23


class Levels(NamedTuple):
    """How the statistic of a group becomes a value of scale_format, times that of the tensor where there is one."""

    format: FP8Format
    scale_format: FP8Format
    method: str = "amax"
    headroom: float = 1.0
    has_tensor_scale: bool = True
    arithmetic: str = "exact"

    def check(self) -> None:
        g, name = self.scale_format, self.scale_format.name
        smallest = g.smallest_normal or g.smallest_subnormal
        if self.has_tensor_scale and smallest < _SMALLEST_NORMAL:
            raise ValueError(
                f"scale_format {name} with values down to {smallest:.3g} needs no scale of the tensor above it: "
                "give tensor_scale=False"
            )
        if not self.has_tensor_scale and not g.has_nan:
            raise ValueError(f"scale_format {name} has no NaN, which tells of NaN in x: without a tensor_scale it must")

    @property
    def top(self) -> float:
        """What the largest statistic of all groups is divided by to be the scale of the tensor.

        Under four over six the largest scale is a power of two, so that one and a half times it is a scale too.
        """
        largest = self.scale_format.max_representable_value
        if self.method == "four_over_six":
            largest = math.ldexp(1.0, math.frexp(largest / FOUR_OVER_SIX)[1] - 1)
        return self.format.max_representable_value * largest

    def tensor_scale(self, x: Tensor) -> Tensor | None:
        """The scale of the whole tensor x, 0-d."""
        return self._tensor_scale(self._largest(x)).reshape(()) if self.has_tensor_scale else None

    def scaler(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """The function statistic -> scale for groups of x; headroom is part of the statistics."""
        f, g = self.format, self.scale_format

        def alone(statistic: Tensor) -> Tensor:
            return torch.where(statistic == math.inf, math.nan, block_level(statistic, f, g, constant(1.0, statistic)))

        if not self.has_tensor_scale:
            return alone
        largest = self._largest(x)
        tensor_scale = self._tensor_scale(largest)
        if self.arithmetic == "exact":
            return lambda statistic: block_level(statistic, f, g, tensor_scale) * tensor_scale
        multiplier = self._multiplier(largest) * reciprocal(constant(f.max_representable_value, largest))
        return lambda statistic: quantize(statistic * multiplier, g, saturation="finite") * tensor_scale

    def _largest(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x.dtype)
        if self.top > torch.finfo(dtype).max:
            raise ValueError(
                f"scale_format {self.scale_format.name} times format {self.format.name} reaches {self.top:.3g}, beyond "
                f"{dtype}: give a narrower scale_format, or tensor_scale=False"
            )
        largest = PerTensor().apply(amax, x.detach())
        return largest if self.headroom == 1 else largest * self.headroom

    def _tensor_scale(self, largest: Tensor) -> Tensor:
        if self.arithmetic == "exact":
            return torch.ops.altgrad.as_scale(largest, self.top)
        return torch.where(largest.isfinite(), reciprocal(self._multiplier(largest)), math.nan)

    def _multiplier(self, largest: Tensor) -> Tensor:
        """TransformerEngine's global encode scale: what x is multiplied by for the scale of the tensor."""
        multiplier = divide(constant(self.top, largest), largest).clamp(max=torch.finfo(largest.dtype).max)
        return multiplier.masked_fill((largest == 0) | ~largest.isfinite(), 1.0)


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, at most the largest number: also of 0."""
    return divide(constant(1.0, scale), scale).clamp(max=torch.finfo(scale.dtype).max)


def multiplied(x: Tensor, scale: Tensor) -> Tensor:
    """TransformerEngine's x / scale: the product with the reciprocal, which for a scale of 0 is 0 or saturates."""
    return x.to(compute_dtype(x.dtype)) * reciprocal(scale)


def quantize_multiplied(x: Tensor, format: FP8Format | str, scale: Tensor, **modes: Any) -> Tensor:
    """:func:`quantize` with the product of :func:`multiplied` for the quotient, straight through."""
    q = dequantize(quantize(multiplied(x.detach(), scale), format, **modes), scale).to(x.dtype)
    if torch.compiler.is_dynamo_compiling() and forward_ad._current_level >= 0:
        torch._dynamo.graph_break("forward mode of arithmetic='transformer_engine'")  # the tangent would be that of q
    function = _StraightThrough if torch.compiler.is_compiling() else _WithTangents
    return function.apply(differentiated(x), q)  # type: ignore[no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    """The second argument with the gradient of the first."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _WithTangents(_StraightThrough):
    """The same in forward mode too. torch.compile refuses a jvp."""

    @staticmethod
    def jvp(ctx: Any, x: Tensor, y: Tensor | None) -> Tensor:
        return x.view_as(x)  # forward AD refuses a tangent that is the input's own
