"""From a tensor to a scale: what statistic of a tensor, of its axes or of its blocks becomes which scale."""

import math
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from ops_registry.autograd import entry
from ops_registry.checks import FLOAT_DTYPES, check_modes, check_number, check_tensor
from ops_registry.formats import format_name
from ops_registry.modes import POWER_OF_TWO_RULES, SEED
from ops_registry.scales import as_power_of_two

from .formats import FP8Format, resolve
from .granularity import Granularity, PerTensor, check_granularity, has_whole_blocks
from .magnitudes import amax, percentile
from .ops import drawn_bits, quantize
from .two_levels import ARITHMETICS, FOUR_OVER_SIX, Levels, quantize_multiplied

METHODS = ("amax", "percentile", "mse", "four_over_six")
_quantize_blocks = entry("quantize_blocks")
_quantize_blocks_stochastic = entry("quantize_blocks_stochastic")
# What mse tries beside amax itself.
_MSE_FACTORS = [2.0 ** (-step / 8) for step in range(1, 17)]
_MSE_POWER_OF_TWO_FACTORS = [2.0, 0.5, 0.25]  # 2 because two of the rules clip


class ScaleOptions(TypedDict, total=False):
    """The keywords of :func:`compute_scale` that say how the elements of a group make its scale."""

    method: str
    fraction: float
    headroom: float
    power_of_two: str | None
    scale_format: FP8Format | str | None
    tensor_scale: bool
    arithmetic: str


_OPTIONS = tuple(ScaleOptions.__annotations__)


def compute_scale(
    x: Tensor,
    format: FP8Format | str,
    *,
    method: str = "amax",
    granularity: Granularity = PerTensor(),  # noqa: B008  (frozen)
    fraction: float = 0.999,
    headroom: float = 1.0,
    power_of_two: str | None = None,
    scale_format: FP8Format | str | None = None,
    tensor_scale: bool = True,
    arithmetic: str = ARITHMETICS[0],
    compact: bool = False,
) -> Tensor:
    """The scale with which x fits a format: ``quantize(x, format, compute_scale(x, format))``.

    A statistic of |x| is divided by the largest value of the format, correctly rounded. With ``"amax"`` nothing clips:
    what x / scale may exceed the largest value by, for the rounding of both quotients, the rounding to the format
    takes back.
    Nothing is read back from the device, and no gradient flows through a scale.

    Zeros, infinities and NaN: a statistic of 0 gives the scale 1. A scale is never below the smallest normal number of
    its dtype, nor so large that the largest value of the format times it overflows. Where the statistic is infinite or
    any element is NaN, the scale is NaN, and so is the group in quantize. Powers of two follow OCP MX instead: 2^-127
    for zeros, 2^-127 to 2^127 otherwise, infinity counting as the power of two above the dtype's numbers (with
    ``"rceil"`` the scale is then 2^127), NaN for NaN. With scale_format a group of zeros gets the smallest scale, and
    an infinite or NaN element makes the scale of the whole tensor NaN.

    Args:
        x: float16, bfloat16, float32 or float64, any shape.
        format: as in :func:`quantize`.
        method: ``"amax"``: the largest |x|. ``"percentile"``: that of |x| at fraction, interpolated as numpy's
            ``quantile`` does in float64; infinity between a number and infinity. ``"mse"``: the scale with the least
            squared error of :func:`quantize`, among that of amax and 2^(-1/8), 2^(-2/8) ... 2^-2 times it (with
            power_of_two 2, 1/2 and 1/4 times). ``"four_over_six"``, for E2M1: of the scales of amax and 1.5 times it,
            which bring the largest element to 6 and to 4, the one with the smaller error. With scale_format the largest
            scale that amax gives is then a power of two, 256 in E4M3 (arXiv 2512.02010).
        granularity: :class:`PerTensor`, :class:`PerAxis` or :class:`PerBlock`.
        fraction: for ``"percentile"``, 0 to 1.
        headroom: for ``"amax"`` and ``"percentile"``, the statistic is multiplied by it. 17/16 makes stochastic
            rounding unbiased where a scale is rounded to E4M3, down by at most 1/17.
        power_of_two: rounds the scale to a power of two by a rule of OCP MX implementations. ``"floor"``, ``"ceil"``:
            the statistic to a power of two, over that of the largest value. ``"even"``: floor after rounding the
            statistic to the mantissa bits of the format. ``"rceil"``: the quotient rounded up.
        scale_format: rounds the scales to this format, under a float32 scale of the whole tensor that brings the
            largest to the top of the format. A scale is not below the smallest normal value there.
        tensor_scale: False: the scales are values of scale_format itself, and saturate at its largest.
        arithmetic: ``"exact"``: quotients, correctly rounded. ``"transformer_engine"``: with scale_format, the scales
            and values of TransformerEngine's NVFP4 instead, bit for bit for finite x: products with reciprocals, and
            scales that may be subnormal, or 0, where :func:`quantize_blocks` gives 0.
        compact: per block one element a block, which :func:`quantize`, :func:`encode` and :func:`decode` take with the
            granularity.

    Returns:
        float32 (float64 for float64 x). Per tensor a 0-d tensor; per axis x's shape with 1 in the other dimensions; per
        block x's shape, every element with the scale of its block, or with compact as many elements as blocks.

    Raises:
        TypeError: x or format of a wrong type or dtype.
        ValueError: an unknown method, rule or format, a fraction outside 0 to 1, both roundings of the scale, options
            that exclude each other, axes or blocks that x does not have.

    Example:
        >>> import torch
        >>> from altgrad.quantization import E4M3, PerAxis, compute_scale
        >>> compute_scale(torch.tensor([[448.0, 1.0], [0.0, -7.0]]), E4M3, granularity=PerAxis(0))
        tensor([[1.0000],
                [0.0156]])
    """
    scale_of = scaler(
        x, format, method=method, fraction=fraction, headroom=headroom, power_of_two=power_of_two,
        scale_format=scale_format, tensor_scale=tensor_scale, arithmetic=arithmetic,
    )  # fmt: skip
    check_granularity(granularity)
    scale = granularity.apply(scale_of, x.detach(), compact=compact)
    return scale.reshape(()) if isinstance(granularity, PerTensor) else scale


