"""Tables of a report and of formats for a terminal."""

import math
from collections import Counter
from statistics import median

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..quantization.formats import FP8Format
from .assign import Assignment
from .number_line import finite_values, text_line
from .results import Layer, Report, Score


def print_report(console: Console, report: Report, choice: Assignment | None, problem: str, worst: int) -> None:
    """What the candidates do to all matrices, the worst layers, and what is recommended."""
    layers = [layer for layer in report.layers if layer.is_matrix] or report.layers
    console.print(_of_candidates(report, layers))
    if choice is None:
        console.print(f"no recommendation: {problem}", highlight=False)
    else:
        console.print(_of_worst(layers, choice, worst))
        console.print(recommendation(choice), highlight=False)
    hurt = [layer for layer in report.layers if layer.nan or layer.infinite]
    for layer in hurt:
        console.print(
            f"{escape(layer.name)}: {layer.nan} NaN, {layer.infinite} infinite", highlight=False, style="bold red"
        )
    if report.left_out:
        reasons = Counter(reason for _, reason in report.left_out)
        texts = (f"{count} ({reason})" for reason, count in reasons.items())
        console.print(f"left out: {', '.join(texts)}; report.json names them", highlight=False)


def recommendation(choice: Assignment) -> str:
    """The assignment in a sentence."""
    counts = Counter(name for operands in choice.choices.values() for name in operands.values())
    parts = ", ".join(f"{name} for {count}" for name, count in counts.most_common())
    return f"recommended, {choice.bits['weights']:.3f} bits a weight on average: {parts}"


def _of_candidates(report: Report, layers: list[Layer]) -> Table:
    table = _table("candidate", f"{len(layers)} layers")
    for column in ("bits", "median dB", "lowest dB", "clipped", "flushed", "used bits"):
        table.add_column(column, justify="right")
    total = sum(layer.count for layer in layers)
    for name in report.candidates:
        scores = [layer.scores[name] for layer in layers]
        weighted = Score(*(_mean(layers, values, total) for values in zip(*(score[:6] for score in scores))))
        ratios = [score.sqnr for score in scores if not math.isnan(score.sqnr)]
        ends = (decibels(median(ratios)), decibels(min(ratios))) if ratios else ("-", "-")
        shares = (percent(weighted.clipped), percent(weighted.flushed))
        table.add_row(name, f"{weighted.bits:.2f}", *ends, *shares, f"{weighted.used_bits:.2f}")
    return table


def _mean(layers: list[Layer], values: tuple[float, ...], total: int) -> float:
    return sum(layer.count * value for layer, value in zip(layers, values)) / total


def _of_worst(layers: list[Layer], choice: Assignment, worst: int) -> Table:
    """The layers that lose most with what is recommended for them."""
    table = _table("layer", "worst with what is recommended")
    for column in ("shape", "recommended"):
        table.add_column(column, no_wrap=True)
    for column in ("dB", "clipped", "flushed", "used bits", "spread"):
        table.add_column(column, justify="right")
    rows = []
    for layer in layers:
        name = choice.choices.get(layer.module, {}).get(layer.operand)
        if name is not None:
            rows.append((layer.scores[name].sqnr, layer, name))
    for _, layer, name in sorted(rows, key=lambda row: (math.isnan(row[0]), row[0]))[:worst]:
        score = layer.scores[name]
        numbers = (decibels(score.sqnr), percent(score.clipped), percent(score.flushed))
        shape = "x".join(map(str, layer.shape))
        table.add_row(escape(layer.name), shape, name, *numbers, f"{score.used_bits:.2f}", f"{score.scale_spread:.1f}")
    return table


def _table(first: str, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column(first, overflow="fold", min_width=20)
    return table


def decibels(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f}"


def percent(share: float) -> str:
    return "0" if share == 0 else f"{share:.2%}" if share >= 1e-4 else "<0.01%"


def specials(f: FP8Format) -> str:
    names = [name for name, has in (("infinity", f.has_inf), ("NaN", f.has_nan)) if has]
    return ", ".join(names) or "none"


def print_formats(console: Console, formats: list[FP8Format]) -> None:
    """A row for each format."""
    table = _table("format", "")
    for column in ("spelling", "bits", "largest", "smallest normal", "smallest", "specials", "-0"):
        table.add_column(column)
    for f in formats:
        normal = "-" if f.smallest_normal is None else f"{f.smallest_normal:g}"
        ends = (f"{f.max_representable_value:g}", normal, f"{f.smallest_subnormal:g}")
        table.add_row(
            f.name, f.spelling, str(f.bits), *ends, specials(f), "yes" if f.is_signed and f.has_negative_zero else "no"
        )
    console.print(table)


def print_format(console: Console, f: FP8Format, values: bool) -> None:
    """A format's numbers and number lines; all values, code by code, where asked."""
    print_formats(console, [f])
    width = min(console.width, 100)
    finite = finite_values(f)
    positive = [value for value in finite if value > 0]
    console.print(f"\n{len(finite)} finite values; how many lie where, linear:")
    console.print(text_line(finite, width), highlight=False)
    console.print(f"{finite[0]:g} to {f.max_representable_value:g}")
    console.print("\nthe positive ones, by the logarithm:")
    console.print(text_line([math.log2(value) for value in positive], width), highlight=False)
    console.print(f"{positive[0]:g} to {positive[-1]:g}")
    if values:
        digits = -(-f.bits // 4)
        for code in range(1 << f.bits):
            console.print(f"0x{code:0{digits}X}  {code:0{f.bits}b}  {f.to_real(code):.17g}", highlight=False)
