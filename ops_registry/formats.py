"""Small floating-point formats as data: a name and seven fields say everything, all other numbers follow from them."""

import math
import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

# One line adds a format: its name is an alias of a spelling, so a saved graph means the same in every process.
NAMED_FORMATS = {
    "E0M7": "e0m7b1f",
    "E1M6": "e1m6b0f",
    "E2M5": "e2m5b1f",
    "E3M4": "e3m4b3f",
    "E4M3": "e4m3b7fn",
    "E5M2": "e5m2b15",
    "E6M1": "e6m1b31f",
    "E7M0": "e7m0b63f",
    "E2M3": "e2m3b1f",
    "E3M2": "e3m2b3f",
    "E2M1": "e2m1b1f",
    "E4M3FNUZ": "e4m3b8fnuz",
    "E5M2FNUZ": "e5m2b16fnuz",
    "FP16": "e5m10b15",
    "BF16": "e8m7b127",
    "TF32": "e8m10b127",
    "E8M0": "e8m0b127fnu",
    "UE4M3": "e4m3b7fnu",
    "UE5M3": "e5m3b15fnu",
}

# What other projects call a format: torch and ml_dtypes by its dtype.
ALIASES = {
    "float8_e4m3fn": "E4M3",
    "float8_e5m2": "E5M2",
    "float8_e4m3fnuz": "E4M3FNUZ",
    "float8_e5m2fnuz": "E5M2FNUZ",
    "float8_e4m3": "e4m3b7",
    "float8_e3m4": "e3m4b3",
    "float8_e4m3b11fnuz": "e4m3b11fnuz",
    "float6_e2m3fn": "E2M3",
    "float6_e3m2fn": "E3M2",
    "float4_e2m1fn": "E2M1",
    "float16": "FP16",
    "bfloat16": "BF16",
    "float8_e8m0fnu": "E8M0",
    "ue8m0": "E8M0",
}

GRAMMAR = (
    "e<exponent bits>m<mantissa bits>b<bias>, one of '' (IEEE specials), 'fn', 'fnuz', 'f' (all finite), "
    "and 'u' where there is no sign"
)

# suffix -> (has_inf, has_nan, has_negative_zero)
_SPECIALS = {
    "": (True, True, True),
    "fn": (False, True, True),
    "fnuz": (False, True, False),
    "f": (False, False, True),
}
_SPELLING = re.compile(r"e([0-9]{1,2})m([0-9]{1,2})b(-?[0-9]{1,3})(fnuz|fn|f|)(u?)")

# All values are float32 numbers, and a format has at most the bits of TF32; codes are one or two bytes.
_MAX_BITS, _MAX_CODE_BITS = 19, 16
_MIN_QUANTUM_EXPONENT, _MAX_OVERFLOW_EXPONENT = -149, 128
# Where float32 has room for the arithmetic of the rounding as well: its smallest normal is 2^-126, and a quantum of
# twice that keeps every value, midpoint and power of two normal; below 2^104 the product a * 2^(23 - M) stays finite.
_NARROW_QUANTUM, _NARROW_OVERFLOW = 2.0**-125, 2.0**104