def quantize_blocks(
    x: Tensor,
    format: FP8Format | str,
    *,
    granularity: Granularity,
    saturation: str = "propagate",
    rounding: str = "nearest_ties_to_even",
    random_bits: Tensor | None = None,
    generator: torch.Generator | None = None,
    **options: Unpack[ScaleOptions],
) -> Tensor:
    """:func:`quantize` with the scales of :func:`compute_scale`, bit for bit, in one call and without copies.

    A :class:`BlockFormat` is the keywords of a call: ``quantize_blocks(x, **MXFP4)``.

    Args:
        x, saturation, rounding, random_bits, generator: as in :func:`quantize`.
        format, granularity, options: as in :func:`compute_scale`.

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        TypeError, ValueError: as in :func:`compute_scale`.

    Example:
        >>> import torch
        >>> from altgrad.quantization import MXFP4, quantize_blocks
        >>> quantize_blocks(torch.tensor([[0.1, 0.25, 6.0, -100.0]]), **MXFP4)
        tensor([[  0.,   0.,   8., -96.]])
    """
    scale_of = scaler(x, format, **options)
    check_granularity(granularity)
    check_modes(saturation, rounding)
    operands = in_one_pass(x, format, granularity, options)
    bits = drawn_bits(x, rounding, random_bits, generator)
    if operands is not None:
        tensor_scale, *others = operands
        if bits is None:
            return _quantize_blocks(x, tensor_scale, format_name(format), saturation, rounding, *others)
        return _quantize_blocks_stochastic(x, tensor_scale, bits, format_name(format), saturation, *others)
    if options.get("arithmetic") == "transformer_engine":
        scale = granularity.apply(scale_of, x.detach())
        return quantize_multiplied(x, format, scale, saturation=saturation, rounding=rounding, random_bits=bits)
    if bits is not None and not (bits.dtype == SEED and has_whole_blocks(granularity, x)):  # bits are of x's elements
        scale = granularity.apply(scale_of, x.detach())
        return quantize(x, format, scale, saturation=saturation, rounding=rounding, random_bits=bits)

    def quantized(blocks: Tensor, dims: tuple[int, ...]) -> Tensor:
        scale = scale_of(blocks.detach(), dims)
        scale = scale.reshape(()) if isinstance(granularity, PerTensor) else scale  # ONNX: QuantizeLinear
        return quantize(blocks, format, scale, saturation=saturation, rounding=rounding, random_bits=bits)

    return granularity.apply(quantized, x)


def in_one_pass(
    x: Tensor, format: FP8Format | str, granularity: Granularity, options: ScaleOptions
) -> tuple[Any, ...] | None:
    """What the operators of blocks take: the scale of the tensor, block, rule, scale format, headroom; None: cannot."""
    levels, headroom = levels_of(resolve(format), options), options.get("headroom", 1.0)
    is_plain = levels is None or levels == Levels(*levels[:2], headroom=headroom)
    if options.get("method", "amax") != "amax" or not is_plain or isinstance(granularity, PerTensor):
        return None
    tensor_scale, scale_format = None, None
    if levels is not None:
        tensor_scale, scale_format = levels.tensor_scale(x), levels.scale_format.name
    return tensor_scale, granularity.block(x), options.get("power_of_two"), scale_format, headroom


