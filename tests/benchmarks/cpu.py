"""The CPU kernels beside ``x * 2`` and the peers that are installed (``pip install altgrad[bench]``).

    python tests/benchmarks/cpu.py [--write]

prints the tables; ``--write`` puts them into the CPU section of docs/benchmarks.md, and a picture beside it. What is
compared takes turns in one process, and memory is warm: the allocator keeps what was freed, so that nobody pays for
fresh pages. Of all runs of a call the time shown is the first decile: the machine may be shared, and a median then
shows the work of others (on a quiet machine the two agree).
"""

import argparse
import ctypes
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import reference
from conftest import near_ties

from altgrad.quantization import E4M3, FORMAT_REGISTRY, decode, encode, quantize
from ops_registry import cpu
from ops_registry.modes import DETERMINISTIC_ROUNDINGS

DOCS = Path(__file__).parents[2] / "docs"
SIZES = {"64": 64, "64K": 1 << 16, "1M": 1 << 20, "16M": 1 << 24}
SECONDS = 6.0  # for the rounds of one group
BYTES = [name for name, f in FORMAT_REGISTRY.items() if f.bits <= 8 and f.is_signed]
Calls = dict[str, Callable[[], object]]


def keep_memory() -> None:
    """Makes glibc reuse freed memory: no mmap for large blocks (M_MMAP_MAX = 0), no trimming (M_TRIM_THRESHOLD)."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)


def seconds_of(calls: Calls) -> dict[str, float]:
    """Seconds of each call, the first decile of its runs; the calls take turns, in a new order each time."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    turns = list(calls.items())
    for call in calls.values():
        call()
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        random.shuffle(turns)
        for name, call in turns:
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(seconds)[len(seconds) // 10] for name, seconds in times.items()}


# --- E4M3 beside the peers --------------------------------------------------------------------------------------------


def altgrad_peers() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    scale = torch.tensor(1.0)
    compiled = torch.compile(lambda x: quantize(x, E4M3, scale), fullgraph=True, dynamic=False)
    return {"altgrad": lambda x: quantize(x, E4M3, scale), "altgrad, compiled": compiled}


def torch_peers() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    return {"torch: cast to float8_e4m3fn and back": lambda x: x.to(torch.float8_e4m3fn).float()}


def torchao_peers() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    from torchao.prototype.custom_fp_utils import _f32_to_floatx_unpacked, _floatx_unpacked_to_f32

    return {"torchao floatx": lambda x: _floatx_unpacked_to_f32(_f32_to_floatx_unpacked(x, 4, 3), 4, 3)}


def gfloat_peers() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    import gfloat
    from gfloat.formats import format_info_ocp_e4m3

    return {
        "gfloat": lambda x: torch.from_numpy(
            gfloat.round_ndarray(format_info_ocp_e4m3, x.numpy(), gfloat.RoundMode.TiesToEven, sat=True)
        )
    }


def ml_dtypes_peers() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    import ml_dtypes

    return {"ml_dtypes": lambda x: torch.from_numpy(x.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32))}


def qtorch_peers() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    from qtorch.quant import float_quantize

    return {"qtorch": lambda x: float_quantize(x, 4, 3, rounding="nearest")}


def peers() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Those that are installed: functions that simulate E4M3 with scale 1, float32 in and out."""
    found = {}
    for group in (altgrad_peers, torch_peers, ml_dtypes_peers, qtorch_peers, torchao_peers, gfloat_peers):
        try:
            found.update(group())
        except ImportError as error:
            print(f"left out: {error}", file=sys.stderr)
    return found


def wrong_values(function: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """How many near-ties within the range of E4M3 get another value than the definition's (0 equals -0)."""
    x = near_ties(E4M3)
    x = x[x.abs() <= E4M3.max_representable_value]
    want = torch.from_numpy(reference.quantize(E4M3, x.numpy(), np.float32(1)))
    return f"{int((function(x).float() != want).sum())} of {x.numel()}"