@dataclass(frozen=True)
class FP8Format:
    """A floating-point format of at most 19 bits: the values of its codes, in exact arithmetic.

    The name is from the days of 8 bits; float16, bfloat16 and TF32 are formats like any other. A code is, from the top
    bit: sign s, E exponent bits e, M mantissa bits m. Its value is ``(-1)^s * 2^(e - bias) * (1 + m / 2^M)`` for e > 0
    and ``(-1)^s * 2^(1 - bias) * (m / 2^M)`` for e = 0. E = 0 makes every code a subnormal: signed fixed point. An
    unsigned format has the same values without s; with M = 0 it is powers of two alone, 2^(e - bias) for e = 0 too, and
    has no zero (OCP's E8M0). The words are those of IEEE P3109 and OCP OFP8.

    Args:
        name: a named format's name (``"E5M2"``) or the spelling of the fields below (``"e5m2b15"``).
        exponent_bits: E, 0 to 8.
        mantissa_bits: M, the stored fraction bits; sign, E and M together are at most 19. ``encode`` and ``decode``
            take formats of at most 16 bits.
        bias: the exponent bias.
        has_inf: the format has infinities; the top exponent is then IEEE's.
        has_nan: the format has NaN.
        has_negative_zero: False makes the code of -0 the only NaN (``fnuz``). Unsigned formats leave it True.
        is_signed: False for a format without a sign bit.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a field out of range, an impossible mix of specials, a name that means another format, or a bias
            that moves values out of float32 (a quantum below 2^-149, or a value of 2^128 and above).

    Example:
        >>> from altgrad.quantization import E5M2
        >>> E5M2.max_representable_value, E5M2.to_bits(1.1), E5M2.to_real(0x3C)
        (57344.0, 60, 1.0)
    """

    name: str = field(compare=False)
    exponent_bits: int
    mantissa_bits: int
    bias: int
    has_inf: bool
    has_nan: bool
    has_negative_zero: bool = True
    is_signed: bool = True

    def __post_init__(self) -> None:
        for name in ("exponent_bits", "mantissa_bits", "bias"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"{name} must be an int, got {getattr(self, name)!r}")
        exponent_bits, mantissa_bits = self.exponent_bits, self.mantissa_bits
        if not 0 <= exponent_bits <= 8:
            raise ValueError(f"exponent_bits must be 0 to 8, got {exponent_bits}")
        if mantissa_bits < 0 or self.bits > _MAX_BITS:
            raise ValueError(
                f"mantissa_bits must be at least 0, and sign, exponent and mantissa at most {_MAX_BITS} bits together, "
                f"got mantissa_bits={mantissa_bits} and {self.bits} bits"
            )
        if self._specials not in _SPECIALS.values():
            raise ValueError(
                f"has_inf, has_nan, has_negative_zero must be one of {sorted(_SPECIALS.values())}, got {self._specials}"
            )
        if self.has_inf and (exponent_bits == 0 or mantissa_bits == 0):
            raise ValueError(f"IEEE specials need E >= 1 and M >= 1, got E={exponent_bits} and M={mantissa_bits}")
        if not self.is_signed and not self.has_negative_zero:
            raise ValueError(
                "an unsigned format has no code of -0 that could be NaN: 'fnuz' and 'u' exclude each other"
            )
        if self.max_code < 1:
            raise ValueError(f"{self.spelling} has no finite value but zero")
        if (
            self.min_exponent - mantissa_bits < _MIN_QUANTUM_EXPONENT
            or self.overflow_value > 2.0**_MAX_OVERFLOW_EXPONENT
        ):
            raise ValueError(
                f"bias {self.bias} of {self.spelling} is out of range: values must be float32 numbers, multiples of "
                f"2^{_MIN_QUANTUM_EXPONENT} below 2^{_MAX_OVERFLOW_EXPONENT}"
            )
        if self.name != self.spelling and NAMED_FORMATS.get(self.name) != self.spelling:
            raise ValueError(f"name must be the spelling {self.spelling!r} or a name of it, got {self.name!r}")
        # Computed now: on Python 3.11 the first read of a cached property takes a lock that torch.compile cannot trace.
        for name, member in vars(FP8Format).items():
            if isinstance(member, cached_property):
                getattr(self, name)

    @property
    def _specials(self) -> tuple[bool, bool, bool]:
        return self.has_inf, self.has_nan, self.has_negative_zero

    @cached_property
    def spelling(self) -> str:
        """The canonical spelling, e.g. ``"e4m3b7fn"``: all fields in one word, accepted wherever a name is."""
        suffix = next(suffix for suffix, specials in _SPECIALS.items() if specials == self._specials)
        return f"e{self.exponent_bits}m{self.mantissa_bits}b{self.bias}{suffix}{'' if self.is_signed else 'u'}"

    @cached_property
    def bits(self) -> int:
        """Width of a code, sign included."""
        return self.is_signed + self.exponent_bits + self.mantissa_bits

    @cached_property
    def code_bytes(self) -> int | None:
        """Bytes that a code is stored in: 1, 2, or None beyond 16 bits, where a format can be simulated only."""
        return 1 if self.bits <= 8 else 2 if self.bits <= _MAX_CODE_BITS else None

    @cached_property
    def has_zero(self) -> bool:
        """Whether zero is a value: in all formats but the unsigned ones without mantissa."""
        return self.is_signed or self.mantissa_bits > 0

    @cached_property
    def needs_float64(self) -> bool:
        """Whether float32 has no room for the arithmetic of its rounding; all its values are float32 numbers."""
        return self.quantum < _NARROW_QUANTUM or self.overflow_value >= _NARROW_OVERFLOW

    @cached_property
    def sign_code(self) -> int:
        """The code with only the sign bit set: -0, or NaN where there is no -0; unsigned codes are below it."""
        return 1 << (self.exponent_bits + self.mantissa_bits)

    @cached_property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal and of the subnormals: 1 - bias, or -bias in formats without zero."""
        return self.has_zero - self.bias

    @cached_property
    def max_code(self) -> int:
        """The code of the largest finite value."""
        if self.has_inf:
            return self.sign_code - 1 - (1 << self.mantissa_bits)
        return self.sign_code - 1 - (self.has_nan and self.has_negative_zero)

    @cached_property
    def inf_code(self) -> int | None:
        """The code of +infinity, None where the format has none."""
        return self.max_code + 1 if self.has_inf else None

    @cached_property
    def nan_code(self) -> int | None:
        """The code that NaN encodes to (the quiet one, as in ``ml_dtypes``), None where the format has none."""
        if not self.has_nan:
            return None
        if not self.has_negative_zero:
            return self.sign_code
        return self.max_code + 1 + (self.has_inf and 1 << (self.mantissa_bits - 1))

    @cached_property
    def quantum(self) -> float:
        """Spacing of the subnormals, 2^(min_exponent - M). With M > 0 it is the smallest positive value."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits)

    @cached_property
    def smallest_subnormal(self) -> float:
        """The smallest positive value."""
        return self._magnitude(int(self.has_zero))

    @cached_property
    def smallest_normal(self) -> float | None:
        """The smallest value with e > 0, None where all finite codes are subnormal."""
        code = self.has_zero << self.mantissa_bits
        return self._magnitude(code) if code <= self.max_code else None

    @cached_property
    def max_representable_value(self) -> float:
        """The largest finite value."""
        return self._magnitude(self.max_code)

    @cached_property
    def overflow_value(self) -> float:
        """What would follow the largest finite value if the exponent had no upper bound."""
        return self._magnitude(self.max_code + 1)

    def _magnitude(self, code: int) -> float:
        """Value of a code without sign, read as a number whatever the specials."""
        exponent, mantissa = divmod(code, 1 << self.mantissa_bits)
        significand = mantissa + (1 << self.mantissa_bits) * (exponent >= self.has_zero)
        return math.ldexp(significand, max(exponent, int(self.has_zero)) - self.bias - self.mantissa_bits)

    def to_real(self, code: int) -> float:
        """The value of a code, exactly.

        Args:
            code: 0 to 2^bits - 1.

        Raises:
            ValueError: code is not in that range.

        Example:
            >>> from altgrad.quantization import E4M3
            >>> E4M3.to_real(0x7E), E4M3.to_real(0x7F)
            (448.0, nan)
        """
        if code not in range(1 << self.bits):
            raise ValueError(f"code must be an integer from 0 to {(1 << self.bits) - 1}, got {code!r}")
        magnitude = code % self.sign_code
        if (not self.has_negative_zero and code == self.sign_code) or magnitude > self.max_code:
            return math.copysign(math.inf, self.sign_code - 1 - code) if magnitude == self.inf_code else math.nan
        return math.copysign(self._magnitude(magnitude), self.sign_code - 1 - code)

    def to_bits(self, value: float) -> int:
        """The code of the nearest value, ties to the even code; beyond the largest, the largest.

        NaN goes to the format's NaN and infinity to its infinity; where there is none, to the largest value. What is
        below the smallest value of an unsigned format goes there.

        Example:
            >>> from altgrad.quantization import E4M3
            >>> hex(E4M3.to_bits(-464.0)), hex(E4M3.to_bits(float("nan")))
            ('0xfe', '0x7f')
        """
        if math.isnan(value):
            return self.max_code if self.nan_code is None else self.nan_code
        if not self.is_signed:
            value = max(0.0 if self.has_zero else self.smallest_subnormal, value)  # the first of equal ones: never -0
        magnitude = self.inf_code if math.isinf(value) and self.inf_code is not None else self._nearest(abs(value))
        is_negative = math.copysign(1.0, value) < 0 and (magnitude > 0 or self.has_negative_zero)
        return magnitude + self.sign_code * is_negative

    def _nearest(self, value: float) -> int:
        if value >= self.max_representable_value:
            return self.max_code
        exponent = max(math.frexp(value or self.quantum)[1] - 1, self.min_exponent)
        # Codes without sign count the values upwards, also from one exponent to the next; without zero from 0 on.
        position = Fraction(value) / Fraction(2) ** (exponent - self.mantissa_bits)
        position += ((exponent - self.min_exponent) << self.mantissa_bits) - (not self.has_zero)
        return round(position)  # Fraction rounds ties to even, and the even position is the even code


