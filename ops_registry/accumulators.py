"""Accumulators of matrix products as data: how a tensor core aligns, truncates and keeps the sum of products.

The rule was found by probing NVIDIA's tensor cores (MMA-Sim, arXiv 2511.10909). The products of a group and what was
accumulated before it are terms: a significand, exact and not normalized, times a power of two. All are shifted to the
largest exponent among them and truncated toward zero to F fraction bits; their sum is exact, and is rounded to what is
kept. Without a group every product is added by itself, exactly, and the sum is rounded: a chain of fused multiply-adds.

Exponents: an operand's is that of its value, at least that of its format's smallest normal; a product's is the sum of
its operands'. A zero, product or accumulator, does not count, and an accumulator that is none with its own exponent, at
least that of its smallest normal. The largest is -133 where all are below it (measured on an H100).
"""

import math
import re
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from .formats import FP8Format, resolve

NAMED_ACCUMULATORS = {
    "VOLTA_FP16": "g4f23e8m23z(FP16,FP16)",
    "TURING_FP16": "g8f24e8m23z(FP16,FP16)",
    "AMPERE_FP16": "g8f24e8m23z(FP16,FP16)",
    "AMPERE_BF16": "g8f24e8m23z(BF16,BF16)",
    "ADA_FP8": "g16f13e8m13z(E4M3,E4M3)",
    "HOPPER_FP16": "g16f25e8m23z(FP16,FP16)",
    "HOPPER_BF16": "g16f25e8m23z(BF16,BF16)",
    "HOPPER_FP8_FAST": "g32f13e8m13z(E4M3,E4M3)",
    "HOPPER_FP8": "g32f13e8m13zp128(E4M3,E4M3)",
    "BLACKWELL_FP16": "g16f25e8m23z(FP16,FP16)",
    "BLACKWELL_BF16": "g16f25e8m23z(BF16,BF16)",
    "BLACKWELL_FP8": "g32f25e8m23z(E4M3,E4M3)",
    "BLACKWELL_MXFP8": "g32f25e8m23zs32(E4M3,E4M3)",
    "BLACKWELL_NVFP4": "g64f35e8m23zx16(E2M1,E2M1)",
}

GRAMMAR = (
    "[g<products of a group>f<fraction bits of a term>]e<exponent bits>m<mantissa bits> of what is kept, 'z' (toward "
    "zero) or 'n' (to nearest, ties to even), optionally p<products after which it is added to a float32>, s<products "
    "with one E8M0 scale> or x<products with one E4M3 scale, summed before they are aligned>, and the formats of the "
    "operands, as in (E4M3,E5M2), 'any' for float32"
)
_RULE = re.compile(
    r"(?:g([0-9]{1,4})f([0-9]{1,2}))?e([0-9])m([0-9]{1,2})([zn])(?:p([0-9]{1,6}))?(?:([sx])([0-9]{1,4}))?"
)
_SPELLING = re.compile(r"(\w+)(?:\(([\w-]+),([\w-]+)\))?", re.ASCII)
_MOST_BITS = 50  # of a sum of terms, so that float64 holds it
_BITS_OF_FLOAT64 = 53


