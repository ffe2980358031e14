"""Quantization by scales that are made of the blocks themselves, composed of the other operators.

quantize_blocks multiplies values by their scales; quantize_operand leaves out that of the tensor, for a product to be
multiplied by, and has no gradient: it is for the inside of a Function. quantize_operands does it in two directions, for
two products. encode_blocks gives packed codes and scales.

Kernels that read x once give the same bits: csrc/blocks.h and cuda_blocks.py. What they do not serve, this does.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .arithmetic import compute_dtype
from .checks import check_encode_blocks, check_quantize_operand, check_quantize_operands, in_two_calls
from .formats import FP8Format, resolve
from .hadamard import transformed
from .modes import SEED
from .operators import blocks_of
from .philox import random_bits as bits_of
from .scales import as_power_of_two, as_scale, block_level


def quantize_operand(
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
    with_tensor_scale: bool = False,
) -> Tensor:
    dtype = dtype or x.dtype
    options = block, power_of_two, scale_format, headroom, dtype
    f = check_quantize_operand(x, tensor_scale, format, saturation, rounding, *options, hadamard, random_bits)
    x = transformed(x) if hadamard else x
    if halves := _apart(x, block, random_bits):
        dim, parts = halves
        part: Any = partial(quantize_operand, with_tensor_scale=with_tensor_scale)
        arguments: tuple[Any, ...] = tensor_scale, format, saturation, rounding, *options
        return torch.cat([part(x, *arguments, random_bits=bits) for x, bits in parts], dim)
    view, dims = blocked(x.detach(), block)
    if random_bits is not None and random_bits.dtype != SEED:
        random_bits, _ = blocked(random_bits, block)
    largest = _largest(view, dims, headroom)
    divisor, multiplier = scales(largest, tensor_scale, f, power_of_two, scale_format, with_tensor_scale)
    modes = (saturation, rounding) if random_bits is None else (saturation,)
    tensors = (view, divisor) if random_bits is None else (view, divisor, random_bits)
    twin = "" if random_bits is None else "_stochastic"
    if multiplier is divisor and dtype == x.dtype:
        values = getattr(torch.ops.altgrad, f"quantize{twin}")(*tensors, format, *modes)
    else:
        project = getattr(torch.ops.altgrad, f"project{twin}")
        values = (project(*tensors, format, *modes, compute_dtype(x.dtype)) * multiplier).to(dtype)
    return unblocked(values, x, block)


def quantize_blocks(*args: Any, **random_bits: Any) -> Tensor:
    return quantize_operand(*args, **random_bits | {"with_tensor_scale": True})


def quantize_operands(*args: Any) -> tuple[Tensor, Tensor]:
    """x as an operand, and x transposed as another one, behind the Hadamard transform where it is asked for."""
    check_quantize_operands(*args)
    first, second = (torch.ops.altgrad.quantize_operand(*call) for call in in_two_calls(*args))
    return first, second


def encode_blocks(
    x: Tensor,
    tensor_scale: Tensor | None,
    format: str,
    saturation: str,
    rounding: str,
    block: list[int],
    power_of_two: str | None = None,
    scale_format: str | None = None,
    headroom: float = 1.0,
    random_bits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Packed codes, and a scale for each block: a code of E8M0 or of scale_format, or itself."""
    options = block, power_of_two, scale_format, headroom
    f = check_encode_blocks(x, tensor_scale, format, saturation, rounding, *options, random_bits=random_bits)
    codes, multiplier = _encoded(x.detach(), tensor_scale, f, saturation, rounding, *options, random_bits)
    of_scales = "E8M0" if power_of_two is not None else scale_format
    if of_scales is not None:
        one = torch.ones((), dtype=multiplier.dtype, device=multiplier.device)
        multiplier = torch.ops.altgrad.encode(multiplier, one, of_scales)
    codes, multiplier = (t.clone(memory_format=torch.contiguous_format) for t in (codes, multiplier))  # no views
    return (codes if f.bits == 8 else torch.ops.altgrad.pack(codes, f.bits)), multiplier


