"""Simulated products beside those of a tensor core: every output bit, over shapes and distributions; and the time.

    python3 tests/benchmarks/accumulators.py [--sections sweep scales error speed]

prints its progress and, last, Markdown tables for docs/accumulators.md; exits with 1 if a bit differs where no kernel
splits the contraction. It takes about four minutes on an H100.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from products_of import KINDS, make  # noqa: E402

import ops_registry  # noqa: E402, F401

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
NAMES = {E4: "E4M3", E5: "E5M2", torch.bfloat16: "BF16", torch.float16: "FP16"}
PAIRS = [(E4, E4), (E4, E5), (E5, E4)]
SHAPES = [(16, 16, 16), (32, 32, 48), (64, 64, 512), (128, 256, 2048), (1024, 1024, 1024), (2048, 4096, 4096)]
SHAPES += [(64, 64, 4096), (64, 64, 8192), (128, 128, 32768), (16, 4096, 4096)]  # small and long: some are split
failures: list[str] = []


def one() -> torch.Tensor:
    return torch.ones((), device="cuda")


def products() -> dict[str, tuple]:
    """Name -> (dtype of a, of b, the product on the tensor core with its dtype of output, the accumulator)."""
    table = {}
    for ta, tb in PAIRS:
        for fast, name in ((True, "HOPPER_FP8_FAST"), (False, "HOPPER_FP8")):
            accumulator = f"{name}({NAMES[ta]},{NAMES[tb]})"

            def scaled(a, b, dtype, fast=fast):
                return torch._scaled_mm(a, b, one(), one(), out_dtype=dtype, use_fast_accum=fast)

            table[accumulator] = ta, tb, scaled, accumulator
    for dtype, name in ((torch.bfloat16, "HOPPER_BF16"), (torch.float16, "HOPPER_FP16")):
        table[name] = dtype, dtype, lambda a, b, out: torch.mm(a, b, out_dtype=out), name
    return table


def simulated(a: torch.Tensor, b: torch.Tensor, accumulator: str) -> torch.Tensor:
    a, b = (x.float() if x.dtype.itemsize == 1 else x for x in (a, b))
    return torch.ops.altgrad.matmul(a, b, accumulator)


def differing(got: torch.Tensor, want: torch.Tensor) -> int:
    integers = {2: torch.int16, 4: torch.int32}[want.element_size()]
    same = (got.view(integers) == want.view(integers)) | (got.isnan() & want.isnan())
    return int((~same).sum())


def splits(call) -> bool:
    """Whether the library sums parts of the contraction apart and adds them, by the names of its kernels."""
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        call()
        torch.cuda.synchronize()
    return any("splitk" in event.key.lower() for event in traced.key_averages())


def sweep() -> None:
    print("| product | outputs | that differ | split along K by the library, not compared |\n|---|---|---|---|")
    for name, (ta, tb, hardware, accumulator) in products().items():
        compared = different = 0
        split = []
        for m, n, k in SHAPES:
            for kind in KINDS if m * n * k <= 1024**3 else ["normal", "positive"]:
                a, b = make(kind, m, k, ta, 0).cuda(), make(kind, n, k, tb, 1).cuda().t()
                if kind == "normal" and splits(partial(hardware, a, b, torch.float32)):
                    split.append(f"{m} x {n} x {k}")
                    break
                got = simulated(a, b, accumulator)
                for dtype in (torch.float32, *([] if ta == torch.float16 else [torch.bfloat16])):
                    count = differing(got.to(dtype), hardware(a, b, dtype))
                    compared, different = compared + got.numel(), different + count
                    if count:
                        failures.append(f"{name} {kind} {m} x {n} x {k} {dtype}: {count}")
                        print(failures[-1], file=sys.stderr)
        print(f"| {name} | {compared:,} | {different} | {', '.join(split)} |", flush=True)


def scales() -> None:
    """Where the scales of _scaled_mm enter: their product, or that of the columns first."""
    a, b = make("normal", 128, 512, E4, 0).cuda(), make("normal", 256, 512, E4, 1).cuda().t()
    bias = torch.randn(256, device="cuda", dtype=torch.bfloat16)
    for fast, accumulator in ((True, "HOPPER_FP8_FAST"), (False, "HOPPER_FP8")):
        y = simulated(a, b, accumulator)
        of_a, of_b = torch.rand(128, 1, device="cuda") + 0.1, torch.rand(1, 256, device="cuda") + 0.1
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for what, sa, sb, want in (
                ("tensor", of_a[0, 0], of_b[0, 0], y * (of_a[0, 0] * of_b[0, 0])),
                ("row", of_a, of_b, (y * of_b) * of_a),
            ):
                got = torch._scaled_mm(a, b, sa, sb, out_dtype=dtype, use_fast_accum=fast)
                print(f"{accumulator} {what} {dtype}: {differing(want.to(dtype), got)} of {got.numel()} differ")
        got = torch._scaled_mm(a, b, of_a[0, 0], of_b[0, 0], bias, out_dtype=bias.dtype, use_fast_accum=fast)
        want = (y * (of_a[0, 0] * of_b[0, 0]) + bias).to(bias.dtype)
        print(f"{accumulator} tensor, bias: {differing(want, got)} of {got.numel()} differ")


def error() -> dict[str, dict[str, list[float]]]:
    """The relative error of both over K, for the picture in docs."""
    table: dict[str, dict[str, list[float]]] = {}
    for kind in ("normal", "positive"):
        for name, (ta, tb, hardware, accumulator) in products().items():
            if ta != tb:
                continue
            for k in (32, 128, 512, 2048, 8192):
                a, b = make(kind, 128, k, ta, 0).cuda(), make(kind, 128, k, tb, 1).cuda().t()
                exact = a.double() @ b.double()
                for side, y in (("simulated", simulated(a, b, accumulator)), ("H100", hardware(a, b, torch.float32))):
                    value = float((y - exact).norm() / exact.norm())
                    table.setdefault(f"{kind} {name} {side}", {"K": [], "error": []})["K"].append(k)
                    table[f"{kind} {name} {side}"]["error"].append(value)
    print(json.dumps(table))
    return table


def speed() -> None:
    def milliseconds(call, repeats: int = 5) -> float:
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats * 1e3

    print("| product | M x N x K | ms | float32 `a @ b`, ms |\n|---|---|---|---|")
    for name in ("HOPPER_FP8_FAST", "HOPPER_FP8", "HOPPER_BF16", "e5m10n"):
        for m, n, k in ((1024, 1024, 1024), (16384, 768, 768), (16384, 3072, 768), (16384, 50304, 768)):
            if n > 50000 and name != "HOPPER_FP8_FAST":
                continue
            a, b = (make("normal", *shape, E4, 0).float().cuda() for shape in ((m, k), (k, n)))
            ours = milliseconds(lambda a=a, b=b, name=name: torch.ops.altgrad.matmul(a, b, name), 2)
            print(f"| {name} | {m} x {n} x {k} | {ours:.2f} | {milliseconds(lambda a=a, b=b: a @ b):.2f} |", flush=True)


if __name__ == "__main__":
    sections = {f.__name__: f for f in (sweep, scales, error, speed)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="*", choices=sections, default=list(sections))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    torch.manual_seed(0)
    for section in parser.parse_args().sections:
        started = time.perf_counter()
        sections[section]()
        print(f"{section}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    sys.exit(bool(failures))
