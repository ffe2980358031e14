"""Matrix products with the accumulator of a tensor core in Triton: ``products.py`` for a tile of outputs at a time.

Operands come as :func:`ops_registry.products.factors` makes them, [batch, K, rows or columns]. Triton must not fuse
products into sums (``enable_fp_fusion=False``): the chain takes the error of a sum apart.
"""

import triton
import triton.language as tl

TILE = 64  # rows and columns
NUM_WARPS = 8


@triton.jit
def power_of_two(exponents, dtype: tl.constexpr):
    if dtype == tl.float64:
        return ((exponents.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((exponents + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponents_of(x):
    if x.dtype == tl.float64:
        return (((x.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023).to(tl.int32)
    else:
        return ((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127


@triton.jit
def toward_zero(x):
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def to_nearest(x):
    """Ties to even. |x| is at most 2^24, but for infinity and NaN, and comes in float64 or at most 2^14 in float32."""
    magic: tl.constexpr = 2.0**52 if x.dtype == tl.float64 else 2.0**23
    a = tl.abs(x)
    r = (a + magic) - magic
    is_negative = (x.to(tl.int64, bitcast=True) if x.dtype == tl.float64 else x.to(tl.int32, bitcast=True)) < 0
    return tl.where(is_negative, -r, r)


@triton.jit
def round_kept(total, rule: tl.constexpr):
    least: tl.constexpr = max(rule.min_exponent, rule.least_exponent)
    exponents = tl.minimum(tl.maximum(exponents_of(total), least), rule.max_exponent) - rule.mantissa_bits
    quanta = total * power_of_two(-exponents, total.dtype)
    kept = (toward_zero(quanta) if rule.is_truncated else to_nearest(quanta)) * power_of_two(exponents, total.dtype)
    limit: tl.constexpr = 2.0 ** (rule.max_exponent + 1)
    if total.dtype == tl.float32:  # what narrow operands can sum to is below it
        return kept
    else:
        return tl.where(kept >= limit, float("inf"), tl.where(kept <= -limit, float("-inf"), kept))


@triton.jit
def sum_to_odd(a, b):
    """a + b in float64, rounded to odd where inexact: whatever rounds it next to fewer bits rounds the exact sum."""
    total = a + b
    of_b = total - a
    error = (a - (total - of_b)) + (b - of_b)
    bits = total.to(tl.int64, bitcast=True)
    away = tl.where((error > 0) == (total > 0), 1, -1)
    is_odd = (error != error) | (error == 0) | ((bits & 1) == 1)
    return tl.where(is_odd, bits, bits + away).to(tl.float64, bitcast=True)


@triton.jit
def read(values, line, stride, places, mask, filler):
    return tl.load(values + line * stride + places, mask=mask, other=filler)


@triton.jit
def term(a, b, first, end, rows, columns, row, column, in_rows, in_columns, zero):
    """The sum of the products of lines first to end."""
    total = zero
    for k in range(first, end):
        x = read(a, k, rows, row, in_rows, 0.0)
        total += x[:, None] * read(b, k, columns, column, in_columns, 0.0)[None, :]
    return total


@triton.jit
def largest_exponent(a, b, first, end, rows, columns, row, column, in_rows, in_columns, least):
    """The largest of the sums of exponents of lines first to end, and least."""
    for k in range(first, end):
        x = read(a, k, rows, row, in_rows, 0)
        least = tl.maximum(least, x[:, None] + read(b, k, columns, column, in_columns, 0)[None, :])
    return least


@triton.jit
def aligned_sum(
    kept, a, b, a_exponents, b_exponents, first, end, rows, columns, row, column, in_rows, in_columns, zero,
    rule: tl.constexpr,
):  # fmt: skip
    """kept with the group of products of lines first to end added."""
    own = exponents_of(kept)
    counts = (kept != 0) & (tl.abs(kept) < float("inf"))
    most = tl.where(counts, tl.maximum(own, rule.min_exponent), rule.least_exponent)
    if rule.sums_block:
        for block in range(first, end, rule.scaled):
            last = tl.minimum(block + rule.scaled, end)
            of_block = largest_exponent(
                a_exponents, b_exponents, block, last, rows, columns, row, column, in_rows, in_columns, most
            )
            value = term(a, b, block, last, rows, columns, row, column, in_rows, in_columns, zero)
            most = tl.where(value == 0, most, of_block)
    else:
        most = largest_exponent(
            a_exponents, b_exponents, first, end, rows, columns, row, column, in_rows, in_columns, most
        )
    scale = power_of_two(rule.fraction_bits - most, kept.dtype)
    summed = toward_zero(kept * scale)
    for block in range(first, end, rule.products_of_term):
        last = tl.minimum(block + rule.products_of_term, end)
        value = term(a, b, block, last, rows, columns, row, column, in_rows, in_columns, zero)
        summed += toward_zero(value * scale)
    kept = round_kept(summed * power_of_two(most - rule.fraction_bits, kept.dtype), rule)
    return tl.where(kept == 0, 0.0, kept)  # never -0


@triton.jit
def product_kernel(a, b, a_exponents, b_exponents, out, rows, columns, size, rule: tl.constexpr, tile: tl.constexpr):
    tiles = tl.cdiv(columns, tile)
    row = tl.program_id(0) // tiles * tile + tl.arange(0, tile)
    column = tl.program_id(0) % tiles * tile + tl.arange(0, tile)
    in_rows, in_columns = row < rows, column < columns
    batch = tl.program_id(1).to(tl.int64)
    a += batch * size * rows
    a_exponents += batch * size * rows
    b += batch * size * columns
    b_exponents += batch * size * columns
    zero = tl.zeros([tile, tile], dtype=a.dtype.element_ty)
    kept, total = zero, tl.zeros([tile, tile], dtype=tl.float32)
    for first in range(0, size, rule.group):
        end = tl.minimum(first + rule.group, size)
        if rule.fraction_bits is None:
            x, y = read(a, first, rows, row, in_rows, 0.0), read(b, first, columns, column, in_columns, 0.0)
            kept = round_kept(sum_to_odd(kept, x[:, None] * y[None, :]), rule)
        else:
            kept = aligned_sum(
                kept, a, b, a_exponents, b_exponents, first, end, rows, columns, row, column, in_rows, in_columns, zero,
                rule,
            )  # fmt: skip
        if rule.promotion is not None:
            is_whole = end % rule.promotion == 0
            total = tl.where(is_whole, total + kept.to(tl.float32), total)
            kept = tl.where(is_whole, zero, kept)
    if rule.promotion is None:
        total = kept.to(tl.float32)
    else:
        total = tl.where(size % rule.promotion == 0, total, total + kept.to(tl.float32))
    nan = tl.full([tile, tile], 0x7FFFFFFF, tl.int32).to(tl.float32, bitcast=True)
    total = tl.where(total != total, nan, total)
    places = (batch * rows + row[:, None]) * columns + column[None, :]
    tl.store(out + places, total, mask=in_rows[:, None] & in_columns[None, :])


def launch(left, right, out, rule) -> None:
    """Fills out [batch, rows, columns] on its device and the current stream."""
    batch, rows, columns = out.shape
    grid = (triton.cdiv(rows, TILE) * triton.cdiv(columns, TILE), batch)
    product_kernel[grid](
        left.values,
        right.values,
        left.exponents,
        right.exponents,
        out,
        rows,
        columns,
        right.values.shape[1],
        rule,
        TILE,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
