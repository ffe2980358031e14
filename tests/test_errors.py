"""Bad input: one clear error, the same in eager, under fake tensors and in compile; nothing is changed by it."""

import numpy as np
import pytest
import torch
from conftest import assert_same_bits
from torch._subclasses import FakeTensorMode

from altgrad.quantization import (
    E5M2,
    MXFP4,
    AmaxHistory,
    PerAxis,
    PerBlock,
    bit_stall,
    compute_scale,
    decode,
    decode_blocks,
    dequantize,
    encode,
    encode_blocks,
    quantization_stats,
    quantize,
    quantize_blocks,
    quantize_gradient,
    resolve,
    sqnr,
)

ag = torch.ops.altgrad
X, ONE = torch.randn(3, 4), torch.tensor(1.0)
CODES = torch.zeros(3, 4, dtype=torch.uint8)
BITS = torch.zeros(3, 4, dtype=torch.int32)

# (call with tensors, its tensors, error, message)
OPERATOR_ERRORS = {
    "unknown format": (
        lambda x, s: ag.quantize(x, s, "E9M9"),
        (X, ONE),
        ValueError,
        r"unknown format 'E9M9': .*E5M2.*e<exp",
    ),
    "malformed": (lambda x, s: ag.encode(x, s, "e4m3b"), (X, ONE), ValueError, r"unknown format 'e4m3b'"),
    "21 bits": (lambda x, s: ag.quantize(x, s, "e5m15b15"), (X, ONE), ValueError, "at most 19 bits together"),
    "no codes": (lambda x, s: ag.encode(x, s, "TF32"), (X, ONE), ValueError, "at most 16 bits, and TF32 has 19"),
    "no codes to decode": (lambda c, s: ag.decode(c, s, "TF32"), (CODES, ONE), ValueError, "at most 16 bits, and TF32"),
    "codes of one byte": (
        lambda c, s: ag.decode(c, s, "BF16"),
        (CODES, ONE),
        TypeError,
        r"codes must have dtype torch\.uint16, got torch\.uint8",
    ),
    "specials": (lambda x, s: ag.quantize(x, s, "e5m0b15"), (X, ONE), ValueError, "IEEE specials need"),
    "saturation": (
        lambda x, s: ag.quantize(x, s, "E5M2", "sat"),
        (X, ONE),
        ValueError,
        "saturation must be one of propagate, finite, none, got 'sat'",
    ),
    "rounding": (
        lambda x, s: ag.encode(x, s, "E5M2", "none", "up"),
        (X, ONE),
        ValueError,
        "rounding must be one of nearest_ties_to_even, .* got 'up'",
    ),
    "integer x": (
        lambda x, s: ag.quantize(x, s, "E5M2"),
        (X.int(), ONE),
        TypeError,
        r"x must have a dtype of float16, .*, got torch\.int32",
    ),
    "bool x": (lambda x, s: ag.dequantize(x, s), (X.bool(), ONE), TypeError, r"x must have a dtype .* got torch\.bool"),
    "complex x": (
        lambda x, s: ag.encode(x, s, "E5M2"),
        (X.cfloat(), ONE),
        TypeError,
        r"x must have a dtype .* got torch\.complex64",
    ),
    "integer scale": (
        lambda x, s: ag.quantize(x, s, "E5M2"),
        (X, ONE.int()),
        TypeError,
        r"scale must have a dtype of .*, got torch\.int32",
    ),
    "codes": (
        lambda c, s: ag.decode(c, s, "E5M2"),
        (BITS, ONE),
        TypeError,
        r"codes must have dtype torch\.uint8, got torch\.int32",
    ),
    "decode dtype": (
        lambda c, s: ag.decode(c, s, "E5M2", torch.int8),
        (CODES, ONE),
        TypeError,
        r"dtype must be one of float16, .* got torch\.int8",
    ),
    "a largest value beyond float32": (
        lambda x: ag.as_scale(x, 1e300),
        (ONE,),
        ValueError,
        r"max_value must be positive and finite in torch\.float32, got 1e\+300",
    ),
    "scales beyond float32": (
        lambda x: quantize_blocks(x, "BF16", granularity=PerBlock(2), scale_format="E5M2"),
        (X,),
        ValueError,
        r"scale_format E5M2 times format BF16 reaches 1.94e\+43, beyond torch\.float32: give a narrower scale_format",
    ),
    "scale shape": (
        lambda x, s: ag.quantize(x, s, "E5M2"),
        (X, torch.ones(3)),
        ValueError,
        r"scale must broadcast to x without enlarging it: got scale of shape \(3,\) for x of shape \(3, 4\)",
    ),
    "enlarging scale": (
        lambda x, s: ag.quantize(x, s, "E5M2"),
        (X[:, :1], torch.ones(3, 4)),
        ValueError,
        "without enlarging it",
    ),
    "scale of higher rank": (
        lambda c, s: ag.decode(c, s, "E5M2"),
        (CODES, torch.ones(1, 1, 1)),
        ValueError,
        "scale must broadcast to codes without",
    ),
    "1-d scale of 0-d x": (
        lambda x, s: ag.dequantize(x, s),
        (torch.tensor(1.0), torch.ones(1)),
        ValueError,
        "without enlarging it",
    ),
    "scale on meta": (
        lambda x, s: ag.quantize(x, s, "E5M2"),
        (X, ONE.to("meta")),
        RuntimeError,
        "scale must be on the device of x, cpu, or a 0-d CPU tensor; got a 0-d tensor on meta",
    ),
    "x on meta": (
        lambda x, s: ag.quantize(x, s, "E5M2"),
        (X.to("meta"), torch.ones(4)),
        RuntimeError,
        "got a 1-d tensor on cpu",
    ),
    "random dtype": (
        lambda x, s, r: ag.quantize_stochastic(x, s, r, "E5M2"),
        (X, ONE, BITS.short()),
        TypeError,
        r"random_bits must have a dtype of int32, uint8, int64, got torch\.int16",
    ),
    "random shape": (
        lambda x, s, r: ag.encode_stochastic(x, s, r, "E5M2"),
        (X, ONE, BITS[:1]),
        ValueError,
        r"random_bits must have the shape of x, \(3, 4\), got \(1, 4\)",
    ),
    "random device": (
        lambda x, s, r: ag.encode_stochastic(x, s, r, "E5M2"),
        (X, ONE, BITS.to("meta")),
        RuntimeError,
        "random_bits must be on the device of x, cpu, got meta",
    ),
}


