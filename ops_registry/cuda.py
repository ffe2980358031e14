"""The operators on CUDA: one pass over x in memory order, by Triton kernels that are compiled when first used.

Triton is imported when the first CUDA tensor arrives. Where it is missing, and for a scale whose broadcast does not
come down to four nested runs of elements, the aten formulas serve.
"""

from functools import cache, lru_cache, partial
from importlib import import_module
from math import gcd, prod
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import aten, blocks, products
from .arithmetic import code_dtype
from .checks import (
    check_amax,
    check_as_scale,
    check_decode,
    check_encode,
    check_encode_blocks,
    check_matmul,
    check_pack,
    check_project,
    check_quantize,
    check_quantize_operand,
    check_quantize_operands,
    check_unpack,
)
from .formats import FP8Format, resolve
from .hadamard import SIZE
from .launches import Launch, served, start
from .layout import laid_out_as, strides_over
from .modes import ROUNDINGS, SATURATIONS, SEED
from .operators import OPERATORS, library, with_twins
from .packing import rows_of
from .philox import random_bits as bits_of
from .tiles import NARROW, Size, both_of, fits_blocks, has_groups, most_of, scaling_of, tiling_of

Plan = tuple[int, list[int], tuple[Any, ...]]
Described = tuple[Tensor, Launch | None]  # the output of an operator, and what writes it

MAX_RUNS = 4
NUM_WARPS = 4
BLOCK_BYTES = 4096  # of the output
MAX_REGISTERS = 40  # of a thread, so that 48 warps are at work; measured in float32 and bfloat16
GROUPS, CODES = 512, 8  # of codes that are whole bytes: groups of a program, and codes of a group
ROWS, COLUMNS = 16, 512  # of a block with a scale per column, which takes the registers that it needs
SCALES = 512  # of a program
# Of a program whose tile is one large block of several rows, by the bytes of a number; measured in E4M3.
LARGE_BLOCKS: dict[int, dict[str, Any]] = {4: {"num_warps": 4}, 2: {"num_warps": 8, "maxnreg": 80}}

_NO_RUNS = [1] * (MAX_RUNS - 1) + [0] * MAX_RUNS


class Walk(NamedTuple):
    """How a kernel finds scales: through ``runs`` nested runs of rows of its block (0: one scale for all).

    moves_in_row: each element of a row has its own scale. is_columns: the rows of a block lie under each other in a
    matrix with a scale per column. is_wide: offsets need 64 bits.
    """

    runs: int = 0
    moves_in_row: bool = False
    is_columns: bool = False
    is_wide: bool = False


