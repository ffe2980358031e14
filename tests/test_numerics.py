"""Eager results against the definition, bit for bit, and against oracles where their conventions are ours."""

import numpy as np
import pytest
import reference
import torch
from conftest import (
    DTYPES,
    FORMATS,
    GIVEN_BITS,
    NAMED,
    all_inputs,
    assert_same_bits,
    near_ties,
    random_bit_patterns,
    reference_quantize,
    reference_quantize_and_encode,
)
from test_formats import ML_DTYPES

from ops_registry import aten
from ops_registry.formats import resolve
from ops_registry.modes import DETERMINISTIC_ROUNDINGS, SATURATIONS

ag = torch.ops.altgrad
formats = pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
saturations = pytest.mark.parametrize("saturation", SATURATIONS)
roundings = pytest.mark.parametrize("rounding", DETERMINISTIC_ROUNDINGS)
SCALES = [1.0, 0.37, 2.0**-9, 3e5]


def assert_quantize_and_encode(f, x, scale, device, *modes):
    """By the device's own kernels, and by the aten formulation, which serves compilers and every other device."""
    on_device = x.to(device), scale.to(device)
    want, want_codes = reference_quantize_and_encode(f, x, scale, *modes)
    for quantize in (ag.quantize, aten.quantize):
        assert_same_bits(quantize(*on_device, f.name, *modes), want, x)
    for encode in (ag.encode, aten.encode):
        assert_same_bits(encode(*on_device, f.name, *modes), want_codes, x)


@formats
@saturations
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_input(f, saturation, dtype, device):
    for scale in (1.0, 0.37):
        assert_quantize_and_encode(f, all_inputs(dtype), torch.tensor(scale), device, saturation)


@formats
@saturations
@roundings
def test_near_ties_and_random_bits(f, saturation, rounding, device):
    points = torch.cat([near_ties(f), random_bit_patterns(20_000)])
    for scale in SCALES:
        assert_quantize_and_encode(f, points * scale, torch.tensor(scale), device, saturation, rounding)


@formats
@roundings
def test_near_ties_in_float64(f, rounding, device):
    points = near_ties(f, torch.float64)
    for scale in (1.0, 0.37):
        scale = torch.tensor(scale, dtype=torch.float64)
        assert_quantize_and_encode(f, points * scale, scale, device, "propagate", rounding)


@formats
@saturations
@pytest.mark.parametrize("bits_dtype", GIVEN_BITS, ids=str)
def test_stochastic_with_given_bits(f, saturation, bits_dtype, device):
    n = GIVEN_BITS[bits_dtype]
    x, scale = near_ties(f) * 0.37, torch.tensor(0.37)
    low, high = (-(1 << 31), 1 << 31) if bits_dtype == torch.int32 else (0, 256)  # bits above the N lowest are ignored
    random = torch.randint(low, high, x.shape, generator=torch.Generator().manual_seed(0)).to(bits_dtype)
    r = random.numpy().astype(np.int64) % (1 << n)
    args = [t.to(device) for t in (x, scale, random)]
    want, want_codes = reference_quantize_and_encode(f, x, scale, saturation, "stochastic", r, n)
    for quantize, encode in (
        (ag.quantize_stochastic, ag.encode_stochastic),
        (aten.FORMULAS["quantize_stochastic"], aten.FORMULAS["encode_stochastic"]),
    ):
        assert_same_bits(quantize(*args, f.name, saturation), want, x)
        assert_same_bits(encode(*args, f.name, saturation), want_codes, x)


@formats
@saturations
@roundings
def test_the_portable_formulation_has_the_same_bits(f, saturation, rounding):
    x, scale = torch.cat([near_ties(f), random_bit_patterns(20_000)]) * 0.37, torch.tensor(0.37)
    portable = aten.quantize(x, scale, f.name, saturation, rounding, sign=aten.with_sign_of_portable)
    assert_same_bits(portable, ag.quantize(x, scale, f.name, saturation, rounding), x)


