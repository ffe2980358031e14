"""The operator quantize_operands: bit for bit quantize_operand of x, and of x transposed.

Tests named ``interpreted`` run the Triton kernel on the CPU, in the process of test_interpreter.py.
"""

import pytest
import torch
from conftest import DTYPES, assert_same_bits
from interpreter import INTERPRETS, interpreted
from test_quantize_blocks import on

from ops_registry import aten, cuda, launches, tiles
from ops_registry.arithmetic import compute_dtype

ag = torch.ops.altgrad
# name -> format, rounding, size of blocks, rule of the scale, format of the scale, headroom, whether it transforms
ONE_LAUNCH = {
    "mxfp8": ("E4M3", "nearest_ties_to_even", 32, "rceil", None, 1.0, False),
    "mxfp4": ("E2M1", "nearest_ties_to_away", 32, "floor", None, 1.0, True),
    "nvfp4 to nearest": ("E2M1", "nearest_ties_to_even", 16, None, "E4M3", 1.0625, True),
    "a number": ("E5M2", "toward_negative", 32, None, None, 1.0, False),
    "short blocks": ("E3M2", "toward_zero", 4, "even", None, 1.0, False),
}
RULES = ONE_LAUNCH | {
    "fp8_block": ("E4M3", "toward_zero", 128, "rceil", None, 1.0, False),
    "blocks across": ("E4M3", "nearest_ties_to_even", 8, "rceil", None, 1.0, True),
    "no power of two": ("E4M3", "to_odd", 48, "rceil", None, 1.0, True),
    "whole rows": ("E4M3", "nearest_ties_to_even", -1, "rceil", None, 1.0, False),
    "wide": ("FP16", "nearest_ties_to_even", 32, "rceil", None, 1.0, False),
    "unsigned": ("UE4M3", "nearest_ties_to_even", 32, None, "E4M3", 1.0, False),
}
SHAPES = [(128, 256), (2, 128, 128), (0, 128)]  # of whole tiles
UNEVEN = [(70, 48), (64, 40), (16, 64), (32, 64, 3), (2, 3, 48, 64), (1, 32)]