def scaler(
    x: Tensor, format: FP8Format | str, **options: Unpack[ScaleOptions]
) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
    """The function (view of x, dims) -> scale, with 1 for the size of dims; checks the options."""
    check_tensor("x", x)
    f = resolve(format)
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    check_options(f, options)
    method, headroom = options.get("method", "amax"), options.get("headroom", 1.0)
    power_of_two, levels = options.get("power_of_two"), levels_of(f, options)

    def scale_of(group: Tensor, dims: tuple[int, ...]) -> Tensor:
        if factors := factors_of(method, power_of_two):
            return least_error(group, dims, f, factors, rounded_scale(x, f, power_of_two, levels))
        if method == "percentile":
            statistic, source = percentile(group, dims, options.get("fraction", 0.999)), x
        else:
            statistic = amax(group, dims)
            source = statistic if group.numel() == x.numel() else x  # all of x, or one of its parts with even blocks
        to_scale = rounded_scale(source, f, power_of_two, levels)
        return to_scale(statistic if headroom == 1 else statistic * headroom)

    return scale_of


def check_options(f: FP8Format, options: ScaleOptions) -> None:
    """Refuses what :func:`compute_scale` does not have, and what excludes each other."""
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"got an unexpected keyword argument {name!r}; options are {', '.join(_OPTIONS)}")
    for name, choices in (
        ("method", METHODS),
        ("power_of_two", (None, *POWER_OF_TWO_RULES)),
        ("arithmetic", ARITHMETICS),
    ):
        if options.get(name, choices[0]) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {options.get(name)!r}")
    method, rule, fraction = options.get("method", "amax"), options.get("power_of_two"), options.get("fraction", 0.999)
    headroom = options.get("headroom", 1.0)
    for name, number in (("fraction", fraction), ("headroom", headroom)):
        check_number(name, number)
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be from 0 to 1, got {fraction!r}")
    if not 0 < headroom < math.inf:
        raise ValueError(f"headroom must be positive and finite, got {headroom!r}")
    if headroom != 1 and factors_of(method, rule):
        raise ValueError(f"headroom is for a scale of amax or of a percentile, got method={method!r}")
    if method == "four_over_six" and (f.spelling != "e2m1b1f" or rule is not None):
        raise ValueError(f"method 'four_over_six' is for E2M1 without power_of_two, got {f.name} and {rule!r}")
    levels = levels_of(f, options)
    if rule is not None and levels is not None:
        raise ValueError("power_of_two and scale_format both round the scale: give one of them")
    if levels is not None:
        levels.check()
    elif not options.get("tensor_scale", True):
        raise ValueError("tensor_scale=False is for scales with a scale_format, got none")
    is_exact = options.get("arithmetic", ARITHMETICS[0]) == ARITHMETICS[0]
    if not is_exact and (levels is None or not levels.has_tensor_scale or factors_of(method, rule)):
        raise ValueError(
            "arithmetic 'transformer_engine' is that of a scale_format under a tensor_scale, of amax or a percentile"
        )


def levels_of(f: FP8Format, options: ScaleOptions) -> Levels | None:
    """The levels of scales, None without a scale_format."""
    scale_format = options.get("scale_format")
    if scale_format is None:
        return None
    return Levels(
        f, resolve(scale_format), options.get("method", "amax"), options.get("headroom", 1.0),
        options.get("tensor_scale", True), options.get("arithmetic", ARITHMETICS[0]),
    )  # fmt: skip


def factors_of(method: str, power_of_two: str | None) -> list[float]:
    """What of amax a method tries beside amax itself."""
    if method == "four_over_six":
        return [FOUR_OVER_SIX]
    if method == "mse":
        return _MSE_FACTORS if power_of_two is None else _MSE_POWER_OF_TWO_FACTORS
    return []


def rounded_scale(
    x: Tensor, format: FP8Format, power_of_two: str | None, levels: Levels | None
) -> Callable[[Tensor], Tensor]:
    """The function statistic -> scale; x has the largest magnitude of the whole tensor."""
    if power_of_two is not None:
        return lambda statistic: as_power_of_two(statistic, format, power_of_two)
    if levels is None:
        return lambda statistic: torch.ops.altgrad.as_scale(statistic, format.max_representable_value)
    return levels.scaler(x)


def least_error(
    x: Tensor, dims: tuple[int, ...], format: FP8Format, factors: list[float], to_scale: Callable[[Tensor], Tensor]
) -> Tensor:
    """to_scale(amax), or to_scale(amax * factor) where that has a smaller squared error; the first of equals."""

    largest = amax(x, dims)
    unit: Tensor | float = 1.0
    if x.dtype == torch.float64 and not torch.onnx.is_in_onnx_export():  # which has no frexp
        # Squares have not the range of float64. A power of two changes no comparison.
        unit = torch.exp2(-largest.frexp().exponent.clamp(-1000, 1000).double())

    def error_of(scale: Tensor) -> Tensor:
        return ((quantize(x, format, scale).double() - x.double()) * unit).square().sum(dims, keepdim=True)

    best = to_scale(largest)
    least = error_of(best)
    for factor in factors:
        scale = to_scale(largest * factor)
        error = error_of(scale)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best
