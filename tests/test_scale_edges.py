"""Scales at the ends of float32 and float64, and of formats whose largest value is below 1: inputs that went wrong."""

import math

import pytest
import torch
from conftest import FORMATS, assert_same_bits

from altgrad.quantization import (
    E0M7,
    E2M1,
    E4M3,
    AmaxHistory,
    PerAxis,
    PerTensor,
    compute_scale,
    decode,
    encode,
    quantize,
    quantize_blocks,
)
from altgrad.quantization.scaling import POWER_OF_TWO_RULES

DTYPES = [torch.float32, torch.float64]
AT_LEAST_ONE = [f for f in FORMATS if f.max_representable_value >= 1]


def top(dtype, n=16):
    """The n largest numbers of a dtype, the largest first."""
    integers = torch.int32 if dtype == torch.float32 else torch.int64
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype)
    return (largest.view(integers) - torch.arange(n, dtype=integers)).view(dtype)[:, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("f", AT_LEAST_ONE, ids=lambda f: f.name)
def test_the_largest_numbers_stay_finite(f, dtype):
    """FLT_MAX in E1M6: the quotient by 3.96875 was rounded up, and its product with 3.96875 infinite."""
    x, eps = top(dtype), torch.finfo(dtype).eps
    scale = compute_scale(x, f, granularity=PerAxis(0))
    y = quantize(x, f, scale, saturation="none")
    assert y.isfinite().all()
    assert (encode(x, f, scale, saturation="none") == f.max_code).all()
    assert ((y - x).abs() <= x * (4 * eps)).all()
    assert_same_bits(scale[4:], (x / torch.tensor(f.max_representable_value, dtype=dtype))[4:], x[4:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_format", ["E4M3", "E5M2", "UE5M3", "E2M1"])
@pytest.mark.parametrize("f", AT_LEAST_ONE, ids=lambda f: f.name)
def test_the_largest_numbers_stay_finite_under_two_levels(f, scale_format, dtype):
    for x in top(dtype, 6):
        y = quantize_blocks(x, f, granularity=PerTensor(), scale_format=scale_format)
        assert y.isfinite().all(), x


def test_the_largest_number_in_a_history():
    history = AmaxHistory("E1M6", length=1)
    x = top(torch.float32)[0]
    history(x)
    assert quantize(x, "E1M6", history.scale(), saturation="none").isfinite().all()


@pytest.mark.parametrize("rule", POWER_OF_TWO_RULES)
@pytest.mark.parametrize("f", ["E0M7", "e2m2b100f", "e0m1b148f", "e1m0b1f"])
def test_zeros_have_the_smallest_power_of_two(f, rule):
    """E0M7 by "floor" gave 2^-126, which is 2^-127 / 2^floor(log2 127/128)."""
    for dtype in (torch.float16, torch.bfloat16, *DTYPES):
        scale = compute_scale(torch.zeros(2, dtype=dtype), f, power_of_two=rule)
        assert_same_bits(scale, torch.tensor(2.0**-127, dtype=scale.dtype))


def test_subnormal_amax_in_formats_below_one():
    x = torch.tensor([[2.0**-149], [2.0**-128], [2.0**-127], [2.0**-126 - 2.0**-149], [2.0**-126]])
    got = {rule: compute_scale(x, E0M7, granularity=PerAxis(0), power_of_two=rule) for rule in ("floor", "ceil")}
    for rule, exponents in {"floor": [-127, -127, -126, -126, -125], "ceil": [-127, -127, -126, -125, -125]}.items():
        assert_same_bits(got[rule][:, 0], torch.tensor([2.0**e for e in exponents]), x[:, 0])


@pytest.mark.parametrize("dtype, exponent", [(torch.float32, 120), (torch.float64, 127)], ids=str)
def test_infinite_amax(dtype, exponent):
    """As torchao has it: the quotient of "rceil" is infinite, the others read the exponent of infinity."""
    x = torch.tensor([math.inf, 1.0], dtype=dtype)
    for rule in POWER_OF_TWO_RULES:
        want = 127 if rule == "rceil" else exponent
        assert_same_bits(compute_scale(x, E4M3, power_of_two=rule), torch.tensor(2.0**want, dtype=dtype))


FLOAT64_AMAX = [
    (2.0 - 2.0**-40, "floor", 0),  # was rounded to 2, a float32 number
    (2.0 - 2.0**-40, "ceil", 1),
    (1.0 + 2.0**-40, "ceil", 1),  # was rounded to 1
    (1.0 + 2.0**-40, "floor", 0),
    (1.75 - 2.0**-40, "even", 0),  # 1.75 is a tie of E2M1's one mantissa bit
    (1.75, "even", 1),
    (1.5 + 2.0**-40, "rceil", 1),  # above 6 / 4, so that 6 * 2^-2 would be too small
    (1.5, "rceil", 0),
    (2.0**129, "floor", 129),  # beyond float32, infinite there
    (2.0**-130, "rceil", -129),
]


@pytest.mark.parametrize("amax, rule, exponent", FLOAT64_AMAX, ids=str)
def test_float64_amax_is_not_rounded_to_float32(amax, rule, exponent):
    """exponent: of the scale in units of the power of two below the largest value, 4 in E2M1."""
    scale = compute_scale(torch.tensor([amax], dtype=torch.float64), E2M1, power_of_two=rule)
    assert_same_bits(scale, torch.tensor(2.0 ** max(exponent - 2, -127), dtype=torch.float64))


@pytest.mark.parametrize("f", ["E0M7", "E4M3", "FP16"])
def test_powers_of_two_of_float64_reach_both_ends(f):
    x = torch.tensor([[5e-324], [1e-300], [1.0], [1e300], [torch.finfo(torch.float64).max]], dtype=torch.float64)
    for rule in POWER_OF_TWO_RULES:
        scale = compute_scale(x, f, granularity=PerAxis(0), power_of_two=rule)[:, 0]
        assert scale[[0, 1, 3, 4]].log2().tolist() == [-127, -127, 127, 127]


def test_even_takes_formats_of_many_mantissa_bits():
    """FP16 by "even" was an IndexError."""
    x = torch.tensor([[2.0 - 2.0**-11 - 2.0**-23], [2.0 - 2.0**-11], [2.0]])
    scale = compute_scale(x, "FP16", granularity=PerAxis(0), power_of_two="even")
    assert_same_bits(scale[:, 0], torch.tensor([2.0**-15, 2.0**-14, 2.0**-14]))


def test_scales_of_a_power_of_two_are_codes_of_e8m0():
    x = torch.cat([top(torch.float64)[:1], torch.tensor([[0.0], [1e-300], [7.0]], dtype=torch.float64)])
    scale = compute_scale(x, E4M3, granularity=PerAxis(0), power_of_two="ceil")
    assert_same_bits(decode(encode(scale, "E8M0"), "E8M0", dtype=torch.float64), scale)


def test_a_power_of_two_that_was_rounded_up_may_overflow():
    """Documented: 2^128 is the nearest value, 256 * 2^120."""
    x = top(torch.float32, 1)
    assert quantize_blocks(x, E4M3, granularity=PerTensor(), power_of_two="ceil").isinf().all()
    assert quantize_blocks(x, E4M3, granularity=PerTensor(), power_of_two="floor").isfinite().all()


@pytest.mark.compiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled(dtype):
    def f(x):
        scales = [compute_scale(x, f, granularity=PerAxis(0)) for f in ("E1M6", E0M7)]
        powers = [compute_scale(x, E0M7, granularity=PerAxis(0), power_of_two=rule) for rule in POWER_OF_TWO_RULES]
        return torch.cat(scales + powers)

    torch._dynamo.reset()
    exponents = range(-149 if dtype == torch.float32 else -1074, 128, 7)
    others = [0.0, math.inf, math.nan, *(math.ldexp(1.37, exponent) for exponent in exponents)]
    x = torch.cat([top(dtype), torch.tensor(others, dtype=dtype)[:, None]])
    assert_same_bits(torch.compile(f, fullgraph=True)(x), f(x), x)