@cache
def kernels(module: str) -> ModuleType | None:
    """A module of Triton kernels, None without Triton."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    return import_module(f".{module}", __package__)


def runs_of(shape: Size, x_strides: Size, scale_strides: list[int]) -> tuple[list[int], list[int]]:
    """How scale walks along a dense x in memory order: sizes and strides of nested runs, the innermost first.

    Dimensions of x are joined where one stride of scale serves both: with a scale per column the runs have the sizes
    [columns, rows] and the strides [1, 0].
    """
    sizes: list[int] = []
    strides: list[int] = []
    for dim in sorted(range(len(shape)), key=x_strides.__getitem__):
        size, stride = shape[dim], scale_strides[dim]
        if sizes and stride == strides[-1] * sizes[-1]:
            sizes[-1] *= size
        elif size > 1:
            sizes.append(size)
            strides.append(stride)
    return sizes, strides


@lru_cache(maxsize=4096)
def plan(shape: Size, x_strides: Size, scale_shape: Size, scale_strides: Size, block: int) -> Plan | None:
    """How blocks of x meet their scales: (programs, sizes and strides of runs in rows, (walk, rows, columns)).

    A row is a power of two of elements of one innermost run. None where the kernels cannot follow.
    """
    n = prod(shape)
    sizes, strides = runs_of(shape, x_strides, strides_over(len(shape), scale_shape, scale_strides))
    runs, is_wide = len(sizes), n > NARROW
    if not any(strides):
        return -(-n // block), _NO_RUNS, (Walk(is_wide=is_wide), 1, block)
    if runs > MAX_RUNS or any(size >= 2**31 for size in sizes[:-1]):
        return None
    if strides == [1, 0] and sizes[0] % COLUMNS == 0 and sizes[1] >= ROWS:  # fewer rows could exceed 32-bit offsets
        tiles = sizes[0] // COLUMNS
        walk = Walk(runs, is_columns=True, is_wide=is_wide)
        return tiles * -(-sizes[1] // ROWS), [tiles, *_NO_RUNS[1:]], (walk, ROWS, COLUMNS)
    moves_in_row = strides[0] == 1
    columns = gcd(block, *([] if runs == 1 else sizes[:1]), *(strides[1:] if moves_in_row else []))
    if strides[0] > 1:
        columns = 1
    unit = columns if moves_in_row else 1
    padding = MAX_RUNS - runs
    integers = [sizes[0] // columns, *sizes[1:], *[1] * padding][: MAX_RUNS - 1]
    integers += [strides[0] * columns // unit, *[stride // unit for stride in strides[1:]], *[0] * padding]
    return -(-n // block), integers, (Walk(runs, moves_in_row, is_wide=is_wide), block // columns, columns)


def in_order_of(out: Tensor, x: Tensor) -> Tensor:
    """x laid out as out: itself where it is dense. A seed becomes bits where memory has another order than elements."""
    if x.dtype == SEED:
        if out.is_contiguous():
            return x
        x = bits_of(x, out.shape)
    return laid_out_as(out, x)


def beside(x: Tensor, scale: Tensor) -> Tensor:
    """A scale, which may be a 0-d tensor on the CPU, on the device of x."""
    if scale.get_device() == x.get_device():
        return scale
    return torch.full((), scale.item(), dtype=scale.dtype, device=x.device)


def saturation_of(f: FP8Format, saturation: str) -> str:
    """The saturation by whose kernel f is served: one for all that give it the same results."""
    differs = {"none": f.has_nan, "propagate": f.has_inf, "finite": True}
    return saturation if differs[saturation] else "finite"


def launch_of(
    kernel: str, out: Tensor, scale: Tensor, inputs: list[Tensor], f: FP8Format, *modes: str
) -> Launch | None:
    """A launch of a kernel of cuda_kernels.py; None where it cannot serve.

    A 0-d scale on the CPU becomes an argument of the kernel, or of a fill: there is no synchronization. In inputs, out
    stands for random bits where there are none.
    """
    planned = plan(out.shape, out.stride(), scale.shape, scale.stride(), BLOCK_BYTES // out.element_size())
    module = kernels("cuda_kernels")
    if module is None or planned is None:
        return None
    programs, integers, layout = planned
    tensors: list[Any] = [scale, *[in_order_of(out, x) for x in inputs], out]
    if scale.get_device() != out.get_device():
        if any(tensor.dtype == torch.float64 for tensor in tensors[1:]):  # kernels take numbers in float32
            tensors[0] = beside(out, scale)
        else:
            tensors[0] = scale.float().item()
    options = {"num_warps": NUM_WARPS, "maxnreg": None if layout[0].is_columns else MAX_REGISTERS}
    constants = (*layout, f, *modes)
    return Launch(getattr(module, kernel), programs, tensors, (out.numel(), *integers), constants, options)


def quantize(
    x: Tensor,
    scale: Tensor,
    format: str,
    saturation: str = SATURATIONS[0],
    rounding: str = ROUNDINGS[0],
    random_bits: Tensor | None = None,
) -> Described:
    f = check_quantize(x, scale, format, saturation, rounding, random_bits)
    out = torch.empty_like(x)
    inputs = [x, out if random_bits is None else random_bits]
    return out, launch_of("project_kernel", out, scale, inputs, f, saturation_of(f, saturation), rounding, "multiplied")


def project(
    x: Tensor,
    scale: Tensor,
    format: str,
    saturation: str = SATURATIONS[0],
    rounding: str = ROUNDINGS[0],
    dtype: torch.dtype | None = None,
    random_bits: Tensor | None = None,
) -> Described:
    f = check_project(x, scale, format, saturation, rounding, dtype, random_bits)
    out = torch.empty_like(x, dtype=dtype)
    inputs = [x, out if random_bits is None else random_bits]
    return out, launch_of("project_kernel", out, scale, inputs, f, saturation_of(f, saturation), rounding, "projected")


def encode(
    x: Tensor,
    scale: Tensor,
    format: str,
    saturation: str = SATURATIONS[0],
    rounding: str = ROUNDINGS[0],
    random_bits: Tensor | None = None,
) -> Described:
    f = check_encode(x, scale, format, saturation, rounding, random_bits=random_bits)
    out = torch.empty_like(x, dtype=code_dtype(f))
    inputs = [x, out if random_bits is None else random_bits]
    return out, launch_of("project_kernel", out, scale, inputs, f, saturation_of(f, saturation), rounding, "packed")


def decode(codes: Tensor, scale: Tensor, format: str, dtype: torch.dtype | None = None) -> Described:
    f = check_decode(codes, scale, format, dtype)
    out = torch.empty_like(codes, dtype=dtype or torch.float32)
    return out, launch_of("decode_kernel", out, scale, [codes], f)


def as_scale(amax: Tensor, max_value: float) -> Described:
    check_as_scale(amax, max_value)
    out, module = torch.empty_like(amax), kernels("cuda_blocks")
    if module is None or amax.dtype == torch.float64:
        return out, None
    constants, options = (max_value, most_of(max_value), SCALES), {"num_warps": NUM_WARPS}
    tensors = [in_order_of(out, amax), out]
    return out, Launch(module.as_scale_kernel, -(-out.numel() // SCALES), tensors, (out.numel(),), constants, options)


def amax(x: Tensor, dims: list[int], hadamard: bool = False) -> Described:
    """Of a whole dense tensor."""
    check_amax(x, dims, hadamard)
    is_dense = x.is_contiguous() or (x.ndim > 1 and x.mT.is_contiguous())
    x = x.contiguous() if hadamard and not is_dense else x
    block = (*[1] * (x.ndim - 1), SIZE)
    is_served = x.dtype != torch.float64 and len(dims) == x.ndim > 0 and (is_dense or hadamard)
    tiling = tiling_of(x.shape, x.stride(), block, False) if is_served else None
    module = kernels("cuda_blocks")
    if module is None or tiling is None or tiling.programs == 0:
        return x, None
    out = OPERATORS["amax"].output(x, dims).zero_()
    integers, constants = tiling.integers[:4], (tiling.tile, hadamard)
    options, kernel = tiling.options, module.largest_kernel
    return out, Launch(kernel, tiling.programs, [x, out], integers, constants, options, from_zero=True)


def pack(codes: Tensor, bits: int) -> Tensor:
    check_pack(codes, bits)
    return _regroup("pack", codes, bits, codes.shape[-1])


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    check_unpack(packed, bits, n)
    return _regroup("unpack", packed, bits, n)


def _regroup(name: str, x: Tensor, bits: int, n: int) -> Tensor:
    module, args = kernels("cuda_packing"), (x, bits, n) if name == "unpack" else (x, bits)
    if module is None:
        return aten.KERNELS[name](*args)
    out = OPERATORS[name].output(*args)
    rows, n = rows_of(out.shape, n, bits)
    codes, packed = (n, CODES, bits), (-(-n * bits // 8), bits, 8)  # of a row the size, of a group count and width
    (x_size, *of_x), (out_size, *of_out) = (codes, packed) if name == "pack" else (packed, codes)
    groups = -(-n // CODES)
    constants = GROUPS, *of_x, *of_out, rows > 1, rows * n > NARROW
    integers, programs = (rows, groups, x_size, out_size), -(-rows * groups // GROUPS)
    options = {"num_warps": NUM_WARPS}
    start(Launch(module.regroup_kernel, programs, [x.contiguous(), out], integers, constants, options))
    return out


def matmul(
    a: Tensor, b: Tensor, accumulator: str, a_scale: Tensor | None = None, b_scale: Tensor | None = None
) -> Tensor:
    module = kernels("cuda_products")
    if module is None:
        return aten.KERNELS["matmul"](a, b, accumulator, a_scale, b_scale)
    rule = check_matmul(a, b, accumulator, a_scale, b_scale)
    left, right = products.factors(a, b, rule, a_scale, b_scale)
    out = a.new_empty([*a.shape[:-1], b.shape[-1]], dtype=torch.float32)
    if out.numel():
        with torch.cuda.device_of(out):
            module.launch(left, right, out.view(-1, *out.shape[-2:]), rule)
    return out


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
) -> Described:
    args: tuple[Any, ...] = block, power_of_two, scale_format, headroom, dtype, hadamard, random_bits
    f = check_quantize_operand(x, tensor_scale, format, saturation, rounding, *args)
    out = torch.empty_like(x, dtype=dtype)
    g = None if scale_format is None else resolve(scale_format)
    is_counted = random_bits is not None and random_bits.dtype == SEED
    tiling = tiling_of(out.shape, out.stride(), tuple(block), is_counted)
    module = kernels("cuda_blocks")
    if module is None or tiling is None or x.dtype == torch.float64 or not fits_blocks(f, g):
        return out, None
    if hadamard and not has_groups(block):
        return out, None
    tensor_scale = x if tensor_scale is None else beside(out, tensor_scale)  # x is not looked at
    random_bits = out if random_bits is None else random_bits
    random_bits = random_bits if is_counted else in_order_of(out, random_bits)
    scaling = scaling_of(f, power_of_two, headroom, with_tensor_scale)
    constants = tiling.tile, f, g, saturation_of(f, saturation), rounding, scaling, hadamard
    tensors = [in_order_of(out, x), tensor_scale, random_bits, out]
    is_large = tiling.has_large_blocks and rounding != "stochastic"
    options = LARGE_BLOCKS[x.itemsize] if is_large else tiling.options
    kernel = module.quantize_operand_kernel
    return out, Launch(kernel, tiling.programs, tensors, tiling.integers, constants, options)


def quantize_operands(
    x: Tensor,
    tensor_scale: Tensor | None,
    turned_scale: Tensor | None,
    format: str,
    saturation: str,
    rounding: str,
    block: list[int],
    power_of_two: str | None = None,
    scale_format: str | None = None,
    headroom: float = 1.0,
    dtype: torch.dtype | None = None,
    hadamard: bool = False,
) -> tuple[tuple[Tensor, Tensor], Launch | None]:
    """Both from one read, where x is whole tiles in blocks along the last dimension."""
    modes, options = (format, saturation, rounding), (power_of_two, scale_format, headroom, dtype, hadamard)
    args: tuple[Any, ...] = x, tensor_scale, turned_scale, *modes, block, *options
    f = check_quantize_operands(*args)
    g = None if scale_format is None else resolve(scale_format)
    outputs: tuple[Tensor, Tensor] = OPERATORS["quantize_operands"].output(*args)
    out, turned = outputs
    along, down = outputs if out.is_contiguous() else (turned, out)  # of blocks in rows of memory, and in columns
    is_dense = along.is_contiguous() and down.stride() == along.transpose(-2, -1).stride()
    both = both_of(along.shape, block[-1]) if is_dense and all(size == 1 for size in block[:-1]) else None
    module = kernels("cuda_blocks")
    is_served = x.dtype != torch.float64 and fits_blocks(f, g) and (not hadamard or has_groups(block))
    if module is None or both is None or not is_served:
        return outputs, None
    scales, transforms = [x if s is None else beside(x, s) for s in (tensor_scale, turned_scale)], (False, hadamard)
    if along is turned:
        scales, transforms = scales[::-1], transforms[::-1]
    scaling, pointers = scaling_of(f, power_of_two, headroom, False), [in_order_of(out, x), *scales, along, down]
    constants = both.along, both.down, f, g, saturation_of(f, saturation), rounding, scaling, *transforms
    kernel = module.quantize_operands_kernel
    return outputs, Launch(kernel, both.programs, pointers, both.integers, constants, both.options)


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
    is_counted = random_bits is not None and random_bits.dtype == SEED
    x = x.contiguous()
    tiling = tiling_of(x.shape, x.stride(), tuple(block), is_counted)
    module = kernels("cuda_blocks")
    is_served = x.dtype != torch.float64 and x.numel() > 0 and fits_blocks(f, g) and (g is None or g.bits <= 8)
    if module is None or tiling is None or not is_served:
        return blocks.encode_blocks(*args, random_bits)
    out, scales = OPERATORS["encode_blocks"].output(*args)
    packs = f.bits < 8 and x.shape[-1] % 8 == 0 and tiling.has_eights
    codes = out if packs or f.bits == 8 else torch.empty_like(x, dtype=torch.uint8)
    tensor_scale = None if tensor_scale is None else beside(x, tensor_scale)
    random_bits = random_bits if is_counted or random_bits is None else random_bits.contiguous()
    modes = saturation_of(f, saturation), rounding
    constants = tiling.tile, f, g, *modes, scaling_of(f, power_of_two, headroom, False), packs
    tensors = [x, *(x if t is None else t for t in (tensor_scale, random_bits)), scales, codes]  # x is not looked at
    start(Launch(module.encode_blocks_kernel, tiling.programs, tensors, tiling.integers, constants, tiling.options))
    return (out if codes is out else pack(codes, f.bits)), scales


DESCRIPTIONS = with_twins(
    {
        "quantize": quantize,
        "project": project,
        "encode": encode,
        "decode": decode,
        "amax": amax,
        "as_scale": as_scale,
        "quantize_blocks": partial(quantize_operand, with_tensor_scale=True),
        "quantize_operand": quantize_operand,
        "quantize_operands": quantize_operands,
    }
)
_SERVED = {name: served(name, describe, aten.KERNELS[name]) for name, describe in DESCRIPTIONS.items()}
KERNELS = with_twins({"encode_blocks": encode_blocks, "pack": pack, "unpack": unpack, "matmul": matmul}) | {
    name: kernel for name, (kernel, _) in _SERVED.items()
}
REPEATED = {name: repeat for name, (_, repeat) in _SERVED.items()}

for _name, _kernel in KERNELS.items():
    library.impl(_name, _kernel, "CUDA")
