"""Blocks of x as they lie in memory, matrices of rows and columns, and those that a program of cuda_blocks.py takes."""

import math
import struct
from functools import lru_cache
from typing import Any, NamedTuple

from .formats import FP8Format
from .hadamard import SIZE

Size = tuple[int, ...]

CHUNK = 1024  # elements that a C kernel takes at a time, as in csrc/kernels.c
SHARED, LEAST_SPAN = 64, 256  # strips of tall blocks that threads share, but for narrower ones than so many columns
TILE = 4096  # elements of a program, where its blocks are not larger
PER_WARP = 1024  # elements of 32 threads
# Of a program of columns: elements, columns, and elements of 32 threads, which have two columns each.
COLUMNS_TILE, COLUMNS_ACROSS, COLUMNS_PER_WARP = 1024, 64, 2048
COLUMN = 32  # elements of a column that a thread takes at most
# Of a program of both directions, 32 threads: its rows, where blocks are not larger, and columns.
BOTH_DOWN, BOTH_ACROSS = 16, 64
MAX_BLOCK = 16384  # the largest block, of sizes that are powers of two, that a program holds
ACROSS = 128  # columns of a tile of several rows
_LARGEST = (2.0 - 2.0**-23) * 2.0**127
NARROW = 2**30  # elements; with more, offsets are of 64 bits


class Matrices(NamedTuple):
    """Matrices that lie behind each other, in blocks of height times width.

    steps: how far an element is from the one in the matrix before, in the row above and to the left, in row-major order
    of x. Where no one counts, they are 0.
    """

    stack: int
    rows: int
    columns: int
    height: int
    width: int
    steps: Size

    @property
    def has_fours_down(self) -> bool:
        """Whether row-major order counts from a multiple of 4 on in every column of a block."""
        out, down, across = self.steps
        return down == 1 and all(number % 4 == 0 for number in (self.height, out, across))


class Tile(NamedTuple):
    """high times wide blocks of height times width; rooms are powers of two.

    is_full: no tile has less than that. is_aligned: rows begin at multiples of 16. is_wide: offsets need 64 bits.
    has_fours: row-major order counts from a multiple of 4 on in every row of a block; has_fours_down: in every column.
    is_of_columns: threads take whole columns of blocks.
    """

    high: int
    height: int
    height_room: int
    wide: int
    width: int
    width_room: int
    is_full: bool
    is_aligned: bool
    is_wide: bool
    has_fours: bool
    has_fours_down: bool
    is_of_columns: bool


class Scaling(NamedTuple):
    """How a scale follows from the largest magnitude, in the numbers of scales.py."""

    headroom: float
    with_tensor_scale: bool
    most: float
    is_power: bool
    by_quotient: bool
    factor: float
    second_factor: float
    carry: int
    exponent: int


class Tiling(NamedTuple):
    programs: int
    integers: Size
    tile: Tile
    options: dict[str, Any]

    @property
    def has_eights(self) -> bool:
        """Whether rows of blocks are of groups of 8 elements."""
        return self.tile.width % 8 == 0 and self.integers[1] % 8 == 0

    @property
    def has_large_blocks(self) -> bool:
        """Whether a tile is a block of several rows that takes all registers of many threads."""
        return self.tile.height > 1 and self.tile.height_room * self.tile.width_room == MAX_BLOCK


def matrices_of(shape: Size, strides: Size, block: Size, is_counted: bool) -> Matrices | None:
    """Dense strides in memory order, dimensions joined where blocks allow it; None where three are not enough."""
    order = sorted((dim for dim, size in enumerate(shape) if size > 1), key=strides.__getitem__)
    joined: list[tuple[int, int, int]] = []  # size, that of a block, step; the innermost first
    for dim in order:
        size, step = shape[dim], math.prod(shape[dim + 1 :]) if is_counted else 0
        own = size if block[dim] == -1 else min(size, block[dim])
        if joined:
            inner, of_inner, inner_step = joined[-1]
            is_line = step == inner_step * inner
            if is_line and (of_inner == inner or (own == 1 and inner % of_inner == 0)):
                joined[-1] = inner * size, own * inner if of_inner == inner else of_inner, inner_step
                continue
        joined.append((size, own, step))
    if len(joined) > 3 or (len(joined) == 3 and joined[2][1] != 1):
        return None
    (columns, width, across), (rows, height, down), (stack, _, out) = [*joined, *[(1, 1, 0)] * (3 - len(joined))]
    return Matrices(stack, rows, columns, height, width, (out, down, across))