@pytest.mark.parametrize("name", OPERATOR_ERRORS)
def test_operator_errors(name):
    call, tensors, error, message = OPERATOR_ERRORS[name]
    before = [t if t.is_meta else t.clone() for t in tensors]
    with pytest.raises(error, match=message):
        call(*tensors)
    with FakeTensorMode() as mode, pytest.raises(error, match=message):
        call(*map(mode.from_tensor, tensors))
    torch._dynamo.reset()
    # Dynamo reports what a fake raises as its own RuntimeError that quotes it.
    with pytest.raises(RuntimeError, match=message) as compiled:
        torch.compile(call, fullgraph=True, backend="eager")(*tensors)
    assert error.__name__ in str(compiled.value) or compiled.type is error
    for tensor, copy in zip(tensors, before):
        if not tensor.is_meta:
            assert torch.equal(tensor, copy)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_sparse_x():
    for call in (lambda x: ag.quantize(x, ONE, "E5M2"), lambda x: compute_scale(x, E5M2)):
        with pytest.raises(TypeError, match=r"x must be a strided tensor, got layout torch\.sparse_coo"):
            call(X.to_sparse())
        with pytest.raises(TypeError, match=r"x must be a strided tensor, got layout torch\.sparse_csr"):
            call(X.to_sparse_csr())


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan"), 1e-46, 1e-38, 1e39])
def test_numbers_that_are_no_scale(scale):
    for call in (
        lambda: quantize(X, E5M2, scale),
        lambda: encode(X, E5M2, scale),
        lambda: decode(CODES, E5M2, scale),
        lambda: dequantize(X, scale),
    ):
        with pytest.raises(ValueError, match=r"scale must be positive and finite in torch\.float32, from 1.17"):
            call()
        torch._dynamo.reset()
        with pytest.raises(Exception, match="scale must be positive and finite"):
            torch.compile(call, fullgraph=True, backend="eager")()


def test_numbers_are_checked_in_the_precision_of_x():
    x = X.double() * 1e-60
    assert_same_bits(quantize(x, E5M2, 1e-60), quantize(x, E5M2, torch.tensor(1e-60, dtype=torch.float64)))
    with pytest.raises(ValueError, match="positive and finite"):
        quantize(X, E5M2, 1e-60)


@pytest.mark.parametrize("scale", ["1", None, True, [1.0], 1j])
def test_things_that_are_no_scale(scale):
    with pytest.raises(TypeError, match="scale must be a tensor or a number, got "):
        quantize(X, E5M2, scale)


@pytest.mark.parametrize("format", [None, 5, torch.int8, torch.float64])
def test_things_that_are_no_format(format):
    message = "format must be an FP8Format, a string or a dtype that is a format, got "
    for call in (quantize, encode, compute_scale, lambda x, f: resolve(f), lambda x, f: AmaxHistory(f)):
        with pytest.raises(TypeError, match=message):
            call(X, format)


