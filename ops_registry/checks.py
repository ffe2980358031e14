"""What an operator accepts. Kernels and fakes call the same check, so eager, fake and compiled calls fail alike."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .accumulators import Accumulator, resolve_accumulator
from .arithmetic import code_dtype, compute_dtype
from .formats import FP8Format, resolve
from .hadamard import SIZE
from .modes import POWER_OF_TWO_RULES, RANDOM_BITS, ROUNDINGS, SATURATIONS, SEED

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, x: Any) -> None:
    """What a function of altgrad asks of an argument before it reads a dtype or a device off it."""
    if not isinstance(x, (Tensor, torch.fx.Proxy)):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__} {x!r:.80}")


def check_number(name: str, number: Any) -> None:
    """Whole or not, Python's or numpy's, but no bool."""
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"{name} must be a number, got {number!r}")


def check_quantize(
    x: Tensor,
    scale: Tensor,
    format: str,
    saturation: str = SATURATIONS[0],
    rounding: str = ROUNDINGS[0],
    random_bits: Tensor | None = None,
) -> FP8Format:
    """Checks the arguments of a projection, deterministic or stochastic; returns the format."""
    check_dequantize(x, scale)
    _check_modes(x, saturation, rounding, random_bits)
    return resolve(format)


def check_modes(saturation: Any, rounding: Any) -> None:
    """Checks that they are names, of what there is."""
    for name, mode, known in (("saturation", saturation, SATURATIONS), ("rounding", rounding, ROUNDINGS)):
        if not isinstance(mode, str):
            raise TypeError(f"{name} must be a name, got {mode!r}")
        if mode not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {mode!r}")


def _check_modes(x: Tensor, saturation: str, rounding: str, random_bits: Tensor | None) -> None:
    check_modes(saturation, rounding)
    if random_bits is not None:
        _check_random_bits(random_bits, x)
    elif rounding == "stochastic":
        raise ValueError(
            "rounding 'stochastic' needs random_bits: it is an operator of its own, with them as an operand"
        )


def check_encode(x: Tensor, scale: Tensor, format: str, *args: Any, **random_bits: Any) -> FP8Format:
    """Checks the arguments of encode; returns the format."""
    f = check_quantize(x, scale, format, *args, **random_bits)
    _check_has_codes(f)
    return f


def _check_has_codes(format: FP8Format) -> None:
    if format.code_bytes is None:
        raise ValueError(
            f"codes have at most 16 bits, and {format.name} has {format.bits}: "
            "quantize simulates it, encode and decode do not take it"
        )


def check_project(
    x: Tensor,
    scale: Tensor,
    format: str,
    saturation: str = SATURATIONS[0],
    rounding: str = ROUNDINGS[0],
    dtype: torch.dtype | None = None,
    random_bits: Tensor | None = None,
) -> FP8Format:
    """Checks the arguments of project; returns the format."""
    f = check_quantize(x, scale, format, saturation, rounding, random_bits)
    _check_result(dtype, x)
    return f


def _check_result(dtype: torch.dtype | None, x: Tensor) -> None:
    if dtype is not None and (dtype not in FLOAT_DTYPES or (dtype == torch.float64) != (x.dtype == torch.float64)):
        raise TypeError(f"dtype must be float64 for float64 x, else float16, bfloat16 or float32, got {dtype}")


def check_quantize_operand(
    x: Tensor,
    tensor_scale: Tensor | None,
    format: str,
    saturation: str,
    rounding: str,
    block: list[int],
    power_of_two: str | None = None,
    scale_format: str | None = None,
    headroom: float = 1.0,
    dtype: torch.dtype | None = None,
    hadamard: bool = False,
    random_bits: Tensor | None = None,
) -> FP8Format:
    """Checks the arguments of quantize_operand, and of quantize_blocks; returns the format."""
    check_floating("x", x)
    _check_groups(x, hadamard)
    _check_modes(x, saturation, rounding, random_bits)
    _check_result(dtype, x)
    if len(block) != x.ndim or not all(size > 0 or size == -1 for size in block):
        raise ValueError(
            f"block must have a positive size, or -1 for all, for each of the {x.ndim} dimensions of x, got {block}"
        )
    if power_of_two is not None and power_of_two not in POWER_OF_TWO_RULES:
        raise ValueError(f"power_of_two must be one of {', '.join(POWER_OF_TWO_RULES)} or None, got {power_of_two!r}")
    if power_of_two is not None and scale_format is not None:
        raise ValueError("power_of_two and scale_format both round the scale: give one of them")
    if not 0 < headroom < math.inf:
        raise ValueError(f"headroom must be positive and finite, got {headroom!r}")
    if (tensor_scale is None) != (scale_format is None):
        raise ValueError("tensor_scale is for scales of a scale_format: give both of them or neither")
    if tensor_scale is not None:
        resolve(scale_format)
        _check_scale(tensor_scale, "x", x)
        if tensor_scale.ndim or tensor_scale.dtype != compute_dtype(x.dtype):
            raise ValueError(
                f"tensor_scale must be a 0-d tensor of {compute_dtype(x.dtype)}, "
                f"got {tensor_scale.ndim} dimensions of {tensor_scale.dtype}"
            )
    return resolve(format)


def in_two_calls(
    x: Tensor,
    tensor_scale: Tensor | None,
    turned_scale: Tensor | None,
    *options: Any,
) -> list[tuple[Any, ...]]:
    """The arguments of the two calls of quantize_operand that quantize_operands stands for.

    The last of the options, whether it transforms, is that of x transposed alone.
    """
    return [(x, tensor_scale, *options[:8]), (x.transpose(-2, -1), turned_scale, *options)]


def check_quantize_operands(x: Tensor, *args: Any) -> FP8Format:
    """Checks the arguments of quantize_operands; returns the format."""
    if x.ndim < 2:
        raise ValueError(f"x must have at least 2 dimensions to be transposed, got {x.ndim}")
    format, _ = (check_quantize_operand(*call) for call in in_two_calls(x, *args))
    return format


def check_encode_blocks(x: Tensor, *args: Any, **random_bits: Any) -> FP8Format:
    """Checks the arguments of encode_blocks; returns the format."""
    f = check_quantize_operand(x, *args, **random_bits)
    if f.bits > 8:
        raise ValueError(f"format must have codes of at most 8 bits to be packed, got {f.name} of {f.bits}")
    if x.ndim == 0:
        raise ValueError("x must have a dimension, along which codes are packed, got a 0-d tensor")
    return f


def _check_random_bits(random_bits: Tensor, x: Tensor) -> None:
    if random_bits.dtype not in RANDOM_BITS:
        raise TypeError(f"random_bits must have a dtype of {_names(RANDOM_BITS)}, got {random_bits.dtype}")
    _check_strided("random_bits", random_bits)
    if random_bits.device != x.device:
        raise RuntimeError(f"random_bits must be on the device of x, {x.device}, got {random_bits.device}")
    if random_bits.dtype == SEED:
        if random_bits.ndim:
            raise ValueError(f"random_bits of int64 are a seed, a 0-d tensor, got shape {tuple(random_bits.shape)}")
    elif random_bits.shape != x.shape:
        raise ValueError(f"random_bits must have the shape of x, {tuple(x.shape)}, got {tuple(random_bits.shape)}")


def check_decode(codes: Tensor, scale: Tensor, format: str, dtype: torch.dtype | None = None) -> FP8Format:
    """Checks the arguments of decode; returns the format."""
    f = resolve(format)
    _check_has_codes(f)
    if codes.dtype != code_dtype(f):
        raise TypeError(f"codes must have dtype {code_dtype(f)}, got {codes.dtype}")
    _check_strided("codes", codes)
    _check_scale(scale, "codes", codes)
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be one of {_names(FLOAT_DTYPES)} or None, got {dtype}")
    return f


def check_dequantize(x: Tensor, scale: Tensor) -> None:
    """Checks the arguments of dequantize."""
    check_floating("x", x)
    _check_scale(scale, "x", x)


def check_amax(x: Tensor, dims: list[int], hadamard: bool = False) -> None:
    """Checks the arguments of amax."""
    check_floating("x", x)
    _check_groups(x, hadamard)
    if not dims or sorted(set(dims)) != sorted(dims) or not 0 <= min(dims) <= max(dims) < x.ndim:
        raise ValueError(f"dims must be different dimensions of x, from 0 to {x.ndim - 1}, got {list(dims)}")


def _check_groups(x: Tensor, hadamard: bool) -> None:
    if hadamard and (x.ndim == 0 or x.shape[-1] % SIZE):
        raise ValueError(f"x must have a multiple of {SIZE} as its last size to be transformed, got {tuple(x.shape)}")


def check_as_scale(amax: Tensor, max_value: float) -> None:
    """Checks the arguments of as_scale."""
    if amax.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"amax must have a dtype of float32, float64, got {amax.dtype}")
    _check_strided("amax", amax)
    if not 0 < max_value <= torch.finfo(amax.dtype).max:
        raise ValueError(f"max_value must be positive and finite in {amax.dtype}, got {max_value!r}")


def check_pack(codes: Tensor, bits: int) -> None:
    """Checks the arguments of pack."""
    _check_codes("codes", codes, bits)


def check_unpack(packed: Tensor, bits: int, n: int) -> None:
    """Checks the arguments of unpack."""
    _check_codes("packed", packed, bits)
    if n < 0 or packed.shape[-1] != (n * bits + 7) // 8:
        raise ValueError(
            f"packed must have {(n * bits + 7) // 8} bytes in its last dimension for n = {n} codes of {bits} bits, "
            f"got {packed.shape[-1]}"
        )


def check_matmul(
    a: Tensor, b: Tensor, accumulator: str, a_scale: Tensor | None = None, b_scale: Tensor | None = None
) -> Accumulator:
    """Checks the arguments of matmul, but for the values of its tensors; returns the accumulator."""
    rule = resolve_accumulator(accumulator)
    for name, x in (("a", a), ("b", b)):
        if x.dtype not in FLOAT_DTYPES or x.dtype == torch.float64:
            raise TypeError(f"{name} must have a dtype of {_names(FLOAT_DTYPES[:3])}, got {x.dtype}")
        _check_strided(name, x)
    if b.device != a.device:
        raise RuntimeError(f"b must be on the device of a, {a.device}, got {b.device}")
    if a.ndim < 2 or a.ndim != b.ndim or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            "a and b must have the shapes [.., M, K] and [.., K, N], with the same dimensions in front, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    for name, scale, x in (("a_scale", a_scale, a.mT), ("b_scale", b_scale, b)):
        _check_block_scale(name, scale, x, rule)
    return rule


def _check_block_scale(name: str, scale: Tensor | None, x: Tensor, rule: Accumulator) -> None:
    """x is [.., K, n], and what scale has to be is [.., blocks, n]; that of a comes transposed, and is told so."""
    if (scale is None) != (rule.scaled is None):
        needs = "takes no scales" if rule.scaled is None else f"needs a scale for each {rule.scaled} products"
        raise ValueError(f"accumulator {rule.name!r} {needs}, got {name}={None if scale is None else 'a tensor'}")
    if scale is None or rule.scaled is None:
        return
    check_floating(name, scale)
    if scale.device != x.device:
        raise RuntimeError(f"{name} must be on the device of a, {x.device}, got {scale.device}")
    wanted = [*x.shape[:-2], -(-x.shape[-2] // rule.scaled), x.shape[-1]]
    if name == "a_scale":
        wanted[-2:] = wanted[:-3:-1]
    if list(scale.shape) != wanted:
        raise ValueError(f"{name} must have the shape {tuple(wanted)}, got {tuple(scale.shape)}")


def _check_codes(name: str, tensor: Tensor, bits: int) -> None:
    if tensor.dtype != torch.uint8:
        raise TypeError(f"{name} must have dtype torch.uint8, got {tensor.dtype}")
    _check_strided(name, tensor)
    if tensor.ndim == 0:
        raise ValueError(f"{name} must have a dimension, along which codes are packed, got a 0-d tensor")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be from 1 to 8, got {bits}")


def check_floating(name: str, x: Tensor) -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must have a dtype of {_names(FLOAT_DTYPES)}, got {x.dtype}")
    _check_strided(name, x)


def _check_scale(scale: Tensor, name: str, x: Tensor) -> None:
    check_floating("scale", scale)
    if scale.device != x.device and (scale.ndim > 0 or scale.device.type != "cpu"):
        raise RuntimeError(
            f"scale must be on the device of {name}, {x.device}, or a 0-d CPU tensor; "
            f"got a {scale.ndim}-d tensor on {scale.device}"
        )
    if scale.ndim and not broadcasts_to(scale, x):
        raise ValueError(
            f"scale must broadcast to {name} without enlarging it: "
            f"got scale of shape {tuple(scale.shape)} for {name} of shape {tuple(x.shape)}"
        )


def broadcasts_to(t: Tensor, x: Tensor) -> bool:
    """Whether t broadcasts to x without enlarging it."""
    # Reading the sizes from the right; `is_one` first, because comparing an unbacked size with 1 is an error.
    return t.ndim <= x.ndim and all(
        _is_one(ours) or ours == theirs for ours, theirs in zip(t.shape[::-1], x.shape[::-1], strict=False)
    )


def _is_one(size: int) -> bool:
    return type(size) is int and size == 1


def _check_strided(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {tensor.layout}")


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
