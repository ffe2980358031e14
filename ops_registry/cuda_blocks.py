"""The operators of blocks in Triton: one pass over x, in which a program finds scales and applies them.

Steps: the largest magnitude, its scale, then those of cuda_kernels.py: divide, round, saturate, multiply. x is a matrix
in memory, or a stack of them, with blocks of ``height`` times ``width``. A program takes ``high`` times ``wide`` blocks
as a tensor of four dimensions, [high, height, wide, width], so that what is of a block, [high, 1, wide, 1], broadcasts.
"""

import triton
import triton.language as tl

from .cuda_kernels import pack, pack_in_float64, philox, project, quotient, with_sign_of

_INTEGERS = ["rows", "columns", "tiles_down", "tiles_across", "step_out", "step_down", "step_across"]


@triton.jit
def as_scale(amax, max_value: tl.constexpr, most: tl.constexpr):
    """amax / max_value, positive and finite, 1 for 0; NaN for an infinite amax and for NaN."""
    smallest: tl.constexpr = 2.0**-126
    scale = tl.div_rn(amax, max_value + tl.zeros_like(amax))
    scale = tl.where(scale < smallest, smallest, scale)
    scale = tl.where(scale > most, most, scale)
    scale = tl.where(amax == 0, 1.0, scale)
    return tl.where(amax == float("inf"), float("nan"), scale)


