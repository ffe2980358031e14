"""What a format does to a tensor: the signal-to-noise ratio, shares of its values, and updates that get lost."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ops_registry.arithmetic import divide
from ops_registry.checks import FLOAT_DTYPES, broadcasts_to, check_floating, check_number, check_tensor
from ops_registry.sharding import largest_over_parts, whole

from .formats import FP8Format, resolve
from .granularity import PerTensor
from .magnitudes import amax
from .ops import encode, quantize


class QuantizationStats(NamedTuple):
    """Shares of the elements of x, as 0-d float64 tensors (what is measured is in :func:`quantization_stats`)."""

    clipped: Tensor
    flushed: Tensor
    subnormal: Tensor
    exact: Tensor
    sqnr: Tensor
    used_bits: Tensor


def sqnr(x: Tensor, y: Tensor) -> Tensor:
    """The signal-to-quantization-noise ratio in dB, ``10 log10(sum x^2 / sum (x - y)^2)``, in float64.

    Infinity where y equals x, NaN where x is zero as well, or empty.

    Args:
        x: the signal, floating point.
        y: what quantization made of it, x's shape.

    Returns:
        A 0-d float64 tensor.

    Raises:
        TypeError: x or y is not float16, bfloat16, float32 or float64.
        ValueError: shapes differ.

    Example:
        >>> import torch
        >>> from altgrad.quantization import sqnr
        >>> sqnr(torch.tensor([10.0, 0.0]), torch.tensor([10.0, 1.0]))
        tensor(20., dtype=torch.float64)
    """
    for name, tensor in (("x", x), ("y", y)):
        check_tensor(name, tensor)
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if x.shape != y.shape:
        raise ValueError(f"x and y must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    is_double = torch.float64 in (x.dtype, y.dtype)
    x, y = x.detach().double(), y.detach().double()
    noise = x - y
    if not is_double:
        return 10 * (whole(x.square().sum()) / whole(noise.square().sum())).log10()
    of_x, exponent_of_x = _squares(x)
    of_noise, exponent_of_noise = _squares(noise)
    return 10 * ((of_x / of_noise).log10() + 2 * math.log10(2) * (exponent_of_x - exponent_of_noise))


def _squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of x^2 as a number times 4^exponent: squares of float64 have not its range."""
    largest = whole(PerTensor().apply(amax, x)).reshape(())
    exponent = torch.where(largest < math.inf, largest, 1).frexp().exponent.clamp(-1000, 1000).double()
    return whole((x * torch.exp2(-exponent)).square().sum()), exponent


def quantization_stats(x: Tensor, format: FP8Format | str, scale: Tensor | float = 1.0) -> QuantizationStats:
    """What :func:`quantize` does to x, without reading anything back from the device.

    Args:
        x, format, scale: as in :func:`quantize`.

    Returns:
        0-d float64 tensors: the shares of all elements that are

        - ``clipped``: x / scale, or its magnitude where the format has a sign, rounds to more than the largest value;
        - ``flushed``: x is not zero and becomes zero;
        - ``subnormal``: the result is a subnormal of the format, not zero;
        - ``exact``: the result equals x;

        then ``sqnr(x, quantize(x))``, and ``used_bits``, log2 of the number of different codes in use, of format.bits.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`encode`, which takes no formats above 16 bits.

    Example:
        >>> import torch
        >>> from altgrad.quantization import E4M3, quantization_stats
        >>> stats = quantization_stats(torch.tensor([1.0, 1e-9, 500.0, 2**-9]), E4M3)
        >>> [share.item() for share in stats[:4]]
        [0.25, 0.25, 0.25, 0.5]
    """
    check_tensor("x", x)
    f, x = resolve(format), x.detach()
    y, codes = quantize(x, f, scale), encode(x, f, scale)
    if not isinstance(scale, Tensor):
        scale = x.new_full((), scale, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    q = divide(x, scale)
    q = q.abs() if f.is_signed else q
    limit = (f.max_representable_value + f.overflow_value) / 2  # a tie goes to the even code
    magnitude = codes.int() & (f.sign_code - 1)  # torch compares no uint16

    def used(codes: Tensor) -> Tensor:
        is_used = torch.zeros(2**f.bits, dtype=torch.float32, device=codes.device)
        return is_used.index_fill(0, codes.flatten().long(), 1.0)

    def share(condition: Tensor) -> Tensor:
        return whole(condition.sum(dtype=torch.float64)) / condition.numel()

    return QuantizationStats(
        clipped=share((q >= limit) if f.max_code % 2 else (q > limit)),
        flushed=share((y == 0) & (x != 0)),
        subnormal=share((magnitude > 0) & (magnitude < 1 << f.mantissa_bits) & ~y.isnan()),
        exact=share(y == x),
        sqnr=sqnr(x, y),
        used_bits=largest_over_parts(used, codes).sum().double().log2(),
    )


def bit_stall(w: Tensor, g: Tensor, lr: Tensor | float, format: FP8Format | str, scale: Tensor | float = 1.0) -> Tensor:
    """The share of weights that the update ``w - lr * g`` leaves on the same code although g is not zero.

    Args:
        w: the weights, floating point.
        g: their gradient, w's shape.
        lr: the learning rate, a number or a tensor that broadcasts to w.
        format, scale: as in :func:`quantize`.

    Returns:
        A 0-d float64 tensor, from 0 to 1; NaN of no weights.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`quantize`.

    Example:
        >>> import torch
        >>> from altgrad.quantization import E3M4, bit_stall
        >>> w, g = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([0.0, 0.01, -0.01, 10.0])
        >>> bit_stall(w, g, 0.1, E3M4)
        tensor(0.5000, dtype=torch.float64)
    """
    for name, tensor in (("w", w), ("g", g)):
        check_tensor(name, tensor)
        check_floating(name, tensor)
    if w.shape != g.shape:
        raise ValueError(f"w and g must have one shape, got {tuple(w.shape)} and {tuple(g.shape)}")
    if not isinstance(lr, Tensor):
        check_number("lr", lr)
    elif not broadcasts_to(lr, w):
        raise ValueError(f"lr must broadcast to w {tuple(w.shape)}, got {tuple(lr.shape)}")
    w, g = w.detach(), g.detach()
    is_same = encode(w - lr * g, format, scale) == encode(w, format, scale)
    return whole((is_same & (g != 0)).sum(dtype=torch.float64)) / w.numel()
