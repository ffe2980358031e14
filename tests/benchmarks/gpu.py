"""What must hold on a GPU, in one call: all 2^32 float32 inputs, bandwidths, the fused path, launches.

    python3 tests/benchmarks/gpu.py [--sections bandwidth launch ...]

prints its progress and, last, a Markdown table for docs/benchmarks.md; exits with 1 if, in the sections that ran, a bit
differs or a bound does not hold. It takes five minutes on an H100. The GPU tests are
``pytest -m "gpu and not slow"``.
"""

import argparse
import functools
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch
import triton
from torch.nn.functional import silu

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import reference  # noqa: E402

from altgrad.quantization import FORMAT_REGISTRY  # noqa: E402
from ops_registry import aten  # noqa: E402
from ops_registry import cpu as c_kernels  # noqa: E402
from ops_registry.modes import DETERMINISTIC_ROUNDINGS  # noqa: E402

altgrad = torch.ops.altgrad
FORMATS = [f for f in FORMAT_REGISTRY.values() if f.bits == 8 and f.name != "E5M2FNUZ"]
NEAREST = DETERMINISTIC_ROUNDINGS[0]
CHUNK = 1 << 28
N = 1 << 27
failures: list[str] = []
rows: list[tuple[str, str, str]] = []


def report(what: str, got: str, bound: str, holds: bool) -> None:
    rows.append((what, got, bound))
    if not holds:
        failures.append(what)
    print(f"{what}: {got} ({bound}){'' if holds else '  FAILS'}", flush=True)


def wrong_bits(got: torch.Tensor, want: torch.Tensor) -> int:
    """How many bit patterns differ; NaN equals NaN."""
    if got.dtype == torch.uint8:
        return int((got != want).sum())
    return int(((got.view(torch.int32) != want.view(torch.int32)) & ~(got.isnan() & want.isnan())).sum())


def defined(f, x: torch.Tensor, rounding: str) -> torch.Tensor:
    """The definition at scale 1 on the GPU: a search among the values of the format."""
    values, midpoints = (torch.tensor(t, dtype=torch.float32, device="cuda") for t in reference.grid(f))
    largest = len(values) - 2
    a = x.abs().clamp(max=float(values[largest]))
    below = (torch.bucketize(a, values[: largest + 1], right=True) - 1).clamp(min=0)
    inexact, odd, negative = values[below] != a, below % 2 == 1, x < 0
    middle = midpoints[below]
    away = {
        "nearest_ties_to_even": (a > middle) | ((a == middle) & odd),
        "nearest_ties_to_away": a >= middle,
        "toward_zero": torch.zeros_like(odd),
        "toward_positive": ~negative,
        "toward_negative": negative,
        "to_odd": ~odd,
    }[rounding]
    r = values[below + (inexact & away)]
    if f.has_inf:
        r = torch.where(x.isinf(), torch.inf, r)
    r = torch.copysign(r, x)
    if not f.has_negative_zero:
        r = torch.where(r == 0, 0.0, r)
    return torch.where(x.isnan(), x, r)


