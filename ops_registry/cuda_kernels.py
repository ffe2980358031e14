"""The rounding as a Triton device function, and the kernels around it: ``cuda.py`` imports this when it launches.

Steps as in ``aten.py``: divide, round, saturate, multiply; in the codecs also pack and unpack. Floats are taken apart
through their bits, of float32 or of float64; ``format`` is an FP8Format, whose numbers become constants of the kernel.

The words, which aten.py and csrc/round.h share:

    q = x / scale      a = |q|, limited to max or one value beyond      r   a rounded and saturated
    power = 2^e        at or below a, e being at least min_exponent     quantum = power * 2^-M, the spacing of values
    below              the value at or below a                          excess = a - below    nu = excess / quantum
"""

import triton
import triton.language as tl

# Kernels are compiled for types, formats and modes, not for values of integers.
_INTEGERS = ["n", "size0", "size1", "size2", "stride0", "stride1", "stride2", "stride3"]


@triton.jit
def parts_of(scale):
    """(power, m, r) with |scale| = m / |power| for a power of two and r = 1 / m, correctly rounded; float32.

    power has the sign of scale, and m is in [1/2, 1), below that for a subnormal scale and up to 4 from 2^126 on.
    Where scale is 0, infinite or NaN, power is its reciprocal and m = 1.
    """
    bits = scale.to(tl.int32, bitcast=True)
    exponent = bits & 0x7F800000
    power = (tl.maximum(0x7E800000 - exponent, 0x00800000) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
    is_special = (exponent == 0x7F800000) | (scale == 0)
    m = tl.where(is_special, scale, scale * power)
    r = tl.div_rn(1.0, m)
    return tl.where(is_special, r, power), tl.where(is_special, 1.0, m), tl.where(is_special, 1.0, r)


@triton.jit
def quotient(x, scale, limit: tl.constexpr, by_reciprocal: tl.constexpr, in_float64: tl.constexpr):
    """(min(|x / scale|, limit), whether the quotient is infinite, a number with its sign), correctly rounded.

    in_float64: to the compute type, and then given in float64, for which alone the limit may be too large.

    by_reciprocal: scale serves many x, and results below 2^-100 need not be exact. x * power is exact where the
    quotient is not below that; a product with r is off by less than 1.5 ulp, and what is left of the dividend corrects
    it: tests/test_cuda.py tries the quotients for which that might not do. A limited quotient may be an ulp off the
    limit, which rounding to nearest removes. Quotients overflow from m * 2^128 on.
    """
    if by_reciprocal:
        power, m, r = parts_of(scale)
        x = x * power
        a = tl.minimum(tl.abs(x), m * limit, propagate_nan=tl.PropagateNan.ALL)
        q = a * r
        return tl.fma(tl.fma(q, -m, a), r, q), tl.abs(x) >= m * 2.0**64 * 2.0**64, x
    else:
        q = x / scale if x.dtype == tl.float64 else tl.div_rn(x, scale)  # Triton's float32 `/` is not IEEE's
        if in_float64:
            q = q.to(tl.float64)
        a = tl.abs(q)
        return tl.where(a > limit, limit, a), a == float("inf"), q


@triton.jit
def power_of_two_below(a, format: tl.constexpr):
    """(2^max(floor(log2 a), min_exponent), its biased exponent, its reciprocal) for a >= 0, from the bits of a.

    An infinity or NaN gives infinity. The reciprocal of 2^e has the biased exponent 2 * bias - e; the limits of a
    format keep both normal.
    """
    if a.dtype == tl.float64:
        power = (a.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
        power = tl.maximum(power, 2.0**format.min_exponent)
        exponent = power.to(tl.int64, bitcast=True) >> 52
        return power, exponent, ((2046 - exponent) << 52).to(tl.float64, bitcast=True)
    else:
        power = (a.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.maximum(power, 2.0**format.min_exponent)
        exponent = power.to(tl.int32, bitcast=True) >> 23
        return power, exponent, ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def code_is_odd(exponent, dtype: tl.constexpr, format: tl.constexpr):
    """Whether the code of a power of two is odd where M = 0: its exponent with the format's bias is the code."""
    bias: tl.constexpr = 1023 if dtype == tl.float64 else 127
    return (exponent + (bias + format.bias)) % 2 == 1


@triton.jit
def round_nearest(a, format: tl.constexpr):
    """a >= 0 to the nearest value of the format, its exponent unbounded above; ties to the even code.

    a < 2 * power, so with magic = power * 2^(F - M), F the fraction bits of the float, a + magic is in
    [magic, 2 * magic], where floats are a quantum apart. Their sum is rounded to it, ties to
    the even multiple, and subtracting magic is exact. For M > 0 the even multiple has the even code.
    """
    fraction_bits: tl.constexpr = 52 if a.dtype == tl.float64 else 23
    power, exponent, _ = power_of_two_below(a, format)
    magic = power * 2.0 ** (fraction_bits - format.mantissa_bits)
    r = (a + magic) - magic
    if format.mantissa_bits == 0:
        # A tie between 2^k and 2^(k+1) went up; where the code of 2^k is even it stays.
        r = tl.where((a == power * 1.5) & ~code_is_odd(exponent, a.dtype, format), power, r)
    return r


@triton.jit
def round_by(a, is_negative, random, format: tl.constexpr, rounding: tl.constexpr):
    """a >= 0 to itself or to the neighbour on the grid that the mode chooses.

    Scaling by powers of two is exact, but for nu, which may underflow: it is compared with 1/2 and 2^-24 only. quanta
    counts what is below, so nu comes without excess. is_inexact is exact.
    """
    power, exponent, reciprocal = power_of_two_below(a, format)
    quantum = power * 2.0**-format.mantissa_bits
    in_quanta = a * (reciprocal * 2.0**format.mantissa_bits)
    quanta = tl.floor(in_quanta)
    nu = in_quanta - quanta
    is_inexact = a > quanta * quantum
    if rounding == "nearest_ties_to_away":
        away = nu >= 0.5
    elif rounding == "toward_zero":
        away = nu < 0
    elif rounding == "toward_positive":
        away = is_inexact & ~is_negative
    elif rounding == "toward_negative":
        away = is_inexact & is_negative
    elif rounding == "to_odd":
        half = quanta * 0.5
        is_odd = half != tl.floor(half)
        if format.mantissa_bits == 0:
            is_odd = is_odd & code_is_odd(exponent, a.dtype, format)
        away = is_inexact & ~is_odd
    else:  # P3109's StochasticA: up where floor(nu * 2^N) >= 2^N - R, with R the low N bits of random
        tl.static_assert(rounding == "stochastic")
        n: tl.constexpr = 8 if random.dtype == tl.uint8 else 24
        r = (random & ((1 << n) - 1)).to(a.dtype)
        away = nu >= 1.0 - r * 2.0**-n  # which is exact, and so is the comparison
    return (quanta + away.to(a.dtype)) * quantum


@triton.jit
def round_to_format(a, is_negative, random, format: tl.constexpr, rounding: tl.constexpr):
    if rounding == "nearest_ties_to_even":
        return round_nearest(a, format)
    else:
        return round_by(a, is_negative, random, format, rounding)


@triton.jit
def project(
    a, is_infinite, is_negative, random, format: tl.constexpr, saturation: tl.constexpr, rounding: tl.constexpr
):
    """The magnitude of the projection, rounded and saturated, of a = min(|q|, the limit); NaN stays NaN.

    Rounding is monotone and max is on the grid, so limiting first gives the same.
    """
    max_value: tl.constexpr = format.max_representable_value
    r = round_to_format(a, is_negative, random, format, rounding)
    if saturation == "none" and format.has_nan:
        overflows = r > max_value
        if rounding == "toward_zero" or rounding == "toward_positive" or rounding == "toward_negative":
            stops = overflows & ~is_infinite  # rounding a finite value inwards stops at max
            if rounding == "toward_positive":
                stops = stops & is_negative
            elif rounding == "toward_negative":
                stops = stops & ~is_negative
            r = tl.where(stops, max_value, r)
            overflows = overflows & ~stops
        return tl.where(overflows, float("inf") if format.has_inf else float("nan"), r)
    elif saturation == "propagate" and format.has_inf:
        return tl.where(is_infinite, float("inf"), r)
    else:
        return r


@triton.jit
def project_unsigned(
    a, is_infinite, q, random, format: tl.constexpr, saturation: tl.constexpr, rounding: tl.constexpr
):  # fmt: skip
    """:func:`project` in an unsigned format: what is below its smallest value becomes that, or NaN in "none"."""
    is_nan: tl.constexpr = saturation == "none" and format.has_nan
    lowest: tl.constexpr = 0.0 if format.has_zero else format.smallest_subnormal
    is_below = q < 0 if format.has_zero else q <= 0
    if not format.has_zero:
        a = tl.where(a < lowest, lowest, a)
    r = project(a, is_infinite & ~is_below, is_below, random, format, saturation, rounding)
    if is_nan:
        return tl.where(is_below & (r > 0), float("nan"), r)
    else:
        return tl.where(is_below, lowest, r)


@triton.jit
def with_sign_of(r, q, format: tl.constexpr):
    """The magnitude r with the sign bit of q; without -0, zero has none, and unsigned nothing has."""
    if not format.is_signed:
        return r
    else:
        if q.dtype == tl.float64:
            sign = q.to(tl.int64, bitcast=True) & -0x8000000000000000
            signed = (r.to(tl.int64, bitcast=True) | sign).to(tl.float64, bitcast=True)
        else:
            sign = q.to(tl.int32, bitcast=True) & -0x80000000
            signed = (r.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        return signed if format.has_negative_zero else tl.where(r == 0, r, signed)


@triton.jit
def pack_in_float64(r, q, format: tl.constexpr):
    """:func:`pack` for every format. Below 2^min_exponent, adding that makes the exponent the smallest normal's."""
    smallest: tl.constexpr = 2.0**format.min_exponent
    m: tl.constexpr = format.mantissa_bits
    first: tl.constexpr = (1023 + format.min_exponent) << m  # what a subnormal has too much, and a normal but for 2^M
    r = r.to(tl.float64)
    is_subnormal = r < smallest
    code = tl.where(is_subnormal, r + smallest, r).to(tl.int64, bitcast=True) >> (52 - m)
    code = code - tl.where(is_subnormal, first, first - (1 << m))
    if not format.has_zero:
        code = code - 1
    if format.inf_code is not None:
        code = tl.where(r == float("inf"), format.inf_code, code)
    if format.is_signed:
        is_negative = q.to(tl.float64).to(tl.int64, bitcast=True) < 0
        if not format.has_negative_zero:
            is_negative = is_negative & (code != 0)
        code = tl.where(is_negative, code + format.sign_code, code)
    nan_code: tl.constexpr = format.max_code if format.nan_code is None else format.nan_code
    return tl.where(r != r, nan_code, code)


@triton.jit
def pack(r, q, format: tl.constexpr):
    """The codes of magnitudes r on the grid, infinite or NaN, with the sign of q.

    Times 2^(-126 - min_exponent), normals of the format are normal float32 and subnormals are subnormal, so the leading
    bits are the code. The product is exact, being a multiple of 2^(-126 - M). The code is put together where the sign
    bit is and shifted down last, which costs nothing where that takes the highest byte.
    """
    down: tl.constexpr = 32 - format.bits
    to_normal: tl.constexpr = -126 - format.min_exponent
    # A power below 2^-126 is no constant for a compiler that may flush it.
    magnitude = r.to(tl.float32) * 2.0 ** max(to_normal, -126) * 2.0 ** min(to_normal + 126, 0)
    code = magnitude.to(tl.uint32, bitcast=True) << (8 - format.exponent_bits)
    if format.inf_code is not None:
        code = tl.where(r == float("inf"), format.inf_code << down, code)
    sign = q.to(tl.float32).to(tl.uint32, bitcast=True) & 0x80000000
    if not format.has_negative_zero:
        sign = tl.where(code == 0, 0, sign)
    nan_code: tl.constexpr = format.max_code if format.nan_code is None else format.nan_code
    return tl.where(r != r, nan_code << down, code | sign) >> down


@triton.jit
def unpack(codes, format: tl.constexpr):
    """The values of codes in float32, exactly: the inverse of :func:`pack`."""
    codes = codes.to(tl.int32)
    magnitude = codes & (format.sign_code - 1)
    value = (magnitude << (23 - format.mantissa_bits)).to(tl.float32, bitcast=True) * 2.0**126
    value = value * 2.0**format.min_exponent
    sign = codes & format.sign_code
    if not format.has_negative_zero:
        value = tl.where((sign != 0) & (magnitude == 0), float("nan"), value)
    elif format.has_nan:
        value = tl.where(magnitude > format.max_code, float("nan"), value)
        if format.inf_code is not None:
            value = tl.where(magnitude == format.inf_code, float("inf"), value)
    return (value.to(tl.int32, bitcast=True) | (sign << (32 - format.bits))).to(tl.float32, bitcast=True)


@triton.jit
def unpack_in_float64(codes, format: tl.constexpr):
    """:func:`unpack` for every format, in float64."""
    codes = codes.to(tl.int64) & ((1 << format.bits) - 1)
    magnitude = codes & (format.sign_code - 1)
    value = (magnitude if format.has_zero else magnitude + 1) << (52 - format.mantissa_bits)
    value = value.to(tl.float64, bitcast=True) * 2.0**1022 * 2.0**format.min_exponent
    if not format.has_negative_zero:
        value = tl.where((codes == format.sign_code), float("nan"), value)
    elif format.has_nan:
        value = tl.where(magnitude > format.max_code, float("nan"), value)
        if format.inf_code is not None:
            value = tl.where(magnitude == format.inf_code, float("inf"), value)
    sign = (codes & format.sign_code) << (63 - format.exponent_bits - format.mantissa_bits)
    return (value.to(tl.int64, bitcast=True) | sign).to(tl.float64, bitcast=True)  # Triton's -value is 0 - value


@triton.jit
def block_of(rows: tl.constexpr, columns: tl.constexpr, row_stride):
    return row_stride * tl.arange(0, rows)[:, None] + tl.arange(0, columns)[None, :]


@triton.jit
def elements_of(base, row_stride, walk: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """The offsets of a block's elements."""
    i = base + block_of(rows, columns, row_stride)
    # Below a row of scales, a thread takes four elements of any dtype at a time, as it does of the scales.
    return tl.max_contiguous(i, [1, 4]) if walk.is_columns else i


@triton.jit
def elements_exist(base, row_stride, n, walk: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Which elements of a block are among the n; below a row of scales, rows are or are not as a whole."""
    return base + block_of(rows, 1 if walk.is_columns else columns, row_stride) < n


@triton.jit
def load_scale(
    scale_ptr, base, column, n, sizes, strides, walk: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr
):  # fmt: skip
    """The scales of a block: one, or of shape [1, columns], [rows, 1] or [rows, columns].

    Where scale walks through nested runs of rows, the innermost first, a step along a run moves it by the stride of the
    run, in units of what a row moves it by, 1 or its columns. Divisions of vectors are of 32 unsigned bits: inner runs
    are shorter than 2^31, and so is what is added to them. n None: the whole block is there. One scale may be given as
    a number.
    """
    if walk.runs == 0:
        return tl.load(scale_ptr) if scale_ptr.dtype.is_ptr() else scale_ptr
    elif walk.is_columns:
        return tl.load(scale_ptr + column + block_of(1, columns, 0))
    else:
        width: tl.constexpr = columns if walk.moves_in_row else 1
        row = base // columns
        i = tl.arange(0, rows).to(tl.uint32)
        offset = tl.zeros([rows], tl.int64)
        for run in tl.static_range(walk.runs - 1):
            size = sizes[run].to(tl.uint32)
            i += (row % sizes[run]).to(tl.uint32)
            row = row // sizes[run]
            carry = i // size
            offset += (i - carry * size) * strides[run]
            i = carry
        offset += (row + i.to(row.dtype)) * strides[walk.runs - 1]
        offset = width * offset[:, None] + tl.arange(0, width)[None, :]
        return tl.load(scale_ptr + offset, None if n is None else base + block_of(rows, width, columns) < n)


@triton.jit
def philox(random_ptr, block, is_wide: tl.constexpr):
    """The four words of a block, as philox.py says. A product of 64 bits has both halves, where tl.philox takes two."""
    seed = tl.load(random_ptr).to(tl.uint64, bitcast=True)
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    x0 = block.to(tl.uint32)
    x1, x2, x3 = (block >> 32).to(tl.uint32) if is_wide else x0 * 0, x0 * 0, x0 * 0
    for _ in tl.static_range(10):
        even, odd = x0.to(tl.uint64) * 0xD2511F53, x2.to(tl.uint64) * 0xCD9E8D57
        x0, x1 = (odd >> 32).to(tl.uint32) ^ x1 ^ key0, odd.to(tl.uint32)
        x2, x3 = (even >> 32).to(tl.uint32) ^ x3 ^ key1, even.to(tl.uint32)
        key0, key1 = key0 + tl.full((), 0x9E3779B9, tl.uint32), key1 + tl.full((), 0xBB67AE85, tl.uint32)
    return x0, x1, x2, x3


@triton.jit
def random_of(
    random_ptr, i, mask, base, row_stride, rows: tl.constexpr, columns: tl.constexpr, is_wide: tl.constexpr
):  # fmt: skip
    """The random numbers of a block's elements: those given, or what follows from a seed as philox.py says."""
    if random_ptr.dtype.element_ty != tl.int64:
        random = tl.load(random_ptr + i, mask)
    elif columns % 4 == 0:  # and so is base: a block of words serves four elements of a row
        fours = base + row_stride * tl.arange(0, rows)[:, None] + 4 * tl.arange(0, columns // 4)[None, :]
        x0, x1, x2, x3 = philox(random_ptr, fours >> 2, is_wide)
        random = tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(rows, columns).to(tl.int32, bitcast=True)
    else:
        x0, x1, x2, x3 = philox(random_ptr, i >> 2, is_wide)
        is_odd = i % 2 == 1
        words = tl.where(i % 4 < 2, tl.where(is_odd, x1, x0), tl.where(is_odd, x3, x2))
        random = words.to(tl.int32, bitcast=True)
    return random


@triton.jit
def project_block(
    x_ptr, scale_ptr, random_ptr, out_ptr, base, column, row_stride, n, sizes, strides, walk: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, format: tl.constexpr, saturation: tl.constexpr, rounding: tl.constexpr,
    result: tl.constexpr,
):  # fmt: skip
    i = elements_of(base, row_stride, walk, rows, columns)
    mask = None if n is None else elements_exist(base, row_stride, n, walk, rows, columns)
    x = tl.load(x_ptr + i, mask)
    compute: tl.constexpr = tl.float64 if x.dtype == tl.float64 else tl.float32
    scale = load_scale(scale_ptr, base, column, n, sizes, strides, walk, rows, columns).to(compute)
    random = None
    if rounding == "stochastic":
        random = random_of(random_ptr, i, mask, base, row_stride, rows, columns, walk.is_wide)
    # One step beyond max is enough to see an overflow.
    overflows: tl.constexpr = saturation == "none" and format.has_nan
    limit: tl.constexpr = format.overflow_value if overflows else format.max_representable_value
    is_nearest: tl.constexpr = rounding == "nearest_ties_to_even" and format.quantum >= 2.0**-98
    is_wide: tl.constexpr = format.needs_float64
    may_vanish: tl.constexpr = format.has_zero and not is_wide  # as q may in the product with a reciprocal
    by_reciprocal: tl.constexpr = is_nearest and may_vanish and compute == tl.float32 and not walk.moves_in_row
    a, is_infinite, q = quotient(x.to(compute), scale, limit, by_reciprocal, is_wide)
    if format.is_signed:
        r = project(a, is_infinite, q < 0, random, format, saturation, rounding)
    else:
        r = project_unsigned(a, is_infinite, q, random, format, saturation, rounding)
    out_dtype: tl.constexpr = out_ptr.dtype.element_ty
    if result == "packed":
        codes = pack_in_float64(r, q, format) if is_wide or not format.is_signed else pack(r, q, format)
        tl.store(out_ptr + i, codes.to(out_dtype), mask)
    elif result == "projected":
        tl.store(out_ptr + i, with_sign_of(r, q, format).to(compute).to(out_dtype), mask)
    else:  # multiply
        tl.store(out_ptr + i, (with_sign_of(r, q, format).to(compute) * scale).to(x.dtype), mask)


@triton.jit
def decode_block(
    codes_ptr, scale_ptr, out_ptr, base, column, row_stride, n, sizes, strides, walk: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, format: tl.constexpr,
):  # fmt: skip
    i = elements_of(base, row_stride, walk, rows, columns)
    mask = None if n is None else elements_exist(base, row_stride, n, walk, rows, columns)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    compute: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    scale = load_scale(scale_ptr, base, column, n, sizes, strides, walk, rows, columns).to(compute)
    codes = tl.load(codes_ptr + i, mask)
    value = unpack_in_float64(codes, format) if format.needs_float64 or not format.is_signed else unpack(codes, format)
    value = value.to(compute)
    tl.store(out_ptr + i, (value * scale).to(dtype), mask)


@triton.jit
def place_of(n, size0, size1, size2, walk: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """(offset of this program's block, its column, stride of its rows, n, sizes), of 64 bits only where needed.

    Blocks tile memory, or a matrix with a scale per column.
    """
    index: tl.constexpr = tl.int64 if walk.is_wide else tl.int32
    program = tl.program_id(0).to(index)
    sizes = (size0.to(index), size1.to(index), size2.to(index))
    if walk.is_columns:
        row_stride = sizes[0] * columns
        column = program % sizes[0] * columns
        base = program // sizes[0] * (rows * row_stride) + column
    else:
        row_stride, column = columns, 0
        base = program * (rows * columns)
    return base, column, row_stride, n.to(index), sizes


@triton.jit(do_not_specialize=_INTEGERS)
def project_kernel(
    scale_ptr, x_ptr, random_ptr, out_ptr, n: tl.int64, size0: tl.int64, size1: tl.int64, size2: tl.int64,
    stride0: tl.int64, stride1: tl.int64, stride2: tl.int64, stride3: tl.int64, walk: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, format: tl.constexpr, saturation: tl.constexpr, rounding: tl.constexpr,
    result: tl.constexpr,
):  # fmt: skip
    """quantize, project or encode, by the result: n elements in memory order, a block a program."""
    base, column, row_stride, n, sizes = place_of(n, size0, size1, size2, walk, rows, columns)
    strides = (stride0, stride1, stride2, stride3)
    if base + (rows - 1) * row_stride + columns <= n:  # without a mask, accesses are of 16 bytes whatever n is
        project_block(
            x_ptr, scale_ptr, random_ptr, out_ptr, base, column, row_stride, None, sizes, strides, walk, rows, columns,
            format, saturation, rounding, result,
        )  # fmt: skip
    else:
        project_block(
            x_ptr, scale_ptr, random_ptr, out_ptr, base, column, row_stride, n, sizes, strides, walk, rows, columns,
            format, saturation, rounding, result,
        )  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def decode_kernel(
    scale_ptr, codes_ptr, out_ptr, n: tl.int64, size0: tl.int64, size1: tl.int64, size2: tl.int64,
    stride0: tl.int64, stride1: tl.int64, stride2: tl.int64, stride3: tl.int64, walk: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, format: tl.constexpr,
):  # fmt: skip
    """decode: n codes in memory order, a block a program."""
    base, column, row_stride, n, sizes = place_of(n, size0, size1, size2, walk, rows, columns)
    strides = (stride0, stride1, stride2, stride3)
    if base + (rows - 1) * row_stride + columns <= n:
        decode_block(
            codes_ptr, scale_ptr, out_ptr, base, column, row_stride, None, sizes, strides, walk, rows, columns, format
        )  # fmt: skip
    else:
        decode_block(
            codes_ptr, scale_ptr, out_ptr, base, column, row_stride, n, sizes, strides, walk, rows, columns, format
        )
