"""From the largest magnitude of a group to its scale, in aten ops: exact quotients, powers of two, two levels."""

import math

import torch
from torch import Tensor

from .arithmetic import constant, divide
from .formats import FP8Format

# Of the dtype of an amax: integers of its width, its mantissa bits, its bias, and the bits of 2^-127, E8M0's smallest.
_LAYOUTS = {torch.float32: (torch.int32, 23, 127, 1 << 22), torch.float64: (torch.int64, 52, 1023, 896 << 52)}
_E8M0_MAX_EXPONENT = 127


def as_scale(amax: Tensor, max_value: float) -> Tensor:
    """amax / max_value, positive and finite, 1 for 0; NaN for an infinite amax and for NaN.

    It is small enough for max_value * scale to be finite, also as the product of two factors, rounded twice.
    """
    limits = torch.finfo(amax.dtype)
    most = min(limits.max, limits.max * (1 - 2 * limits.eps) / max_value)
    scale = divide(amax, amax.new_full((), max_value)).clamp(limits.smallest_normal, most)
    # Not masked_fill by NaN, which is not equal to itself: DTensor would plan that operation anew at every call.
    return torch.where(amax == math.inf, math.nan, scale.masked_fill(amax == 0, 1.0))


def as_power_of_two(amax: Tensor, format: FP8Format, rule: str) -> Tensor:
    """The E8M0 scale of amax in its dtype, by the rules of OCP MX, on the bits of numbers (logarithms err)."""
    integers, mantissa_bits, bias, smallest = _LAYOUTS[amax.dtype]
    a, exponent = amax, math.frexp(format.max_representable_value)[1] - 1
    if rule == "rceil":
        a, exponent = divide(amax, constant(format.max_representable_value, amax)), 0
    while exponent < 1:  # so that all subnormals of a, where an exponent says nothing, mean 2^-127
        step = min(1 - exponent, 127)
        a, exponent = a * 2.0**step, exponent + step
    bits = a.view(integers)
    if rule != "floor":  # a carry into the exponent
        bits = bits + ((1 << mantissa_bits) - 1 if rule != "even" else 2 ** (mantissa_bits - 1 - format.mantissa_bits))
    code = (_shifted(bits, -mantissa_bits) - exponent).clamp(max=bias + _E8M0_MAX_EXPONENT)
    bits = _shifted(code, mantissa_bits).clamp(min=smallest)  # what a code below 1 becomes
    return torch.where(amax.isnan(), math.nan, bits.view(amax.dtype))


def _shifted(bits: Tensor, by: int) -> Tensor:
    """bits << by, by its name, for the operators << and >> leave a DTensor as it is (torch 2.13)."""
    return torch.bitwise_left_shift(bits, by) if by > 0 else torch.bitwise_right_shift(bits, -by)


def block_level(amax: Tensor, format: FP8Format, scale_format: FP8Format, tensor_scale: Tensor) -> Tensor:
    """The scale of a group in the scale format, which tensor_scale multiplies: not below the smallest normal value."""
    scale = divide(amax, constant(format.max_representable_value, amax))
    smallest = scale_format.smallest_normal or scale_format.smallest_subnormal  # below it the rounding would clip
    level: Tensor = torch.ops.altgrad.quantize(divide(scale, tensor_scale), constant(1.0, scale), scale_format.name)
    return level.clamp(min=smallest)
