"""Writes the parts of README.md and docs/*.md between ``<!-- generated: name -->`` and ``<!-- end -->``.

Run ``python docs/generate.py`` after a change of a format or an operator; a test fails while a page is not current.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import torch
from torch._decomp import decomposition_table
from torch._library.simple_registry import singleton
from torch._subclasses.functional_tensor import FunctionalTensorMode

from altgrad.quantization import FORMAT_REGISTRY, FP8Format, quantize, resolve
from altgrad.simulation import RECIPES, Rule
from ops_registry.operators import OPERATORS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

ALSO_KNOWN_AS = {
    "E0M7": "signed fixed point, sign and magnitude",
    "E3M4": "not `float8_e3m4`, which is `e3m4b3`",
    "E4M3": "OCP E4M3, `float8_e4m3fn`",
    "E5M2": "OCP E5M2, `float8_e5m2`",
    "E2M3": "OCP MXFP6, `float6_e2m3fn`",
    "E3M2": "OCP MXFP6, `float6_e3m2fn`",
    "E2M1": "OCP MXFP4, `float4_e2m1fn`",
    "E4M3FNUZ": "`float8_e4m3fnuz`",
    "E5M2FNUZ": "`float8_e5m2fnuz`",
    "FP16": "IEEE binary16, `float16`",
    "BF16": "`bfloat16`",
    "TF32": "NVIDIA TensorFloat-32; 19 bits, no codes",
    "E8M0": "OCP MX scale, UE8M0, `float8_e8m0fnu`",
    "UE4M3": "NVFP4's scale, whose sign is never set",
    "UE5M3": "scale of 8 bits",
}
SPECIALS = {
    (True, True, True): "infinity, NaN",
    (False, True, True): "NaN",
    (False, True, False): "NaN, no -0",
    (False, False, True): "none",
}


def number(value: float | None) -> str:
    """A number exactly: a short decimal, or odd * 2^k."""
    if value is None:
        return "-"
    if value in (0, float("inf"), float("-inf")) or value != value:
        return {"0.0": "0", "nan": "NaN"}.get(str(value), str(value))
    mantissa, exponent = Fraction(value), 0
    while mantissa.denominator > 1:
        mantissa, exponent = mantissa * 2, exponent - 1
    while mantissa % 2 == 0:
        mantissa, exponent = mantissa / 2, exponent + 1
    if abs(value) < 1e6 and (mantissa != 1 or exponent >= -1):
        return f"{value:.9g}" if float(f"{value:.9g}") == value else f"{mantissa}/2^{-exponent}"
    return f"2^{exponent}" if mantissa == 1 else f"{mantissa} * 2^{exponent}"


def table(header: str, rows: Iterable[Iterable[str]]) -> str:
    columns = header.split(" | ")
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def hexadecimal(code: int | None) -> str:
    return "-" if code is None else f"0x{code:0{2 if code < 256 else 4}X}"


def unsigned(f: FP8Format) -> str:
    return "" if f.is_signed else ", no sign" if f.has_zero else ", no sign, no zero"


def formats() -> str:
    return table(
        "format | largest | smallest normal | smallest subnormal | specials | also known as",
        (
            [
                name,
                number(f.max_representable_value),
                number(f.smallest_normal),
                "-" if f.smallest_subnormal == f.smallest_normal else number(f.smallest_subnormal),
                SPECIALS[f.has_inf, f.has_nan, f.has_negative_zero] + unsigned(f),
                ALSO_KNOWN_AS.get(name, ""),
            ]
            for name, f in FORMAT_REGISTRY.items()
        ),
    )


def format_fields() -> str:
    return table(
        "format | spelling | bits | E | M | bias | min_exponent | quantum | code of 1 | max_code | inf_code | nan_code",
        (
            [
                name,
                f"`{f.spelling}`",
                *map(str, (f.bits, f.exponent_bits, f.mantissa_bits, f.bias, f.min_exponent)),
                number(f.quantum),
                hexadecimal(f.to_bits(1.0)) if f.to_real(f.to_bits(1.0)) == 1 else "-",
                *map(hexadecimal, (f.max_code, f.inf_code, f.nan_code)),
            ]
            for name, f in FORMAT_REGISTRY.items()
        ),
    )


# format, inputs on which some library differs, and what the library calls the format (or the nearest thing it has)
DIFFERENCES = [
    ("E4M3", [464.0, 464.1, float("inf")], "float8_e4m3fn", "ocp_e4m3"),
    ("E5M2", [61439.0, 61440.0, float("inf")], "float8_e5m2", "ocp_e5m2"),
    ("E4M3FNUZ", [1000.0, float("inf"), -0.0], "float8_e4m3fnuz", None),
    ("E2M1", [8.0, float("inf"), float("nan")], "float4_e2m1fn", "ocp_e2m1"),
    ("E3M4", [20.0, 40.0], "float8_e3m4", None),
    ("E8M0", [1.5, 3.0, 1e-45, 0.0, -1.0, float("inf")], "float8_e8m0fnu", "ocp_e8m0"),
]


def by_altgrad(f: FP8Format, x: float) -> list[str]:
    values = (quantize(torch.tensor(x), f, saturation=mode) for mode in ("propagate", "finite", "none"))
    return [number(value.item()) for value in values]


def by_ml_dtypes(name: str, x: float) -> str:
    with np.errstate(all="ignore"):
        return number(float(np.float32(x).astype(getattr(ml_dtypes, name)).astype(np.float32)))


def by_torch(name: str, x: float) -> str:
    dtype = getattr(torch, name, None)  # float4 and float6 have no casts
    return "-" if dtype is None or dtype.itemsize != 1 else number(torch.tensor(x).to(dtype).float().item())


def by_gfloat(name: str | None, x: float, sat: bool) -> str:
    if name is None:
        return "-"
    try:
        return number(gfloat.round_float(getattr(gfloat.formats, f"format_info_{name}"), x, sat=sat))
    except ValueError:
        return "ValueError"


def differences() -> str:
    return table(
        "format | input | propagate | finite | none | ml_dtypes | torch cast | gfloat sat=True | gfloat | theirs",
        (
            [
                name,
                number(x),
                *by_altgrad(FORMAT_REGISTRY[name], x),
                by_ml_dtypes(theirs, x) if hasattr(ml_dtypes, theirs) else "-",
                by_torch(theirs, x),
                by_gfloat(in_gfloat, x, True),
                by_gfloat(in_gfloat, x, False),
                f"`{theirs}`",
            ]
            for name, inputs, theirs, in_gfloat in DIFFERENCES
            for x in inputs
        ),
    )


def p3109() -> str:
    """P3109's signed formats of 8 bits without infinity are ours, code by code; those with infinity are not."""
    rows = []
    for precision in range(1, 8):
        f = resolve(f"e{8 - precision}m{precision - 1}b{1 << (7 - precision)}fnuz")
        theirs = gfloat.formats.format_info_p3109(8, precision, domain=gfloat.Domain.Finite)
        values = ([gfloat.decode_float(theirs, code).fval, f.to_real(code)] for code in range(256))
        same = all(str(a) == str(b) for a, b in values)
        extended = gfloat.formats.format_info_p3109(8, precision)
        name = next((name for name, named in FORMAT_REGISTRY.items() if named.spelling == f.spelling), "")
        rows.append(
            [
                f"binary8p{precision}sf",
                f"`{f.spelling}`" + (f" ({name})" if name else ""),
                "all 256" if same else "not all",
                number(f.max_representable_value),
                number(extended.max),
            ]
        )
    return table("P3109 | altgrad | codes that agree | largest | largest of P3109's `se` sibling", rows)


