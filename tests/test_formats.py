"""Formats as data: every derived number against the definition, the grammar, and what is refused."""

import copy
import math
import pickle
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import reference
import torch
from conftest import FORMATS, NAMED, WIDE, assert_same_bits, points_of

from altgrad.quantization import FORMAT_REGISTRY, FP8Format, quantize, resolve
from ops_registry.formats import ALIASES

# The contract's table, typed by hand once, here: name, max, smallest positive value.
TABLE = """
E0M7      0.9921875               0.0078125
E1M6      3.96875                 0.03125
E2M5      7.875                   0.03125
E3M4      31                      0.015625
E4M3      448                     0.001953125
E5M2      57344                   0.0000152587890625
E6M1      6442450944              0.0000000004656612873077393
E7M0      18446744073709551616    0.0000000000000000002168404344971009
E2M3      7.5                     0.125
E3M2      28                      0.0625
E2M1      6                       0.5
E4M3FNUZ  240                     0.0009765625
E5M2FNUZ  57344                   0.00000762939453125
FP16      65504                   0.000000059604644775390625
BF16      3.3895313892515355e38   9.183549615799121e-41
TF32      3.4011621342146535e38   1.1479437019748901e-41
E8M0      1.7014118346046923e38   5.877471754111438e-39
UE4M3     448                     0.001953125
UE5M3     114688                  0.00000762939453125
"""
ML_DTYPES = {
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
    "E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E2M1": ml_dtypes.float4_e2m1fn,
    "e3m4b3": ml_dtypes.float8_e3m4,
    "e4m3b7": ml_dtypes.float8_e4m3,
    "e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
}


@pytest.mark.parametrize("line", TABLE.strip().splitlines(), ids=lambda line: line.split()[0])
def test_table_of_named_formats(line):
    name, largest, smallest = line.split()
    f = FORMAT_REGISTRY[name]
    assert (f.max_representable_value, f.smallest_subnormal) == (float(largest), float(smallest))


@pytest.mark.parametrize("f", WIDE, ids=lambda f: f.name)
def test_wide_formats_are_the_definition(f):
    values = reference.finite_values(f)
    codes = [*range(min(1 << f.bits, 300)), f.max_code, *range(max((1 << f.bits) - 300, 0), 1 << f.bits)]
    assert [str(f.to_real(code)) for code in codes] == [str(reference.decode_one(f, code)) for code in codes]
    assert f.bits == reference.width(f)
    assert (f.max_code, f.max_representable_value) == (len(values) - 1, values[-1])
    assert f.smallest_subnormal == min(value for value in values[:2] if value)
    assert f.nan_code == reference.nan_code(f)
    points = points_of(f, torch.float64).numpy()
    if f.code_bytes:
        points = points[:: 1 + len(points) // 2000]
        points = np.where(np.isnan(points), np.nan, points)
        want = reference.encode(f, points, np.float64(1))
        assert [f.to_bits(x) for x in points.tolist()] == want.tolist()


def test_table_is_complete():
    assert [line.split()[0] for line in TABLE.strip().splitlines()] == list(FORMAT_REGISTRY)


@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_to_real_is_the_definition(f):
    got = [f.to_real(code) for code in range(1 << f.bits)]
    want = [reference.decode_one(f, code) for code in range(1 << f.bits)]
    assert [str(v) for v in got] == [str(v) for v in want]  # str tells -0 from 0 and prints every NaN alike


@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_to_bits_is_the_definition(f):
    values, midpoints = reference.grid(f)
    points = np.concatenate([values, midpoints, values[-1:] * 3])
    points = np.concatenate([points, np.nextafter(points, 0), np.nextafter(points, np.inf), [np.inf, np.nan]])
    points = np.concatenate([points, -points])
    want = reference.encode(f, points, np.float64(1))
    assert [f.to_bits(x) for x in points.tolist()] == want.tolist()


@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_derived_properties(f):
    values = reference.finite_values(f)
    assert f.bits == 1 + f.exponent_bits + f.mantissa_bits
    assert f.max_code == len(values) - 1
    assert f.max_representable_value == values[-1]
    assert f.smallest_subnormal == values[1]
    assert f.quantum == Fraction(2) ** (f.min_exponent - f.mantissa_bits)
    normals = [v for v in values if v >= Fraction(2) ** f.min_exponent]
    assert f.smallest_normal == (normals[0] if normals else None)
    assert f.nan_code == reference.nan_code(f)
    codes = [code for code in range(1 << f.bits) if reference.decode_one(f, code) == math.inf]
    assert f.inf_code == (codes[0] if codes else None)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_values_of_ml_dtypes(name):
    f, dtype = resolve(name), ML_DTYPES[name]
    theirs = np.arange(1 << f.bits, dtype=np.uint8).view(dtype).astype(np.float64)
    ours = np.array([f.to_real(code) for code in range(1 << f.bits)])
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(np.signbit(ours), np.signbit(theirs) & ~np.isnan(theirs))


@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_name_and_spelling_mean_the_format(f):
    assert resolve(f.name) == f
    assert resolve(f.name.swapcase()) == f
    assert replace(resolve(f.spelling), name=f.name) == f


def test_a_spelling_is_never_mistaken_for_a_name():
    assert resolve("e3m4b3").max_representable_value == 15.5
    assert resolve("e3m4b3f").max_representable_value == resolve("E3M4").max_representable_value == 31
    assert resolve("E4M3").spelling == "e4m3b7fn"


@pytest.mark.parametrize("f", NAMED, ids=lambda f: f.name)
def test_formats_copy_and_pickle(f):
    assert pickle.loads(pickle.dumps(f)) == f == copy.deepcopy(f)
    assert hash(f) == hash(copy.deepcopy(f))


@pytest.mark.parametrize("text", ["", "E9M9", "fp8", "e4m3f", "e4m3b", "e4m3b7x", " e4m3b7", "e4m3b7fnn", "E5M2\n"])
def test_unknown_formats_name_the_choices(text):
    with pytest.raises(ValueError) as error:
        resolve(text)
    for part in (repr(text), "E0M7", "E5M2FNUZ", "e<exponent bits>m<mantissa bits>b<bias>", "fnuz"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("e9m3b7", "exponent_bits must be 0 to 8, got 9"),
        ("e5m15b15", "at most 19 bits together, got mantissa_bits=15 and 21 bits"),
        ("e8m10b127fu", "bias 127 of e8m10b127fu is out of range"),  # its top exponent would be 2^128
        ("e8m0b127f", "values must be float32 numbers, multiples of 2\\^-149 below 2\\^128"),
        ("e4m3b8fnuzu", "'fnuz' and 'u' exclude each other"),
        ("e0m7b1", "IEEE specials need E >= 1 and M >= 1"),
        ("e5m0b15", "IEEE specials need E >= 1 and M >= 1"),
        ("e0m0b1f", "no finite value but zero"),
        ("e1m0b0fn", "no finite value but zero"),
        ("e5m2b149f", "bias 149 .* out of range"),
        ("e7m0b-5f", "bias -5 .* out of range"),
    ],
)
def test_impossible_formats(text, message):
    with pytest.raises(ValueError, match=message):
        resolve(text)


