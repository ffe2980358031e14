"""The CPU kernels: plain C, in a library that is built where a compiler is at hand; without it the aten kernels serve.

The library knows neither torch nor Python. It gets addresses, sizes and strides, and torch's own thread pool through
the C function ``torch_parallel_for``, so it uses as many threads as any torch operator. ctypes releases the GIL.
"""

import ctypes
import os
import struct
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from . import aten, blocks, products
from .arithmetic import code_dtype, compute_dtype
from .checks import (
    FLOAT_DTYPES,
    check_amax,
    check_decode,
    check_dequantize,
    check_encode,
    check_encode_blocks,
    check_matmul,
    check_pack,
    check_project,
    check_quantize,
    check_quantize_operand,
    check_unpack,
)
from .formats import FP8Format, resolve
from .hadamard import SIZE, transformed
from .layout import laid_out_as, strides_over
from .modes import RANDOM_BITS, ROUNDINGS, SATURATIONS, SEED
from .native import load, of_torch, warn_without
from .operators import OPERATORS, library, with_twins
from .packing import rows_of
from .tiles import CHUNK, Scaling, Size, Strips, fits_blocks, matrices_of, scaling_of, strips_of

# The numbers of csrc/plan.h
_OPERATIONS = {name: i for i, name in enumerate(("quantize", "encode", "decode", "dequantize", "project"))}
_DTYPES = {dtype: i for i, dtype in enumerate((*FLOAT_DTYPES, torch.uint8, torch.int32, torch.int64, torch.uint16))}
_ROUNDINGS = {rounding: i for i, rounding in enumerate(ROUNDINGS)}
_tensors = struct.Struct("q4Pq").pack  # struct tensors of csrc/plan.h
_transform = struct.Struct("2P2q2i").pack  # struct transform
_GROUPS = CHUNK // SIZE  # of csrc/hadamard.h
_ROWS = 64  # enough for every thread to have some