def schemas() -> str:
    return "```\n" + "\n".join(f"altgrad::{name}{operator.schema}" for name, operator in OPERATORS.items()) + "\n```"


KEYS = {
    "CPU": "`cpu.py`",
    "CUDA": "`cuda.py`",
    "CompositeExplicitAutograd": "`aten.py`: every other device, and these where their own kernel is missing",
    "Meta": "`fake.py`: also FakeTensor",
    "Autograd": "`autograd.py`: every device",
    "FuncTorchBatched": "`vmap.py`",
}


def dispatch() -> str:
    """Which keys have a kernel of their own, read off the dispatcher and off the two Python-side tables."""
    names = list(OPERATORS)
    registered = {
        name: set(
            re.findall(r"^([A-Z]\w+)(?:\[alias\])?: registered", torch._C._dispatch_dump(f"altgrad::{name}"), re.M)
        )
        for name in names
    }
    unknown = set().union(*registered.values()) - set(KEYS)
    if unknown:
        raise KeyError(f"say which file registers {sorted(unknown)}")
    entries = {name: singleton.find(f"altgrad::{name}") for name in names}
    decomposed = {name: getattr(torch.ops.altgrad, name).default in decomposition_table for name in names}

    def row(key: str, file: str, has: Callable[[str], object]) -> list[str]:
        return [key, file, *("yes" if has(name) else "-" for name in names)]

    return table(
        " | ".join(["key", "file in `ops_registry`", *(f"`{name}`" for name in names)]),
        [
            *(
                row(key, file, lambda name, key=key: key in registered[name])
                for key, file in KEYS.items()
                if any(key in keys for keys in registered.values())
            ),
            row(
                "FunctionalTensorMode rule",
                "`functionalize.py`: torch.compile, AOTInductor",
                lambda name: entries[name].torch_dispatch_rules.find(FunctionalTensorMode),
            ),
            row("decomposition table", "`functionalize.py`: ONNX, DTensor", decomposed.get),
        ],
    )


