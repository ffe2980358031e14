"""One operand of a product: values that bfloat16 holds exactly, and what the product is multiplied by afterwards.

A scale that is constant along the contraction, a tensor's or a row's, stays out of the values: the product is
multiplied by it in float32. What remains, at most 8 significant bits times a power of two or a scale of few bits, is
exact in bfloat16, so that a product on bfloat16 hardware multiplies the numbers that the small format has.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ops_registry.arithmetic import divide
from ops_registry.aten import split
from ops_registry.blocks import blocked, unblocked
from ops_registry.functionalize import stays_opaque
from ops_registry.hadamard import SIZE, transformed
from ops_registry.philox import random_bits
from ops_registry.scales import block_level
from ops_registry.sharding import random_bits_like, whole_largest, with_whole_blocks

from ..quantization.formats import FP8Format, resolve
from ..quantization.granularity import PerBlock, PerTensor
from ..quantization.magnitudes import amax, percentile
from ..quantization.ops import quantize
from ..quantization.scaling import factors_of, least_error, rounded_scale
from ..quantization.two_levels import Levels
from .recipes import Rule

BFLOAT16_BITS = 8


class Operand(NamedTuple):
    """An operand as ``values * scale``; scale is constant along the contraction, None is 1.

    For an accumulator that takes scales of blocks, values are without them too: [..., rows, blocks].
    """

    values: Tensor
    scale: Tensor | None = None
    of_blocks: Tensor | None = None

    @property
    def transposed(self) -> "Operand":
        """The operand of the other direction, where one scale is the whole tensor's."""
        return Operand(transposed(self.values), self.scale)


def transposed(x: Tensor) -> Tensor:
    """``x.mT``, by a method: Dynamo takes an attribute of a saved tensor for another one, saved with no check of its
    version, and such tensors live as long as the whole graph of a loss."""
    return x.transpose(-2, -1)


def stored(operand: Operand, rule: Rule | None) -> Operand:
    """The operand as it is kept for a backward pass: values of E4M3 in a byte each, where all scales are outside them.

    The cast loses nothing. Triton has it from compute capability 8.9 on. (Infinite values of E5M2 it makes finite.)
    """
    plain = "E4M3", "tensor", None, None
    if rule is None or (rule.format, rule.per, rule.power_of_two, rule.scale_format) != plain:
        return operand
    x = operand.values
    has_cast = x.device.type in ("cpu", "cuda")
    if x.is_cuda and torch.compiler.is_compiling():
        has_cast = torch.cuda.get_device_capability(x.device) >= (8, 9)
    return operand._replace(values=x.to(torch.float8_e4m3fn)) if has_cast else operand


def restored(operand: Operand, rule: Rule | None, dtype: torch.dtype) -> Operand:
    """The operand that was kept, of a layer in the dtype."""
    if operand.values.dtype != torch.float8_e4m3fn:
        return operand
    return operand._replace(values=operand.values.to(operand_dtype(dtype, rule)))


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
    x: Tensor,
    rule: Rule | None,
    transform: int,
    state: State,
    dtype: torch.dtype | None = None,
    is_apart: bool = False,
) -> Operand:
    """The operand x [..., rows, contraction] by a rule, behind a Hadamard transform if transform is not 0.

    dtype is that of the layer, where x has another one. is_apart: the values are the format's, and all scales apart.
    """
    dtype = operand_dtype(dtype or x.dtype, rule)
    if transform and (missing := -x.shape[-1] % SIZE):
        x = pad(x, (0, missing))
    if rule is None or rule.format is None:
        return Operand(transformed(x) if transform else x)
    in_blocks = is_of_blocks(rule) and not is_apart
    in_memory = x
    if may_be_unrounded(x) and not (in_blocks and stays_opaque("quantize_operand", x)):
        x = rounded_to_bfloat16(x)
        # The product is one of float32 numbers there, and Inductor's C++ fails on two blocked operands of 16 bits.
        dtype = torch.float32 if x.device.type == "cpu" else dtype
    f = resolve(rule.format)
    bits = state.seed if rule.is_stochastic else None
    if in_blocks:
        return quantize_in_blocks(x, rule, f, bits, dtype, transform > 0)
    x = transformed(x) if transform else x
    x = with_whole_blocks(x, block := block_of(rule, x))
    view, dims = blocked(x, block)
    if bits is not None and view.numel() != x.numel():
        bits, _ = blocked(bits_of_elements(bits, x), block)
    source = in_memory if rule.per == "tensor" and not transform else x if rule.method == "percentile" else view
    scales = find_scales(view, source, tuple(dims), rule, f, state)
    if is_apart:
        values = unblocked(projected(view, scales.divisor, f, rule, dtype, bits), x, block)
        return apart(values, scales, view, x, rule)
    if scales.inner is scales.divisor and x.dtype == dtype:
        values = quantize(view, f, scales.divisor, saturation=rule.saturation, rounding=rule.rounding, random_bits=bits)
    else:
        values = projected(view, scales.divisor, f, rule, dtype, bits)
        if scales.inner is not None:
            values = values * scales.inner.to(dtype)
    return Operand(unblocked(values, x, block), scales.outer)


