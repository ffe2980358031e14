"""The operators as functions: formats as objects or names, scales as tensors or numbers, random bits drawn or given."""

import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops_registry.arithmetic import compute_dtype
from ops_registry.autograd import RULES, differentiated, entry
from ops_registry.checks import check_modes, check_quantize, check_tensor
from ops_registry.formats import format_name
from ops_registry.modes import SEED
from ops_registry.operators import blocks_of
from ops_registry.sharding import random_bits_like, shared_seed

from .formats import FP8Format
from .granularity import Granularity, PerBlock, check_granularity

_SEEDS = (1 << 63) - 1
_OPERATORS = {name: entry(name) for name in RULES}


def quantize(
    x: Tensor,
    format: FP8Format | str,
    scale: Tensor | float = 1.0,
    *,
    granularity: Granularity | None = None,
    saturation: str = "propagate",
    rounding: str = "nearest_ties_to_even",
    random_bits: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Simulates a small format: ``project(x / scale) * scale``, floating point in, the same dtype out.

    x / scale is rounded to a value of the format, by default the nearest one with ties to the even code, and saturated.
    Arithmetic is float32 (float64 for float64 x) with one rounding to x's dtype at the end. NaN stays NaN in every
    format and zero keeps its sign where the format has -0. The gradient to x is the straight-through estimator: the
    incoming gradient itself; the gradient to scale is None.

    Args:
        x: float16, bfloat16, float32 or float64, any shape and strides.
        format: an :class:`FP8Format`, a name (``"E5M2"``) or a spelling (``"e3m4b3fn"``).
        scale: positive and finite, value = scale * decode(code). A number, or a floating-point tensor that broadcasts
            to x without enlarging it, on x's device or 0-d on the CPU. A tensor's values are not checked.
        granularity: a :class:`PerBlock` whose blocks have one element of scale each, as ``compute_scale(...,
            compact=True)`` gives them; None and the others: scale broadcasts to x.
        saturation: what becomes of values beyond the largest. ``"propagate"``: finite ones to the largest, infinities
            stay where the format has them. ``"finite"``: all to the largest. ``"none"``: to infinity, else NaN, else
            the largest, whichever the format has. (SatPropagate, SatFinite, SatNone of IEEE P3109.)
        rounding: ``"nearest_ties_to_even"``, ``"nearest_ties_to_away"``, ``"toward_zero"``, ``"toward_positive"``,
            ``"toward_negative"``, ``"to_odd"`` or ``"stochastic"``, as in IEEE P3109 4.7.4; parity is that of the code.
        random_bits: for stochastic rounding, an int32 (N = 24) or uint8 (N = 8) tensor of x's shape whose low N bits
            decide: a value is rounded away from zero where ``floor(nu * 2^N) + R >= 2^N``, nu being how far it is from
            the value below it (P3109's StochasticA). Or a seed, a 0-d int64 tensor on x's device: N = 24, and the bits
            of element i in row-major order are word i mod 4 of the Philox-4x32-10 block of the counter i div 4 under
            the key seed, whatever the layout and the device. None draws a seed.
        generator: what to draw from instead of the default generator of x's device.

    Returns:
        A tensor of x's shape and dtype, laid out as ``torch.empty_like(x)``.

    Raises:
        TypeError: x, scale, format or random_bits of a wrong type or dtype.
        ValueError: an unknown format, saturation or rounding, a scale that would enlarge x, a number that is not
            positive and finite, random_bits of another shape, random_bits or generator without stochastic rounding.
        RuntimeError: scale or random_bits on another device.

    Example:
        >>> import torch
        >>> from altgrad.quantization import quantize, E3M4
        >>> quantize(torch.tensor([0.3, 1.03125, 100.0]), E3M4)
        tensor([ 0.2969,  1.0000, 31.0000])
    """
    return _project("quantize", x, format, scale, saturation, rounding, random_bits, generator, granularity)


def quantize_gradient(
    x: Tensor,
    format: FP8Format | str,
    scale: Tensor | float | Callable[[Tensor], Tensor] = 1.0,
    *,
    saturation: str = "propagate",
    rounding: str = "nearest_ties_to_even",
    random_bits: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x unchanged; in the backward pass the incoming gradient is quantized: ``quantize(grad, format, scale, ...)``.

    It gives gradients a format of their own, as in training with E4M3 forward and E5M2 backward. A seed is drawn (or
    ``random_bits`` are taken) in the forward pass and kept for the backward pass. The gradient of the gradient is
    straight-through; forward-mode tangents pass unchanged. In eager the output is a copy of x; compiled there is none.
    Arguments and errors are those of :func:`quantize`; scale may also be a function, which gets the incoming gradient
    and gives its scale (not in forward mode, which raises).

    Returns:
        A tensor of x's values, shape and dtype, laid out as ``torch.empty_like(x)``.

    Example:
        >>> import torch
        >>> from altgrad.quantization import E5M2, compute_scale, quantize_gradient
        >>> x = torch.tensor([1.1], requires_grad=True)
        >>> y = quantize_gradient(x, E5M2)
        >>> y.backward(torch.tensor([1.1]))
        >>> y, x.grad
        (tensor([1.1000], grad_fn=<QuantizeGradientBackward>), tensor([1.]))
        >>> y = quantize_gradient(x, E5M2, scale=lambda grad: compute_scale(grad, E5M2))
        >>> y.backward(torch.tensor([1e-30]))  # at scale 1 it would be zero
    """
    if callable(scale) and not isinstance(scale, Tensor):
        check_tensor("x", x)
        check_modes(saturation, rounding)
        unit, name = _as_tensor(1.0, None, x.device), format_name(format)
        bits = _checked_bits(x, unit, name, saturation, rounding, random_bits, generator)
        check_quantize(x, unit, name, saturation, rounding, bits)
        args = differentiated(x), bits, scale, name, saturation, rounding
        return _QuantizeGradient.apply(*args)  # type: ignore[no-untyped-call]
    return _project("quantize_gradient", x, format, scale, saturation, rounding, random_bits, generator)


def encode(
    x: Tensor,
    format: FP8Format | str,
    scale: Tensor | float = 1.0,
    *,
    granularity: Granularity | None = None,
    saturation: str = "propagate",
    rounding: str = "nearest_ties_to_even",
    random_bits: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The codes of ``project(x / scale)``, in the low bits of a byte, or of two where a format has more than 8 bits.

    NaN goes to the format's NaN; where it has none, to the code of the largest value, as in the saturating conversions
    of hardware to FP4 and FP6. Codes carry no gradient. Arguments and errors are those of :func:`quantize`.

    Returns:
        A uint8 tensor (uint16 for formats of 9 to 16 bits) of x's shape, laid out as ``torch.empty_like(x)``.

    Example:
        >>> import torch
        >>> from altgrad.quantization import encode, E5M2
        >>> encode(torch.tensor([1.0, -1.0, 0.0]), E5M2)
        tensor([ 60, 188,   0], dtype=torch.uint8)
    """
    return _project("encode", x, format, scale, saturation, rounding, random_bits, generator, granularity)


def decode(
    codes: Tensor,
    format: FP8Format | str,
    scale: Tensor | float = 1.0,
    *,
    granularity: Granularity | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``value(code) * scale``, in float32 arithmetic (float64 for dtype float64), rounded once to dtype.

    Bits above the format's width are ignored.

    Args:
        codes: uint8, or uint16 for formats of 9 to 16 bits; any shape and strides.
        format: as in :func:`quantize`.
        scale, granularity: as in :func:`quantize`, for codes.
        dtype: float16, bfloat16, float32 (None) or float64.

    Returns:
        A tensor of the shape of codes, laid out as ``torch.empty_like(codes)``.

    Raises:
        TypeError: codes of another dtype than the format's, scale, dtype or format of a wrong type or dtype.
        ValueError, RuntimeError: as in :func:`quantize`.

    Example:
        >>> import torch
        >>> from altgrad.quantization import decode, E5M2
        >>> decode(torch.tensor([60, 188, 123], dtype=torch.uint8), E5M2, 0.5)
        tensor([ 5.0000e-01, -5.0000e-01,  2.8672e+04])
    """
    check_tensor("codes", codes)
    if isinstance(granularity, PerBlock):
        compact = _compact("codes", codes, scale, granularity)

        def decoded(blocks: Tensor, dims: tuple[int, ...], scale: Tensor) -> Tensor:
            return decode(blocks, format, scale, dtype=dtype)

        return granularity.apply(decoded, codes, compact)
    if granularity is not None:
        check_granularity(granularity)
    return _OPERATORS["decode"](codes, _as_tensor(scale, dtype, codes.device), format_name(format), dtype)


def dequantize(x: Tensor, scale: Tensor | float) -> Tensor:
    """``x * scale`` in x's dtype, computed in float32 (float64 for float64 x).

    The gradient to x is the incoming gradient times scale; the gradient to scale is None.

    Args:
        x: values of a format, e.g. ``quantize(w / scale, format)``; float16, bfloat16, float32 or float64.
        scale: as in :func:`quantize`.

    Returns:
        A tensor of x's shape and dtype, laid out as ``torch.empty_like(x)``.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`quantize`.

    Example:
        >>> import torch
        >>> from altgrad.quantization import dequantize
        >>> dequantize(torch.tensor([1.0, -3.0]), 0.5)
        tensor([ 0.5000, -1.5000])
    """
    check_tensor("x", x)
    return _OPERATORS["dequantize"](x, _as_tensor(scale, x.dtype, x.device))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes packed to their width along the last dimension: one stream of bits, the lowest first.

    Two 4-bit codes share a byte, the first in its low half, as in ``torch.float4_e2m1fn_x2`` and torchao;
    four 6-bit codes share three bytes. Where codes do not fill the last byte, zeros do.

    Args:
        codes: uint8 of shape [..., n], with a code in the low bits of each; the bits above are ignored.
        bits: the width of a code, 1 to 8: a format's ``bits``.

    Returns:
        uint8, [..., ceil(n * bits / 8)].

    Raises:
        TypeError: codes that are not uint8.
        ValueError: bits out of range, or codes without a dimension.

    Example:
        >>> import torch
        >>> from altgrad.quantization import pack, unpack
        >>> packed = pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4)
        >>> packed, unpack(packed, 4, 3)
        (tensor([33, 15], dtype=torch.uint8), tensor([ 1,  2, 15], dtype=torch.uint8))
    """
    check_tensor("codes", codes)
    return _OPERATORS["pack"](codes, bits)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The codes that :func:`pack` packed: n of bits each along the last dimension.

    Raises:
        TypeError: packed that is not uint8.
        ValueError: bits out of range, or another number of bytes than n codes take.

    Example:
        >>> import torch
        >>> from altgrad.quantization import unpack
        >>> unpack(torch.tensor([33, 15], dtype=torch.uint8), 4, 3)
        tensor([ 1,  2, 15], dtype=torch.uint8)
    """
    check_tensor("packed", packed)
    return _OPERATORS["unpack"](packed, bits, n)


class QuantizeFunc(torch.autograd.Function):
    """:func:`quantize` as a Function: ``QuantizeFunc.apply(x, format, scale)``.

    For code that composes Functions, with their forward-mode and batching rules. In code for
    ``torch.compile(fullgraph=True)`` call :func:`quantize`: Dynamo refuses a Function with a forward-mode rule where x
    requires a gradient, and one whose defaults are left out where it does not.

    Example:
        >>> import torch
        >>> from altgrad.quantization import QuantizeFunc, E5M2
        >>> QuantizeFunc.apply(torch.tensor([1.1]), E5M2, torch.tensor(1.0))
        tensor([1.])
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        format: FP8Format | str,
        scale: Tensor,
        saturation: str = "propagate",
        rounding: str = "nearest_ties_to_even",
        random_bits: Tensor | None = None,
    ) -> Tensor:
        return _project("quantize", x, format, scale, saturation, rounding, random_bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *others: None) -> Tensor:
        return x.view_as(x)  # forward AD refuses a tangent that is the input's own


class DequantizeFunc(torch.autograd.Function):
    """:func:`dequantize` as a Function: ``DequantizeFunc.apply(x, scale)``.

    Example:
        >>> import torch
        >>> from altgrad.quantization import DequantizeFunc
        >>> DequantizeFunc.apply(torch.tensor([1.0]), torch.tensor(2.0))
        tensor([2.])
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor) -> Tensor:
        return dequantize(x, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return dequantize(grad, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, scale: None) -> Tensor:
        return dequantize(x, *ctx.saved_tensors)


class _QuantizeGradient(torch.autograd.Function):
    """:func:`quantize_gradient` with a scale that is made of the incoming gradient. torch.compile refuses a jvp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        random_bits: Tensor | None,
        scale_of: Callable[[Tensor], Tensor],
        format: str,
        saturation: str,
        rounding: str,
    ) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, random_bits, ctx.scale_of, *ctx.modes = inputs
        ctx.save_for_backward(random_bits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (random_bits,), (format, saturation, rounding) = ctx.saved_tensors, ctx.modes
        scale = ctx.scale_of(grad.detach())
        rounded = quantize(grad, format, scale, saturation=saturation, rounding=rounding, random_bits=random_bits)
        return rounded, None, None, None, None, None


def _project(
    name: str,
    x: Tensor,
    format: FP8Format | str,
    scale: Tensor | float,
    saturation: str,
    rounding: str,
    random_bits: Tensor | None,
    generator: torch.Generator | None = None,
    granularity: Granularity | None = None,
) -> Tensor:
    """Calls an operator that projects x, or its stochastic twin."""
    if isinstance(granularity, PerBlock):
        return _by_blocks(name, granularity, x, scale, format, saturation, rounding, random_bits, generator)
    if granularity is not None:
        check_granularity(granularity)
    check_tensor("x", x)
    check_modes(saturation, rounding)
    scale, word = _as_tensor(scale, x.dtype, x.device), format_name(format)
    random_bits = _checked_bits(x, scale, word, saturation, rounding, random_bits, generator)
    if random_bits is None:
        return _OPERATORS[name](x, scale, word, saturation, rounding)
    return _OPERATORS[f"{name}_stochastic"](x, scale, random_bits, word, saturation)


def _checked_bits(
    x: Tensor,
    scale: Tensor,
    format: str,
    saturation: str,
    rounding: str,
    random_bits: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor | None:
    """:func:`drawn_bits`, but that a call which is refused draws nothing."""
    if rounding == "stochastic" and random_bits is None:
        check_quantize(x, scale, format, saturation)
    return drawn_bits(x, rounding, random_bits, generator)


def _by_blocks(
    name: str,
    granularity: PerBlock,
    x: Tensor,
    scale: Tensor | float,
    format: FP8Format | str,
    saturation: str,
    rounding: str,
    random_bits: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    """:func:`_project` with one element of scale a block."""
    check_tensor("x", x)
    compact = _compact("x", x, scale, granularity)
    if rounding == "stochastic" or random_bits is not None or generator is not None:  # bits are those of x's elements
        scale = granularity.apply(lambda blocks, dims, scale: scale, x, compact)
        return _project(name, x, format, scale, saturation, rounding, random_bits, generator)
    return granularity.apply(
        lambda blocks, dims, scale: _project(name, blocks, format, scale, saturation, rounding, None), x, compact
    )


def _compact(name: str, x: Tensor, scale: Tensor | float, granularity: PerBlock) -> Tensor:
    wanted = tuple(blocks_of(x, granularity.block(x)))
    if not isinstance(scale, Tensor) or tuple(scale.shape) != wanted:
        got = tuple(scale.shape) if isinstance(scale, Tensor) else scale
        raise ValueError(f"scale must have one element for each {granularity} of {name}: the shape {wanted}, got {got}")
    return scale


def drawn_bits(
    x: Tensor, rounding: str, random_bits: Tensor | None, generator: torch.Generator | None
) -> Tensor | None:
    """The random operand of stochastic rounding, drawn where it is not given; None for the other roundings."""
    if rounding != "stochastic":
        if random_bits is not None or generator is not None:
            raise ValueError(f"random_bits and generator need rounding='stochastic', got rounding={rounding!r}")
        return None
    if random_bits is None:
        if generator is None:  # Inductor fuses this draw, but not the overload with a generator
            random_bits = torch.randint(_SEEDS, (), dtype=SEED, device=x.device)
        else:
            random_bits = torch.randint(_SEEDS, (), dtype=SEED, device=x.device, generator=generator)
        random_bits = shared_seed(x, random_bits)
    check_tensor("random_bits", random_bits)
    if random_bits.dtype == SEED and random_bits.ndim == 0 and hasattr(x, "placements"):
        return random_bits_like(x, random_bits)
    return random_bits


def _as_tensor(scale: Tensor | float, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """scale as a tensor; a number is checked here, because an operator never reads the values of a tensor."""
    if isinstance(scale, Tensor):
        return scale
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):  # also numpy's
        raise TypeError(f"scale must be a tensor or a number, got {scale!r}")
    dtype = compute_dtype(dtype or torch.float32)
    limits = torch.finfo(dtype)
    if not limits.smallest_normal <= scale <= limits.max:
        raise ValueError(
            f"scale must be positive and finite in {dtype}, from {limits.smallest_normal:.8g} to {limits.max:.8g}, "
            f"got {scale!r}"
        )
    if not torch.compiler.is_compiling():
        return torch.full((), float(scale), dtype=dtype, device="cpu")  # there it costs a GPU no launch
    if torch.compiler.is_exporting():
        return torch.full((), scale, dtype=dtype, device=device)
    # A constant of the kernel on x's device. torch.full would compile the function again for every number.
    return torch.ones((), dtype=dtype, device=device) * scale