@pytest.mark.parametrize("specials", [(True, False, True), (True, True, False), (False, False, False)])
def test_impossible_mixes_of_specials(specials):
    with pytest.raises(ValueError, match="has_inf, has_nan, has_negative_zero must be one of"):
        FP8Format("mine", 4, 3, 7, *specials)


def test_a_name_cannot_mean_another_format():
    with pytest.raises(ValueError, match="name must be the spelling 'e4m3b7f' or a name of it, got 'E4M3'"):
        FP8Format("E4M3", 4, 3, 7, False, False)


def test_fields_have_types():
    with pytest.raises(TypeError, match=r"bias must be an int, got 7\.0"):
        FP8Format("E4M3", 4, 3, 7.0, False, True)
    with pytest.raises(TypeError, match="format must be an FP8Format, a string or a dtype"):
        resolve(5)


@pytest.mark.parametrize("code", [-1, 256, 0.5, "0"])
def test_codes_out_of_range(code):
    with pytest.raises(ValueError, match="code must be an integer from 0 to 255"):
        FORMAT_REGISTRY["E5M2"].to_real(code)


def test_dtypes_and_their_names_are_formats():
    x = torch.linspace(-20, 20, 1000)
    for name, same in ALIASES.items():
        assert resolve(name) == resolve(name.upper()) == resolve(same) == resolve(resolve(same))
        assert_same_bits(quantize(x, name), quantize(x, same), x)
        assert_same_bits(torch.ops.altgrad.quantize(x, torch.tensor(1.0), name), quantize(x, same), x)
        dtype = getattr(torch, name, None)
        if dtype is not None:
            assert resolve(dtype) == resolve(same)
            assert_same_bits(quantize(x, dtype), quantize(x, same), x)


def test_formats_of_the_same_values_are_equal():
    f, g = resolve("E4M3"), resolve("e4m3b7fn")
    assert f == g and hash(f) == hash(g) and (f.name, g.name) == ("E4M3", "e4m3b7fn")
    assert f != resolve("e4m3b7")


@pytest.mark.parametrize("format", ["E4M3", resolve("E5M2"), torch.float8_e4m3fn, "float6_e2m3fn"], ids=str)
def test_resolve_in_compiled_code(format):
    torch._dynamo.reset()
    f = torch.compile(lambda x: x * resolve(format).max_representable_value, fullgraph=True, backend="eager")
    assert f(torch.ones(())).item() == resolve(format).max_representable_value


def test_digits_of_other_scripts_are_no_spelling():
    with pytest.raises(ValueError, match="unknown format"):
        resolve("e\N{ARABIC-INDIC DIGIT FOUR}m3b7fn")
