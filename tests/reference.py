"""The definition, for tests: list every value of a format in exact arithmetic and search in the list.

It reads the eight fields of a format and nothing else of the package, and shares no trick with any kernel. A rounded
quotient is compared in float64, where every value, every midpoint and every float32 quotient is exact.
"""

from fractions import Fraction
from functools import cache
from itertools import chain, count, islice, pairwise

import numpy as np


def code_value(f, code):
    """Value of a code without sign by section 1 of the contract, the specials not yet considered."""
    exponent, significand = code >> f.mantissa_bits, code & ((1 << f.mantissa_bits) - 1)
    if exponent > 0 or not has_zero(f):
        significand += 1 << f.mantissa_bits
    else:
        exponent = 1
    power = exponent - f.bias - f.mantissa_bits
    return Fraction(significand << power) if power > 0 else Fraction(significand, 1 << -power)


def has_zero(f):
    """OCP's E8M0 has none: an unsigned format without mantissa is powers of two from the code 0 on."""
    return f.is_signed or f.mantissa_bits > 0


def sign_bit(f):
    """The first number that is no code without sign."""
    return 1 << (f.exponent_bits + f.mantissa_bits)


def special(f, code):
    """'nan', 'inf' or None for a code without sign."""
    top = sign_bit(f) - 1
    if f.has_inf:
        exponent, mantissa = code >> f.mantissa_bits, code & ((1 << f.mantissa_bits) - 1)
        if exponent == (1 << f.exponent_bits) - 1:
            return "inf" if mantissa == 0 else "nan"
    elif f.has_nan and f.has_negative_zero and code == top:
        return "nan"
    return None


@cache
def finite_values(f):
    """The non-negative finite values, ascending; the index of a value is its code."""
    values = [code_value(f, code) for code in range(sign_bit(f)) if special(f, code) is None]
    assert all(a < b for a, b in pairwise(values))
    return values


def decode_one(f, code):
    magnitude, negative = code & (sign_bit(f) - 1), f.is_signed and bool(code & sign_bit(f))
    if not f.has_negative_zero and negative and magnitude == 0:
        return float("nan")
    value = {"nan": float("nan"), "inf": float("inf"), None: None}[special(f, magnitude)]
    value = float(code_value(f, magnitude)) if value is None else value
    return -value if negative else value


@cache
def decoded(f):
    """The values of all codes."""
    return np.array([decode_one(f, code) for code in range(1 << width(f))])


def width(f):
    return f.is_signed + f.exponent_bits + f.mantissa_bits


def nan_code(f):
    """The quiet NaN; None where the format has none."""
    if not f.has_nan:
        return None
    if not f.has_negative_zero:
        return sign_bit(f)
    if f.has_inf:  # top exponent, leading mantissa bit set
        return (((1 << f.exponent_bits) - 1) << f.mantissa_bits) | (1 << (f.mantissa_bits - 1))
    return sign_bit(f) - 1


@cache
def grid(f):
    """Values and midpoints in float64, with the value that would follow the largest: (values, midpoints)."""
    values = finite_values(f)
    values = [*values, code_value(f, len(values))]
    midpoints = [(a + b) / 2 for a, b in pairwise(values)]
    as_floats = [np.array([float(v) for v in vs]) for vs in (values, midpoints)]
    for exact, floats in zip((values, midpoints), as_floats):
        assert all(x.as_integer_ratio() == e.as_integer_ratio() for x, e in zip(floats.tolist(), exact))
    return as_floats


def round_magnitude(f, a, negative, rounding, random=None, n=None):
    """Codes (indices into grid) of finite magnitudes a <= the last value of the grid, by P3109 4.7.4."""
    values, midpoints = grid(f)
    a = np.maximum(a, values[0])
    below = np.searchsorted(values, a, side="right") - 1
    last = below == len(values) - 1
    upper = np.minimum(below + 1, len(values) - 1)
    inexact = (values[below] != a) & ~last
    middle = midpoints[np.minimum(below, len(midpoints) - 1)]
    odd = below % 2 == 1
    if rounding == "nearest_ties_to_even":
        away = (a > middle) | ((a == middle) & odd)
    elif rounding == "nearest_ties_to_away":
        away = a >= middle
    elif rounding == "toward_zero":
        away = np.zeros_like(inexact)
    elif rounding == "toward_positive":
        away = ~negative
    elif rounding == "toward_negative":
        away = negative
    elif rounding == "to_odd":
        away = ~odd
    else:
        assert rounding == "stochastic"
        # nu in exact integers would be slow; the distance and the step are exact in float64, and so is their ratio,
        # because the step is a power of two.
        nu = (a - values[below]) / np.where(last, 1.0, values[upper] - values[below])
        away = np.floor(nu * 2.0**n) + random >= 2.0**n
    return np.where(inexact & away, upper, below)


