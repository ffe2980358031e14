"""Errors that papers report for block formats, to the digits that they give: those of a standard normal sample.

NVFP4's are of the Quartet II notebook (arXiv 2601.22813).
"""

import math

import pytest
import torch

from altgrad.quantization import E2M1, NVFP4, PerBlock, quantize, quantize_blocks

UNBIASED = NVFP4 | {"headroom": 17 / 16}


def relative_error(x, y):
    """The squared error of y beside the square of x."""
    return ((y.double() - x.double()).square().sum() / x.double().square().sum()).item()


@pytest.mark.parametrize(
    ("options", "want"),
    [
        (NVFP4, 9.0e-3),
        (NVFP4 | {"arithmetic": "transformer_engine"}, 9.0e-3),
        (NVFP4 | {"granularity": PerBlock((16, 16))}, 12.4e-3),
        (NVFP4 | {"method": "four_over_six"}, 7.6e-3),
        (NVFP4 | {"rounding": "stochastic"}, 18.9e-3),
        (UNBIASED | {"rounding": "stochastic"}, 23.5e-3),
    ],
    ids=["1x16", "TransformerEngine", "16x16", "four over six", "stochastic", "stochastic with headroom"],
)
def test_nvfp4(options, want):
    x = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    bits = {"random_bits": torch.tensor(7)} if "rounding" in options else {}
    assert relative_error(x, quantize_blocks(x, **options, **bits)) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "want"), [(NVFP4, [2.37, 3.35, 4.31, 5.14, 5.70]), (UNBIASED, [2.20, 3.20, 4.20, 5.20, 6.20])]
)
def test_bits_of_averaged_products(options, want):
    """-log2(error) / 2 of a product of two quantized matrices, the mean of 1, 4, 16, 64, 256 draws.

    An unbiased estimate gains a bit with each step. Without headroom scales that E4M3 rounds down clip.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(512, 512, generator=generator), torch.randn(512, 512, generator=generator)
    exact, total, got = a @ b, torch.zeros(512, 512), []
    for draw in range(256):
        qa, qb = (
            quantize_blocks(x, **options, rounding="stochastic", random_bits=torch.tensor(2 * draw + i))
            for i, x in enumerate((a, b.T.contiguous()))
        )
        total += qa @ qb.T
        if draw + 1 in (1, 4, 16, 64, 256):
            got.append(-math.log2(relative_error(exact, total / (draw + 1))) / 2)
    assert got == pytest.approx(want, abs=0.02)


def test_best_single_scale_of_e2m1():
    """For a normal distribution, here by 2^22 of its quantiles."""
    x = torch.special.ndtri((torch.arange(1 << 22).double() + 0.5) / (1 << 22))
    lower, least, upper = (relative_error(x, quantize(x, E2M1, 0.48708 + by)) for by in (-1e-4, 0, 1e-4))
    assert round(least, 6) == 0.012685 and least < min(lower, upper)
