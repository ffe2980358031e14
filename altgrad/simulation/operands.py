"""One operand of a product: values that bfloat16 holds exactly, and what the product is multiplied by afterwards.

A scale that is constant along the contraction, a tensor's or a row's, stays out of the values: the product is
multiplied by it in float32. What remains, at most 8 significant bits times a power of two or a scale of few bits, is
exact in bfloat16, so that a product on bfloat16 hardware multiplies the numbers that the small format has.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ops_registry.arithmetic import divide
from ops_registry.aten import split
from ops_registry.scales import as_scale

from ..quantization.formats import FP8Format, resolve
from ..quantization.granularity import PerTensor
from ..quantization.magnitudes import amax, percentile
from ..quantization.ops import quantize
from ..quantization.scaling import (
    _MSE_FACTORS,
    _MSE_POWER_OF_TWO_FACTORS,
    _least_error,
    _rounded_scale,
)
from .hadamard import hadamard
from .recipes import Rule

BFLOAT16_BITS = 8


class Operand(NamedTuple):
    """An operand as ``values * scale``; scale is constant along the contraction, None is 1."""

    values: Tensor
    scale: Tensor | None = None

    @property
    def transposed(self) -> "Operand":
        """The operand of the other direction, where one scale is the whole tensor's."""
        return Operand(self.values.mT, self.scale)


class Scales(NamedTuple):
    """What x is divided by; what its values are multiplied by again; what the product is multiplied by."""

    divisor: Tensor
    inner: Tensor | None
    outer: Tensor | None


class State(NamedTuple):
    """What a rule needs from outside: the seed of stochastic rounding, and delayed scaling's scale and amax."""

    seed: Tensor | None = None
    scale: Tensor | None = None
    amax: Tensor | None = None  # the largest magnitude of this step, written in place


def quantize_operand(
    x: Tensor, rule: Rule | None, transform: int, state: State, dtype: torch.dtype | None = None
) -> Operand:
    """The operand x [..., rows, contraction] by a rule, behind a Hadamard transform if transform is not 0.

    dtype is that of the layer, where x has another one.
    """
    dtype = operand_dtype(dtype or x.dtype, rule)
    if transform:
        x = hadamard(x)
    if rule is None or rule.format is None:
        return Operand(x)
    if torch.compiler.is_compiling() and x.dtype == torch.bfloat16:
        x = rounded_to_bfloat16(x)
        # The product is one of float32 numbers there, and Inductor's C++ fails on two blocked operands of 16 bits.
        dtype = torch.float32 if x.device.type == "cpu" else dtype
    f = resolve(rule.format)
    view, dims = grouped(x, rule)
    scales = find_scales(view, dims, rule, f, state)
    bits = state.seed if rule.is_stochastic else None
    if scales.inner is scales.divisor and x.dtype == dtype:
        values = quantize(view, f, scales.divisor, saturation=rule.saturation, rounding=rule.rounding, random_bits=bits)
    else:
        values = projected(view, scales.divisor, f, rule, dtype, bits)
        if scales.inner is not None:
            values = values * scales.inner.to(dtype)
    return Operand(ungrouped(values, x, rule), scales.outer)


def rounded_to_bfloat16(x: Tensor) -> Tensor:
    """x in float32, rounded there: what a compiler fuses stays in float32, and its rounding to bfloat16 is dropped."""
    x = x.float()
    return torch.where(x.abs() < 2.0**100, split(x, BFLOAT16_BITS), x)  # beyond, the splitting could overflow


def projected(x: Tensor, scale: Tensor, f: FP8Format, rule: Rule, dtype: torch.dtype, bits: Tensor | None) -> Tensor:
    """The value of x / scale in the format, not multiplied by the scale again."""
    if bits is None:
        return torch.ops.altgrad.project(x, scale, f.name, rule.saturation, rule.rounding, dtype)
    return torch.ops.altgrad.project_stochastic(x, scale, bits, f.name, rule.saturation, dtype)


def operand_dtype(dtype: torch.dtype, rule: Rule | None) -> torch.dtype:
    """bfloat16 for 16-bit x where it holds the values exactly, else float32; float32 and float64 stay."""
    if rule is None or rule.format is None or dtype in (torch.float32, torch.float64):
        return dtype
    bits = 1 + resolve(rule.format).mantissa_bits
    if rule.scale_format is not None:
        bits += 1 + resolve(rule.scale_format).mantissa_bits
    elif rule.power_of_two is None and rule.per not in ("tensor", "row"):
        bits += 24
    return torch.bfloat16 if bits <= BFLOAT16_BITS else torch.float32