@dataclass(frozen=True)
class Accumulator:
    """How a dot product is summed: groups of exact products, aligned, truncated, added, and rounded to what is kept.

    Args:
        name: the name (``"HOPPER_FP8"``) or the spelling of the fields below; :func:`resolve_accumulator` reads them
            from it.
        group: how many products are added at once, with the accumulator. 1 for a chain.
        fraction_bits: F, the fraction bits that a term keeps, counted from the largest exponent of the group. None for
            a chain: every product is added exactly.
        exponent_bits, mantissa_bits: of the accumulator, an IEEE 754 format with subnormals and infinities: e8m23 is
            float32.
        is_truncated: the accumulator is rounded toward zero, else to nearest with ties to even. What exceeds its
            largest value becomes infinite either way.
        promotion: after as many products the accumulator is added to a float32, rounded to nearest, and starts at zero.
            None for never.
        scaled: as many products, along the contraction, share a scale of each operand, which is inside the sum; None
            for operands without scales.
        sums_block: products with one scale are summed exactly to one term, whose exponent is that of the scales.
        formats: of the operands, None for any float32: their values, and their exponents where they are subnormal.

    Raises:
        ValueError: a field out of range, or another one than the name says.
    """

    name: str
    group: int
    fraction_bits: int | None
    exponent_bits: int
    mantissa_bits: int
    is_truncated: bool
    promotion: int | None = None
    scaled: int | None = None
    sums_block: bool = False
    formats: tuple[FP8Format | None, FP8Format | None] = (None, None)

    def __post_init__(self) -> None:
        if _fields_of(self.name) != tuple(getattr(self, f.name) for f in fields(self)[1:]):
            raise ValueError(
                f"fields of accumulator {self.name!r} must be those of its name: give other ones by a spelling"
            )

        def check(name: str, value: int, least: int, most: int) -> None:
            if not least <= value <= most:
                raise ValueError(f"{name} of accumulator {self.name!r} must be {least} to {most}, got {value}")

        check("exponent bits", self.exponent_bits, 2, 8)
        check("mantissa bits", self.mantissa_bits, 1, 23)
        check("group", self.group, 1, 4096)
        if self.fraction_bits is not None:
            check("fraction bits", self.fraction_bits, 1, _MOST_BITS - 2 - self.group.bit_length())
        for name, value, unit in (("promotion", self.promotion, self.group), ("scaled", self.scaled, 1)):
            if value is not None and (value == 0 or value % unit):
                raise ValueError(f"{name} of accumulator {self.name!r} must be a multiple of {unit}, got {value}")
        if self.scaled and (self.fraction_bits is None or (self.scaled % self.group and self.group % self.scaled)):
            raise ValueError(f"accumulator {self.name!r} must have groups of whole blocks, or blocks of whole groups")
        if self.sums_block and (self.group % (self.scaled or 1) or None in self.formats):
            raise ValueError(f"accumulator {self.name!r} must have groups of whole blocks, and formats of its operands")
        if self.sums_block and (bits := self._bits_of_block()) > _BITS_OF_FLOAT64:
            names = " and ".join(f.name for f in self.formats if f is not None)
            raise ValueError(
                f"formats of accumulator {self.name!r} must be such that {self.scaled} products with one scale sum to "
                f"{_BITS_OF_FLOAT64} bits or less, got {names}, which take {bits}"
            )

    def _bits_of_block(self) -> int:
        """The most significant bits of a sum of products with one scale."""
        assert self.scaled and self.scale_format is not None
        steps = [f.max_representable_value / f.smallest_subnormal for f in self.formats if f is not None]
        return math.ceil(math.log2(self.scaled * math.prod(steps))) + 2 * (self.scale_format.mantissa_bits + 1)

    @property
    def scale_format(self) -> FP8Format | None:
        """The format of the scales of blocks."""
        return resolve("E4M3" if self.sums_block else "E8M0") if self.scaled else None

    @property
    def products_of_term(self) -> int:
        """How many products are summed before they are aligned."""
        return self.scaled if self.scaled and self.sums_block else 1

    @property
    def min_exponent(self) -> int:
        """That of the smallest normal number of what is kept."""
        return 2 - (1 << self.exponent_bits - 1)

    @property
    def max_exponent(self) -> int:
        """That of the largest number of what is kept."""
        return 1 - self.min_exponent

    @property
    def is_narrow(self) -> bool:
        """Whether float32 holds every product, term and sum exactly, as it does for operands of 8 bits."""
        if self.fraction_bits is None or self.scaled or self.exponent_bits < 8 or None in self.formats:
            return False
        formats = [f for f in self.formats if f is not None]
        in_range = all(f.smallest_subnormal >= 2.0**-30 and f.max_representable_value <= 2.0**30 for f in formats)
        bits = sum(f.mantissa_bits + 1 for f in formats)
        return in_range and bits <= 24 and self.fraction_bits + 2 + self.group.bit_length() <= 24

    @property
    def least_exponent(self) -> int:
        """To which terms are aligned at least: where it is narrow, all values that are not zero are above it anyway."""
        return -60 if self.is_narrow else -133

    @property
    def without_scales(self) -> "Accumulator":
        """The same accumulator for operands that are multiplied by their scales: any float32."""
        rule = NAMED_ACCUMULATORS.get(self.name.split("(")[0].upper(), self.name).split("(")[0]
        return resolve_accumulator(re.sub(r"[sx]\d+$", "", rule, flags=re.I))

    def with_formats(self, left: "FP8Format | str | None", right: "FP8Format | str | None") -> "Accumulator":
        """The same accumulator for operands of other formats, None for any float32."""
        names = ["any" if f is None else f.name if isinstance(f, FP8Format) else f for f in (left, right)]
        return resolve_accumulator(f"{self.name.split('(')[0]}({names[0]},{names[1]})")


@lru_cache(maxsize=1024)
def resolve_accumulator(accumulator: str) -> Accumulator:
    """The accumulator of a name (``"HOPPER_FP8"``) or a spelling (``"g32f13e8m13zp128"``), in either case of letters.

    Behind it may stand the formats of the operands: ``"HOPPER_FP8(E5M2,E4M3)"``. A spelling without takes any float32.

    Raises:
        TypeError: accumulator is not a string.
        ValueError: no such name, or a spelling that :class:`Accumulator` refuses.

    Example:
        >>> from ops_registry.accumulators import resolve_accumulator
        >>> resolve_accumulator("HOPPER_FP8").promotion, resolve_accumulator("e5m10n").group
        (128, 1)
    """
    return Accumulator(accumulator, *_fields_of(accumulator))


def _fields_of(name: str) -> tuple[Any, ...]:
    """What a name or a spelling says, in the order of Accumulator's fields."""
    if not isinstance(name, str):
        raise TypeError(f"accumulator must be a string, got {name!r}")
    match = _SPELLING.fullmatch(name)
    rule, formats = (match[1], match.groups()[1:]) if match else ("", (None, None))
    if rule.upper() in NAMED_ACCUMULATORS:
        named = _SPELLING.fullmatch(NAMED_ACCUMULATORS[rule.upper()])
        assert named is not None
        rule, formats = named[1], formats if formats[0] else named.groups()[1:]
    found = _RULE.fullmatch(rule.lower())
    if found is None:
        raise ValueError(
            f"unknown accumulator {name!r}: expected one of {', '.join(NAMED_ACCUMULATORS)}, or a spelling {GRAMMAR}"
        )
    group, fraction_bits, exponent_bits, mantissa_bits, rounding, promotion, kind, scaled = found.groups()
    return (
        int(group or 1),
        None if fraction_bits is None else int(fraction_bits),
        int(exponent_bits),
        int(mantissa_bits),
        rounding == "z",
        int(promotion) if promotion else None,
        int(scaled) if scaled else None,
        kind == "x",
        tuple(None if word is None or word.lower() == "any" else resolve(word) for word in formats),
    )


ACCUMULATORS = {name: resolve_accumulator(name) for name in NAMED_ACCUMULATORS}
"""The named accumulators by name, from the oldest architecture on."""
