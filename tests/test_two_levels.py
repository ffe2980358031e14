"""Scales in a format of their own and their published variants against definitions in numpy, block by block."""

import math

import numpy as np
import pytest
import reference
import torch
from conftest import DTYPES, assert_same_bits

from altgrad.quantization import (
    BF16,
    E2M1,
    E4M3,
    E8M0,
    FP16,
    NVFP4,
    TF32,
    UE4M3,
    UE5M3,
    PerAxis,
    PerBlock,
    PerTensor,
    compute_scale,
    decode_blocks,
    encode_blocks,
    quantize_blocks,
    resolve,
)
from altgrad.simulation import Rule
from altgrad.simulation.operands import State, quantize_operand

TE = NVFP4 | {"arithmetic": "transformer_engine"}
ALONE = {"granularity": PerBlock(16), "tensor_scale": False}
VARIANTS = {
    "four_over_six": NVFP4 | {"method": "four_over_six"},
    "four_over_six, float32 scales": {"format": E2M1, "granularity": PerBlock(16), "method": "four_over_six"},
    "headroom": NVFP4 | {"headroom": 17 / 16},
    "headroom, powers of two": NVFP4 | {"headroom": 17 / 16, "scale_format": None, "power_of_two": "rceil"},
    "UE5M3": NVFP4 | {"scale_format": UE5M3},
    "UE5M3 alone": ALONE | {"format": E2M1, "scale_format": UE5M3},
    "E8M0 alone": ALONE | {"format": E4M3, "scale_format": "E8M0"},
    "FP16 alone": ALONE | {"format": "e0m3b-2f", "scale_format": FP16},
    "BF16 alone, four_over_six": ALONE | {"format": E2M1, "scale_format": BF16, "method": "four_over_six"},
    "TransformerEngine": TE,
    "TransformerEngine, headroom, squares": TE | {"headroom": 17 / 16, "granularity": PerBlock((16, 16))},
    "TransformerEngine, rows": TE | {"granularity": PerAxis(0)},
    "TransformerEngine, tensor": TE | {"granularity": PerTensor()},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
FLOAT = np.float32
LARGEST = np.finfo(FLOAT).max


def samples(*shape, seed=0):
    """Blocks of 16 over many binades: with scales that are subnormal or 0 in E4M3, and one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = (
        x
        * torch.randn(*shape[:-1], -(-shape[-1] // 16), generator=generator)
        .mul(4)
        .exp()
        .repeat_interleave(16, -1)[..., : shape[-1]]
    )
    x[..., 16:32] = 0
    x[..., 3] = -0.0
    return x


def by_blocks(x, quantize_block):
    """quantize_block(block, amax of x) for the blocks of 16 of each row."""
    rows, largest = x.numpy(), np.abs(x.numpy()).max(initial=0)
    blocks = [[quantize_block(row[i : i + 16], largest) for i in range(0, len(row), 16)] for row in rows]
    return torch.from_numpy(np.stack([np.concatenate(row) for row in blocks]))


def nearest(f, x, scale=1.0, **modes):
    return reference.quantize(resolve(f), np.atleast_1d(x).astype(FLOAT), FLOAT(scale), **modes)


def level(g, statistic, tensor_scale):
    """A scale of E2M1 values in the format g under a scale of the tensor."""
    g = resolve(g)
    smallest = FLOAT(g.smallest_normal or g.smallest_subnormal)
    return max(nearest(g, FLOAT(statistic) / FLOAT(6), tensor_scale)[0], smallest * FLOAT(tensor_scale))


def squared_error(x, y):
    return ((y.astype(np.float64) - x.astype(np.float64)) ** 2).sum()


@pytest.mark.parametrize(("g", "top"), [("E4M3", 256), ("e4m0b7fn", 64)])
def test_four_over_six(g, top):
    """Cook et al., arXiv 2512.02010: the largest scale is 256, so that 1.5 times it is in E4M3."""

    def quantize_block(x, largest):
        tensor_scale = FLOAT(largest) / FLOAT(6 * top)
        by_six, by_four = (
            nearest(E2M1, x, level(g, np.abs(x).max() * FLOAT(factor), tensor_scale)) for factor in (1, 1.5)
        )
        return by_four if squared_error(x, by_four) < squared_error(x, by_six) else by_six

    x = samples(20, 160)
    got = quantize_blocks(x, **NVFP4 | {"method": "four_over_six", "scale_format": g})
    assert_same_bits(got, by_blocks(x, quantize_block), x)
    assert 0.1 < (got != quantize_blocks(x, **NVFP4 | {"scale_format": g})).float().mean() < 0.8


@np.errstate(over="ignore", divide="ignore")
def transformer_engine(x, largest, headroom=1.0):
    """quantization_nvfp4.py of TransformerEngine, in numpy's float32."""
    multiplier = min(FLOAT(6 * 448) / (FLOAT(largest) * FLOAT(headroom)), LARGEST)
    tensor_scale = FLOAT(1) / multiplier
    multiplier = multiplier * (FLOAT(1) / FLOAT(6))
    statistic = np.abs(x).max() * FLOAT(headroom)
    scale = nearest(E4M3, min(statistic * multiplier, LARGEST), saturation="finite")[0] * tensor_scale
    inverse = min(FLOAT(1) / scale, LARGEST)
    return nearest(E2M1, x * inverse) * scale


@pytest.mark.parametrize("headroom", [1.0, 17 / 16])
def test_transformer_engine(headroom):
    x = samples(60, 160)
    options = TE | {"headroom": headroom}
    got = quantize_blocks(x, **options)
    assert_same_bits(got, by_blocks(x, lambda block, largest: transformer_engine(block, largest, headroom)), x)
    scale, exact = (compute_scale(x, **o, compact=True) for o in (options, NVFP4 | {"headroom": headroom}))
    tensor_scale = scale.max() / 448
    assert (scale == 0).any() and ((scale > 0) & (scale < tensor_scale * 2.0**-6)).any()  # what is clamped elsewhere
    assert (exact >= tensor_scale * 2.0**-6 * (1 - 2.0**-20)).all()


def test_transformer_engine_of_tiny_and_huge_tensors():
    for factor in (2.0**-149, 2.0**-130, 1e-38, 1e-20, 2.0**100, 2.0**120):
        x = (samples(4, 48).clamp(-200, 200) * factor).contiguous()
        assert_same_bits(quantize_blocks(x, **TE), by_blocks(x, transformer_engine), x)


@pytest.mark.parametrize("g", [UE4M3, UE5M3, "E5M2", "e3m4b3", "e4m3b11fnuz", FP16], ids=lambda g: resolve(g).name)
def test_scale_formats_under_a_scale_of_the_tensor(g):
    top = resolve(g).max_representable_value

    def quantize_block(x, largest):
        return nearest(E2M1, x, level(g, np.abs(x).max(), FLOAT(largest) / FLOAT(6 * top)))

    x = samples(10, 80)
    assert_same_bits(quantize_blocks(x, **NVFP4 | {"scale_format": g}), by_blocks(x, quantize_block), x)


@pytest.mark.parametrize("g", [UE4M3, UE5M3, E8M0, "E5M2", FP16, BF16], ids=lambda g: resolve(g).name)
def test_scale_formats_alone(g):
    """Among them amax whose scale saturates, or is at its smallest."""
    x = torch.cat([samples(10, 80), samples(10, 80) * 1e6, samples(10, 80) * 1e-8])
    options = ALONE | {"format": E2M1, "scale_format": g}
    want = by_blocks(x, lambda block, largest: nearest(E2M1, block, level(g, np.abs(block).max(), 1.0)))
    assert_same_bits(quantize_blocks(x, **options), want, x)


def test_headroom_is_that_of_the_statistic():
    x, h = samples(6, 80), FLOAT(17 / 16)
    for options in (
        NVFP4,
        {"format": "E4M3", "granularity": PerAxis(0)},
        {"format": "E5M2", "granularity": PerTensor()},
    ):
        got = compute_scale(x, **options, headroom=17 / 16)
        if options is NVFP4:
            tensor_scale = np.abs(x.numpy()).max() * h / FLOAT(6 * 448)
            want = by_blocks(x, lambda b, _: np.full(len(b), level(E4M3, np.abs(b).max() * h, tensor_scale)))  # noqa: B023
        else:
            dims = {"dim": 1, "keepdim": True} if isinstance(options["granularity"], PerAxis) else {}
            want = x.abs().amax(**dims) * h / options_max(options)
        assert_same_bits(got, want)
    percentile = {"method": "percentile", "fraction": 0.9}
    options = NVFP4 | {"scale_format": None}
    got = compute_scale(x, **options, **percentile, headroom=17 / 16)
    statistic = compute_scale(x, **options | {"format": "e0m1b0f"}, **percentile)  # whose largest value is 1
    assert_same_bits(got, torch.where(statistic == 1, 1, statistic * 17 / 16 / 6))


def options_max(options):
    return resolve(options["format"]).max_representable_value


@variants
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 96), (5, 33), (0, 32)])
def test_decode_blocks_is_quantize_blocks(shape, dtype, options):
    x = samples(*shape).to(dtype)
    bits = torch.randint(1 << 24, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    for modes in ({}, {"rounding": "stochastic", "random_bits": bits}, {"rounding": "toward_zero"}):
        blocks = encode_blocks(x, **options, **modes)
        assert_same_bits(decode_blocks(blocks), quantize_blocks(x, **options, **modes), x)
    has_level = options.get("scale_format") is not None and options.get("tensor_scale", True)
    assert (blocks.tensor_scale is not None) == has_level


@variants
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_shows(value, options):
    x = samples(6, 48)
    x[1, 40] = value
    y = quantize_blocks(x, **options)
    assert y[1, 40].isnan() or options.get("power_of_two") == "rceil"  # there infinity counts as 2^128
    assert_same_bits(decode_blocks(encode_blocks(x, **options)), y, x)


@variants
def test_gradients_are_straight_through(options):
    x = samples(4, 48).requires_grad_()
    grad = torch.randn(4, 48)
    quantize_blocks(x, **options).backward(grad)
    assert_same_bits(x.grad, grad)
    assert not compute_scale(x, **options).requires_grad
    y, tangent = torch.func.jvp(lambda x: quantize_blocks(x, **options), (x.detach(),), (grad,))
    assert_same_bits(y, quantize_blocks(x.detach(), **options))
    assert_same_bits(tangent, grad)
    jacobian = torch.func.jacfwd(lambda x: quantize_blocks(x, **options))(x.detach()[:1])
    assert_same_bits(jacobian.reshape(48, 48), torch.eye(48))


@variants
def test_batches_and_seeds(options):
    """Under vmap a tensor is each example; a seed counts the elements of x."""
    x, seed = samples(3, 16, 32), torch.tensor(5)
    got = torch.vmap(lambda x: quantize_blocks(x, **options))(x)
    assert_same_bits(got, torch.stack([quantize_blocks(each, **options) for each in x]))
    got = quantize_blocks(x, **options, rounding="stochastic", random_bits=seed)
    assert_same_bits(got, decode_blocks(encode_blocks(x, **options, rounding="stochastic", random_bits=seed)))


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["four_over_six", "headroom", "UE5M3 alone", "TransformerEngine"])
def test_compiled(name):
    torch._dynamo.reset()
    options, x = VARIANTS[name], samples(8, 96).requires_grad_()
    y = torch.compile(lambda x: quantize_blocks(x, **options), fullgraph=True)(x)
    assert_same_bits(y, quantize_blocks(x, **options), x)
    y.sum().backward()
    assert_same_bits(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(
    "rule",
    [
        Rule("E2M1", per=16, scale_format="E4M3", method="four_over_six"),
        Rule("E2M1", per=16, scale_format="E4M3", headroom=17 / 16),
        Rule("E2M1", per=16, scale_format="E4M3", headroom=17 / 16, method="percentile", fraction=0.9),
        Rule("E2M1", per=16, scale_format="UE5M3", method="mse"),
    ],
    ids=str,
)
def test_simulated_operands_are_these(rule):
    x = samples(12, 64)
    blocks = encode_blocks(
        x, rule.format, granularity=PerBlock(16), scale_format=rule.scale_format, method=rule.method,
        headroom=rule.headroom, fraction=rule.fraction,
    )  # fmt: skip
    operand = quantize_operand(x, rule, 0, State())
    assert_same_bits(operand.scale, blocks.tensor_scale)
    assert_same_bits(operand.values, decode_blocks(blocks._replace(tensor_scale=None)))


def test_errors():
    x = torch.ones(2, 32)
    for options, message in (
        ({"method": "four_over_six", "format": E4M3}, "'four_over_six' is for E2M1 without power_of_two, got E4M3"),
        (
            {"method": "four_over_six", "power_of_two": "floor", "scale_format": None},
            "is for E2M1 without power_of_two",
        ),
        ({"method": "four_over_six", "headroom": 2.0}, "headroom is for a scale of amax or of a percentile"),
        ({"method": "mse", "headroom": 2.0}, "headroom is for a scale of amax or of a percentile"),
        ({"headroom": 0.0}, "headroom must be positive and finite, got 0.0"),
        ({"headroom": math.nan}, "headroom must be positive and finite, got nan"),
        ({"headroom": math.inf}, "headroom must be positive and finite, got inf"),
        ({"scale_format": "E8M0"}, "scale_format E8M0 with values down to 5.88e-39 needs no scale of the tensor"),
        ({"scale_format": "BF16"}, "give tensor_scale=False"),
        ({"scale_format": "E3M4", "tensor_scale": False}, "scale_format E3M4 has no NaN"),
        ({"scale_format": None, "tensor_scale": False}, "tensor_scale=False is for scales with a scale_format"),
        ({"arithmetic": "fast"}, "arithmetic must be one of exact, transformer_engine, got 'fast'"),
        ({"arithmetic": "transformer_engine", "scale_format": None}, "is that of a scale_format under a tensor_scale"),
        ({"arithmetic": "transformer_engine", "tensor_scale": False}, "is that of a scale_format under a tensor_scale"),
        ({"arithmetic": "transformer_engine", "method": "mse"}, "is that of a scale_format under a tensor_scale"),
    ):
        for function in (compute_scale, quantize_blocks, encode_blocks):
            with pytest.raises(ValueError, match=message):
                function(x, **NVFP4 | options)
    with pytest.raises(ValueError, match="'four_over_six' is for E2M1"):
        Rule("E4M3", method="four_over_six")
    with pytest.raises(ValueError, match="at most 16 bits"):
        encode_blocks(x, E2M1, granularity=PerBlock(16), scale_format=TF32, tensor_scale=False)