def bits_of_elements(seed: Tensor, x: Tensor) -> Tensor:
    return random_bits_like(x, seed) if hasattr(x, "placements") else random_bits(seed, x.shape)


def apart(values: Tensor, scales: Scales, view: Tensor, x: Tensor, rule: Rule) -> Operand:
    """The operand of an accumulator: scales that are constant along the contraction, and those that are not."""
    if isinstance(rule.per, str):
        constant = scales.inner if scales.outer is None else scales.outer
        return Operand(values, constant.reshape(()) if rule.per == "tensor" and constant is not None else constant)
    assert scales.inner is not None
    inner = unblocked(scales.inner.expand(view.shape), x, block_of(rule, x))
    return Operand(values, scales.outer, inner[..., :: rule.block[1]])


def is_of_blocks(rule: Rule) -> bool:
    """Whether an operator finds the scales and applies them: of amax, rounded or for parts of the contraction."""
    is_current = rule.method == "amax" and rule.scale is None and not rule.history
    is_rounded = rule.power_of_two is not None or rule.scale_format is not None
    return is_current and rule.per != "tensor" and (is_rounded or rule.per != "row")


def quantize_in_blocks(
    x: Tensor, rule: Rule, f: FP8Format, bits: Tensor | None, dtype: torch.dtype, transforms: bool
) -> Operand:
    """The operand by one operator; its scale is that of the whole tensor, where scales have a format of their own."""
    outer = tensor_scale_of(x, rule, f, transforms)
    options = block_of(rule, x), rule.power_of_two, rule.scale_format, rule.headroom, dtype, transforms
    if bits is None:
        values = torch.ops.altgrad.quantize_operand(x, outer, f.name, rule.saturation, rule.rounding, *options)
    else:
        values = torch.ops.altgrad.quantize_operand_stochastic(x, outer, bits, f.name, rule.saturation, *options)
    return Operand(values, outer)


def tensor_scale_of(x: Tensor, rule: Rule, f: FP8Format, transforms: bool) -> Tensor | None:
    """The scale of the whole tensor above scales of blocks that have a format of their own."""
    if rule.scale_format is None:
        return None
    dims = tuple(range(x.ndim))
    largest = torch.ops.altgrad.amax(x, dims, True) if transforms else rounded_amax(x, dims)
    largest = largest if rule.headroom == 1 else largest * rule.headroom
    top = f.max_representable_value * resolve(rule.scale_format).max_representable_value
    return torch.ops.altgrad.as_scale(largest, top).reshape(())


def are_made_at_once(x: Tensor, rule: Rule, transform: int) -> bool:
    """Whether one operator makes the operands of x and of x transposed: not where a compiler would open it.

    What takes the time of stochastic rounding is arithmetic, which one launch does no faster than two.
    """
    is_called = not torch.compiler.is_compiling() or stays_opaque("quantize_operands", x)
    is_padded = transform > 0 and x.shape[-2] % SIZE != 0
    is_served = rule.format is not None and is_of_blocks(rule) and not rule.is_stochastic
    return is_served and is_called and not is_padded


def quantize_both(x: Tensor, rule: Rule, transform: int) -> tuple[Operand, Operand]:
    """The operands of x, and of x transposed behind the transform, by one rule."""
    f = resolve(rule.format or "")
    outer = tensor_scale_of(x, rule, f, False)
    of_turned = tensor_scale_of(transposed(x), rule, f, True) if transform else outer
    options = block_of(rule, x), rule.power_of_two, rule.scale_format, rule.headroom, operand_dtype(x.dtype, rule)
    first, second = torch.ops.altgrad.quantize_operands(
        x, outer, of_turned, f.name, rule.saturation, rule.rounding, *options, transform > 0
    )
    return Operand(first, outer), Operand(second, of_turned)