def sample(shape, dtype=torch.float32):
    """Magnitudes so far apart that blocks of both directions have other scales; NaN, an infinity, zeros, subnormals."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-12, 12, shape, generator=generator)
    if x.numel() and x.shape[-2] > 8:
        x[..., 3, 0], x[..., 4, 2], x[..., 6, :], x[..., 7, :] = torch.inf, torch.nan, 0.0, -0.0
        x[..., 8, :] *= 2.0**-130
    if INTERPRETS:  # its casts from bfloat16 flush subnormals
        x = x.masked_fill((x.abs() < 1e-30) & (x != 0), 0)
    return x.to(dtype)


def laid_out(x):
    """x contiguous, transposed, sliced and expanded, and its stack otherwise, each with the same shape."""
    yield x
    yield x.mT.contiguous().mT
    yield torch.stack([x, x], -1)[..., 0]
    yield x[..., :1, :].expand(x.shape)
    if x.ndim > 2:
        yield x.transpose(0, 1).contiguous().transpose(0, 1)


def arguments(x, rule, dtype=None):
    """Those of quantize_operands, and those of the two calls of quantize_operand that it stands for."""
    format, rounding, size, power_of_two, scale_format, headroom, hadamard = rule
    hadamard = hadamard and x.shape[-2] % 16 == 0
    scales = [None, None]
    if scale_format is not None:
        scales = [torch.full((), scale, dtype=compute_dtype(x.dtype)) for scale in (0.37, 0.0021)]
    block = [*[1] * (x.ndim - 1), size]
    options = format, "propagate", rounding, block, power_of_two, scale_format, headroom, dtype
    calls = [(x, scales[0], *options, False), (x.mT, scales[1], *options, hadamard)]
    return (x, *scales, *options, hadamard), calls


def check(op, x, rule, device, dtype=None):
    args, calls = arguments(x, rule, dtype)
    outputs = op(*on(device, args))
    for got, call in zip(outputs, calls, strict=True):
        assert_same_bits(got, aten.KERNELS["quantize_operand"](*call), call[0])
        assert got.stride() == torch.empty_like(call[0]).stride()


@pytest.fixture(params=["formula", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request):
    if request.param == "formula":
        return aten.KERNELS["quantize_operands"], "cpu"
    return ag.quantize_operands, request.param


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [*SHAPES, *UNEVEN], ids=str)
def test_layouts(shape, name, implementation):
    for x in laid_out(sample(shape)):
        check(implementation[0], x, RULES[name], implementation[1])


@pytest.mark.parametrize("name", ONE_LAUNCH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, name, implementation):
    for out in [torch.float64] if dtype == torch.float64 else [None, *DTYPES[:3]]:
        check(implementation[0], sample((64, 128), dtype), RULES[name], implementation[1], out)


def in_one_launch():
    """The kernel of one launch, which has launched nothing yet."""
    kernel, _ = launches.served(
        "quantize_operands", cuda.quantize_operands, lambda *args: pytest.fail("no launch serves it")
    )
    return kernel


@pytest.mark.gpu
@pytest.mark.parametrize("name", ONE_LAUNCH)
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 512)], ids=str)
def test_one_launch(shape, name):
    for dtype in DTYPES[:3]:
        for x in [*laid_out(sample(shape, dtype))][:3]:
            check(in_one_launch(), x, RULES[name], "cuda")


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ONE_LAUNCH)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted(shape, name):
    for x in [*laid_out(sample(shape))][:3]:
        check(in_one_launch(), x, RULES[name], "cpu")


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4 to nearest"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_interpreted_dtypes(dtype, name):
    """Its casts to bfloat16 truncate: to float32."""
    check(in_one_launch(), sample((64, 128), dtype), RULES[name], "cpu", torch.float32)


def test_what_one_launch_serves():
    for shape, size, is_served in (
        ((4096, 768), 32, True),
        ((3, 64, 128), 16, True),
        ((48, 64), 2, True),
        ((64, 96), 32, False),
        ((48, 128), 32, False),
        ((4096, 770), 2, False),
        ((4096, 768), 48, False),
        ((4096, 768), 64, False),
        ((4096, 768), 1, False),
        ((4096, 768), -1, False),
        ((4100, 768), 16, False),
    ):
        assert (tiles.both_of(shape, size) is not None) == is_served, (shape, size)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.ones(4)}, ValueError, "x must have at least 2 dimensions to be transposed, got 1"),
        ({5: "stochastic"}, ValueError, "rounding 'stochastic' needs random_bits: it is an operator of its own"),
        ({1: torch.tensor(1.0), 8: "E4M3"}, ValueError, "give both of them or neither"),
        ({6: [2]}, ValueError, "block must have .* for each of the 2 dimensions of x, got"),
        ({11: True}, ValueError, r"multiple of 16 as its last size to be transformed, got \(16, 24\)"),
        ({10: torch.float64}, TypeError, "dtype must be float64 for float64 x"),
        ({3: "E9M9"}, ValueError, "unknown format"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_input(change, error, message, device):
    args = [torch.ones(24, 16), None, None, "E4M3", "propagate", "nearest_ties_to_even", [1, 8]]
    args += [None, None, 1.0, None, False]
    for place, value in change.items():
        args[place] = value
    with pytest.raises(error, match=message):
        ag.quantize_operands(*on(device, args))


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4 to nearest"])
@pytest.mark.parametrize("in_dim", [0, 2])
def test_vmap(name, in_dim):
    x = sample((3, 48, 64))
    args, _ = arguments(x[0], RULES[name])
    tensors = [None if t is None else torch.stack([t, 2 * t, 3 * t]) for t in args[1:3]]
    in_dims = in_dim, *(None if t is None else 0 for t in tensors)
    got = torch.vmap(lambda *tensors: ag.quantize_operands(*tensors, *args[3:]), in_dims)(
        x.movedim(0, in_dim).contiguous(), *tensors
    )
    for i in range(3):
        want = ag.quantize_operands(x[i], *(None if t is None else t[i] for t in tensors), *args[3:])
        for outputs in zip(got, want, strict=True):
            assert_same_bits(outputs[0][i], outputs[1])


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4 to nearest"])
def test_opcheck_and_compiled(name):
    x = sample((32, 64))[9:25]  # no NaN: opcheck takes it for a difference
    args, _ = arguments(x.contiguous(), RULES[name])
    torch.library.opcheck(ag.quantize_operands.default, args)
    compiled = torch.compile(ag.quantize_operands, fullgraph=True)
    for got, want in zip(compiled(*args), ag.quantize_operands(*args), strict=True):
        assert_same_bits(got, want)


def test_no_gradients():
    args, _ = arguments(sample((32, 64)).requires_grad_(), RULES["mxfp8"])
    assert not any(t.requires_grad for t in ag.quantize_operands(*args))