@formats
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_every_byte(f, dtype, device):
    codes = torch.arange(256, dtype=torch.uint8)  # bits above the width are ignored
    for scale in SCALES:
        scale = torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        want = torch.from_numpy(np.asarray(reference.decode(f, codes.numpy(), scale.numpy()))).to(dtype)
        for decode in (ag.decode, aten.decode):
            assert_same_bits(decode(codes.to(device), scale.to(device), f.name, dtype), want, codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_is_one_product(dtype, device):
    x, scale = all_inputs(torch.bfloat16).to(dtype), torch.tensor(0.37)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert_same_bits(ag.dequantize(x.to(device), scale.to(device)), (x.to(compute) * scale.to(compute)).to(dtype), x)


@pytest.mark.parametrize(
    "scale",
    [
        torch.rand(5) + 0.1,
        torch.rand(4, 1) + 0.1,
        torch.rand(3, 1, 1) + 0.1,
        torch.rand(3, 4, 5) + 0.1,
        torch.rand(4, 5).t().contiguous().t() + 0.1,
        torch.rand(3, 1, 5)[:, :, ::2].repeat_interleave(2, -1)[..., :5] + 0.1,
        torch.rand(()).double() + 0.1,
        torch.rand(()).half() + 0.1,
    ],
    ids=lambda scale: f"{tuple(scale.shape)}-{scale.dtype}",
)
@pytest.mark.parametrize("f", NAMED, ids=lambda f: f.name)
def test_scales_broadcast(f, scale, device):
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    assert_quantize_and_encode(f, x, scale, device)
    codes = ag.encode(x, scale, f.name).to(device)
    assert_same_bits(ag.decode(codes, scale.to(device), f.name), reference_quantize(f, x, scale), x)


@pytest.mark.parametrize("scale", [0.0, -0.5, float("inf"), float("nan"), 1e-45, 3e38])
def test_odd_scales_give_what_ieee_gives(scale, device):
    x, scale = near_ties(resolve("E5M2")), torch.tensor(scale)
    assert_quantize_and_encode(resolve("E5M2"), x, scale, device)


@formats
def test_identities(f, device):
    x = torch.cat([near_ties(f), random_bit_patterns(5000)]).to(device)
    one = torch.tensor(1.0)
    y = ag.quantize(x, one, f.name)
    assert_same_bits(ag.quantize(y, one, f.name), y, x)
    assert_same_bits(ag.quantize(-x, one, f.name), torch.where(y == 0, ag.quantize(-x, one, f.name), -y), x)
    codes = torch.arange(1 << f.bits, dtype=torch.uint8, device=device)
    values = ag.decode(codes, one, f.name)
    numbers = ~values.isnan()
    assert_same_bits(ag.encode(values, one, f.name)[numbers], codes[numbers])
    for scale in SCALES:
        scale = torch.tensor(scale)
        xs = x * scale.to(device)
        xs = xs if f.has_nan else xs[~xs.isnan()]
        quotients = xs / scale.to(device)  # torch multiplies a CUDA tensor by the reciprocal of a scale on the CPU
        y = ag.quantize(xs, scale, f.name)
        assert_same_bits(ag.decode(ag.encode(xs, scale, f.name), scale, f.name), y, xs)
        assert_same_bits(ag.dequantize(ag.quantize(quotients, one, f.name), scale), y, xs)
        ascending = ag.quantize(xs[~xs.isnan()].sort().values, scale, f.name)
        assert (ascending[1:] >= ascending[:-1]).all()


@pytest.mark.parametrize("name", ML_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_ml_dtypes_agrees(name, dtype):
    """Its conversions are SatNone for the formats with specials and saturate the others; those it makes -0 of NaN."""
    f = resolve(name)
    x = all_inputs(dtype) if dtype == torch.float16 else torch.cat([near_ties(f), random_bit_patterns(50_000)])
    x = x if f.has_nan else x[~x.isnan()]
    with np.errstate(invalid="ignore"):  # numpy warns of the NaN that overflow gives
        theirs = x.numpy().astype(ML_DTYPES[name])
        values, codes = torch.from_numpy(theirs.astype(np.float32)), torch.from_numpy(theirs.view(np.uint8))
    one, numbers = torch.tensor(1.0), ~values.isnan()
    assert_same_bits(ag.quantize(x.float(), one, name, "none"), values, x)
    assert_same_bits(ag.encode(x, one, name, "none")[numbers], codes[numbers], x[numbers])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("E5M2", torch.float8_e5m2),
        ("E4M3FNUZ", torch.float8_e4m3fnuz),
        ("E5M2FNUZ", torch.float8_e5m2fnuz),
        ("E4M3", torch.float8_e4m3fn),
    ],
)
def test_torch_float8_casts_agree(name, dtype):
    x = torch.cat([near_ties(resolve(name)), random_bit_patterns(50_000)])
    if name == "E4M3":  # torch saturates since 2.12 and gave NaN before; both agree below the overflow
        x = x[~(x.abs() > 464)]
    assert_same_bits(ag.quantize(x, torch.tensor(1.0), name, "none"), x.to(dtype).float(), x)


def test_regressions():
    """Inputs on which a formulation, ours or a peer's, was wrong once."""
    one = torch.tensor(1.0)
    for name, modes, x, want in [
        ("E7M0", (), 1.5, 2.0),  # code parity, not the parity of the significand
        ("E7M0", (), 3.0, 2.0),
        ("E5M2", (), 0.93749994, 0.875),  # double rounding through float16
        ("E5M2", (), 6.0976e-05, 2.0**-14),  # carry from subnormal to normal
        ("E5M2", ("none",), 61439.996, 57344.0),  # saturation is tested after rounding
        ("E5M2", ("none",), 61440.0, float("inf")),
        ("E4M3", ("none",), 464.0, 448.0),
        ("E4M3", ("none",), 464.00003, float("nan")),
        ("E3M4", (), 0.0078124995, 0.0),  # floor(x + 1/2) rounds this up
        ("e3m2b-60f", ("propagate", "toward_positive"), 1e-45, 2.0**59),  # nu underflows, the mode must not
        ("e0m5b-9fn", ("none", "to_odd"), -1e-45, -32.0),
    ]:
        x, want = torch.tensor(x), torch.tensor(want)
        assert_same_bits(ag.quantize(x, one, name, *modes), want, x)


@pytest.mark.slow
@pytest.mark.parametrize("f", NAMED, ids=lambda f: f.name)
def test_all_float32_inputs(f, device):
    one = torch.tensor(1.0)
    for start in range(-(1 << 31), 1 << 31, 1 << 24):
        x = torch.arange(start, start + (1 << 24), dtype=torch.int64).to(torch.int32).view(torch.float32)
        assert_quantize_and_encode(f, x, one, device)