@triton.jit(do_not_specialize=["n"])
def as_scale_kernel(amax_ptr, out_ptr, n: tl.int64, max_value: tl.constexpr, most: tl.constexpr, block: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    scale = as_scale(tl.load(amax_ptr + i, i < n, 0.0), max_value, most)
    tl.store(out_ptr + i, scale, i < n)


@triton.jit
def as_power_of_two(amax, max_value: tl.constexpr, scaling: tl.constexpr):
    """The E8M0 scale of amax as scales.py finds it; the factors make room for subnormals."""
    a = amax
    if scaling.by_quotient:
        a = tl.div_rn(amax, max_value + tl.zeros_like(amax))
    if scaling.factor != 1:
        a = a * scaling.factor * scaling.second_factor
    code = ((a.to(tl.int32, bitcast=True) + scaling.carry) >> 23) - scaling.exponent
    bits = tl.maximum(tl.minimum(code, 254) << 23, 0x00400000)
    return tl.where(amax != amax, float("nan"), bits.to(tl.float32, bitcast=True))


@triton.jit
def block_level(amax, tensor_scale, max_value: tl.constexpr, scale_format: tl.constexpr):
    """The scale of a block in the scale format, which tensor_scale multiplies."""
    top: tl.constexpr = scale_format.max_representable_value
    smallest: tl.constexpr = scale_format.smallest_normal or scale_format.smallest_subnormal
    scale = tl.div_rn(amax, max_value + tl.zeros_like(amax))
    a, is_infinite, q = quotient(scale, tensor_scale + tl.zeros_like(amax), top, False, False)
    level = project(a, is_infinite, q < 0, None, scale_format, "propagate", "nearest_ties_to_even")
    return tl.where(level < smallest, smallest, level)


@triton.jit
def quotient_of(x, divisor, limit: tl.constexpr, format: tl.constexpr, rounding: tl.constexpr, is_power: tl.constexpr):
    """(min(|x / divisor|, limit), whether the quotient is infinite, a number with its sign), as quotient gives them.

    The product with the reciprocal of a power of two, which is a float32 number for each scale, is the quotient. By
    another reciprocal, quotients below 2^-100 need not be exact, nor twice the limit: in roundings that make zero of
    what is that small, for stochastic rounding below 2^-24 quanta, that is no harm.
    """
    quantum: tl.constexpr = format.quantum
    if is_power:
        q = x * tl.div_rn(1.0 + tl.zeros_like(divisor), divisor)
        a = tl.abs(q)
        return tl.where(a > limit, limit, a), a == float("inf"), q
    elif (
        (rounding == "stochastic" and quantum >= 2.0**-74)
        or (rounding == "nearest_ties_to_even" and quantum >= 2.0**-98)
        or (rounding == "nearest_ties_to_away" and quantum >= 2.0**-98)
        or (rounding == "toward_zero" and quantum >= 2.0**-98)
    ):
        a, is_infinite, q = quotient(x, divisor, 2.0 * limit, True, False)
        return tl.where(a > limit, limit, a), is_infinite, q
    else:
        return quotient(x, divisor, limit, False, False)


@triton.jit
def random_words(random_ptr, first, across, column, step, tile: tl.constexpr):
    """The words of a seed, as philox.py says, of elements that row-major order counts from first, by step a column.

    Where a row or a column has whole blocks of four words, they are made once.
    """
    if tile.has_fours_down:
        block, four = (
            tl.arange(0, tile.high)[:, None, None, None],
            tl.arange(0, tile.height_room // 4)[None, :, None, None],
        )
        x0, x1, x2, x3 = philox(random_ptr, (first + block * tile.height + 4 * four + column * step) >> 2, tile.is_wide)
        words = tl.join(tl.join(x0, x2), tl.join(x1, x3))
        words = words.reshape(tile.high, tile.height_room // 4, tile.wide, tile.width_room, 4)
        words = tl.permute(words, (0, 1, 4, 2, 3)).reshape(tile.high, tile.height_room, tile.wide, tile.width_room)
    elif tile.has_fours:
        block, four = tl.arange(0, tile.wide)[None, None, :, None], tl.arange(0, tile.width_room // 4)[None, None, None]
        x0, x1, x2, x3 = philox(random_ptr, (first + (across + block) * tile.width + 4 * four) >> 2, tile.is_wide)
        words = tl.join(tl.join(x0, x2), tl.join(x1, x3))
        words = words.reshape(tile.high, tile.height_room, tile.wide, tile.width_room)
    else:
        at = first + column * step
        x0, x1, x2, x3 = philox(random_ptr, at >> 2, tile.is_wide)
        is_odd = at % 2 == 1
        words = tl.where(at % 4 < 2, tl.where(is_odd, x1, x0), tl.where(is_odd, x3, x2))
    return words.to(tl.int32, bitcast=True)


@triton.jit
def span(first, count: tl.constexpr, room: tl.constexpr, size: tl.constexpr, n, axis: tl.constexpr):
    """(places, whether they exist) of count blocks from first on, in a dimension of n; a block has size of its room."""
    block = tl.arange(0, count)
    place = tl.arange(0, room)
    if axis == 0:
        block, place = block[:, None, None, None], place[None, :, None, None]
    else:
        block, place = block[None, None, :, None], place[None, None, None, :]
    at = first * size + block * size + place
    return at, (at < n) & (place < size)


@triton.jit
def tile_of(rows, columns, tiles_down, tiles_across, tile: tl.constexpr):
    """(matrix, rows and columns of a matrix, the tile's place down and across), of 64 bits only where needed."""
    index: tl.constexpr = tl.int64 if tile.is_wide else tl.int32
    program = tl.program_id(0).to(index)
    rows, columns = rows.to(index), columns.to(index)
    if tile.is_aligned:
        columns = tl.multiple_of(columns, 16)
    across = program % tiles_across.to(index)
    program = program // tiles_across.to(index)
    return program // tiles_down.to(index), rows, columns, program % tiles_down.to(index), across


@triton.jit
def hadamard(x, tile: tl.constexpr):
    """The transform of hadamard.py in float32, in groups of 16 down columns of blocks, or along their rows."""
    x = x.to(tl.float32)
    groups: tl.constexpr = tile.high * tile.height_room * tile.wide * tile.width_room // 16
    if tile.height > 1:
        x = tl.permute(x, (0, 2, 3, 1))
    is_negated = (0b1101_0111_1110_1000 >> tl.arange(0, 16)) & 1 == 1
    y = x.reshape(groups, 16)
    y = tl.where(is_negated[None, :], -y, y)
    for _ in tl.static_range(4):  # the last bit of an element's place is summed over and becomes the first
        a, b = tl.split(y.reshape(groups, 8, 2))
        y = tl.permute(tl.join(a + b, a - b), (0, 2, 1)).reshape(groups, 16)
    y = y * 0.25
    if tile.height > 1:
        return tl.permute(y.reshape(tile.high, tile.wide, tile.width_room, tile.height_room), (0, 3, 1, 2))
    return y.reshape(tile.high, tile.height_room, tile.wide, tile.width_room)


@triton.jit
def place_tile(matrix, rows, columns, down, across, tile: tl.constexpr):
    """(offsets, rows, columns, whether they exist) of a tile of blocks."""
    row, row_exists = span(down * tile.high, tile.high, tile.height_room, tile.height, rows, 0)
    column, column_exists = span(across * tile.wide, tile.wide, tile.width_room, tile.width, columns, 1)
    i = (matrix * rows + row) * columns + column
    if tile.is_of_columns:  # two a thread, so that no other one looks for their scales
        i = tl.max_contiguous(i, [1, 1, 2, 1])
    return i, row, column, row_exists & column_exists


@triton.jit
def load_tile(x_ptr, matrix, rows, columns, down, across, tile: tl.constexpr):
    """The numbers of a tile of blocks, 0 where none exist."""
    i, _, _, exists = place_tile(matrix, rows, columns, down, across, tile)
    return tl.load(x_ptr + i) if tile.is_full else tl.load(x_ptr + i, exists, 0.0)


@triton.jit(do_not_specialize=_INTEGERS)
def largest_kernel(
    x_ptr, out_ptr, rows: tl.int64, columns: tl.int64, tiles_down: tl.int64, tiles_across: tl.int64,
    tile: tl.constexpr, transforms: tl.constexpr,
):  # fmt: skip
    """The largest magnitude, behind the Hadamard transform where it transforms; out was 0."""
    matrix, rows, columns, down, across = tile_of(rows, columns, tiles_down, tiles_across, tile)
    x = load_tile(x_ptr, matrix, rows, columns, down, across, tile)
    x = hadamard(x, tile) if transforms else x.to(tl.float32)
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # ordered as magnitudes, NaN behind infinity
    largest = tl.max(bits.reshape(tile.high * tile.height_room * tile.wide * tile.width_room), axis=0)
    # Most programs find a larger one there, or one that was, and leave it.
    out_ptr = out_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.atomic_max(out_ptr, largest, largest > tl.load(out_ptr), "relaxed")


@triton.jit
def project_tile(
    x, tensor_scale_ptr, random_ptr, matrix, rows, columns, down, across, step_out, step_down, step_across,
    tile: tl.constexpr, format: tl.constexpr, scale_format: tl.constexpr, saturation: tl.constexpr,
    rounding: tl.constexpr, scaling: tl.constexpr,
):  # fmt: skip
    """(magnitudes of values, numbers with their signs, multipliers, offsets) of the numbers of a tile of blocks."""
    index: tl.constexpr = tl.int64 if tile.is_wide else tl.int32
    i, row, column, exists = place_tile(matrix, rows, columns, down, across, tile)
    random = None
    if rounding == "stochastic":
        if random_ptr.dtype.element_ty != tl.int64:
            random = tl.load(random_ptr + i) if tile.is_full else tl.load(random_ptr + i, exists)
        else:
            first = matrix * step_out.to(index)
            first += down * tile.high * tile.height if tile.has_fours_down else row * step_down.to(index)
            random = random_words(random_ptr, first, across * tile.wide, column, step_across.to(index), tile)
    # Magnitudes are ordered as their bits are, NaN behind infinity. Numbers of 16 bits wait for their scales as they
    # are, two in a register.
    is_short: tl.constexpr = x.dtype.primitive_bitwidth == 16
    bits = x.to(tl.int16, bitcast=True) & 0x7FFF if is_short else x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.max(bits, axis=3, keep_dims=True), axis=1, keep_dims=True)
    amax = largest.to(tl.int16 if is_short else tl.int32).to(x.dtype, bitcast=True).to(tl.float32)
    x = x.to(tl.float32)
    if scaling.headroom != 1:
        amax = amax * scaling.headroom
    max_value: tl.constexpr = format.max_representable_value
    if scale_format is not None:
        tensor_scale = tl.load(tensor_scale_ptr)
        level = block_level(amax, tensor_scale, max_value, scale_format)
        divisor = level * tensor_scale
        multiplier = divisor if scaling.with_tensor_scale else level
    else:
        divisor = (
            as_power_of_two(amax, max_value, scaling) if scaling.is_power else as_scale(amax, max_value, scaling.most)
        )
        multiplier = divisor
    overflows: tl.constexpr = saturation == "none" and format.has_nan
    limit: tl.constexpr = format.overflow_value if overflows else max_value
    a, is_infinite, q = quotient_of(x, divisor, limit, format, rounding, scaling.is_power)
    return project(a, is_infinite, q < 0, random, format, saturation, rounding), q, multiplier, i


@triton.jit
def store_tile(y, out_ptr, i, rows, columns, down, across, tile: tl.constexpr):
    if tile.is_full:
        tl.store(out_ptr + i, y)
    else:
        _, row_exists = span(down * tile.high, tile.high, tile.height_room, tile.height, rows, 0)
        _, column_exists = span(across * tile.wide, tile.wide, tile.width_room, tile.width, columns, 1)
        tl.store(out_ptr + i, y, row_exists & column_exists)


@triton.jit
def store_operand(
    x, tensor_scale_ptr, random_ptr, out_ptr, matrix, rows, columns, down, across, step_out, step_down, step_across,
    tile: tl.constexpr, format: tl.constexpr, scale_format: tl.constexpr, saturation: tl.constexpr,
    rounding: tl.constexpr, scaling: tl.constexpr, transforms: tl.constexpr,
):  # fmt: skip
    """The values of the numbers of a tile of blocks, behind the Hadamard transform where it transforms."""
    r, q, multiplier, i = project_tile(
        hadamard(x, tile) if transforms else x, tensor_scale_ptr, random_ptr, matrix, rows, columns, down, across,
        step_out, step_down, step_across, tile, format, scale_format, saturation, rounding, scaling,
    )  # fmt: skip
    y = (with_sign_of(r, q, format) * multiplier).to(out_ptr.dtype.element_ty)
    store_tile(y, out_ptr, i, rows, columns, down, across, tile)


@triton.jit(do_not_specialize=_INTEGERS)
def quantize_operand_kernel(
    x_ptr, tensor_scale_ptr, random_ptr, out_ptr, rows: tl.int64, columns: tl.int64, tiles_down: tl.int64,
    tiles_across: tl.int64, step_out: tl.int64, step_down: tl.int64, step_across: tl.int64, tile: tl.constexpr,
    format: tl.constexpr, scale_format: tl.constexpr, saturation: tl.constexpr, rounding: tl.constexpr,
    scaling: tl.constexpr, transforms: tl.constexpr,
):  # fmt: skip
    """One tile of blocks a program; the steps are those of the row-major index of x, which random numbers go by."""
    matrix, rows, columns, down, across = tile_of(rows, columns, tiles_down, tiles_across, tile)
    x = load_tile(x_ptr, matrix, rows, columns, down, across, tile)
    store_operand(
        x, tensor_scale_ptr, random_ptr, out_ptr, matrix, rows, columns, down, across, step_out, step_down,
        step_across, tile, format, scale_format, saturation, rounding, scaling, transforms,
    )  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS[:4])
def quantize_operands_kernel(
    x_ptr, along_scale_ptr, down_scale_ptr, along_ptr, down_ptr, rows: tl.int64, columns: tl.int64,
    tiles_down: tl.int64, tiles_across: tl.int64, along_tile: tl.constexpr, down_tile: tl.constexpr,
    format: tl.constexpr, scale_format: tl.constexpr, saturation: tl.constexpr, rounding: tl.constexpr,
    scaling: tl.constexpr, along_transforms: tl.constexpr, down_transforms: tl.constexpr,
):  # fmt: skip
    """One tile a program, as operands of blocks along rows and of blocks down columns of contiguous matrices.

    It is read twice, by the threads that have whole rows of a block and by those that have its columns: the second time
    from the first-level cache.
    """
    matrix, rows, columns, down, across = tile_of(rows, columns, tiles_down, tiles_across, along_tile)
    x = load_tile(x_ptr, matrix, rows, columns, down, across, along_tile)
    store_operand(
        x, along_scale_ptr, x_ptr, along_ptr, matrix, rows, columns, down, across, 0, 0, 0, along_tile, format,
        scale_format, saturation, rounding, scaling, along_transforms,
    )  # fmt: skip
    x = load_tile(x_ptr, matrix, rows, columns, down, across, down_tile)
    store_operand(
        x, down_scale_ptr, x_ptr, down_ptr, matrix, rows, columns, down, across, 0, 0, 0, down_tile, format,
        scale_format, saturation, rounding, scaling, down_transforms,
    )  # fmt: skip


@triton.jit
def store_packed(codes, out_ptr, matrix, rows, columns, down, across, tile: tl.constexpr, bits: tl.constexpr):
    """The bytes of a tile's codes, 8 of which make a word."""
    eights: tl.constexpr = tile.width_room // 8
    word: tl.constexpr = tl.int32 if bits <= 4 else tl.int64
    row, row_exists = span(down * tile.high, tile.high, tile.height_room, tile.height, rows, 0)
    eight, exists = span(across * tile.wide, tile.wide, eights, tile.width // 8, columns // 8, 1)
    first = ((matrix * rows + row) * (columns // 8) + eight) * bits
    codes = codes.to(word).reshape(tile.high, tile.height_room, tile.wide, eights, 8)
    # The bits of a word are those of one code each, so that the sum has no carries.
    words = tl.sum(codes << tl.arange(0, 8)[None, None, None, None] * bits, axis=4)
    j = tl.arange(0, 4 if bits <= 4 else 8)[None, None, None, None]
    out = ((tl.expand_dims(words, 4) >> j * 8) & 255).to(tl.uint8)
    exists = tl.expand_dims(row_exists & exists, 4) & (j < bits)
    tl.store(out_ptr + tl.expand_dims(first, 4) + j, out, exists)


@triton.jit
def store_scales(multiplier, scales_ptr, matrix, rows, columns, down, across, tile: tl.constexpr,
                 scale_format: tl.constexpr, is_power: tl.constexpr):  # fmt: skip
    """One scale a block, as a code of its format."""
    blocks_down, blocks_across = tl.cdiv(rows, tile.height), tl.cdiv(columns, tile.width)
    row, row_exists = span(down * tile.high, tile.high, 1, 1, blocks_down, 0)
    column, column_exists = span(across * tile.wide, tile.wide, 1, 1, blocks_across, 1)
    if scale_format is not None:
        if scale_format.is_signed:
            scales = pack(multiplier, multiplier, scale_format)
        else:
            scales = pack_in_float64(multiplier, multiplier, scale_format)
    elif is_power:
        scales = multiplier.to(tl.int32, bitcast=True) >> 23  # 0 of 2^-127, 255 of NaN
    else:
        scales = multiplier
    at = (matrix * blocks_down + row) * blocks_across + column
    tl.store(scales_ptr + at, scales.to(scales_ptr.dtype.element_ty), row_exists & column_exists)


@triton.jit(do_not_specialize=_INTEGERS)
def encode_blocks_kernel(
    x_ptr, tensor_scale_ptr, random_ptr, scales_ptr, out_ptr, rows: tl.int64, columns: tl.int64, tiles_down: tl.int64,
    tiles_across: tl.int64, step_out: tl.int64, step_down: tl.int64, step_across: tl.int64, tile: tl.constexpr,
    format: tl.constexpr, scale_format: tl.constexpr, saturation: tl.constexpr, rounding: tl.constexpr,
    scaling: tl.constexpr, packs: tl.constexpr,
):  # fmt: skip
    """:func:`quantize_operand_kernel` for codes, packed where packs, and a scale a block."""
    matrix, rows, columns, down, across = tile_of(rows, columns, tiles_down, tiles_across, tile)
    r, q, multiplier, i = project_tile(
        load_tile(x_ptr, matrix, rows, columns, down, across, tile), tensor_scale_ptr, random_ptr, matrix, rows,
        columns, down, across, step_out, step_down, step_across, tile, format, scale_format, saturation, rounding,
        scaling,
    )  # fmt: skip
    store_scales(multiplier, scales_ptr, matrix, rows, columns, down, across, tile, scale_format, scaling.is_power)
    codes = pack(r, q, format)
    if packs:
        store_packed(codes, out_ptr, matrix, rows, columns, down, across, tile, format.bits)
    else:
        store_tile(codes.to(tl.uint8), out_ptr, i, rows, columns, down, across, tile)