def in_words(rule: Rule | None) -> str:
    """A rule in a few words."""
    if rule is None:
        return "high precision"
    if rule.format is None:
        return "as in `forward`"
    per = rule.per if isinstance(rule.per, str) else " x ".join(map(str, rule.block))
    if rule.history:
        scale = f"amax of {rule.history} steps"
    elif rule.scale is not None:
        scale = f"scale {rule.scale:g}"
    else:
        scale = f"{rule.scale_format} scales" if rule.scale_format else rule.power_of_two or "float32"
    others = [rule.rounding.replace("_", " ")] * (rule.rounding != "nearest_ties_to_even")
    return ", ".join([f"{rule.format} {per}", scale, *others])


def recipes() -> str:
    rows = []
    for recipe in RECIPES.values():
        sides = [dict.fromkeys((in_words(p.left), in_words(p.right))) for p in recipe.products]  # one entry if the same
        pairs = ["; ".join(s) + "; Hadamard" * bool(p.hadamard) for s, p in zip(sides, recipe.products)]
        same = [pair if pair not in pairs[:i] else "the same" for i, pair in enumerate(pairs)]
        rows.append([f"`{recipe.name}`", *same, recipe.source])
    return table("recipe | `forward`: x; w | `grad_input`: dy; w | `grad_weight`: dy; x | source", rows)


def described(docstring: str) -> str:
    """A docstring as Markdown: its sections as bold words, arguments as items, the example as a block."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", inspect.cleandoc(docstring)).replace("``", "`")
    text, _, example = text.partition("\nExample:\n")
    lines = []
    for line in text.split("\n"):
        if re.fullmatch(r"(Args|Returns|Raises|Yields):", line):
            lines.append(f"**{line[:-1]}**\n")
        elif item := re.match(r"    ([\w*][\w*, ]*): (.*)", line):
            lines.append(f"- `{item[1]}`: {item[2]}")
        else:
            lines.append(re.sub(r"^    ", "  " if lines and lines[-1].startswith(("-", "  ")) else "", line))
    block = f"\n```pycon\n{inspect.cleandoc(example)}\n```" if example else ""
    return "\n".join(lines) + "\n" + block


def api() -> str:
    """The public functions and classes, from their docstrings."""
    parts = []
    for name in (
        "altgrad.quantization",
        "altgrad.simulation",
        "altgrad.accumulators",
        "altgrad.report",
        "altgrad.storage",
    ):
        module = importlib.import_module(name)
        parts.append(f"## {module.__name__}\n\n{described(module.__doc__ or '')}")
        for member in module.__all__:
            value = getattr(module, member)
            if callable(value) and value.__doc__:
                signature = (
                    "" if inspect.isclass(value) else re.sub(r"\b(\w+\.)+(?=[A-Z])", "", str(inspect.signature(value)))
                )
                signature = re.sub(r"\*<class '(\w+)'>", r"Unpack[\1]", signature)
                parts.append(f"### {member}\n\n`{member}{signature}`\n\n{described(value.__doc__)}")
    return re.sub(r"\n{3,}", "\n\n", "\n" + "\n\n".join(parts))


SECTIONS = {f.__name__: f for f in (formats, format_fields, differences, p3109, schemas, dispatch, recipes, api)}


def render(text: str) -> str:
    """The text of a page with its generated parts as they should be."""

    def section(match: re.Match[str]) -> str:
        return f"{match[1]}\n{SECTIONS[match[2]]()}\n<!-- end -->"

    return re.sub(r"(<!-- generated: (\w+) -->)\n.*?<!-- end -->", section, text, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        old = page.read_text()
        new = render(old)
        if new != old:
            page.write_text(new)
            print(f"wrote {page.relative_to(ROOT)}")
