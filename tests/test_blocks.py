"""Stored blocks against quantize_blocks and torchao, bit for bit."""

import math
import pickle

import pytest
import torch
from conftest import DTYPES, assert_same_bits
from torch.utils import _pytree as pytree

from altgrad.quantization import (
    E3M2,
    E4M3,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    NVFP4,
    Blocks,
    PerAxis,
    PerBlock,
    PerTensor,
    decode_blocks,
    encode_blocks,
    quantize_blocks,
)

BLOCK_FORMATS = {
    "MXFP8_E4M3": MXFP8_E4M3,
    "MXFP8_E5M2": MXFP8_E5M2,
    "MXFP6_E2M3": MXFP6_E2M3,
    "MXFP6_E3M2": MXFP6_E3M2,
    "MXFP4": MXFP4,
    "NVFP4": NVFP4,
    "columns": MXFP4 | {"granularity": PerBlock({0: 4})},
    "tiles": NVFP4 | {"granularity": PerBlock((3, 5))},
    "float scales": {"format": E3M2, "granularity": PerBlock(7)},
    "rows": {"format": E4M3, "granularity": PerAxis(0), "power_of_two": "rceil"},
    "tensor": {"format": "e2m2b1f", "granularity": PerTensor()},
}
block_formats = pytest.mark.parametrize("options", BLOCK_FORMATS.values(), ids=BLOCK_FORMATS)


def samples(*shape, dtype=torch.float32):
    """Numbers over many binades, with a block of zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(3).exp()
    x[..., :3] = 0
    return x.to(dtype)


def test_errors():
    with pytest.raises(ValueError, match="at most 8 bits to be packed, got FP16 of 16"):
        encode_blocks(torch.ones(4, 4), "FP16", granularity=PerBlock(4))
    with pytest.raises(ValueError, match=r"blocks along the dimensions \[2\]"):
        encode_blocks(torch.ones(4, 4), E4M3, granularity=PerBlock({2: 4}))
    blocks = encode_blocks(torch.ones(4, 32), **MXFP4)
    with pytest.raises(ValueError, match="packed must have 17 bytes"):
        decode_blocks(blocks._replace(n=34))
    with pytest.raises(ValueError, match=r"the shape \(4, 1\), got \(3, 1\)"):
        decode_blocks(blocks._replace(scales=blocks.scales[:3]))


@block_formats
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 96), (5, 33), (2, 3, 50), (7, 1), (0, 32)])
def test_decode_blocks_is_quantize_blocks(shape, dtype, options):
    x = samples(*shape, dtype=dtype)
    bits = torch.randint(1 << 24, shape, dtype=torch.int32)
    for y in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        for modes in ({}, {"saturation": "finite"}, {"rounding": "stochastic", "random_bits": bits}):
            blocks = encode_blocks(y, **options, **modes)
            assert blocks.shape == shape and blocks.dtype == dtype
            assert_same_bits(decode_blocks(blocks), quantize_blocks(y, **options, **modes), x)


@block_formats
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 2.0**-140, 3e38])
def test_specials(value, options):
    x = samples(6, 40)
    x[1, 20] = value
    assert_same_bits(decode_blocks(encode_blocks(x, **options)), quantize_blocks(x, **options), x)


@pytest.mark.parametrize(
    "options, bits, tensor", [(MXFP4, 4.25, 0), (NVFP4, 4.5, 32), (MXFP6_E3M2, 6.25, 0), (MXFP8_E4M3, 8.25, 0)]
)
def test_bits_an_element(options, bits, tensor):
    x = samples(64, 256)
    blocks = encode_blocks(x, **options)
    assert blocks.nbytes * 8 == bits * x.numel() + tensor
    assert sum(t.untyped_storage().nbytes() for t in blocks if isinstance(t, torch.Tensor)) == blocks.nbytes


@block_formats
def test_blocks_are_a_pytree_and_pickle(options):
    blocks = encode_blocks(samples(6, 40), **options)
    cloned = pytree.tree_map_only(torch.Tensor, torch.clone, blocks)
    for other in (cloned, pickle.loads(pickle.dumps(blocks)), blocks.to("cpu")):
        assert isinstance(other, Blocks) and other[3:] == blocks[3:]
        assert_same_bits(decode_blocks(other), decode_blocks(blocks))
    assert all(t.is_meta for t in blocks.to("meta") if isinstance(t, torch.Tensor))


def test_nothing_else_is_read_by_torchao():
    """torchao decodes our bytes, and we its bytes; its rules for scales are those of test_scaling_peers."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed").MXTensor
    x = torch.randn(16, 128)
    for element, options in ((torch.float8_e4m3fn, MXFP8_E4M3), (torch.float4_e2m1fn_x2, MXFP4)):
        theirs, ours = mx.to_mx(x, element, 32), encode_blocks(x, **options)
        assert_same_bits(ours.scales, theirs.scale.view(torch.uint8))
        assert_same_bits(ours.codes, theirs.qdata.view(torch.uint8))
        assert_same_bits(decode_blocks(ours), theirs.dequantize(torch.float32))
        foreign = ours._replace(codes=theirs.qdata.view(torch.uint8), scales=theirs.scale.view(torch.uint8))
        assert_same_bits(decode_blocks(foreign), theirs.dequantize(torch.float32))
        theirs.qdata.copy_(ours.codes.view(theirs.qdata.dtype).flip(0))
        theirs.scale.copy_(ours.scales.view(theirs.scale.dtype).flip(0))
        assert_same_bits(theirs.dequantize(torch.float32), decode_blocks(ours).flip(0))


def test_torchao_reads_nvfp4():
    module = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", reason="torchao is not installed")
    x = torch.randn(16, 128)
    ours = encode_blocks(x, **NVFP4)
    theirs = module.NVFP4Tensor.to_nvfp4(x, 16, per_tensor_scale=ours.tensor_scale)
    theirs.qdata.copy_(ours.codes.view(theirs.qdata.dtype))
    theirs.scale.copy_(ours.scales.view(theirs.scale.dtype))
    assert_same_bits(theirs.dequantize(torch.float32), decode_blocks(ours))


def test_views_by_dtypes_of_torch():
    x = samples(4, 64)
    blocks = encode_blocks(x, **MXFP8_E4M3)
    scales = blocks.scales.view(torch.float8_e8m0fnu).float().repeat_interleave(32, -1)
    assert_same_bits(blocks.codes.view(torch.float8_e4m3fn).float() * scales, decode_blocks(blocks))
    assert encode_blocks(x, **MXFP4).codes.view(torch.float4_e2m1fn_x2).shape == (4, 32)
    nvfp4 = encode_blocks(x, **NVFP4)
    assert_same_bits(nvfp4.scales.view(torch.float8_e4m3fn).float() * nvfp4.tensor_scale, nvfp4.float_scales())


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["MXFP6_E2M3", "NVFP4"])
def test_compiled(name):
    """Both kinds of scales, and codes that share bytes by twos and by threes."""
    torch._dynamo.reset()
    options, x = BLOCK_FORMATS[name], samples(8, 96)
    encoded = torch.compile(lambda x: encode_blocks(x, **options)[:3], fullgraph=True)(x)
    want = encode_blocks(x, **options)
    for got, wanted in zip(encoded, want[:3]):
        if wanted is not None:
            assert_same_bits(got, wanted)
    decoded = torch.compile(lambda blocks: decode_blocks(want._replace(codes=blocks)), fullgraph=True)(want.codes)
    assert_same_bits(decoded, decode_blocks(want))
