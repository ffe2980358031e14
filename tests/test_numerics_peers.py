"""Bit for bit what gfloat has, where its conventions are ours."""

import gfloat
import gfloat.formats
import numpy as np
import pytest
import torch
from conftest import NAMED, assert_same_bits, near_ties, random_bit_patterns

from ops_registry.formats import resolve

ag = torch.ops.altgrad
GFLOAT = {
    "E4M3": gfloat.formats.format_info_ocp_e4m3,
    "E5M2": gfloat.formats.format_info_ocp_e5m2,
    "E2M3": gfloat.formats.format_info_ocp_e2m3,
    "E3M2": gfloat.formats.format_info_ocp_e3m2,
    "E2M1": gfloat.formats.format_info_ocp_e2m1,
}
GFLOAT_ROUNDINGS = {
    "nearest_ties_to_even": gfloat.RoundMode.TiesToEven,
    "nearest_ties_to_away": gfloat.RoundMode.TiesToAway,
    "toward_zero": gfloat.RoundMode.TowardZero,
    "toward_positive": gfloat.RoundMode.TowardPositive,
    "toward_negative": gfloat.RoundMode.TowardNegative,
}


def _gfloat_info(f):
    """gfloat's description of a format without IEEE specials or of a named OCP format."""
    if f.name in GFLOAT:
        return GFLOAT[f.name]
    return gfloat.FormatInfo(
        name=f.name,
        k=f.bits,
        precision=f.mantissa_bits + 1,
        bias=f.bias,
        is_signed=True,
        domain=gfloat.Domain.Finite,
        has_nz=f.has_negative_zero,
        num_high_nans=0,
        has_subnormals=True,
        is_twos_complement=False,
    )


def _gfloat_inputs(f):
    x = torch.cat([near_ties(f), random_bit_patterns(2000)])
    return x[x.isfinite()]


@pytest.mark.parametrize("f", [f for f in NAMED if f.has_negative_zero], ids=lambda f: f.name)
@pytest.mark.parametrize("rounding", GFLOAT_ROUNDINGS)
def test_gfloat_agrees(f, rounding):
    """Saturating, finite inputs: there its conventions are ours, the code parity of M = 0 included."""
    x = _gfloat_inputs(f)
    theirs = gfloat.round_ndarray(_gfloat_info(f), x.double().numpy(), GFLOAT_ROUNDINGS[rounding], sat=True)
    ours = ag.quantize(x, torch.tensor(1.0), f.name, "finite", rounding)
    assert_same_bits(ours, torch.from_numpy(theirs).float(), x)


@pytest.mark.parametrize("f", [f for f in NAMED if f.has_negative_zero], ids=lambda f: f.name)
def test_gfloat_agrees_on_stochastic_rounding(f):
    """Its StochasticFastest is P3109's StochasticA."""
    x = _gfloat_inputs(f)
    random = torch.randint(0, 256, x.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = gfloat.round_ndarray(
        _gfloat_info(f),
        x.double().numpy(),
        gfloat.RoundMode.StochasticFastest,
        sat=True,
        srbits=random.numpy().astype(np.int64),
        srnumbits=8,
    )
    ours = ag.quantize_stochastic(x, torch.tensor(1.0), random, f.name, "finite")
    assert_same_bits(ours, torch.from_numpy(theirs).float(), x)


@pytest.mark.parametrize("precision", range(2, 8))
def test_codes_of_p3109_unsigned(precision):
    """P3109's unsigned finite formats of 8 bits, as gfloat has them."""
    f = resolve(f"e{9 - precision}m{precision - 1}b{1 << (8 - precision)}fnu")
    theirs = gfloat.formats.format_info_p3109(8, precision, gfloat.Signedness.Unsigned, gfloat.Domain.Finite)
    assert [str(gfloat.decode_float(theirs, c).fval) for c in range(256)] == [str(f.to_real(c)) for c in range(256)]
