"""What a user of altgrad.quantization sees first: values, gradients, clamping, zeros, infinities, shapes."""

import pytest
import torch
from conftest import FORMATS, assert_same_bits

import altgrad.quantization.formats
import altgrad.quantization.ops
from altgrad.quantization import (
    E4M3,
    E5M2,
    FORMAT_REGISTRY,
    DequantizeFunc,
    QuantizeFunc,
    decode,
    dequantize,
    encode,
    quantize,
    resolve,
)

ONE = torch.tensor(1.0)


def test_the_users_example():
    x = torch.randn(10, requires_grad=True)
    y = quantize(x, E5M2, torch.tensor(1.0))
    y.sum().backward()
    assert_same_bits(x.grad, torch.ones(10))


def test_modules_export_what_the_package_does():
    assert altgrad.quantization.ops.quantize is quantize
    assert altgrad.quantization.formats.E5M2 is E5M2
    for name, f in FORMAT_REGISTRY.items():
        assert getattr(altgrad.quantization, name) is getattr(altgrad.quantization.formats, name) is f
    assert set(FORMAT_REGISTRY) < set(altgrad.quantization.__all__)


def test_values_of_e5m2_stay():
    x = torch.tensor([0.5, 1.0, 2.0])
    assert_same_bits(quantize(x, E5M2, ONE), x)


@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_every_format_gives_its_own_values(f):
    y = quantize(torch.randn(1000), f, ONE)
    values = {f.to_real(code) for code in range(1 << f.bits)}
    assert set(y.tolist()) <= values
    assert_same_bits(quantize(y, f, ONE), y)


@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_gradient_of_quantize_is_one(f):
    x = torch.tensor([-1e9, -1.0, -0.0, 1e-30, 0.3, 1e9], requires_grad=True)
    quantize(x, f, ONE).sum().backward()
    assert_same_bits(x.grad, torch.ones(6))


def test_gradient_through_the_chain():
    x = torch.randn(16, requires_grad=True)
    scale = torch.tensor(0.25)
    dequantize(quantize(x / scale, E5M2, ONE), scale).sum().backward()
    assert_same_bits(x.grad, torch.ones(16))
    x.grad = None
    dequantize(quantize(x, E5M2, ONE), scale).sum().backward()
    assert_same_bits(x.grad, torch.full((16,), 0.25))


@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_clamps_outside_the_range(f):
    largest = f.max_representable_value
    x = torch.tensor([largest * 4, -largest * 4, 3e38, -3e38])
    assert quantize(x, f, ONE).tolist() == [largest, -largest, largest, -largest]
    assert quantize(x * 2.0**-20, f, 2.0**-20)[:2].tolist() == [largest * 2.0**-20, -largest * 2.0**-20]


@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_zeros_and_what_rounds_to_zero(f):
    tiny = f.smallest_subnormal / 4
    y = quantize(torch.tensor([0.0, -0.0, tiny, -tiny]), f, ONE)
    negative = -0.0 if f.has_negative_zero else 0.0
    assert_same_bits(y, torch.tensor([0.0, negative, 0.0, negative]))


@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_infinities_and_nan(f):
    x = torch.tensor([float("inf"), -float("inf"), float("nan")])
    infinity = float("inf") if f.has_inf else f.max_representable_value
    assert_same_bits(quantize(x, f, ONE), torch.tensor([infinity, -infinity, float("nan")]))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (0, 3), (2, 0, 3), (2, 3, 4), (1, 2, 1, 3, 1, 2)])
def test_any_rank(shape):
    x = torch.randn(shape)
    assert_same_bits(quantize(x, E4M3, ONE), x.to(torch.float8_e4m3fn).float())
    codes = encode(x, E4M3, ONE)
    assert codes.shape == x.shape
    assert_same_bits(decode(codes, E4M3, ONE), quantize(x, E4M3, ONE))


@pytest.mark.parametrize("scale", [1, 0.5, 2.0**-30, torch.tensor(0.5), torch.tensor([0.5, 1.0, 2.0])])
def test_scales_as_numbers_and_tensors(scale):
    x = torch.randn(4, 3)
    as_tensor = scale if isinstance(scale, torch.Tensor) else torch.tensor(float(scale))
    assert_same_bits(quantize(x, E4M3, scale), torch.ops.altgrad.quantize(x, as_tensor, "E4M3"))
    assert_same_bits(dequantize(x, scale), x * as_tensor)
    assert_same_bits(decode(encode(x, E4M3, scale), E4M3, scale), quantize(x, E4M3, scale))


def test_formats_as_objects_names_and_spellings():
    x = torch.randn(100)
    want = quantize(x, E4M3)
    for same in ("E4M3", "e4m3", "e4m3b7fn", "E4M3B7FN", resolve("e4m3b7fn")):
        assert_same_bits(quantize(x, same), want)


def test_functions_are_the_operators():
    x = torch.randn(8, requires_grad=True)
    y = QuantizeFunc.apply(x, E5M2, torch.tensor(0.5))
    assert_same_bits(y, quantize(x, E5M2, 0.5))
    z = DequantizeFunc.apply(y, torch.tensor(0.5))
    assert_same_bits(z, dequantize(y, 0.5))
    z.sum().backward()
    assert_same_bits(x.grad, torch.full((8,), 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_kept(dtype):
    x = torch.randn(3, dtype=dtype)
    assert quantize(x, E5M2).dtype == dequantize(x, 2.0).dtype == dtype
    assert encode(x, E5M2).dtype == torch.uint8
    assert decode(encode(x, E5M2), E5M2, dtype=dtype).dtype == dtype
    assert decode(encode(x, E5M2), E5M2).dtype == torch.float32


def test_inputs_are_left_alone():
    x, scale = torch.randn(10), torch.tensor(0.3)
    before = x.clone(), scale.clone()
    y = quantize(x, E5M2, scale)
    assert_same_bits(x, before[0])
    assert_same_bits(scale, before[1])
    assert y.data_ptr() != x.data_ptr()