def grouped(x: Tensor, rule: Rule) -> tuple[Tensor, tuple[int, ...]]:
    """x as a view whose elements along dims share a scale; zeros fill the last blocks up."""
    if rule.per == "tensor":
        return x, tuple(range(x.ndim))
    if rule.per == "row":
        return x, (x.ndim - 1,)
    rows, columns = rule.block
    missing_rows, missing_columns = -x.shape[-2] % rows, -x.shape[-1] % columns
    if missing_rows or missing_columns:
        x = pad(x, (0, missing_columns, 0, missing_rows))
    x = x.unflatten(-1, (-1, columns)) if x.shape[-1] else x.unsqueeze(-1)
    if rows == 1:
        return x, (x.ndim - 1,)
    return x.unflatten(-3, (-1, rows)), (x.ndim - 2, x.ndim)


def ungrouped(values: Tensor, x: Tensor, rule: Rule) -> Tensor:
    """Values of a view by :func:`grouped` in the shape of x."""
    if rule.per in ("tensor", "row"):
        return values
    if rule.block[0] > 1:
        values = values.flatten(-4, -3)
    return values.flatten(-2)[..., : x.shape[-2], : x.shape[-1]]


def find_scales(view: Tensor, dims: tuple[int, ...], rule: Rule, f: FP8Format, state: State) -> Scales:
    """The scales of a view by :func:`grouped`; as :func:`altgrad.quantization.compute_scale` finds them."""
    if rule.scale is not None:
        fixed = torch.full((), rule.scale, device=view.device)
        return Scales(fixed, None, None if rule.scale == 1 else fixed)
    if rule.history:
        if state.amax is not None:
            state.amax.copy_(torch.maximum(state.amax, _whole(amax(view, dims)).reshape(())))
        assert state.scale is not None
        return Scales(state.scale, None, state.scale)
    statistic = percentile(view, dims, rule.fraction) if rule.method == "percentile" else amax(view, dims)
    if rule.headroom != 1:
        statistic = statistic * rule.headroom
    if rule.scale_format is not None:
        return _two_levels(view, dims, rule, f, statistic)
    divisor = _scale_of(view, dims, rule, f, statistic, _rounded_scale(statistic, f, rule.power_of_two, None))
    if rule.power_of_two is not None:  # exact in the values, wherever it is constant
        return Scales(divisor, divisor, None)
    if rule.per == "tensor":
        return Scales(divisor.reshape(()), None, divisor.reshape(()))
    return Scales(divisor, None, divisor) if rule.per == "row" else Scales(divisor, divisor, None)


def _whole(t: Tensor) -> Tensor:
    """A DTensor as the plain tensor that all ranks agree on."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def _two_levels(view: Tensor, dims: tuple[int, ...], rule: Rule, f: FP8Format, statistic: Tensor) -> Scales:
    """Scales in a format of their own under one of the tensor, which is left out of the operand."""
    g = resolve(rule.scale_format or "")
    top = f.max_representable_value
    largest = PerTensor().apply(amax, view if rule.method == "percentile" else statistic)
    outer = as_scale(largest, top * g.max_representable_value).reshape(())
    smallest = g.smallest_normal or g.smallest_subnormal

    def level(statistic: Tensor) -> Tensor:
        scale = divide(statistic, statistic.new_full((), top))
        return quantize(divide(scale, outer), g).clamp(min=smallest)

    if rule.method != "mse":
        inner = level(statistic)
        return Scales(inner * outer, inner, outer)
    divisor = _scale_of(view, dims, rule, f, statistic, lambda statistic: level(statistic) * outer)
    return Scales(divisor, quantize(divide(divisor, outer), g), outer)  # the rounded scale again, exactly


def _scale_of(
    view: Tensor,
    dims: tuple[int, ...],
    rule: Rule,
    f: FP8Format,
    statistic: Tensor,
    to_scale: Callable[[Tensor], Tensor],
) -> Tensor:
    if rule.method != "mse":
        return to_scale(statistic)
    factors = _MSE_FACTORS if rule.power_of_two is None else _MSE_POWER_OF_TWO_FACTORS
    return _least_error(view, dims, f, factors, to_scale)