def _load() -> tuple[Any, str]:
    """The library and the name of what serves."""
    wanted = os.environ.get("ALTGRAD_CPU_TARGET") or None
    native = None if wanted == "aten" else load()
    if native is None:
        if wanted not in (None, "aten"):
            raise ImportError(f"ALTGRAD_CPU_TARGET={wanted}, but the C kernels were not built")
        return None, "aten"
    native.altgrad_select.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    native.altgrad_select.restype = ctypes.c_char_p
    for function, arguments in (
        (native.altgrad_run, [ctypes.c_char_p] * 3),
        (native.altgrad_amax, [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2),
        (native.altgrad_pack, [ctypes.c_int64] * 2 + [ctypes.c_int32] * 2 + [ctypes.c_void_p] * 2),
        (native.altgrad_matmul, [ctypes.c_char_p]),
        (native.altgrad_blocks, [ctypes.c_char_p, ctypes.c_int64]),
        (native.altgrad_transform, [ctypes.c_char_p, ctypes.c_int64]),
        (native.altgrad_random, [ctypes.c_int64, ctypes.c_void_p, ctypes.c_uint64]),
    ):
        function.argtypes, function.restype = arguments, None
    target = select(native, wanted)
    if target is None:
        raise ImportError(f"ALTGRAD_CPU_TARGET={wanted} is neither aten nor an instruction set of this machine")
    return native, target


def select(native: Any, target: str | None) -> str | None:
    """Makes the library run the target, or the best one for None; the name of what runs, None where it cannot."""
    name = native.altgrad_select(target and target.encode(), of_torch("torch_parallel_for"))
    return name and name.decode()


_native, _backend = _load()


def backend() -> str:
    """What serves CPU tensors: ``"avx512"``, ``"avx2"`` or ``"baseline"`` (C for that instruction set), or ``"aten"``.

    The environment variable ALTGRAD_CPU_TARGET, read at import, asks for one of them; ImportError where it cannot be.

    Example:
        >>> from ops_registry.cpu import backend
        >>> backend() in ("avx512", "avx2", "baseline", "aten")
        True
    """
    return _backend


@lru_cache(maxsize=4096)
def _plan(
    operation: str,
    x_dtype: torch.dtype,
    scale_dtype: torch.dtype,
    out_dtype: torch.dtype,
    format: str,
    saturation: str = SATURATIONS[0],
    rounding: str = ROUNDINGS[0],
    random_dtype: torch.dtype = torch.int32,
) -> bytes:
    """``struct plan`` of csrc/plan.h, made once for each combination of arguments."""
    f = resolve(format)
    nan_code = f.max_code if f.nan_code is None else f.nan_code
    overflows = saturation == "none" and f.has_nan
    keeps_infinity = overflows or (saturation == "propagate" and f.has_inf)
    # One step beyond max is enough to see an overflow; rounding a finite value inwards stops at max.
    max_code = f.max_code + (not f.has_zero)
    limit_positive = max_code + (overflows and rounding not in ("toward_zero", "toward_negative"))
    limit_negative = max_code + (overflows and rounding not in ("toward_zero", "toward_positive"))
    is_double = torch.float64 in (x_dtype, out_dtype)
    dtypes = [_DTYPES[dtype] for dtype in (x_dtype, scale_dtype, random_dtype, out_dtype)]
    fields = [_OPERATIONS[operation], is_double, *dtypes, _ROUNDINGS[rounding], RANDOM_BITS[random_dtype]]
    fields += [
        f.mantissa_bits,
        f.min_exponent,
        f.exponent_bits + f.mantissa_bits + (not f.has_zero),
        max_code,
        nan_code,
    ]
    fields += [f.has_inf, f.has_nan, f.has_negative_zero]
    fields += [overflows, limit_positive, limit_negative, max_code + keeps_infinity]
    has_wide_codes = f.code_bytes != 1 and operation in ("encode", "decode")
    is_wide = operation != "dequantize" and (f.needs_float64 or not f.is_signed or has_wide_codes)
    fields += [is_wide, f.is_signed, f.has_zero, f.bits]
    return struct.pack(f"{len(fields)}i", *fields)


@lru_cache(maxsize=4096)
def _layout(shape: Size, scale_shape: Size, out: Size, x: Size, scale: Size, random: Size) -> bytes:
    """The sizes and the strides of out, x, scale (expanded to the shape) and random, as altgrad_run takes them."""
    rows = (*shape, *out, *x, *strides_over(len(shape), scale_shape, scale), *random)
    return struct.pack(f"{len(rows)}q", *rows)


def _run(plan: bytes, out: Tensor, x: Tensor, scale: Tensor, random_bits: Tensor | None = None) -> Tensor:
    n = out.numel()
    if n == 0:
        return out
    random = x if random_bits is None else random_bits
    ndim, layout = 0, None
    # out is laid out as x by empty_like, so where x is contiguous they need no strides.
    if scale.numel() != 1 or not x.is_contiguous() or not random.is_contiguous():
        ndim = x.ndim
        random_strides = out.stride() if random.dtype == SEED else random.stride()
        layout = _layout(x.shape, scale.shape, out.stride(), x.stride(), scale.stride(), random_strides)
    tensors = _tensors(n, out.data_ptr(), x.data_ptr(), scale.data_ptr(), random.data_ptr(), ndim)
    _native.altgrad_run(plan, tensors, layout)
    return out


def transform(x: Tensor) -> Tensor:
    """The Hadamard transform of x, laid out as x is."""
    out = torch.empty_like(x, dtype=compute_dtype(x.dtype))
    m = matrices_of(x.shape, out.stride(), (*[1] * (x.ndim - 1), SIZE), False)
    if m is None or x.dtype == torch.float64:
        return transformed(x)
    is_down, groups = m.width == 1, x.numel() // SIZE
    across = -(-m.columns // _GROUPS)
    strips = groups // m.columns * across if is_down else -(-groups // _GROUPS)
    x = laid_out_as(out, x)
    fields = x.data_ptr(), out.data_ptr(), groups, m.columns, _DTYPES[x.dtype], is_down
    _native.altgrad_transform(_transform(*fields), strips)
    return out


def amax(x: Tensor, dims: list[int], hadamard: bool = False) -> Tensor:
    """Rows that lie side by side by a loop over their bits, everything else as aten does."""
    check_amax(x, dims, hadamard)
    x = transform(x) if hadamard else x
    first = x.ndim  # of the last dimensions that are all among dims
    while first - 1 in dims:
        first -= 1
    while first < x.ndim - 1 and x.shape[:first].numel() < _ROWS:
        first += 1  # rows for threads; they are reduced below
    if first in (0, x.ndim) or not x.is_contiguous() or x.numel() == 0:
        return aten.amax(x, dims)
    largest = x.new_empty([*x.shape[:first], *[1] * (x.ndim - first)])
    size = x.shape[first:].numel()
    _native.altgrad_amax(x.element_size(), largest.numel(), size, largest.data_ptr(), x.data_ptr())
    others = [dim for dim in dims if dim < first]
    return (largest.amax(others, keepdim=True) if others else largest).to(compute_dtype(x.dtype))


def pack(codes: Tensor, bits: int) -> Tensor:
    check_pack(codes, bits)
    return _pack(OPERATORS["pack"].output(codes, bits), codes, codes.shape[-1], bits, unpacks=False)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    check_unpack(packed, bits, n)
    return _pack(OPERATORS["unpack"].output(packed, bits, n), packed, n, bits, unpacks=True)


def _pack(out: Tensor, x: Tensor, n: int, bits: int, unpacks: bool) -> Tensor:
    if out.numel() == 0:
        return out
    rows, n = rows_of(out.shape, n, bits)
    x = x.contiguous()
    _native.altgrad_pack(rows, n, bits, unpacks, out.data_ptr(), x.data_ptr())
    return out


def quantize(
    x: Tensor,
    scale: Tensor,
    format: str,
    saturation: str = SATURATIONS[0],
    rounding: str = ROUNDINGS[0],
    random_bits: Tensor | None = None,
) -> Tensor:
    check_quantize(x, scale, format, saturation, rounding, random_bits)
    out = torch.empty_like(x)
    return _project("quantize", out, x, scale, format, saturation, rounding, random_bits=random_bits)


def project(
    x: Tensor,
    scale: Tensor,
    format: str,
    saturation: str = SATURATIONS[0],
    rounding: str = ROUNDINGS[0],
    dtype: torch.dtype | None = None,
    random_bits: Tensor | None = None,
) -> Tensor:
    check_project(x, scale, format, saturation, rounding, dtype, random_bits)
    out = torch.empty_like(x, dtype=dtype)
    return _project("project", out, x, scale, format, saturation, rounding, random_bits=random_bits)


def encode(
    x: Tensor,
    scale: Tensor,
    format: str,
    saturation: str = SATURATIONS[0],
    rounding: str = ROUNDINGS[0],
    random_bits: Tensor | None = None,
) -> Tensor:
    f = check_encode(x, scale, format, saturation, rounding, random_bits=random_bits)
    out = torch.empty_like(x, dtype=code_dtype(f))
    return _project("encode", out, x, scale, format, saturation, rounding, random_bits=random_bits)


def random_words(seed: Tensor, shape: Size) -> Tensor:
    """The random words of a seed, as int32."""
    words = torch.empty(shape, dtype=torch.int32)
    _native.altgrad_random(words.numel(), words.data_ptr(), seed.item() % 2**64)
    return words


def _project(operation: str, out: Tensor, x: Tensor, scale: Tensor, *modes: str, random_bits: Tensor | None) -> Tensor:
    if random_bits is not None and random_bits.dtype == SEED and not out.is_contiguous():
        random_bits = random_words(random_bits, x.shape)  # the loops count in the order of memory
    random_dtype = torch.int32 if random_bits is None else random_bits.dtype
    return _run(_plan(operation, x.dtype, scale.dtype, out.dtype, *modes, random_dtype), out, x, scale, random_bits)


def decode(codes: Tensor, scale: Tensor, format: str, dtype: torch.dtype | None = None) -> Tensor:
    check_decode(codes, scale, format, dtype)
    dtype = dtype or torch.float32
    plan = _plan("decode", codes.dtype, scale.dtype, dtype, format)
    return _run(plan, torch.empty_like(codes, dtype=dtype), codes, scale)


def dequantize(x: Tensor, scale: Tensor) -> Tensor:
    check_dequantize(x, scale)
    plan = _plan("dequantize", x.dtype, scale.dtype, x.dtype, "E5M2")  # any format: it is not looked at
    return _run(plan, torch.empty_like(x), x, scale)


_PANEL = 16  # of csrc/plan.h
_product = struct.Struct("4q5P3q7i").pack  # struct product


def matmul(
    a: Tensor, b: Tensor, accumulator: str, a_scale: Tensor | None = None, b_scale: Tensor | None = None
) -> Tensor:
    rule = check_matmul(a, b, accumulator, a_scale, b_scale)
    left, right = products.factors(a, b, rule, a_scale, b_scale)
    batch, size, columns = right.values.shape
    out = torch.empty([*a.shape[:-1], columns], dtype=torch.float32)
    # Columns lie side by side in panels; the last one is filled up.
    filled = (torch.nn.functional.pad(t, (0, -columns % _PANEL)).unflatten(2, (-1, _PANEL)) for t in right)
    panels = products.Factor(*(t.transpose(1, 2).contiguous() for t in filled))
    tensors = (left.values, panels.values, left.exponents, panels.exponents, out)
    fields = [batch, a.shape[-2], size, columns, *(t.data_ptr() for t in tensors)]
    fields += [rule.group, rule.products_of_term, rule.promotion or 0, not rule.is_narrow]
    fields += [-1 if rule.fraction_bits is None else rule.fraction_bits, rule.least_exponent, rule.mantissa_bits]
    fields += [max(rule.min_exponent, rule.least_exponent), rule.max_exponent, rule.is_truncated]
    if out.numel():
        _native.altgrad_matmul(_product(*fields))
    return out


_blocks = struct.Struct("6P10q7f7i").pack  # struct blocks


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
    options = block, power_of_two, scale_format, headroom, dtype or x.dtype
    f = check_quantize_operand(x, tensor_scale, format, saturation, rounding, *options, hadamard, random_bits)
    g = None if scale_format is None else resolve(scale_format)
    out = torch.empty_like(x, dtype=dtype)
    x = transform(x) if hadamard else x
    strips = strips_of(out.shape, out.stride(), tuple(block))
    if strips is None or x.dtype == torch.float64 or not fits_blocks(f, g):
        modes = saturation, rounding, *options, False, random_bits, with_tensor_scale
        return out.copy_(blocks.quantize_operand(x, tensor_scale, format, *modes))
    scaling = scaling_of(f, power_of_two, headroom, with_tensor_scale)
    _run_blocks(strips, scaling, f, g, out, laid_out_as(out, x), tensor_scale, random_bits, saturation, rounding)
    return out


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
    args = x, tensor_scale, format, saturation, rounding, block, power_of_two, scale_format, headroom
    f = check_encode_blocks(*args, random_bits=random_bits)
    g = None if scale_format is None else resolve(scale_format)
    x = x.contiguous()
    strips = strips_of(x.shape, x.stride(), tuple(block))
    is_served = strips is not None and x.dtype != torch.float64 and x.numel() > 0 and fits_blocks(f, g)
    if strips is None or not is_served or (g is not None and g.bits > 8):
        return blocks.encode_blocks(*args, random_bits)
    out, scales = OPERATORS["encode_blocks"].output(*args)
    packs = f.bits < 8 and x.shape[-1] * f.bits % 8 == 0 and strips.begins_with_bytes(f.bits)
    codes = out if packs or f.bits == 8 else torch.empty_like(x, dtype=torch.uint8)
    scaling = scaling_of(f, power_of_two, headroom, False)
    _run_blocks(strips, scaling, f, g, codes, x, tensor_scale, random_bits, saturation, rounding, scales, packs)
    return (out if codes is out else pack(codes, f.bits)), scales


def _run_blocks(
    strips: Strips,
    scaling: Scaling,
    f: FP8Format,
    g: FP8Format | None,
    out: Tensor,
    x: Tensor,
    tensor_scale: Tensor | None,
    random_bits: Tensor | None,
    saturation: str,
    rounding: str,
    scales: Tensor | None = None,
    packs: bool = False,
) -> None:
    """The kernel of csrc/blocks.h, which encodes where there are scales to be stored; x lies as values or codes do."""
    random, random_dtype = _random_of(random_bits, x, strips)
    operation = "quantize" if scales is None else "encode"
    plan = _plan(operation, x.dtype, torch.float32, out.dtype, f.name, saturation, rounding, random_dtype)
    level = None if g is None else _plan("quantize", torch.float32, torch.float32, torch.float32, g.name)
    smallest = 2.0**-126 if g is None else g.smallest_normal or g.smallest_subnormal
    above = 1.0 if tensor_scale is None else tensor_scale.item()
    top = f.max_representable_value
    of_scales = 0 if scaling.is_power else 24 if g is None or scaling.with_tensor_scale else 1 + g.mantissa_bits
    is_short = 1 + f.mantissa_bits + of_scales <= 8
    numbers = scaling.headroom, top, scaling.most, smallest, scaling.factor, scaling.second_factor, above
    rule = scaling.with_tensor_scale, scaling.is_power, scaling.by_quotient, scaling.carry, scaling.exponent
    plans = _address(plan), 0 if level is None else _address(level)
    data = out.data_ptr(), 0 if scales is None else scales.data_ptr(), x.data_ptr(), random.data_ptr()
    _native.altgrad_blocks(_blocks(*plans, *data, *strips.integers, *numbers, *rule, is_short, packs), strips.number)


def _random_of(random_bits: Tensor | None, out: Tensor, strips: Strips) -> tuple[Tensor, torch.dtype]:
    """The random operand as csrc/blocks.h reads it, a seed or words laid out as out is, and the dtype of its plan."""
    if random_bits is None:
        return out, torch.int32
    if random_bits.dtype != SEED:
        return laid_out_as(out, random_bits.to(torch.int32)), random_bits.dtype
    if strips.finds_words:
        return random_bits, SEED
    return laid_out_as(out, random_words(random_bits, out.shape)), torch.int32


def _address(plan: bytes) -> int:
    """Of the bytes, which the cache of plans keeps, or the caller."""
    return ctypes.cast(ctypes.c_char_p(plan), ctypes.c_void_p).value or 0


KERNELS = with_twins(
    {
        "quantize": quantize,
        "project": project,
        "encode": encode,
        "decode": decode,
        "dequantize": dequantize,
        "quantize_blocks": partial(quantize_operand, with_tensor_scale=True),
        "quantize_operand": quantize_operand,
        "encode_blocks": encode_blocks,
        "amax": amax,
        "pack": pack,
        "unpack": unpack,
        "matmul": matmul,
    }
)


def _slow(name: str) -> Callable[..., Tensor]:
    formula = aten.KERNELS[name]

    def kernel(*args: Any) -> Tensor:
        warn_without("CPU")
        return formula(*args)

    return kernel


if _native is not None or not os.environ.get("ALTGRAD_CPU_TARGET"):
    for _name, _kernel in KERNELS.items():
        library.impl(_name, _slow(_name) if _native is None else _kernel, "CPU")
