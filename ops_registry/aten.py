"""The operators in aten ops: the kernel on any device without one of its own, and what compilers fuse.

Steps: divide, round, saturate, multiply; in the codecs also pack and unpack. Everything works on the magnitude of
x / scale and puts the sign on last, so that zero keeps its sign. There are neither bit casts nor new tensors, so that
ONNX and DTensor can follow, and no expression that contraction to a fused multiply-add would change.

The words, which csrc/round.h and cuda_kernels.py share:

    q = x / scale      a = |q|, limited to max or one value beyond      r   a rounded and saturated
    power = 2^e        at or below a, e being at least min_exponent     quantum = power * 2^-M, the spacing of values
    below              the value at or below a                          excess = a - below    nu = excess / quantum
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import blocks, packing, products, scales
from .arithmetic import code_dtype, compute_dtype, divide
from .checks import (
    check_amax,
    check_as_scale,
    check_decode,
    check_dequantize,
    check_encode,
    check_project,
    check_quantize,
)
from .formats import FP8Format
from .hadamard import transformed
from .layout import in_order_of_memory, inverse, order_in_memory, with_layout_of_input
from .modes import RANDOM_BITS, ROUNDINGS, SATURATIONS, SEED
from .operators import OPERATORS, library, with_twins
from .philox import random_bits as bits_of

_FRACTION_BITS = {torch.float32: 23, torch.float64: 52}


def split(a: Tensor, bits: int) -> Tensor:
    """a >= 0 to its leading bits, ties to even: Veltkamp's splitting.

    a * 2^k is exact, so contracting it into the sum is harmless (with a * (2^k + 1), the textbook's, it is not).
    """
    t = a * 2.0 ** (_FRACTION_BITS[a.dtype] + 1 - bits) + a
    return t - (t - a)


def times_power_of_two(a: Tensor, exponent: int) -> Tensor:
    """a * 2^exponent by factors that float32 has, for which the exporter of ONNX takes constants."""
    while exponent > 127:
        a, exponent = a * 2.0**127, exponent - 127
    return a * 2.0**exponent


def is_odd(n: Tensor) -> Tensor:
    half = n * 0.5
    return half != half.floor()


def round_nearest(a: Tensor, format: FP8Format) -> Tensor:
    """a >= 0 to the nearest value of the format, its exponent unbounded above; ties to the even code."""
    normal = split(a, 1 + format.mantissa_bits)
    if format.mantissa_bits == 0:
        # Every tie went up to a power of two, 2^k. Its code is k + bias; where that is odd, the code below is even.
        # Any log2 with an error below 1/2 finds k.
        code = normal.log2().round() + format.bias
        normal = torch.where((a == normal * 0.75) & is_odd(code), normal * 0.5, normal)
    # Not (a + c) - c, which is as fast: the optimizer of torch.onnx takes a constant c below 1e-8 for 0.
    subnormal = times_power_of_two(a, format.mantissa_bits - format.min_exponent).round() * format.quantum
    return torch.where(a < 2.0**format.min_exponent, subnormal, normal)


def round_by(a: Tensor, format: FP8Format, rounds_away: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """a >= 0 to itself or to the neighbour on the grid that ``rounds_away(nearest, below, excess, quantum)`` chooses.

    nearest is a rounded to nearest. All of them are exact.
    """
    power = split(a, 1)
    power = torch.where(power > a, power * 0.5, power).clamp(min=2.0**format.min_exponent)
    quantum = power * 2.0**-format.mantissa_bits
    nearest = round_nearest(a, format)
    below = torch.where(nearest > a, nearest - quantum, nearest)
    return torch.where(rounds_away(nearest, below, a - below, quantum), below + quantum, below)


def round_to_format(a: Tensor, format: FP8Format, rounding: str, is_negative: Tensor) -> Tensor:
    """The rounding step by its P3109 name; a is a magnitude, is_negative tells where directed modes go."""
    if rounding == "nearest_ties_to_even":
        return round_nearest(a, format)

    def is_even(below: Tensor, quantum: Tensor) -> Tensor:
        if format.mantissa_bits == 0:  # the quantum is the power of two itself; see round_nearest for its code
            return (below == 0) | ~is_odd(quantum.log2().round() + format.bias)
        return round_nearest(below + quantum * 0.5, format) == below  # for then the midpoint above it goes there

    rounds_away: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
        "nearest_ties_to_away": lambda nearest, below, excess, quantum: excess >= quantum * 0.5,
        "toward_zero": lambda nearest, below, excess, quantum: excess < 0,
        "toward_positive": lambda nearest, below, excess, quantum: (nearest != a) & ~is_negative,
        "toward_negative": lambda nearest, below, excess, quantum: (nearest != a) & is_negative,
        "to_odd": lambda nearest, below, excess, quantum: (nearest != a) & is_even(below, quantum),
    }
    return round_by(a, format, rounds_away[rounding])


def round_stochastic(a: Tensor, format: FP8Format, random_bits: Tensor) -> Tensor:
    """P3109's StochasticA: up where floor(nu * 2^N) + R >= 2^N, with R the low N bits of random_bits.

    That is nu * 2^N >= 2^N - R; both sides times quantum / 2^N are exact.
    """
    n = RANDOM_BITS[random_bits.dtype]
    if random_bits.dtype == SEED:
        random_bits = bits_of(random_bits, a.shape)
    r = (random_bits & ((1 << n) - 1)).to(a.dtype)  # N <= 24: every integer here is exact in float32
    return round_by(a, format, lambda nearest, below, excess, quantum: excess >= (2.0**n - r) * (quantum * 2.0**-n))


def project(q: Tensor, format: FP8Format, saturation: str, rounding: str, random_bits: Tensor | None) -> Tensor:
    """The magnitude of the projection of q, in q's dtype: rounded, then saturated; NaN stays NaN in every format."""
    modes = saturation, rounding, random_bits
    wide = q.double() if format.needs_float64 else q
    if format.is_signed:
        return project_signed(wide, format, *modes).to(q.dtype)
    # From a number to infinity: without that, onnxruntime ends at the largest number.
    clamped = wide.clamp(0.0 if format.has_zero else format.smallest_subnormal, math.inf)
    if saturation != "none" or not format.has_nan:
        return project_signed(clamped, format, *modes).to(q.dtype)
    r = project_signed(wide if format.has_zero else clamped, format, *modes)
    is_beyond = (wide < 0) & (r > 0) if format.has_zero else wide <= 0
    return r.masked_fill(is_beyond, float("nan")).to(q.dtype)


def project_signed(q: Tensor, format: FP8Format, saturation: str, rounding: str, random_bits: Tensor | None) -> Tensor:
    """:func:`project` but for what an unsigned format does to numbers below its smallest."""
    max_value = format.max_representable_value
    a, is_negative = q.abs(), q < 0

    def rounded(a: Tensor) -> Tensor:
        if random_bits is None:
            return round_to_format(a, format, rounding, is_negative)
        return round_stochastic(a, format, random_bits)

    if saturation == "none" and format.has_nan:
        # One step beyond max is enough to see the overflow, and keeps the rounding's arithmetic finite.
        r = rounded(limited(a, format.overflow_value))
        overflows = r > max_value
        if rounding in ("toward_zero", "toward_positive", "toward_negative"):
            stops = a < float("inf")  # rounding a finite value inwards stops at max
            if rounding != "toward_zero":
                stops = stops & (is_negative if rounding == "toward_positive" else ~is_negative)
            r, overflows = r.masked_fill(overflows & stops, max_value), overflows & ~stops
        return r.masked_fill(overflows, float("inf") if format.has_inf else float("nan"))
    # Rounding is monotone and max is on the grid, so saturating first gives the same.
    r = rounded(a.clamp(max=max_value))
    if saturation == "propagate" and format.has_inf:
        r = torch.where(a == float("inf"), a, r)
    return r


def limited(a: Tensor, most: float) -> Tensor:
    """a >= 0 or most, if that is less; compared at a smaller scale where float32 has no such constant."""
    if most < 2.0**128:
        return a.clamp(max=most)
    scaled, most = a * 2.0**-64, most * 2.0**-64
    return torch.where(scaled < most, a, times_power_of_two(scaled.clamp(max=most), 64))


def has_sign_bit(q: Tensor) -> Tensor:
    """torch.signbit for all but NaN, in operators that ONNX has (the clamp keeps 1 / -inf from being -0)."""
    return q.clamp(min=-1.0).reciprocal() < 0


def pack(r: Tensor, is_negative: Tensor, format: FP8Format) -> Tensor:
    """The codes of magnitudes that are on the grid, infinite or NaN."""
    max_value = format.max_representable_value
    # With at most 8 significant bits, log2 is below an integer by 0.005 or not at all, so log2 and exp2 may be
    # approximate. It is below by 0.7 * 2^-M; float64 has more room for large M, and for wide ranges.
    r = r.double() if format.needs_float64 or format.mantissa_bits > 7 else r
    a = r.clamp(max=max_value)
    exponent = (a.log2() + 2.0 ** -max(9, format.mantissa_bits + 2)).floor().clamp(min=format.min_exponent)
    significand = (a * (format.mantissa_bits - exponent).exp2()).round()
    code = significand + (exponent - format.min_exponent) * 2.0**format.mantissa_bits
    if not format.has_zero:
        code = code - 1
    if format.inf_code is not None:
        code = code.masked_fill(r > max_value, format.inf_code)
    if format.is_signed:
        is_negative = is_negative & (r >= 0 if format.has_negative_zero else r > 0)  # NaN has no sign
        code = code + is_negative.to(code.dtype) * format.sign_code
    nan_code = format.max_code if format.nan_code is None else format.nan_code
    return code.masked_fill(r.isnan(), nan_code).to(code_dtype(format))


def unpack(codes: Tensor, format: FP8Format, dtype: torch.dtype) -> Tensor:
    """The values of codes, exactly: the significand times a power of two for each bit of the exponent."""
    mantissa_bits, sign_code = format.mantissa_bits, format.sign_code
    codes = codes if format.sign_code < 256 else codes.to(torch.int32)  # few operators take uint16
    values = torch.float64 if format.needs_float64 else dtype
    magnitude = codes & (sign_code - 1)
    mantissa = (codes & ((1 << mantissa_bits) - 1)).to(values)
    if format.has_zero:
        significand = torch.where(magnitude >= 1 << mantissa_bits, mantissa + 2.0**mantissa_bits, mantissa * 2.0)
    else:
        significand = mantissa + 1.0
    value = significand * 2.0 ** (-format.bias - mantissa_bits)
    for bit in range(format.exponent_bits):
        is_set = (codes & (1 << (mantissa_bits + bit))) != 0
        value = torch.where(is_set, times_power_of_two(value, 1 << bit), value)
    is_negative = (codes & (sign_code if format.is_signed else 0)) != 0
    if not format.has_negative_zero:
        value = value.masked_fill(is_negative & (magnitude == 0), float("nan"))
    elif format.has_nan:
        value = value.masked_fill(magnitude > format.max_code, float("nan"))
        if format.inf_code is not None:
            value = value.masked_fill(magnitude == format.inf_code, float("inf"))
    return (value * (1.0 - 2.0 * is_negative.to(values))).to(dtype)


def with_sign_of(r: Tensor, q: Tensor, format: FP8Format) -> Tensor:
    """The magnitude r with the sign of q, where the format has one."""
    if not format.is_signed:
        return r
    signed = torch.copysign(r, q)
    return signed if format.has_negative_zero else torch.where(r > 0, signed, r)


def with_sign_of_portable(r: Tensor, q: Tensor, format: FP8Format) -> Tensor:
    """:func:`with_sign_of` bit for bit, for ONNX: it has no copysign, and its runtime's `where` drops the sign of zero.

    The reciprocal in it costs 30 % of the time of a compiled CPU kernel, so it is not the only one.
    """
    if not format.is_signed:
        return r
    is_negative = has_sign_bit(q) if format.has_negative_zero else q < 0
    if not format.has_negative_zero:
        is_negative = is_negative & (r > 0)
    return r * (1.0 - 2.0 * is_negative.to(q.dtype))


def quantize(
    x: Tensor,
    scale: Tensor,
    format: str,
    saturation: str = SATURATIONS[0],
    rounding: str = ROUNDINGS[0],
    random_bits: Tensor | None = None,
    sign: Callable[..., Tensor] = with_sign_of,
) -> Tensor:
    f = check_quantize(x, scale, format, saturation, rounding, random_bits)
    q = divide(x, scale, None if f.needs_float64 else rounding)
    return (sign(project(q, f, saturation, rounding, random_bits), q, f) * scale.to(q.dtype)).to(x.dtype)


def project_to(
    x: Tensor,
    scale: Tensor,
    format: str,
    saturation: str = SATURATIONS[0],
    rounding: str = ROUNDINGS[0],
    dtype: torch.dtype | None = None,
    random_bits: Tensor | None = None,
    sign: Callable[..., Tensor] = with_sign_of,
) -> Tensor:
    f = check_project(x, scale, format, saturation, rounding, dtype, random_bits)
    q = divide(x, scale, None if f.needs_float64 else rounding)
    return sign(project(q, f, saturation, rounding, random_bits), q, f).to(dtype or x.dtype)


def encode(
    x: Tensor,
    scale: Tensor,
    format: str,
    saturation: str = SATURATIONS[0],
    rounding: str = ROUNDINGS[0],
    random_bits: Tensor | None = None,
) -> Tensor:
    f = check_encode(x, scale, format, saturation, rounding, random_bits)
    q = divide(x, scale, None if f.needs_float64 else rounding)
    return pack(project(q, f, saturation, rounding, random_bits), has_sign_bit(q), f)


def quantize_gradient(x: Tensor, *args: Any, **random_bits: Any) -> Tensor:
    check_quantize(x, *args, **random_bits)
    return x


def decode(codes: Tensor, scale: Tensor, format: str, dtype: torch.dtype | None = None) -> Tensor:
    f = check_decode(codes, scale, format, dtype)
    dtype = dtype or torch.float32
    compute = compute_dtype(dtype)
    return (unpack(codes, f, compute) * scale.to(compute)).to(dtype)


def dequantize(x: Tensor, scale: Tensor) -> Tensor:
    check_dequantize(x, scale)
    dtype = compute_dtype(x.dtype)
    return (x.to(dtype) * scale.to(dtype)).to(x.dtype)


def amax(x: Tensor, dims: list[int], hadamard: bool = False) -> Tensor:
    """The largest |x| along dims, which keep the size 1, in the compute dtype; NaN if one is NaN, 0 of nothing."""
    check_amax(x, dims, hadamard)
    x = transformed(x) if hadamard else x
    dtype = compute_dtype(x.dtype)
    if any(type(size) is int and size == 0 for size in x.shape):
        return x.new_zeros([1 if dim in dims else size for dim, size in enumerate(x.shape)], dtype=dtype)
    if x.device.type != "cpu" and len(dims) == x.ndim and not torch.compiler.is_compiling():
        return torch.linalg.vector_norm(x, math.inf, dims, keepdim=True, dtype=dtype)
    # A reduction of a transposed x is up to 40 times slower than one with the dimensions in the order of memory.
    order = order_in_memory(x)
    in_memory, kept = x.permute(order), [order.index(dim) for dim in dims]
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        largest = torch.linalg.vector_norm(in_memory, math.inf, kept, keepdim=True)
        if torch.onnx.is_in_onnx_export():  # onnxruntime's ReduceMax drops NaN
            largest = torch.where(in_memory.isnan().any(kept, keepdim=True), math.nan, largest)
    else:  # where the norm's loop is slow, and writing |x| is too
        if len(dims) == x.ndim:
            least, most = (end.reshape([1] * x.ndim) for end in torch.aminmax(in_memory))
        else:
            least, most = in_memory.amin(kept, keepdim=True), in_memory.amax(kept, keepdim=True)
        largest = torch.maximum(most, -least).abs()  # abs: of -0
    if order != list(range(x.ndim)):
        largest = largest.permute(inverse(order)).clone(memory_format=torch.contiguous_format)  # no view
    return largest.to(dtype)


def as_scale(amax: Tensor, max_value: float) -> Tensor:
    check_as_scale(amax, max_value)
    return scales.as_scale(amax, max_value)


FORMULAS = with_twins(
    {
        "quantize": quantize,
        "encode": encode,
        "quantize_gradient": quantize_gradient,
        "project": project_to,
        "decode": decode,
        "dequantize": dequantize,
        "quantize_blocks": blocks.quantize_blocks,
        "quantize_operand": blocks.quantize_operand,
        "quantize_operands": blocks.quantize_operands,
        "encode_blocks": blocks.encode_blocks,
        "amax": amax,
        "as_scale": as_scale,
        "pack": packing.pack,
        "unpack": packing.unpack,
        "matmul": products.matmul,
    }
)


def _kernel_of(name: str, formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    operator = OPERATORS[name]
    if operator.is_pointwise:
        formula = in_order_of_memory(formula, operator.check)
    return with_layout_of_input(formula) if operator.is_laid_out_like_x else formula


# The formulas with the layout of their operator.
KERNELS = {name: _kernel_of(name, formula) for name, formula in FORMULAS.items()}

for _name, _kernel in KERNELS.items():
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
