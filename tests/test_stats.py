"""Statistics of quantization against counts in Python over the definition."""

import math

import numpy as np
import pytest
import reference
import torch
from conftest import DTYPES, NAMED, WIDE, near_ties, points_of, reference_encode, reference_quantize
from torch._subclasses.fake_tensor import FakeTensorMode

from altgrad.quantization import E3M4, E4M3, bit_stall, compute_scale, quantization_stats, quantize, sqnr

COUNTED = [*NAMED, *(f for f in WIDE if f.code_bytes)]


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("f", COUNTED, ids=lambda f: f.name)
def test_shares_are_counts_over_the_definition(f, scale):
    x = near_ties(f) if f in NAMED else points_of(f)
    x = x[x.abs() < 1e30]
    got = quantization_stats(x, f, scale)
    scale = torch.tensor(scale)
    y = reference_quantize(f, x, scale).numpy()
    codes = reference_encode(f, x, scale).numpy().astype(np.int64)
    sign = reference.sign_bit(f)
    last = len(reference.finite_values(f)) - 1
    q = (x.numpy() / scale.numpy()).astype(np.float64)
    unbounded = reference.round_magnitude(
        f, np.minimum(np.abs(q), reference.grid(f)[0][-1]), q < 0, "nearest_ties_to_even"
    )
    assert got.clipped.item() == np.mean((unbounded > last) & (f.is_signed | (q > 0)))
    assert got.flushed.item() == np.mean((x.numpy() != 0) & (y == 0))
    assert got.subnormal.item() == np.mean((codes % sign < 1 << f.mantissa_bits) & (codes % sign > 0))
    assert got.exact.item() == np.mean(y == x.numpy())
    assert got.used_bits.item() == math.log2(len(set(codes.tolist())))
    noise = np.square(y.astype(np.float64) - x.numpy()).sum()
    with np.errstate(divide="ignore"):
        want = 10 * np.log10(np.square(x.double().numpy()).sum() / noise)
    assert math.isclose(got.sqnr.item(), want, rel_tol=1e-12, abs_tol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_scale_tensors(dtype):
    x = torch.randn(8, 16).to(dtype)
    scale = torch.rand(8, 1) + 0.5
    stats = quantization_stats(x, E4M3, scale)
    assert all(value.dtype == torch.float64 and value.ndim == 0 for value in stats)
    assert stats.sqnr == sqnr(x, quantize(x, E4M3, scale))


def test_no_value_is_read():
    with FakeTensorMode():
        x = torch.empty(8, 16)
        quantization_stats(x, E4M3, 0.5)
        bit_stall(x, x, 0.1, E4M3)
        sqnr(x, x)


@pytest.mark.gpu
def test_on_a_gpu_nothing_synchronizes():
    x = torch.randn(64, 64)
    want = quantization_stats(x, E4M3, 0.5)
    x = x.cuda()
    try:
        torch.cuda.set_sync_debug_mode("error")
        got = quantization_stats(x, E4M3, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [value.item() for value in got[:4]] == [value.item() for value in want[:4]]


def test_compiles():
    torch._dynamo.reset()
    x = torch.randn(64, 64)
    got = torch.compile(quantization_stats, fullgraph=True, backend="aot_eager")(x, E4M3, torch.tensor(0.1))
    assert got == quantization_stats(x, E4M3, torch.tensor(0.1))


def test_sqnr():
    x = torch.tensor([3.0, -4.0])
    assert sqnr(x, x * 0.9).item() == pytest.approx(20)
    assert sqnr(x, x) == math.inf
    assert sqnr(x * 0, x * 0).isnan()
    assert sqnr(x * 0, x) == -math.inf
    assert math.isfinite(sqnr(x * 1e30, x * 0.9e30))
    with pytest.raises(ValueError, match="one shape"):
        sqnr(x, x[:1])


@pytest.mark.parametrize("lr, error", [(torch.ones(2, 3), ValueError), (torch.ones(2), ValueError), ("1", TypeError)])
def test_a_learning_rate_that_does_not_broadcast(lr, error):
    """One that enlarged the weights made a share of 2."""
    with pytest.raises(error, match="lr must"):
        bit_stall(torch.ones(3), torch.ones(3), lr, E4M3)


def test_bit_stall_counts_updates_that_vanish():
    w = torch.ones(6)
    g = torch.tensor([0.0, 0.1, -0.1, 0.4, -0.4, 100.0])
    # Next to 1 the values of E3M4 are 1/32 below and 1/16 above, so a step of 0.01 stays and one of 0.04 leaves.
    assert bit_stall(w, g, 0.1, E3M4) == 2 / 6
    assert bit_stall(w, g, torch.tensor(0.01), E3M4) == 4 / 6
    assert bit_stall(w, g, 0.1, E3M4, torch.tensor(1 / 16)) == 2 / 6


@pytest.mark.parametrize("power", [-900, -600, 0, 600, 900])
def test_squares_beyond_the_range_of_float64(power):
    x = torch.randn(100, dtype=torch.float64)
    y = x.float().double()
    scaled = x * 2.0**power, y * 2.0**power
    assert abs(sqnr(*scaled) - 10 * (x.square().sum() / (x - y).square().sum()).log10()) < 1e-9
    alone = torch.tensor([1e200, 1.0], dtype=torch.float64), torch.tensor([1e200, 1.001], dtype=torch.float64)
    assert abs(sqnr(*alone) - 20 * 203) < 1e-9
    wide = x**3
    assert compute_scale(wide * 2.0**power, "E2M1", method="mse") == 2.0**power * compute_scale(
        wide, "E2M1", method="mse"
    )


def test_nan_is_no_subnormal():
    assert quantization_stats(torch.tensor([torch.nan, 0.3]), "E0M7").subnormal == 0.5


def test_used_bits_under_another_default_dtype():
    x, before = torch.arange(257.0), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert quantization_stats(x, "FP16").used_bits == math.log2(257)
    finally:
        torch.set_default_dtype(before)


def test_bit_stall_of_what_is_not_floating_point():
    for w in (torch.ones(3).to(torch.float8_e4m3fn), torch.ones(3, dtype=torch.int32)):
        with pytest.raises(TypeError, match="w must have a dtype of"):
            bit_stall(w, torch.ones(3), 0.1, E4M3)