def peers_table() -> tuple[list[str], dict[str, dict[str, float]]]:
    functions = peers()
    seconds: dict[str, dict[str, float]] = {}
    for size, n in SIZES.items():
        x = torch.randn(n)
        calls: Calls = {"`x * 2`": lambda x=x: x * 2}
        calls |= {name: lambda f=f, x=x: f(x) for name, f in functions.items()}
        seconds[size] = seconds_of(calls)
    lines = [
        f"| E4M3, float32 | {' | '.join(SIZES)} | 16M / `x * 2` | wrong near ties |",
        "|---|" + "---:|" * (len(SIZES) + 2),
    ]
    for name in seconds["64"]:
        times = " | ".join(readable(seconds[size][name]) for size in SIZES)
        ratio = seconds["16M"][name] / seconds["16M"]["`x * 2`"]
        wrong = wrong_values(functions[name]) if name in functions else ""
        lines.append(f"| {name} | {times} | {ratio:.2f} | {wrong} |")
    return lines, seconds


def readable(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-4 else f"{seconds * 1e3:.3g} ms"


# --- Ratios to x * 2 --------------------------------------------------------------------------------------------------


def rounding_calls(x: torch.Tensor, scale: torch.Tensor) -> dict[str, tuple[Calls, float | str]]:
    """The groups of :func:`ratio_calls` for the roundings that are not the default."""
    calls: Calls = {"ties to even": lambda: quantize(x, E4M3, scale)}
    for rounding in DETERMINISTIC_ROUNDINGS[1:]:
        calls[rounding] = lambda rounding=rounding: quantize(x, E4M3, scale, rounding=rounding)
    for dtype in (torch.uint8, torch.int32):
        name = f"stochastic with {str(dtype).removeprefix('torch.')} bits"
        bits = torch.randint(0, 256, x.shape, dtype=dtype)
        calls[name] = lambda bits=bits: quantize(x, E4M3, scale, rounding="stochastic", random_bits=bits)
    seed = torch.tensor(2026)
    seeded: Calls = {
        "`x * 2`": lambda: x * 2,
        "stochastic with a seed": lambda: quantize(x, E4M3, scale, rounding="stochastic", random_bits=seed),
        "stochastic, seed drawn": lambda: quantize(x, E4M3, scale, rounding="stochastic"),
    }
    return {"other roundings": (calls, 1.3), "a seed": (seeded, 1.5 if x.numel() > 1 << 22 else "")}


def block_calls(x: torch.Tensor) -> Calls:
    """Scales of blocks found and applied in one call, the tensor's scale given; x is a matrix."""
    op, stochastic = torch.ops.altgrad.quantize_blocks, torch.ops.altgrad.quantize_blocks_stochastic
    modes, above, seed = ("propagate", "nearest_ties_to_even"), torch.tensor(0.01), torch.tensor(2026)
    return {
        "`x * 2`": lambda: x * 2,
        "MXFP8": lambda: op(x, None, "E4M3", *modes, [1, 32], "floor"),
        "MXFP4": lambda: op(x, None, "E2M1", *modes, [1, 32], "floor"),
        "NVFP4": lambda: op(x, above, "E2M1", *modes, [1, 16], None, "E4M3"),
        "128 x 128": lambda: op(x, None, "E4M3", *modes, [128, 128]),
        "per row": lambda: op(x, None, "E4M3", *modes, [1, x.shape[1]]),
        "MXFP8 by columns": lambda: op(x, None, "E4M3", *modes, [32, 1], "floor"),
        "MXFP4 with a seed": lambda: stochastic(x, None, seed, "E2M1", "propagate", [1, 32], "floor"),
    }


def special_calls(x: torch.Tensor, scale: torch.Tensor) -> Calls:
    """What a NaN in every chunk costs the loops that do without."""
    spoiled = x.clone()
    spoiled[::1000] = torch.nan
    codes, spoiled_codes = encode(x, E4M3, scale), encode(spoiled, E4M3, scale)
    return {
        "quantize without": lambda: quantize(x, E4M3, scale),
        "quantize": lambda: quantize(spoiled, E4M3, scale),
        "encode without": lambda: encode(x, E4M3, scale),
        "encode": lambda: encode(spoiled, E4M3, scale),
        "decode without": lambda: decode(codes, E4M3, scale),
        "decode": lambda: decode(spoiled_codes, E4M3, scale),
    }


def ratio_calls(n: int) -> dict[str, tuple[Calls, float | str]]:
    """Title -> (calls of which the first is the measure, the bound on the ratio to it)."""
    x, scale = torch.randn(n), torch.tensor(0.37)
    matrix, rows, columns = x.view(1024, -1), torch.rand(1024, 1) + 0.5, torch.rand(n // 1024) + 0.5
    groups: dict[str, tuple[Calls, float | str]] = {}
    for operation in ("quantize", "encode", "decode"):
        calls: Calls = {"`x * 2`": lambda: x * 2}
        for name in BYTES:
            codes = encode(x, name, scale)
            calls[name] = {
                "quantize": lambda f=name: quantize(x, f, scale),
                "encode": lambda f=name: encode(x, f, scale),
                "decode": lambda f=name, codes=codes: decode(codes, f, scale),
            }[operation]
        groups[operation] = calls, 1.1 if n > 1 << 22 else 1.3
    wide: Calls = {"`x * 2`": lambda: x * 2}
    wide |= {name: lambda f=name: quantize(x, f, scale) for name in FORMAT_REGISTRY if name not in BYTES}
    groups["quantize, by way of float64"] = wide, ""
    groups["quantize with a vector of scales"] = (
        {
            "`x * 2`": lambda: x * 2,
            "per row": lambda: quantize(matrix, E4M3, rows),
            "per column": lambda: quantize(matrix, E4M3, columns),
        },
        1.25,
    )
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        calls = {"`x * 2`": lambda half=half: half * 2, "E4M3": lambda half=half: quantize(half, E4M3, scale)}
        groups[f"quantize, {str(dtype).removeprefix('torch.')}"] = calls, 1.3 if n > 1 << 22 else ""
    for dtype in (torch.float32, torch.bfloat16):
        calls = block_calls(x.view(-1, 4096).to(dtype))
        groups[f"blocks, {str(dtype).removeprefix('torch.')}"] = calls, 1.3 if n > 1 << 22 else ""
    groups |= rounding_calls(x, scale)
    groups["NaN in every thousand elements"] = special_calls(x, scale), ""
    silu = torch.nn.functional.silu
    compiled = torch.compile(silu, dynamic=False)
    fused = torch.compile(lambda x: silu(quantize(x, E4M3, scale)), fullgraph=True, dynamic=False)
    calls = {"silu(x), compiled": lambda: compiled(x), "silu(quantize(x)), compiled": lambda: fused(x)}
    groups["fusion"] = calls | {"silu(quantize(x)), eager": lambda: silu(quantize(x, E4M3, scale))}, 1.4
    return groups


def ratios_table() -> list[str]:
    lines = ["| ratio of times | size | measured | bound |", "|---|---|---|---|"]
    for size in ("1M", "16M"):
        for title, (calls, bound) in ratio_calls(SIZES[size]).items():
            seconds = seconds_of(calls)
            first, *others = calls
            shown = ", ".join(f"{name} {seconds[name] / seconds[first]:.2f}" for name in others)
            lines.append(f"| {title}, of {first} ({readable(seconds[first])}) | {size} | {shown} | {bound} |")
    return lines


def small_calls_table() -> list[str]:
    x, scale = torch.randn(64), torch.tensor(0.37)
    matrix, rows = torch.randn(8, 8), torch.rand(8, 1) + 0.5
    leaf, op = torch.randn(64, requires_grad=True), torch.ops.altgrad.quantize
    seconds = seconds_of(
        {
            "`x * 2`": lambda: x * 2,
            "operator": lambda: op(x, scale, "E4M3"),
            "function": lambda: quantize(x, E4M3, scale),
            "function, scale for each row": lambda: quantize(matrix, E4M3, rows),
            "`x * 2`, with grad": lambda: leaf * 2,
            "operator, with grad": lambda: op(leaf, scale, "E4M3"),
            "function, with grad": lambda: quantize(leaf, E4M3, scale),
        }
    )
    lines = ["| a call on 64 elements | time | bound |", "|---|---:|---:|"]
    for name, value in seconds.items():
        bound = "" if "`" in name else "30 us" if "grad" in name else "20 us"
        lines.append(f"| {name} | {value * 1e6:.1f} us | {bound} |")
    return lines


# --- Cycles an element ------------------------------------------------------------------------------------------------

# A million additions of which each waits for the one before: a cycle each.
CHAIN = """
#include <time.h>
double seconds(void) {
    struct timespec from, to;
    unsigned long x = 0;
    clock_gettime(CLOCK_MONOTONIC, &from);
    for (int i = 0; i < 1000000; i++) __asm__ volatile("imul $3, %0, %0" : "+r"(x)); /* 3 cycles */
    clock_gettime(CLOCK_MONOTONIC, &to);
    return (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
}
"""
FEW, MANY = 8192, 40960  # elements: all of them in the second-level cache


CYCLES = [
    "One thread: cycles an element of the least times, in the second-level cache (what more elements take longer",
    "there), at 1M and at 16M; others' work on the machine moves these least. With AVX-512, 16 float32 elements",
    "take 12 instructions of arithmetic to the nearest value or toward zero, 13 or 14 with another rounding, 16",
    "with given bits, a reciprocal for many instead of a division among them; 32 of 16 bits take 15 to be looked",
    "up, to the nearest by one scale, or otherwise for each 16 what float32 takes and the conversions, 2 of float16",
    "and 5 of bfloat16; 32 random words from a seed take 62. Where two finish in a cycle, as on Intel's, that is",
    "0.38 cycles an element in float32, 0.23 looked up and 1.0 a word at best, which is what binds in cache.",
    "Compiled code reads no number as its bits: for that Inductor's C++ writes a vector in",
    "halves and reads it whole, and the load waits. Where it did, silu(quantize(x)) took 5.8 of silu(x) on an Intel",
    "processor with AVX-512 and takes 1.6, one thread (2026-11-29); on an AMD EPYC 2.0, and 2.4 without (2026-11-25).",
]


def cycles_a_second() -> float:
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "chain.c", Path(folder) / "chain.so"
        source.write_text(CHAIN)
        subprocess.run(["cc", "-O2", "-funroll-loops", "-shared", "-fPIC", source, "-o", built], check=True)
        seconds = ctypes.CDLL(str(built)).seconds
        seconds.restype = ctypes.c_double
        return 3e6 / min(seconds() for _ in range(300))


def cycle_calls(n: int) -> Calls:
    x, scale = torch.randn(n), torch.tensor(0.37)
    calls: Calls = {"`x * 2`": lambda: x * 2}
    for name in ("E4M3", "E7M0", "E4M3FNUZ"):
        codes = encode(x, name, scale)
        calls[f"quantize, {name}"] = lambda f=name: quantize(x, f, scale)
        calls[f"encode, {name}"] = lambda f=name: encode(x, f, scale)
        calls[f"decode, {name}"] = lambda f=name, codes=codes: decode(codes, f, scale)
    for rounding in DETERMINISTIC_ROUNDINGS[1:]:
        calls[f"quantize, {rounding}"] = lambda rounding=rounding: quantize(x, E4M3, scale, rounding=rounding)
    for kind, bits in {"int32 bits": torch.randint(256, (n,), dtype=torch.int32), "a seed": torch.tensor(1)}.items():
        calls[f"quantize, stochastic with {kind}"] = lambda bits=bits: quantize(
            x, E4M3, scale, rounding="stochastic", random_bits=bits
        )
    for dtype in (torch.float16, torch.bfloat16):
        half, name = x.to(dtype), str(dtype).removeprefix("torch.")
        calls[f"`x * 2`, {name}"] = lambda half=half: half * 2
        calls[f"quantize, {name}"] = lambda half=half: quantize(half, E4M3, scale)
    return calls


def cycles_table() -> list[str]:
    threads, frequency = torch.get_num_threads(), cycles_a_second()
    torch.set_num_threads(1)
    least: dict[int, dict[str, float]] = {}
    for n in (FEW, MANY, SIZES["1M"], SIZES["16M"]):
        calls = cycle_calls(n)
        least[n] = dict.fromkeys(calls, 1.0)
        end = time.perf_counter() + 2 * SECONDS
        while time.perf_counter() < end:
            for name in random.sample(list(calls), len(calls)):
                start = time.perf_counter()
                calls[name]()
                least[n][name] = min(least[n][name], time.perf_counter() - start)
    torch.set_num_threads(threads)
    lines = [
        f"| E4M3 in float32 unless said, at {frequency / 1e9:.2f} GHz | cache | 1M | of `x * 2` | 16M | of `x * 2` |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in least[FEW]:
        dtype = name.partition("float16")[1] and name.rpartition(" ")[2]
        measure = f"`x * 2`, {dtype}" if dtype else "`x * 2`"
        cells = [f"{(least[MANY][name] - least[FEW][name]) / (MANY - FEW) * frequency:.2f}"]
        for n in (SIZES["1M"], SIZES["16M"]):
            cells += [f"{least[n][name] / n * frequency:.2f}", f"{least[n][name] / least[n][measure]:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


# --- The page ---------------------------------------------------------------------------------------------------------


def machine() -> str:
    fields = [line.split(":") for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    processor = {name.strip(): value.strip() for name, value in fields}
    generation = f"family {processor.get('cpu family')}, model {processor.get('model')}"
    packages = {"torch", "torchao", "gfloat", "ml_dtypes", "qtorch", "numpy"} & {*packages_distributions()}
    versions = [f"{package} {version(package)}" for package in sorted(packages)]
    return (
        f"{processor.get('model name')} ({generation}), {torch.get_num_threads()} threads, backend {cpu.backend()}, "
        f"Python {platform.python_version()}, {', '.join(versions)}, {time.strftime('%Y-%m-%d')}."
    )


def draw(seconds: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "altgrad"
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name in seconds["64"]:
        times = [seconds[size][name] * 1e6 for size in SIZES]
        style = {"color": "black", "linestyle": "--"} if "x * 2" in name else {"marker": "o"}
        axes.plot(list(SIZES.values()), times, label=name.replace("`", ""), **style)
    axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="microseconds")
    axes.set_xticks(list(SIZES.values()), list(SIZES))
    axes.set_title("Simulated E4M3, float32, CPU: time of a call")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md, and a picture")
    writes = parser.parse_args().write
    if cpu.backend() == "aten" and os.environ.get("ALTGRAD_CPU_TARGET") != "aten":
        sys.exit(f"{cpu.__file__} has no C kernels beside it; ALTGRAD_CPU_TARGET=aten measures without them")
    keep_memory()
    table, seconds = peers_table()
    section = [
        "## CPU",
        "",
        "`python tests/benchmarks/cpu.py --write` measures this and writes it here: calls taking turns in one process,",
        "with warm memory; the time is the first decile of the runs, because the machine is shared. Near ties: values",
        "and midpoints of E4M3 with their float32 neighbours. From run to run a ratio at 1M, where all is in the",
        "cache, swings by 0.2, that of float16 by 0.5. Another machine, and what changed, is in the section behind.",
        machine(),
        "",
        *table,
        "",
        "![Time of a call over the number of elements](benchmarks_cpu.svg)",
        "",
        *small_calls_table(),
        "",
        *ratios_table(),
        "",
        *CYCLES,
        "",
        *cycles_table(),
        "",
    ]
    print("\n".join(section))
    if writes:
        page = DOCS / "benchmarks.md"
        title, *others = page.read_text().split("\n## ")
        kept = [f"## {other.rstrip()}\n" for other in others if not other.startswith("CPU\n")]
        page.write_text("\n".join([title.rstrip() + "\n", "\n".join(section), *kept]))
        draw(seconds, DOCS / "benchmarks_cpu.svg")


if __name__ == "__main__":
    main()
