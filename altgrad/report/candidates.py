"""What a report compares: a format and who shares a scale of which kind, in one word."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ops_registry.modes import POWER_OF_TWO_RULES

from ..quantization.formats import FP8Format, resolve
from ..quantization.granularity import Granularity, PerAxis, PerBlock, PerTensor
from ..quantization.scaling import ScaleOptions
from ..simulation.recipes import Recipe, Rule

# The block formats of OCP MX and NVIDIA, spelled out.
NAMED = {
    "MXFP8_E4M3": "E4M3@32/floor",
    "MXFP8_E5M2": "E5M2@32/floor",
    "MXFP6_E2M3": "E2M3@32/floor",
    "MXFP6_E3M2": "E3M2@32/floor",
    "MXFP4": "E2M1@32/floor",
    "NVFP4": "E2M1@16/E4M3",
}
DEFAULT = ("E0M7", "E2M5", "E3M4", "E4M3", "E5M2", "E2M3", "E3M2", "e2m2b1f", "E2M1", *NAMED, "e2m2b1f@32/floor")
GRAMMAR = (
    "FORMAT, FORMAT@tensor, FORMAT@row, FORMAT@32 or FORMAT@128x128, and behind it /floor, /ceil, /even, /rceil "
    "(scales are powers of two) or /FORMAT (scales in a format)"
)
_SPELLING = re.compile(r"([^@/]+)(?:@(tensor|row|\d{1,9}|\d{1,9}x\d{1,9}))?(?:/(\w+))?", re.IGNORECASE)


@dataclass(frozen=True)
class Candidate:
    """A format with its scales, as a rule of :mod:`altgrad.simulation`.

    Example:
        >>> from altgrad.report import candidate
        >>> candidate("nvfp4")
        Candidate(name='NVFP4', rule=Rule('E2M1', per=16, scale_format='E4M3'))
        >>> candidate("e2m1@32/FLOOR").name, candidate("e4m3").bits(1024, 1024)
        ('MXFP4', 8.000030517578125)
    """

    name: str
    rule: Rule

    @property
    def format(self) -> FP8Format:
        return resolve(self.rule.format or "")

    @property
    def granularity(self) -> Granularity:
        """Who shares a scale in a matrix [rows, contraction]."""
        if self.rule.per == "tensor":
            return PerTensor()
        return PerAxis(0) if self.rule.per == "row" else PerBlock(self.rule.per)

    @property
    def keywords(self) -> ScaleOptions:
        """The keywords of :func:`altgrad.quantization.compute_scale`, but for the granularity."""
        return {"power_of_two": self.rule.power_of_two, "scale_format": self.rule.scale_format}

    def bits(self, rows: int, columns: int) -> float:
        """Bits of storage for an element of a matrix, its share of the scales included.

        A scale is a whole number of bytes, as in :func:`altgrad.quantization.encode_blocks`: float32 where not rounded.
        """
        if self.rule.per == "tensor":
            scales = 1
        elif self.rule.per == "row":
            scales = rows
        else:
            m, n = self.rule.block
            scales = -(-rows // m) * -(-columns // n)
        of_tensor = 0
        if self.rule.power_of_two is not None:
            width = 8
        elif self.rule.scale_format is not None:
            width, of_tensor = -(-resolve(self.rule.scale_format).bits // 8) * 8, 32
        else:
            width = 32
        return self.format.bits + (scales * width + of_tensor) / (rows * columns)

    def recipe(self) -> Recipe:
        """Weights by this candidate, all else in high precision."""
        return Recipe(self.name, forward=(None, self.rule))  # type: ignore[arg-type]


def candidate(name: str) -> Candidate:
    """The candidate of a name (``"MXFP4"``, ``"E4M3"``) or a spelling (``"e3m2b3f@64/rceil"``, ``"E2M1@16/E4M3"``).

    Raises:
        TypeError: name is not a string.
        ValueError: what is neither.

    Example:
        >>> from altgrad.report import candidate
        >>> candidate("E3M2@128x128").rule
        Rule('E3M2', per=(128, 128))
    """
    if not isinstance(name, str):
        raise TypeError(f"a candidate must be a string, got {name!r}")
    match = _SPELLING.fullmatch(NAMED.get(name.upper(), name))
    if match is None:
        raise ValueError(f"unknown candidate {name!r}: expected one of {', '.join(NAMED)}, or {GRAMMAR}")
    format, per, scale = match.groups()
    rule = Rule(format, per=_per(per), **_scale(scale))
    spelling = str(rule.format)
    if per is not None and rule.per != "tensor":
        spelling += f"@{per.lower()}"
    if scale is not None:
        spelling += f"/{rule.power_of_two or rule.scale_format}"
    return Candidate(next((known for known, word in NAMED.items() if word == spelling), spelling), rule)


def candidates_of(names: Iterable[str]) -> list[Candidate]:
    """The candidates of names, each once.

    Raises:
        TypeError: names is a string, or no list of strings.
        ValueError: none, a format above 16 bits, or what :func:`candidate` refuses.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"candidates must be a list of formats, got {names!r}")
    found = list(dict.fromkeys(candidate(name) for name in names))
    if not found:
        raise ValueError("candidates must not be empty")
    wide = [c.name for c in found if c.format.code_bytes is None]
    if wide:
        raise ValueError(f"candidates must have at most 16 bits, for their codes to be counted, got {', '.join(wide)}")
    return found


def _per(word: str | None) -> Any:
    if word is None or not word[0].isdigit():
        return (word or "tensor").lower()
    sizes = tuple(int(size) for size in word.lower().split("x"))
    return sizes[0] if len(sizes) == 1 else sizes


def _scale(word: str | None) -> dict[str, Any]:
    if word is None:
        return {}
    return {"power_of_two": word.lower()} if word.lower() in POWER_OF_TWO_RULES else {"scale_format": word}