@lru_cache(maxsize=4096)
def tiling_of(shape: Size, strides: Size, block: Size, is_counted: bool) -> Tiling | None:
    """How programs share dense matrices; None where a block is too large, or scattered."""
    m = matrices_of(shape, strides, block, is_counted)
    if m is None:
        return None
    height_room, width_room = _power_of_two(m.height), _power_of_two(m.width)
    if height_room * width_room > MAX_BLOCK:
        return None
    across, down = -(-m.columns // m.width), -(-m.rows // m.height)
    is_columns = m.width == 1 < m.height
    elements, per_warp = (COLUMNS_TILE, COLUMNS_PER_WARP) if is_columns else (TILE, PER_WARP)
    columns = COLUMNS_ACROSS if is_columns else TILE if m.height == 1 else ACROSS
    wide = max(1, min(_power_of_two(across), columns // width_room))
    high = max(1, min(_power_of_two(down), elements // (height_room * width_room * wide)))
    is_full = m.rows % (high * m.height) == 0 and m.columns % (wide * m.width) == 0
    is_full = is_full and (height_room, width_room) == (m.height, m.width)
    n = math.prod(shape)
    has_fours = m.steps[2] == 1 and all(number % 4 == 0 for number in (m.width, *m.steps[:2]))
    is_of_columns = is_columns and m.height <= COLUMN and wide > 1
    sizes = high, m.height, height_room, wide, m.width, width_room
    tile = Tile(*sizes, is_full, m.columns % 16 == 0, n > NARROW, has_fours, m.has_fours_down, is_of_columns)
    tiles_down, tiles_across = -(-down // high), -(-across // wide)
    elements = high * height_room * wide * width_room
    options = {"num_warps": max(1, min(16, elements // per_warp))}
    programs = m.stack * tiles_down * tiles_across if n else 0
    return Tiling(programs, (m.rows, m.columns, tiles_down, tiles_across, *m.steps), tile, options)


class Both(NamedTuple):
    """The same tiles of matrices in blocks along rows, and in blocks down columns."""

    programs: int
    integers: Size
    along: Tile
    down: Tile
    options: dict[str, Any]


@lru_cache(maxsize=4096)
def both_of(shape: Size, size: int) -> Both | None:
    """How programs share contiguous matrices in blocks of size elements; None where tiles and blocks are not whole."""
    rows, columns = shape[-2:]
    high, wide = max(BOTH_DOWN, size), BOTH_ACROSS
    has_whole_blocks = 2 <= size <= COLUMN and size == _power_of_two(size)
    if not has_whole_blocks or rows % high or columns % wide:
        return None
    n, is_aligned = math.prod(shape), columns % 16 == 0
    along = Tile(high, 1, 1, wide // size, size, size, True, is_aligned, n > NARROW, False, False, False)
    down = Tile(high // size, size, size, wide, 1, 1, True, is_aligned, n > NARROW, False, False, True)
    integers = rows, columns, rows // high, columns // wide
    return Both(n // (high * wide), integers, along, down, {"num_warps": 1})


class Strips(NamedTuple):
    """How many strips of blocks there are, the integers of struct blocks, and whether it finds the words of a seed.

    It does where a seed counts along rows, or down columns by fours that no block splits.
    """

    number: int
    integers: Size
    finds_words: bool

    def begins_with_bytes(self, bits: int) -> bool:
        """Whether every row of a strip begins with a byte of codes that are packed in their order in memory."""
        _, columns, _, _, span, *_ = self.integers
        return columns * bits % 8 == 0 and (span >= columns or span * bits % 8 == 0)


@lru_cache(maxsize=4096)
def strips_of(shape: Size, strides: Size, block: Size) -> Strips | None:
    """The strips of csrc/blocks.h; None where blocks are scattered, or of several rows and more columns than CHUNK."""
    m = matrices_of(shape, strides, block, True)
    if m is None or (m.width > CHUNK and m.height > 1):
        return None
    most, down = CHUNK, -(-m.rows // m.height)
    while m.height > 1 and most > LEAST_SPAN and m.stack * down * -(-m.columns // most) < SHARED:
        most //= 2
    span = max(m.width, most // m.width * m.width)
    across = -(-m.columns // span)
    number = m.stack * down * across if math.prod(shape) else 0
    integers = m.rows, m.columns, m.height, m.width, span, down, across, *m.steps
    return Strips(number, integers, m.steps[2] == 1 or m.has_fours_down)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def fits_blocks(format: FP8Format, scale_format: FP8Format | None) -> bool:
    """Whether float32 has room for the arithmetic of both, and the values have a sign."""
    narrow = not format.needs_float64 and format.is_signed
    return narrow and (scale_format is None or (not scale_format.needs_float64 and scale_format.has_zero))


def has_groups(block: list[int]) -> bool:
    """Whether blocks are of whole groups of the Hadamard transform, each within a row or a column in memory."""
    return all(size == 1 for size in block[:-1]) and (block[-1] == -1 or block[-1] % SIZE == 0)


def most_of(max_value: float) -> float:
    """The largest scale, as in scales.as_scale, rounded to float32."""
    most = min(_LARGEST, _LARGEST * (1 - 2.0**-22) / max_value)
    return float(struct.unpack("f", struct.pack("f", most))[0])


@lru_cache(maxsize=4096)
def scaling_of(format: FP8Format, power_of_two: str | None, headroom: float, with_tensor_scale: bool) -> Scaling:
    by_quotient = power_of_two == "rceil"
    up = (1 << 23) - 1
    carry = {"ceil": up, "rceil": up, "even": 1 << max(0, 22 - format.mantissa_bits)}.get(power_of_two or "", 0)
    exponent = 0 if by_quotient else math.frexp(format.max_representable_value)[1] - 1
    missing = max(0, 1 - exponent)
    factors = 2.0 ** min(127, missing), 2.0 ** max(0, missing - 127)
    most = most_of(format.max_representable_value)
    return Scaling(
        headroom, with_tensor_scale, most, power_of_two is not None, by_quotient, *factors, carry, exponent + missing
    )