def exhaustive() -> None:
    """All 2^32 inputs at scale 1: Triton == the definition; in ties to even also == aten == Inductor == C."""
    one = torch.ones((), device="cuda")
    for f in FORMATS:
        start, wrong = time.perf_counter(), dict.fromkeys(("definition", "aten", "compiled", "C", "codes"), 0)
        quantize = torch.compile(lambda x: altgrad.quantize(x, one, f.name))  # noqa: B023
        encode = torch.compile(lambda x: altgrad.encode(x, one, f.name))  # noqa: B023
        for first in range(-(1 << 31), 1 << 31, CHUNK):
            x = torch.arange(first, first + CHUNK, dtype=torch.int32, device="cuda").view(torch.float32)
            got = altgrad.quantize(x, one, f.name)
            for part in range(0, CHUNK, CHUNK // 4):
                here = slice(part, part + CHUNK // 4)
                wrong["definition"] += wrong_bits(got[here], defined(f, x[here], NEAREST))
                wrong["aten"] += wrong_bits(got[here], aten.quantize(x[here], one, f.name))
            wrong["compiled"] += wrong_bits(got, quantize(x))
            wrong["C"] += wrong_bits(got, altgrad.quantize(x.cpu(), one.cpu(), f.name).cuda())
            codes = altgrad.encode(x, one, f.name)
            wrong["codes"] += wrong_bits(codes, encode(x))
            if f.has_nan:
                wrong["codes"] += wrong_bits(altgrad.decode(codes, one, f.name), got)
        torch._dynamo.reset()
        report(
            f"{f.name}, 2^32 inputs, Triton against the definition, aten, Inductor, {c_kernels.backend()} on the CPU",
            " ".join(map(str, wrong.values())),
            "0 wrong",
            not any(wrong.values()),
        )
        print(f"  {time.perf_counter() - start:.1f} s", flush=True)


def exhaustive_in_other_modes() -> None:
    """All 2^32 inputs at scale 1: Triton == the definition == Inductor."""
    one = torch.ones((), device="cuda")
    for rounding in DETERMINISTIC_ROUNDINGS[1:]:
        wrong = {"definition": 0, "compiled": 0}
        for f in FORMATS:
            compiled = torch.compile(lambda x: altgrad.quantize(x, one, f.name, "propagate", rounding))  # noqa: B023
            for first in range(-(1 << 31), 1 << 31, CHUNK // 2):
                x = torch.arange(first, first + CHUNK // 2, dtype=torch.int32, device="cuda").view(torch.float32)
                got = altgrad.quantize(x, one, f.name, "propagate", rounding)
                wrong["definition"] += wrong_bits(got, defined(f, x, rounding))
                wrong["compiled"] += wrong_bits(got, compiled(x))
            torch._dynamo.reset()
        report(
            f"{rounding}, 2^32 inputs, {len(FORMATS)} formats, Triton against the definition, Inductor",
            " ".join(map(str, wrong.values())),
            "0 wrong",
            not any(wrong.values()),
        )


def scales() -> None:
    """2^27 random bit patterns and four scales: Triton == aten == Inductor."""
    x = torch.randint(-(1 << 31), 1 << 31, (N,), dtype=torch.int64, device="cuda").to(torch.int32).view(torch.float32)
    for f in FORMATS:
        quantize = torch.compile(lambda x, scale: altgrad.quantize(x, scale, f.name))  # noqa: B023
        wrong = 0
        for value in (1.0, 0.37, torch.pi / 1000, 2.0**-9):
            scale = torch.tensor(value, device="cuda")
            got = altgrad.quantize(x, scale, f.name)
            wrong += wrong_bits(got, aten.quantize(x, scale, f.name)) + wrong_bits(got, quantize(x, scale))
        torch._dynamo.reset()
        report(f"{f.name}, 4 scales, 2^27 random inputs", str(wrong), "0 wrong", not wrong)


def milliseconds(function, repeats: int = 41) -> float:
    """Median time on the device, which is busy while the host queues all calls: a host that is late does not show."""
    function()
    torch.cuda._sleep(1 << 25)  # some 20 ms
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def bandwidth() -> None:
    """Times at 2^27 elements beside ``y.copy_(x)``, for the same bytes."""
    x32 = torch.randn(1 << 14, 1 << 13, device="cuda")
    for x in (x32, x32.bfloat16()):
        y, dtype = torch.empty_like(x), str(x.dtype).removeprefix("torch.")
        copy = milliseconds(lambda: y.copy_(x))  # noqa: B023
        rows.append((f"copy_, {dtype}", f"{2 * x.nbytes / copy / 1e9:.2f} TB/s", ""))
        size, codes = x.element_size(), torch.randint(0, 256, x.shape, dtype=torch.uint8, device="cuda")
        scales = {
            "tensor": torch.tensor(0.37, device="cuda"),
            "row": torch.rand(1 << 14, 1, device="cuda") + 0.5,
            "column": torch.rand(1 << 13, device="cuda") + 0.5,
        }
        for name, scale in scales.items():
            ratio = copy / milliseconds(lambda: altgrad.quantize(x, scale, "E4M3"))  # noqa: B023
            report(f"quantize, {dtype}, a scale per {name}", f"{ratio:.3f} of copy_", ">= 0.97", ratio >= 0.97)
        blocks, scale = x.view(1 << 14, 1 << 8, 32), torch.rand(1 << 14, 1 << 8, 1, device="cuda") + 0.5
        ratio = copy / milliseconds(lambda: altgrad.quantize(blocks, scale, "E4M3"))  # noqa: B023
        rows.append((f"quantize, {dtype}, a scale per block of 32", f"{ratio:.3f} of copy_", ""))
        share = copy * (size + 1) / (2 * size)  # what copy_ would take for the bytes of a codec
        one = scales["tensor"]
        ratio = share / milliseconds(lambda: altgrad.encode(x, one, "E4M3"))  # noqa: B023
        report(f"encode, {dtype}", f"{ratio:.3f} of copy_", ">= 0.93", ratio >= 0.93)
        ratio = share / milliseconds(lambda: altgrad.decode(codes, one, "E4M3", x.dtype))  # noqa: B023
        report(f"decode, {dtype}", f"{ratio:.3f} of copy_", ">= 0.93", ratio >= 0.93)
        if dtype == "float32":
            cast = milliseconds(lambda: x.to(torch.float8_e4m3fn).to(x.dtype))  # noqa: B023
            formula = milliseconds(lambda: aten.quantize(x, one, "E4M3"), 5)  # noqa: B023
            rows.append(("cast to float8_e4m3fn and back, float32", f"{copy / cast:.3f} of copy_", ""))
            rows.append(("the aten formula, eager, float32", f"{copy / formula:.3f} of copy_", ""))


def blocks() -> None:
    """quantize_blocks at 2^27 elements, eager and compiled, beside ``y.copy_(x)`` for what it must read and write."""
    from altgrad.quantization import E4M3, MXFP4, MXFP8_E4M3, NVFP4, PerAxis, PerBlock, quantize_blocks

    x32 = torch.randn(1 << 14, 1 << 13, device="cuda")
    recipes = {
        "MXFP8": MXFP8_E4M3,
        "MXFP4": MXFP4,
        "NVFP4": NVFP4,
        "E4M3 in 128 x 128": {"format": E4M3, "granularity": PerBlock((128, 128))},
        "E4M3 per row": {"format": E4M3, "granularity": PerAxis(0)},
    }
    for x in (x32, x32.bfloat16()):
        y, dtype = torch.empty_like(x), str(x.dtype).removeprefix("torch.")
        for name, options in recipes.items():
            torch._dynamo.reset()
            eager = functools.partial(quantize_blocks, x, **options)
            fast = torch.compile(lambda x: quantize_blocks(x, **options), fullgraph=True)  # noqa: B023
            share = 1.5 if name == "NVFP4" else 1.0  # one more read, for the scale of the tensor
            for mode, call in (("eager", eager), ("compiled", functools.partial(fast, x))):
                copy = milliseconds(lambda: y.copy_(x))  # noqa: B023
                ratio = milliseconds(call) / (share * copy)
                value = f"{ratio:.3f} of {share:g} copy_"
                report(f"quantize_blocks, {name}, {dtype}, {mode}", value, "<= 1.15", ratio <= 1.15)


def fusion() -> None:
    x, scale = torch.randn(N, device="cuda"), torch.tensor(0.37, device="cuda")
    plain, fused = torch.compile(silu), torch.compile(lambda x: silu(altgrad.quantize(x, scale, "E4M3")))
    ratio = statistics.median(milliseconds(lambda: fused(x)) / milliseconds(lambda: plain(x)) for _ in range(5))
    report("compiled silu(quantize(x)), float32, 2^27", f"{ratio:.3f} of silu(x)", "<= 1.02", ratio <= 1.02)
    for rounding in DETERMINISTIC_ROUNDINGS[1:]:
        other = torch.compile(lambda x: silu(altgrad.quantize(x, scale, "E4M3", "propagate", rounding)))  # noqa: B023
        ratio = statistics.median(milliseconds(lambda: other(x)) / milliseconds(lambda: plain(x)) for _ in range(3))  # noqa: B023
        rows.append((f"the same, {rounding}", f"{ratio:.3f} of silu(x)", ""))


def modes() -> None:
    """The other roundings beside ties to even, 2^27 float32; random bits are read (given) or made."""
    from altgrad import quantization

    x, scale = torch.randn(N, device="cuda"), torch.tensor(0.37, device="cuda")
    int32, uint8 = (torch.randint(0, 256, (N,), dtype=dtype, device="cuda") for dtype in (torch.int32, torch.uint8))
    nearest = milliseconds(lambda: altgrad.quantize(x, scale, "E4M3"))
    for rounding in DETERMINISTIC_ROUNDINGS[1:]:
        ratio = milliseconds(lambda: altgrad.quantize(x, scale, "E4M3", "propagate", rounding)) / nearest  # noqa: B023
        report(f"quantize, {rounding}", f"{ratio:.3f} of ties to even", "<= 1.15", ratio <= 1.15)
    for name, bits in (("uint8", uint8), ("int32", int32)):
        ratio = milliseconds(lambda: altgrad.quantize_stochastic(x, scale, bits, "E4M3")) / nearest  # noqa: B023
        share = (8 + bits.element_size()) / 8
        report(
            f"quantize_stochastic, {name} bits given",
            f"{ratio:.3f} of ties to even",
            f"<= 1.15 * {share}",
            ratio <= 1.15 * share,
        )
    stochastic = functools.partial(quantization.quantize, format="E4M3", scale=scale, rounding="stochastic")
    compiled = torch.compile(stochastic, fullgraph=True)
    drawing = milliseconds(lambda: torch.randint(1 << 24, (N,), dtype=torch.int32, device="cuda")) / nearest
    rows.append(("torch.randint of int32 bits", f"{drawing:.3f} of ties to even", ""))
    for name, function in (("eager", stochastic), ("compiled", compiled)):
        ratio = milliseconds(lambda: function(x)) / nearest  # noqa: B023
        rows.append((f"quantize, stochastic, a seed drawn, {name}", f"{ratio:.3f} of ties to even", ""))


def launch() -> None:
    """Time per call on 1024 elements on the host, medians of sixty rounds of all calls in turn: clocks change."""
    from altgrad import quantization

    x, scale = torch.randn(32, 32, device="cuda"), torch.tensor(0.37, device="cuda")
    row, codes = torch.rand(32, 1, device="cuda") + 0.5, torch.zeros(32, 32, dtype=torch.uint8, device="cuda")
    seed, modes = torch.tensor(7, device="cuda"), ("E4M3", "propagate", "nearest_ties_to_even")
    calls = {
        "x * 2": lambda: x * 2,
        "cast to float8_e4m3fn and back": lambda: x.to(torch.float8_e4m3fn).to(torch.float32),
        "quantize": lambda: altgrad.quantize(x, scale, "E4M3"),
        "quantize, a scale per row": lambda: altgrad.quantize(x, row, "E4M3"),
        "encode": lambda: altgrad.encode(x, scale, "E4M3"),
        "decode": lambda: altgrad.decode(codes, scale, "E4M3"),
        "quantize_stochastic by a seed": lambda: altgrad.quantize_stochastic(x, scale, seed, "E4M3"),
        "quantize_blocks, MXFP8": lambda: altgrad.quantize_blocks(x, None, *modes, [1, 32], "rceil"),
        "quantize_operand, NVFP4": lambda: altgrad.quantize_operand(x, scale, *modes, [1, 16], None, "E4M3"),
        "altgrad.quantization.quantize, a tensor as scale": lambda: quantization.quantize(x, "E4M3", scale),
        "altgrad.quantization.quantize, a number as scale": lambda: quantization.quantize(x, "E4M3", 0.37),
    }
    try:
        from torchao.quantization import quant_primitives as torchao

        e4m3, tensor_scale = torch.float8_e4m3fn, scale.view(1, 1)
        to_codes = lambda: torchao._quantize_affine_float8(x, tensor_scale, e4m3)  # noqa: E731
        calls["torchao: quantize and dequantize float8"] = lambda: torchao._dequantize_affine_float8(
            to_codes(), tensor_scale, torch.float32
        )
    except ImportError as error:
        print(f"left out: {error}")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(61):  # the first warms up
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                call()
            times[name].append((time.perf_counter() - start) / 100 * 1e6)
    for name in calls:
        microseconds = statistics.median(times[name][1:])
        ratio = statistics.median(mine / base for mine, base in zip(times[name][1:], times["x * 2"][1:]))
        value = f"{microseconds:.1f} us, {ratio:.2f} of x * 2"
        if hasattr(altgrad, name.split()[0].rstrip(",")):
            report(f"launch: {name}", value, "<= 2.0", ratio <= 2)
        else:
            rows.append((f"launch: {name}", value, ""))


_SECTIONS = bandwidth, blocks, fusion, modes, launch, scales, exhaustive, exhaustive_in_other_modes
SECTIONS = {f.__name__: f for f in _SECTIONS}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    start = time.perf_counter()
    for name in parser.parse_args().sections:
        SECTIONS[name]()
        torch.cuda.empty_cache()
    print(f"\n{time.perf_counter() - start:.0f} s\n")
    driver = torch.cuda.get_device_properties(0)
    print(f"{driver.name}, torch {torch.__version__}, triton {triton.__version__}, {date.today()}")
    print(f"the operators of {Path(aten.__file__).parent}\n")
    print("| what | measured | bound |\n|---|---|---|")
    for row in rows:
        print("| {} | {} | {} |".format(*row))
    print(f"\n{len(failures)} failures: {', '.join(failures)}" if failures else "\nall bounds hold")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