def resolve(format: Any) -> FP8Format:
    """The format of a name (``"E5M2"``), a spelling (``"e3m4b3fn"``) or a dtype; case does not matter.

    A dtype is one of torch (``torch.float8_e4m3fn``) or a string with the name that torch or ml_dtypes gives it
    (``"float6_e2m3fn"``). A format is itself. Formats of the same values are equal, whatever they are called.

    Raises:
        TypeError: format is none of these.
        ValueError: no such name, or a spelling that :class:`FP8Format` refuses.

    Example:
        >>> from altgrad.quantization import resolve
        >>> resolve("e3m4b3").max_representable_value, resolve("E4M3").spelling
        (15.5, 'e4m3b7fn')
    """
    return format if isinstance(format, FP8Format) else _resolve(format_name(format))


def format_name(format: Any) -> str:
    """What an operator takes for a format, a string that names or spells it, or a dtype of torch."""
    if isinstance(format, FP8Format):
        return format.name
    name = format if isinstance(format, str) else str(format).removeprefix("torch.")
    if isinstance(format, str) or name in ALIASES:
        return name
    raise TypeError(f"format must be an FP8Format, a string or a dtype that is a format, got {format!r}")


@lru_cache(maxsize=1024)
def _parse(format: str) -> FP8Format:
    format = ALIASES.get(format.lower(), format)
    spelling = NAMED_FORMATS.get(format.upper(), format.lower())
    match = _SPELLING.fullmatch(spelling)
    if match is None:
        raise ValueError(
            f"unknown format {format!r}: expected one of {', '.join(NAMED_FORMATS)}, or a spelling {GRAMMAR}"
        )
    exponent_bits, mantissa_bits, bias = (int(group) for group in match.groups()[:3])
    name = (
        format.upper()
        if format.upper() in NAMED_FORMATS
        else f"e{exponent_bits}m{mantissa_bits}b{bias}{match[4]}{match[5]}"
    )
    return FP8Format(name, exponent_bits, mantissa_bits, bias, *_SPECIALS[match[4]], is_signed=not match[5])


def _resolve(name: str) -> FP8Format:
    return _parse(name)


# What torch.compiler.assume_constant_result sets, without its import of the compiler: Dynamo then calls the function
# instead of tracing it, and locks and regular expressions in it cannot be traced.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]

# Copies: where a compiled function has a constant, E4M3, and its name too, Dynamo must not meet one object on two ways.
FORMAT_REGISTRY = {name: replace(resolve(name)) for name in NAMED_FORMATS}
"""The named formats by name, in the order of the table in the documentation."""
