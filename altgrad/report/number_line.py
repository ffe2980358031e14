"""Where the values of a format lie: a line of characters, and a picture in SVG."""

import math
from html import escape

from ..quantization.formats import FP8Format

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH, _HEIGHT, _MARGIN = 900, 96, 20


def finite_values(f: FP8Format) -> list[float]:
    """The finite values of a format in order, each once."""
    values = {f.to_real(code) for code in range(1 << f.bits)}  # -0 and 0 are one
    return sorted(value for value in values if math.isfinite(value))


def text_line(values: list[float], width: int) -> str:
    """How many values lie in each of width equal parts of their range, as bars one character wide."""
    first, last = values[0], values[-1]
    counts = [0] * width
    for value in values:
        counts[min(int((value - first) / (last - first or 1) * width), width - 1)] += 1
    most = max(counts)
    return "".join(_BARS[math.ceil(count / most * (len(_BARS) - 1))] for count in counts)


def picture(formats: list[FP8Format]) -> str:
    """The number lines of formats as one SVG: a tick for each value, linear, and the positive ones by the logarithm."""
    height = _HEIGHT * len(formats)
    body = "".join(_lines(f, _HEIGHT * i) for i, f in enumerate(formats))
    names = ", ".join(escape(f.name) for f in formats)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'font-family="sans-serif" font-size="11"><title>Number lines of {names}</title>'
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>{body}</svg>\n'
    )


def _lines(f: FP8Format, top: int) -> str:
    values = finite_values(f)
    positive = [value for value in values if value > 0]
    logarithms = [math.log2(value) for value in positive]
    ends = (f"{values[0]:g}", f"{values[-1]:g}"), (f"{positive[0]:g}", f"{positive[-1]:g}, by the logarithm")
    return (
        f'<text x="{_MARGIN}" y="{top + 14}" font-weight="bold">{escape(f.name)}, {escape(f.spelling)}, '
        f"{len(values)} finite values</text>{_ticks(values, top + 24, *ends[0])}"
        f"{_ticks(logarithms, top + 58, *ends[1])}"
    )


def _ticks(values: list[float], top: int, left: str, right: str) -> str:
    """A line with a tick for each value; ticks of one place are drawn once."""
    span = values[-1] - values[0] or 1
    places = {round(_MARGIN + (value - values[0]) / span * (_WIDTH - 2 * _MARGIN), 1) for value in values}
    marks = "".join(f"M{x:g} {top}v12" for x in sorted(places))
    end, below = _WIDTH - _MARGIN, top + 24
    return (
        f'<path d="M{_MARGIN} {top + 12}H{end}" stroke="#888"/><path d="{marks}" stroke="#0072b2" stroke-width="0.7"/>'
        f'<text x="{_MARGIN}" y="{below}">{left}</text><text x="{end}" y="{below}" text-anchor="end">{right}</text>'
    )
