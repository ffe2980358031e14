"""Scales: the time of a scale and of a quantization by it, beside the peers that do the same work.

    python tests/benchmarks/scaling.py [elements [bfloat16]]

prints a Markdown table. Every row computes the scales of x and quantizes by them, floating point in and out. Missing
peers are left out. The runs take turns, so that whatever disturbs the machine disturbs all rows; the least time is the
least disturbed.
"""

import importlib
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from cpu import keep_memory

from altgrad.quantization import (
    E4M3,
    MXFP4,
    MXFP6_E2M3,
    MXFP8_E4M3,
    NVFP4,
    PerAxis,
    PerBlock,
    PerTensor,
    compute_scale,
    decode_blocks,
    encode_blocks,
    quantize_blocks,
)

warnings.filterwarnings("error", message="altgrad computes on the CPU without")  # ALTGRAD_CPU_TARGET=aten asks for it
ROUNDS = 15
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Rows = dict[str, Callable[[], Tensor]]


def compiled(f: Callable[..., Tensor], *args: object, **kwargs: object) -> Callable[[], Tensor]:
    fast = torch.compile(lambda x: f(x, *args, **kwargs), fullgraph=True)
    return lambda: fast(X)


def ours() -> Rows:
    rows: Rows = {"`x * 2`": lambda: X * 2}
    for name, options in {
        "E4M3 per tensor": {"format": E4M3, "granularity": PerTensor()},
        "E4M3 per row": {"format": E4M3, "granularity": PerAxis(0)},
        "E4M3 per 128 x 128": {"format": E4M3, "granularity": PerBlock((128, 128))},
        "MXFP8": MXFP8_E4M3,
        "MXFP4": MXFP4,
        "NVFP4": NVFP4,
    }.items():
        rows[f"altgrad {name}"] = lambda options=options: quantize_blocks(X, **options)
        rows[f"altgrad {name}, compiled"] = compiled(quantize_blocks, **options)
    for name, options in {"MXFP8": MXFP8_E4M3, "MXFP6": MXFP6_E2M3, "MXFP4": MXFP4, "NVFP4": NVFP4}.items():
        blocks = encode_blocks(X, **options)
        rows[f"altgrad encode_blocks {name}"] = lambda options=options: encode_blocks(X, **options).codes
        rows[f"altgrad decode_blocks {name}"] = lambda blocks=blocks: decode_blocks(blocks)
    for fraction in (0.99, 0.999, 0.99999):
        options = {"method": "percentile", "fraction": fraction}
        rows[f"altgrad percentile {fraction}, scale only"] = lambda options=options: compute_scale(X, E4M3, **options)
    rows["`torch.kthvalue` of `x.abs()`"] = lambda: X.abs().flatten().kthvalue(math.ceil(0.999 * X.numel())).values
    return rows


def torchao() -> Rows:
    mx = importlib.import_module("torchao.prototype.mx_formats.mx_tensor").MXTensor
    primitives = importlib.import_module("torchao.quantization.quant_primitives")

    def block(x: Tensor, element: torch.dtype) -> Tensor:
        return mx.to_mx(x, element, 32).dequantize(torch.float32)

    def dynamic(x: Tensor, block_size: list[int]) -> Tensor:
        scale = primitives._choose_scale_float8(x, block_size, torch.float8_e4m3fn)
        codes = primitives._quantize_affine_float8(x, scale, torch.float8_e4m3fn)
        return primitives._dequantize_affine_float8(codes, scale, torch.float32)

    rows: Rows = {}
    for name, f, argument in [
        ("MXFP8", block, torch.float8_e4m3fn),
        ("MXFP4", block, torch.float4_e2m1fn_x2),
        ("float8 dynamic per tensor", dynamic, list(X.shape)),
        ("float8 dynamic per row", dynamic, [1, X.shape[1]]),
    ]:
        rows[f"torchao {name}"] = lambda f=f, argument=argument: f(X, argument)
        rows[f"torchao {name}, compiled"] = compiled(f, argument)
    for name, element in [("MXFP8", torch.float8_e4m3fn), ("MXFP4", torch.float4_e2m1fn_x2)]:
        tensor = mx.to_mx(X, element, 32)
        rows[f"torchao to_mx {name}"] = lambda element=element: mx.to_mx(X, element, 32).qdata
        rows[f"torchao dequantize {name}"] = lambda tensor=tensor: tensor.dequantize(torch.float32)
    return rows


def brevitas() -> Rows:
    linear = importlib.import_module("brevitas.nn").QuantLinear
    float_quant = importlib.import_module("brevitas.quant.experimental.float")
    mx_quant = importlib.import_module("brevitas.quant.experimental.mx_quant_ocp")
    rows: Rows = {}
    for name, quantizer in {
        "E4M3 amax per tensor": float_quant.Fp8e4m3WeightPerTensorFloat,
        "E4M3 amax per row": float_quant.Fp8e4m3WeightPerChannelFloat,
        "MXFP8": mx_quant.MXFloat8e4m3Weight,
    }.items():
        layer = linear(X.shape[1], X.shape[0], bias=False, weight_quant=quantizer).to(DEVICE)
        layer.weight.data = X
        rows[f"brevitas {name}"] = lambda layer=layer: layer.quant_weight().value
    return rows


def seconds(f: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    f()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    keep_memory()
    # One function is compiled for every row; each row is to be compiled as if it were the only one.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    own = ours()
    rows = dict(own)
    for peer in (torchao, brevitas):
        try:
            rows |= peer()
        except ImportError as error:
            print(f"without {peer.__name__}: {error}", file=sys.stderr)
    for name, f in list(rows.items()):
        try:
            f(), f()
        except Exception as error:  # a peer that cannot do this here
            if name in own:
                raise
            print(f"without {name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            del rows[name]
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(ROUNDS):
        for name, f in rows.items():
            times[name].append(seconds(f))
    least = {name: min(t) for name, t in times.items()}
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{X.numel()} {X.dtype} elements, torch {torch.__version__}, {device}\n")
    print("| what | least ms | times `x * 2` | median ms |\n|---|---|---|---|")
    for name, t in least.items():
        median = statistics.median(times[name])
        print(f"| {name} | {t * 1e3:.2f} | {t / least['`x * 2`']:.2f} | {median * 1e3:.2f} |")


if __name__ == "__main__":
    torch.manual_seed(0)
    side = math.isqrt(int(sys.argv[1])) if len(sys.argv) > 1 else 4096
    X = torch.randn(side, side, device=DEVICE).to(getattr(torch, sys.argv[2] if len(sys.argv) > 2 else "float32"))
    main()