def _encoded(
    x: Tensor,
    tensor_scale: Tensor | None,
    f: FP8Format,
    saturation: str,
    rounding: str,
    block: list[int],
    power_of_two: str | None,
    scale_format: str | None,
    headroom: float,
    random_bits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A code for each element, and what values are multiplied by for each block, but for tensor_scale."""
    options = block, power_of_two, scale_format, headroom
    if halves := _apart(x, block, random_bits):
        dim, parts = halves
        encoded = [_encoded(x, tensor_scale, f, saturation, rounding, *options, bits) for x, bits in parts]
        return torch.cat([codes for codes, _ in encoded], dim), torch.cat([scale for _, scale in encoded], dim)
    view, dims = blocked(x, block)
    if random_bits is not None and random_bits.dtype != SEED:
        random_bits, _ = blocked(random_bits, block)
    divisor, multiplier = scales(_largest(view, dims, headroom), tensor_scale, f, power_of_two, scale_format, False)
    if random_bits is None:
        codes = torch.ops.altgrad.encode(view, divisor, f.name, saturation, rounding)
    else:
        codes = torch.ops.altgrad.encode_stochastic(view, divisor, random_bits, f.name, saturation)
    numbers = blocks_of(x, block)
    is_empty = any(type(n) is int and n == 0 for n in numbers)  # then there is a group of nothing
    return unblocked(codes, x, block), multiplier.new_empty(numbers) if is_empty else multiplier.reshape(numbers)


def _apart(
    x: Tensor, block: list[int], random_bits: Tensor | None
) -> tuple[int, list[tuple[Tensor, Tensor | None]]] | None:
    """A dimension whose last block is smaller, and x before and from it on with their random bits; None: all are whole.

    Of whole blocks and zeros that fill up the last, Inductor's C++ makes wrong bits.
    """
    for dim, size in enumerate(x.shape):
        if missing := _missing(size, block[dim]):
            if random_bits is not None and random_bits.dtype == SEED:
                random_bits = bits_of(random_bits, x.shape)
            ends = size - block[dim] + missing, block[dim] - missing
            bits = [None, None] if random_bits is None else random_bits.split(ends, dim)
            return dim, list(zip(x.split(ends, dim), bits, strict=True))
    return None


def _largest(view: Tensor, dims: list[int], headroom: float) -> Tensor:
    largest = torch.ops.altgrad.amax(view, dims)
    return largest if headroom == 1 else largest * headroom


def scales(
    largest: Tensor,
    tensor_scale: Tensor | None,
    format: FP8Format,
    power_of_two: str | None,
    scale_format: str | None,
    with_tensor_scale: bool,
) -> tuple[Tensor, Tensor]:
    """What the elements of groups with these largest magnitudes are divided by, and what values are multiplied by."""
    if tensor_scale is not None:
        level = block_level(largest, format, resolve(scale_format), tensor_scale)
        divisor = level * tensor_scale
        return divisor, divisor if with_tensor_scale else level
    if power_of_two is not None:
        divisor = as_power_of_two(largest, format, power_of_two)
    else:
        divisor = as_scale(largest, format.max_representable_value)
    return divisor, divisor


def blocked(x: Tensor, block: list[int]) -> tuple[Tensor, list[int]]:
    """A view of x in which each dimension of several blocks is two, and the dimensions that are within blocks.

    Zeros fill the last blocks up: they change no largest magnitude.
    """
    padding = [side for size, b in zip(reversed(x.shape), reversed(block)) for side in (0, _missing(size, b))]
    x = pad(x, padding) if any(padding) else x
    dims: list[int] = []
    for dim in reversed(range(x.ndim)):
        if _is_whole(x.shape[dim], block[dim]):
            dims = [dim, *dims]
        elif block[dim] != 1:
            x = x.unflatten(dim, (-1, block[dim]))
            dims = [dim + 1, *[d + 1 for d in dims]]
    return (x, dims) if dims else (x.unsqueeze(-1), [x.ndim])  # to reductions no dimensions mean all


def unblocked(values: Tensor, x: Tensor, block: list[int]) -> Tensor:
    """Values of a view by :func:`blocked` in the shape of x."""
    sizes = [size + _missing(size, b) for size, b in zip(x.shape, block)]
    values = values.reshape(sizes)
    for dim, size in enumerate(x.shape):
        values = values if sizes[dim] is size else values.narrow(dim, 0, size)
    return values


def _is_whole(size: int, block: int) -> bool:
    return block == -1 or (block != 1 and size <= block)


def _missing(size: int, block: int) -> int:
    return 0 if block == 1 or _is_whole(size, block) else -size % block