def may_be_unrounded(x: Tensor) -> bool:
    """Whether a compiler may leave x out of memory: what it fuses stays in float32, not rounded to bfloat16."""
    return torch.compiler.is_compiling() and x.dtype == torch.bfloat16


def rounded_to_bfloat16(x: Tensor) -> Tensor:
    """x in float32, rounded there."""
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
    f = resolve(rule.format)
    bits = 1 + f.mantissa_bits
    if rule.scale_format is not None:
        bits += 1 + resolve(rule.scale_format).mantissa_bits
    elif rule.power_of_two is None and rule.per not in ("tensor", "row"):
        bits += 24
    return torch.bfloat16 if bits <= BFLOAT16_BITS and f.smallest_subnormal >= 2.0**-133 else torch.float32


def block_of(rule: Rule, x: Tensor) -> list[int]:
    """The size of what shares a scale in each dimension, -1 for all of it."""
    if rule.per == "tensor":
        return [-1] * x.ndim
    return [*[1] * (x.ndim - 2), *((1, -1) if rule.per == "row" else rule.block)]


def find_scales(view: Tensor, x: Tensor, dims: tuple[int, ...], rule: Rule, f: FP8Format, state: State) -> Scales:
    """The scales of a view in blocks of x, with the amax of x; as :func:`altgrad.quantization.compute_scale`."""
    if rule.scale is not None:
        fixed = torch.full((), rule.scale, dtype=torch.float32, device=view.device)
        return Scales(fixed, None, None if rule.scale == 1 else fixed)
    if rule.history:
        if state.amax is not None:
            state.amax.copy_(torch.maximum(state.amax, whole_largest(rounded_amax(x, dims)).reshape(())))
        assert state.scale is not None
        return Scales(state.scale, None, state.scale)
    is_percentile = rule.method == "percentile"
    statistic = percentile_of(view, x, dims, rule) if is_percentile else rounded_amax(x, dims)
    if rule.headroom != 1:
        statistic = statistic * rule.headroom
    if rule.scale_format is not None:
        return _two_levels(view, dims, rule, f, statistic)
    divisor = _scale_of(view, dims, rule, f, statistic, rounded_scale(statistic, f, rule.power_of_two, None))
    if rule.power_of_two is not None or not isinstance(rule.per, str):  # a power of two is exact in the values
        return Scales(divisor, divisor, None)
    outer = divisor.reshape(()) if rule.per == "tensor" else divisor
    return Scales(outer, None, outer)


def rounded_amax(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """amax of x in its dtype, which a compiler may leave out: the largest, rounded, is the largest of x rounded.

    Of x itself, not of what :func:`rounded_to_bfloat16` makes of it, a kernel may find it in memory.
    """
    largest = amax(x, dims)
    return rounded_to_bfloat16(largest) if may_be_unrounded(x) else largest


def percentile_of(view: Tensor, x: Tensor, dims: tuple[int, ...], rule: Rule) -> Tensor:
    """That of the blocks of x, without the zeros that fill up the last ones of its view."""
    if view.numel() == x.numel():
        return percentile(view, dims, rule.fraction)
    of_blocks = PerBlock(tuple(block_of(rule, x))).apply(partial(percentile, fraction=rule.fraction), x, compact=True)
    return of_blocks.reshape([1 if dim in dims else size for dim, size in enumerate(view.shape)])


def _two_levels(view: Tensor, dims: tuple[int, ...], rule: Rule, f: FP8Format, statistic: Tensor) -> Scales:
    """Scales in a format of their own under one of the tensor, which is left out of the operand."""
    g = resolve(rule.scale_format or "")
    is_amax = rule.method != "percentile"
    largest = PerTensor().apply(amax, statistic) if is_amax else PerTensor().apply(amax, view) * rule.headroom
    outer = torch.ops.altgrad.as_scale(largest, Levels(f, g, rule.method).top).reshape(())
    if not factors_of(rule.method, None):
        inner = block_level(statistic, f, g, outer)
        return Scales(inner * outer, inner, outer)
    divisor = _scale_of(view, dims, rule, f, statistic, lambda largest: block_level(largest, f, g, outer) * outer)
    return Scales(divisor, quantize(divide(divisor, outer), g), outer)  # the rounded scale again, exactly


def _scale_of(
    view: Tensor,
    dims: tuple[int, ...],
    rule: Rule,
    f: FP8Format,
    statistic: Tensor,
    to_scale: Callable[[Tensor], Tensor],
) -> Tensor:
    factors = factors_of(rule.method, rule.power_of_two)
    return least_error(view, dims, f, factors, to_scale) if factors else to_scale(statistic)