def project(f, q, saturation="propagate", rounding="nearest_ties_to_even", random=None, n=None):
    """(magnitude in float64, code of the magnitude) of the projection of float64 numbers q; NaN has the code -1."""
    values, _ = grid(f)
    last = len(values) - 1  # one beyond the largest finite value
    a, negative = np.abs(q), np.signbit(q)
    finite = np.minimum(np.where(np.isnan(a), 0, a), values[-1])
    code = round_magnitude(f, finite, negative, rounding, random, n)
    magnitude = values[code]
    over, infinite = code == last, np.isinf(a)
    if saturation == "none" and f.has_nan:
        inward = {"toward_zero": np.full(a.shape, True), "toward_positive": negative, "toward_negative": ~negative}
        stops = inward.get(rounding, np.full(a.shape, False)) & ~infinite
        magnitude = np.where(over, np.where(stops, values[last - 1], np.inf if f.has_inf else np.nan), magnitude)
    else:
        keeps = infinite & (saturation == "propagate") & f.has_inf
        magnitude = np.where(over | infinite, np.where(keeps, np.inf, values[last - 1]), magnitude)
    magnitude = np.where(np.isnan(q), np.nan, magnitude)
    code = np.where(over, last - 1, code)
    if not f.is_signed:  # saturates at the smallest value as at the largest
        below = (negative & (magnitude != 0) if has_zero(f) else negative | (q == 0)) & ~np.isnan(q)
        magnitude = np.where(below, np.nan if saturation == "none" and f.has_nan else values[0], magnitude)
        code = np.where(below, 0, code)
    if f.has_inf:
        code = np.where(np.isinf(magnitude), last, code)
    return magnitude, np.where(np.isnan(magnitude), -1, code)


def _divide(x, scale):
    with np.errstate(all="ignore"):
        return (x / scale).astype(np.float64)


def _value(f, q, magnitude, dtype, scale):
    negative = np.signbit(q) & f.is_signed & (f.has_negative_zero | (magnitude != 0))
    with np.errstate(all="ignore"):
        return np.where(negative, -magnitude, magnitude).astype(dtype) * scale


def _code(f, q, code):
    nan = nan_code(f)
    signed = np.signbit(q) & f.is_signed & (f.has_negative_zero | (code != 0))
    code = np.where(code < 0, len(finite_values(f)) - 1 if nan is None else nan, code + signed * sign_bit(f))
    return code.astype(np.uint8 if width(f) <= 8 else np.uint16)


def quantize(f, x, scale, *modes, **named_modes):
    """x and scale float32 or float64 arrays of one dtype; the result has that dtype. The modes are those of project."""
    q = _divide(x, scale)
    return _value(f, q, project(f, q, *modes, **named_modes)[0], x.dtype, scale)


def encode(f, x, scale, *modes, **named_modes):
    q = _divide(x, scale)
    return _code(f, q, project(f, q, *modes, **named_modes)[1])


def quantize_and_encode(f, x, scale, *modes):
    """Both by one projection, most of the work of either."""
    q = _divide(x, scale)
    magnitude, code = project(f, q, *modes)
    return _value(f, q, magnitude, x.dtype, scale), _code(f, q, code)


def decode(f, codes, scale):
    with np.errstate(all="ignore"):
        return decoded(f)[codes.astype(np.int64) % (1 << width(f))].astype(scale.dtype) * scale


def random_words(seed, size):
    """The random bits of elements 0 to size - 1 by Philox-4x32-10: element i has word i % 4 of the block i // 4."""
    blocks = (philox([i & 0xFFFFFFFF, i >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]) for i in count())
    return np.array([*islice(chain.from_iterable(blocks), size)], dtype=np.int64)


def philox(counter, key):
    """Philox-4x32-10 as in section 4 of Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011)."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        first, second = divmod(a * 0xD2511F53, 2**32), divmod(c * 0xCD9E8D57, 2**32)
        a, b, c, d = second[0] ^ b ^ k, second[1], first[0] ^ d ^ m, first[1]
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return a, b, c, d
