"""Draws docs/accumulators.png: the error of products over the length of the contraction, by accumulator.

    python docs/examples/accumulators.py

Lines are computed here; the points are what an H100 gave (tests/benchmarks/accumulators.py --sections error).
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from altgrad.accumulators import matmul
from altgrad.quantization import quantize

LENGTHS = [32, 128, 512, 2048, 8192]
H100 = {
    "normal": {
        "HOPPER_FP8_FAST": [4.47e-5, 1.27e-4, 3.42e-4, 8.48e-4, 1.03e-3],
        "HOPPER_FP8": [4.38e-5, 1.29e-4, 1.25e-4, 1.26e-4, 1.26e-4],
        "HOPPER_BF16": [3.80e-8, 1.16e-7, 4.76e-7, 2.12e-6, 1.37e-6],
    },
    "positive": {
        "HOPPER_FP8_FAST": [5.13e-5, 6.51e-4, 6.10e-3, 3.39e-2, 4.52e-2],
        "HOPPER_FP8": [5.14e-5, 6.77e-4, 6.22e-4, 6.23e-4, 6.21e-4],
        "HOPPER_BF16": [4.88e-8, 1.73e-7, 8.94e-7, 5.63e-6, 3.02e-6],
    },
}
OTHERS = {"e5m10n": "chain in float16", "BLACKWELL_FP8": "BLACKWELL_FP8 (not verified)"}


def error(accumulator: str, kind: str, k: int) -> float:
    """Relative to the exact product, of 64 x 64 outputs."""
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(k)) for shape in ((64, k), (k, 64)))
    if kind == "positive":
        a, b = a.abs(), b.abs()
    a, b = (quantize(x, "BF16" if "BF16" in accumulator else "E4M3") for x in (a, b))
    exact = a.double() @ b.double()
    return float((matmul(a, b, accumulator) - exact).norm() / exact.norm())


def main() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (kind, measured) in zip(axes, H100.items(), strict=True):
        for name, marker in zip([*measured, *OTHERS], "os^Dv", strict=True):
            errors = [error(name, kind, k) for k in LENGTHS]
            (line,) = axis.plot(LENGTHS, errors, label=OTHERS.get(name, name))
            if name in measured:
                axis.plot(LENGTHS, measured[name], marker, color=line.get_color(), label=f"{name}, H100")
        axis.set(xscale="log", yscale="log", xlabel="length of the contraction K", title=f"{kind} operands")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(Path(__file__).parents[1] / "accumulators.png", dpi=110)


if __name__ == "__main__":
    main()