NOT_TENSORS = {
    "x": [
        lambda x: quantize(x, E5M2),
        lambda x: encode(x, E5M2),
        lambda x: quantize_gradient(x, E5M2),
        lambda x: dequantize(x, 1.0),
        lambda x: compute_scale(x, E5M2),
        lambda x: quantize_blocks(x, **MXFP4),
        lambda x: quantization_stats(x, E5M2),
        lambda x: sqnr(x, X),
        lambda x: AmaxHistory(E5M2)(x),
    ],
    "y": [lambda y: sqnr(X, y)],
    "w": [lambda w: bit_stall(w, X, 0.1, E5M2)],
    "g": [lambda g: bit_stall(X, g, 0.1, E5M2)],
    "codes": [lambda codes: decode(codes, E5M2)],
}


@pytest.mark.parametrize("argument", NOT_TENSORS)
@pytest.mark.parametrize("value", [[1.0], 1.0, None], ids=str)
def test_things_that_are_no_tensor(argument, value):
    for call in NOT_TENSORS[argument]:
        with pytest.raises(TypeError, match=rf"{argument} must be a tensor, got {type(value).__name__}"):
            call(value)


def test_numbers_of_numpy_are_scales():
    for scale in (np.float32(0.5), np.float64(0.5), np.int64(2)):
        assert_same_bits(quantize(X, E5M2, scale), quantize(X, E5M2, float(scale)), X)


def test_random_operands_need_stochastic_rounding():
    with pytest.raises(ValueError, match="need rounding='stochastic', got rounding='nearest_ties_to_even'"):
        quantize(X, E5M2, random_bits=BITS)
    with pytest.raises(ValueError, match="need rounding='stochastic'"):
        encode(X, E5M2, generator=torch.Generator())


OF_GRANULARITY = r"granularity must be a PerTensor\(\), PerAxis or PerBlock, got"
# (call, error, message)
FUNCTION_ERRORS = [
    (lambda: quantize_blocks(X, **MXFP4, power_of_to="floor"), TypeError, "unexpected keyword argument 'power_of_to'"),
    (lambda: encode_blocks(X, **MXFP4, compact=True), TypeError, "unexpected keyword argument 'compact'"),
    *(
        (call, TypeError, OF_GRANULARITY)
        for call in (
            lambda: quantize(X, E5M2, granularity=4),
            lambda: encode(X, E5M2, granularity="rows"),
            lambda: decode(CODES, E5M2, granularity=PerBlock),
            lambda: quantize_blocks(X, E5M2, granularity=4),
            lambda: encode_blocks(X, E5M2, granularity=None),
            lambda: compute_scale(X, E5M2, granularity=0),
        )
    ),
    *((lambda sizes=sizes: PerBlock(sizes), TypeError, "sizes must be an integer, a tuple") for sizes in (4.0, None)),
    *((lambda a=a: PerAxis(a), TypeError, "axes must be an integer or a tuple") for a in ("a", 0.5, True, (0, None))),
    (lambda: compute_scale(X, E5M2, method="percentile", fraction="a"), TypeError, "fraction must be a number"),
    (lambda: compute_scale(X, E5M2, headroom=None), TypeError, "headroom must be a number"),
    *((lambda n=n: AmaxHistory(E5M2, length=n), TypeError, "length must be an integer") for n in ("a", 1.5, True)),
    (lambda: AmaxHistory(E5M2, margin="a"), TypeError, "margin must be a number"),
    *((lambda m=m: AmaxHistory(E5M2, margin=m), ValueError, "margin must be from -126 to 127") for m in (1e4, np.nan)),
    (lambda: decode_blocks(3), TypeError, "blocks must be what encode_blocks gives, got int 3"),
    (lambda: encode_blocks(X, **MXFP4).to(torch.float16), TypeError, "device must be a device, got torch.float16"),
    (lambda: quantize(X, E5M2, rounding=None), TypeError, "rounding must be a name, got None"),
    (lambda: quantize_blocks(X, **MXFP4, saturation=None), TypeError, "saturation must be a name, got None"),
    (lambda: encode_blocks(X, **MXFP4, rounding=3), TypeError, "rounding must be a name, got 3"),
    (lambda: bit_stall(X, X[:, :1], 0.1, E5M2), ValueError, r"w and g must have one shape, got \(3, 4\) and \(3, 1\)"),
    (lambda: sqnr(X.int(), X), TypeError, "x must be float16, bfloat16, float32 or float64, got torch.int32"),
    (lambda: quantize_gradient(X.int(), E5M2, lambda g: ONE), TypeError, "x must have a dtype of"),
    (lambda: quantize_gradient(X, E5M2, lambda g: ONE, saturation="sat"), ValueError, "saturation must be one of"),
]


@pytest.mark.parametrize(("call", "error", "message"), FUNCTION_ERRORS)
def test_function_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_default_device_is_not_that_of_numbers():
    with torch.device("meta"):
        assert_same_bits(quantize(X, E5M2, 0.3), quantize(X, E5M2, torch.tensor(0.3, device="cpu")))
        assert decode_blocks(encode_blocks(X, **MXFP4)).device == X.device
