"""Matrix products with the accumulator of a tensor core, in aten ops: what kernels get, and the formula.

A kernel gets of each operand its values and their exponents, both [batch, K, rows or columns], contiguous: float32 and
int32 where float32 is wide enough (``Accumulator.is_narrow``), else float64 and int32. Scales of blocks are in both.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .accumulators import Accumulator
from .checks import check_matmul
from .formats import FP8Format

NOT_COUNTED = -(1 << 14)  # the exponent of zero, infinity and NaN: with any other it is below all that count
_ROOM = 1 << 22  # terms at a time


class Factor(NamedTuple):
    """An operand as kernels take it: [batch, K, n]."""

    values: Tensor
    exponents: Tensor


def factors(
    a: Tensor, b: Tensor, accumulator: Accumulator, a_scale: Tensor | None, b_scale: Tensor | None
) -> tuple[Factor, Factor]:
    """Both operands as kernels take them, checked element by element."""
    left = _factor("a", a.mT, accumulator, 0, None if a_scale is None else a_scale.mT)
    return left, _factor("b", b, accumulator, 1, b_scale)


def _factor(name: str, x: Tensor, accumulator: Accumulator, side: int, scale: Tensor | None) -> Factor:
    f = accumulator.formats[side]
    x = x.reshape(x.shape[:-2].numel(), *x.shape[-2:])
    values = x.to(torch.float32 if accumulator.is_narrow else torch.float64)
    if f is not None and not (f.name == "BF16" and x.dtype == torch.bfloat16):
        hint = "; other formats of operands are named behind it, as in 'HOPPER_FP8(E5M2,any)'"
        _check_values(name, values, f, accumulator.name, hint)
    exponents = exponents_of(values, -126 if f is None else f.min_exponent)
    if scale is not None:
        assert accumulator.scaled is not None and accumulator.scale_format is not None
        scale = scale.reshape(scale.shape[:-2].numel(), *scale.shape[-2:]).double()
        _check_values(f"{name}_scale", scale, accumulator.scale_format, accumulator.name)
        scale = of_products(scale, accumulator.scaled, 1, x.shape[1])
        own = exponents_of(scale, accumulator.scale_format.min_exponent)
        exponents = torch.where(exponents > NOT_COUNTED, own + (0 if accumulator.sums_block else exponents), exponents)
        values = values * scale
    return Factor(values.contiguous(), exponents.contiguous())


def of_products(scale: Tensor, scaled: int, dim: int, size: int) -> Tensor:
    """Scales of blocks along dim, one for each of the products."""
    return scale.repeat_interleave(scaled, dim).narrow(dim, 0, size)


def exponents_of(values: Tensor, least: int) -> Tensor:
    """floor(log2 |values|), at least that, in int32; NOT_COUNTED of zero, infinity and NaN."""
    if values.dtype == torch.float32:
        biased = (values.view(torch.int32) >> 23 & 0xFF) - 127
    else:
        biased = ((values.view(torch.int64) >> 52 & 0x7FF) - 1023).int()
    counts = (values != 0) & values.isfinite()
    return torch.where(counts, biased.clamp(min=least), NOT_COUNTED)


def _check_values(name: str, values: Tensor, f: FP8Format, accumulator: str, hint: str = "") -> None:
    """Every finite element is a value of the format. On a GPU this waits for it, but not while a graph is captured."""
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    unit = values.new_ones(())
    off_grid = (torch.ops.altgrad.quantize(values, unit, f.name, "finite") != values) & values.isfinite()
    if off_grid.any():
        example = values[off_grid][0].item()
        raise ValueError(f"{name} must hold values of {f.name} for accumulator {accumulator!r}, got {example!r}{hint}")


def power_of_two(exponents: Tensor) -> Tensor:
    """2^exponents in float64, from its bits, for -1022 to 1023."""
    return (exponents.long() + 1023 << 52).view(torch.float64)


def matmul(
    a: Tensor, b: Tensor, accumulator: str, a_scale: Tensor | None = None, b_scale: Tensor | None = None
) -> Tensor:
    rule = check_matmul(a, b, accumulator, a_scale, b_scale)
    left, right = factors(a, b, rule, a_scale, b_scale)
    left, right = (Factor(x.values.double(), x.exponents) for x in (left, right))
    out = a.new_empty([*a.shape[:-1], b.shape[-1]], dtype=torch.float32)
    matrices = out.view(left.values.shape[0], *out.shape[-2:])
    rows = max(1, _ROOM // max(1, rule.group * matrices.shape[0] * matrices.shape[2]))
    for start in range(0, matrices.shape[1], rows):
        part = Factor(*(t[:, :, start : start + rows] for t in left))
        matrices[:, start : start + rows] = _accumulated(part, right, rule)
    return out


def _accumulated(left: Factor, right: Factor, rule: Accumulator) -> Tensor:
    batch, k, rows = left.values.shape
    kept = left.values.new_zeros(batch, rows, right.values.shape[2])
    total = kept.float()
    for start in range(0, k, rule.group):
        group = slice(start, start + rule.group)
        terms = left.values[:, group, :, None] * right.values[:, group, None, :]
        exponents = left.exponents[:, group, :, None] + right.exponents[:, group, None, :]
        if rule.fraction_bits is None:
            kept = round_kept(sum_to_odd(kept, terms[:, 0]), rule)
        else:
            kept = round_kept(_aligned_sum(kept, terms, exponents, rule), rule) + 0.0  # never -0
        if rule.promotion and (start + rule.group) % rule.promotion == 0:
            total, kept = total + kept.float(), torch.zeros_like(kept)
    result = total + kept.float() if rule.promotion else kept.float()
    return torch.where(result.isnan(), torch.full_like(result.int(), 0x7FFFFFFF).view(torch.float32), result)


def _aligned_sum(kept: Tensor, terms: Tensor, exponents: Tensor, rule: Accumulator) -> Tensor:
    assert rule.fraction_bits is not None
    if rule.sums_block:
        size = rule.products_of_term
        blocks = range(0, terms.shape[1], size)
        exponents = torch.stack([exponents[:, i : i + size].amax(1) for i in blocks], 1)
        terms = torch.stack([terms[:, i : i + size].sum(1) for i in blocks], 1)
        exponents = torch.where(terms == 0, NOT_COUNTED, exponents)
    largest = torch.maximum(exponents.amax(1), exponents_of(kept, rule.min_exponent)).clamp(min=rule.least_exponent)
    scale = power_of_two(rule.fraction_bits - largest)
    total = (terms * scale[:, None]).trunc().sum(1) + (kept * scale).trunc()
    return total * power_of_two(largest - rule.fraction_bits)


def sum_to_odd(a: Tensor, b: Tensor) -> Tensor:
    """a + b in float64, rounded to odd where inexact: whatever rounds it next to fewer bits rounds the exact sum."""
    total = a + b
    of_b = total - a
    error = (a - (total - of_b)) + (b - of_b)
    bits = total.view(torch.int64)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    is_even = (bits & 1) == 0
    return torch.where((error != 0) & is_even & total.isfinite(), bits + away, bits).view(torch.float64)


def round_kept(total: Tensor, rule: Accumulator) -> Tensor:
    """What the accumulator keeps of a float64 sum."""
    own = (total.view(torch.int64) >> 52 & 0x7FF) - 1023
    exponents = own.clamp(rule.min_exponent, rule.max_exponent) - rule.mantissa_bits
    quanta = total * power_of_two(-exponents)
    kept = (quanta.trunc() if rule.is_truncated else quanta.round()) * power_of_two(exponents)
    infinite = torch.full_like(kept, torch.inf).copysign(kept)
    return torch.where(kept.abs() >= 2.0 ** (rule.max_exponent + 1), infinite, kept)
