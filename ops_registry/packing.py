"""Codes packed to their width, as one stream of bits along the last dimension, the lowest bits first.

Code i has the bits from i * bits on; bit b is bit b % 8 of byte b // 8. So two 4-bit codes share a byte, the first in
its low half, as ``torch.float4_e2m1fn_x2`` and torchao have it, and four 6-bit codes three bytes.
"""

import math

import torch
from torch import Tensor

from .checks import check_pack, check_unpack


def pack(codes: Tensor, bits: int) -> Tensor:
    """The bytes of codes; the last one is filled up with zeros."""
    check_pack(codes, bits)
    n = codes.shape[-1]
    group, count = 8 // math.gcd(8, bits), bits // math.gcd(8, bits)  # codes and bytes that begin and end together
    codes = torch.nn.functional.pad(codes, (0, -n % group)).unflatten(-1, (-1, group)).int() & ((1 << bits) - 1)
    shifts = [[i * bits - 8 * j for i in range(group)] for j in range(count)]
    packed = [_joined(codes, row, range(1 - bits, 8)) & 255 for row in shifts]
    return torch.stack(packed, -1).flatten(-2)[..., : (n * bits + 7) // 8].to(torch.uint8)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The n codes that were packed."""
    check_unpack(packed, bits, n)
    group, count = 8 // math.gcd(8, bits), bits // math.gcd(8, bits)
    packed = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % count)).unflatten(-1, (-1, count)).int()
    shifts = [[8 * j - i * bits for j in range(count)] for i in range(group)]
    codes = [_joined(packed, row, range(-7, bits)) & ((1 << bits) - 1) for row in shifts]
    return torch.stack(codes, -1).flatten(-2)[..., :n].to(torch.uint8)


def rows_of(shape: tuple[int, ...], n: int, bits: int) -> tuple[int, int]:
    """How many rows of how many codes lie behind each other; where rows are whole bytes they are one."""
    rows = math.prod(shape[:-1])
    return (1, rows * n) if n * bits % 8 == 0 else (rows, n)


def _joined(parts: Tensor, shifts: list[int], overlap: range) -> Tensor:
    """The parts that overlap what is made of them, each shifted to its place."""
    shifted = [_shifted(parts[..., i], by) for i, by in enumerate(shifts) if by in overlap]
    result = shifted[0]
    for part in shifted[1:]:
        result = result | part
    return result


def _shifted(part: Tensor, by: int) -> Tensor:
    return torch.bitwise_left_shift(part, by) if by >= 0 else torch.bitwise_right_shift(part, -by)
