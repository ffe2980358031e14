"""compressed-tensors, whose files vLLM loads: it reads our bytes and we read its, bit for bit.

Its own scales are not compared: an observer finds them, elsewhere.
"""

import importlib.util

import pytest
import torch
from conftest import assert_same_bits, name_operators_of_torchvision

from altgrad.quantization import (
    MXFP4,
    MXFP6_E2M3,
    NVFP4,
    decode,
    decode_blocks,
    encode,
    encode_blocks,
    pack,
    unpack,
)

if importlib.util.find_spec("compressed_tensors") is None:
    pytest.skip("compressed-tensors is not installed", allow_module_level=True)


def module(name):
    """Where a test needs it: it imports transformers, which takes four seconds of each process that collects tests."""
    name_operators_of_torchvision()
    return importlib.import_module(f"compressed_tensors.{name}")


@pytest.mark.parametrize(("name", "bits", "theirs"), [("E2M1", 4, "nvfp4"), ("E2M3", 6, "mxfp6")])
def test_bytes_of_codes(name, bits, theirs):
    """Every code beside every other."""
    codes = torch.cartesian_prod(*[torch.arange(1 << bits, dtype=torch.uint8)] * 2)
    codes = torch.cat([codes, codes.flip(-1)], -1)
    values, helpers = decode(codes, name), module(f"compressors.{theirs}.helpers")
    packs, unpacks = (
        getattr(helpers, f"{word}_fp{bits}_{way}_uint8") for word, way in (("pack", "to"), ("unpack", "from"))
    )
    assert_same_bits(pack(codes, bits), packs(values))
    assert_same_bits(unpacks(pack(codes, bits), *codes.shape, torch.float32), values)
    assert_same_bits(unpack(packs(values), bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [32, 40, 37])
def test_integers_in_words(bits, n):
    """Its words are our stream of codes from -2^(bits - 1) on, filled up to four bytes."""
    numbers = torch.randint(-(1 << bits - 1), 1 << bits - 1, (7, n)).to(torch.int8)
    codes = (numbers.int() + (1 << bits - 1)).to(torch.uint8)
    integers = module("compressors.pack_quantized.helpers")
    theirs, ours = integers.pack_to_int32(numbers, bits), pack(codes, bits)
    filled = torch.nn.functional.pad(ours, (0, -ours.shape[1] % 4)).view(torch.int32)
    assert_same_bits(filled, theirs)
    assert_same_bits(integers.unpack_from_int32(filled, bits, numbers.shape), numbers)
    assert_same_bits(unpack(theirs.view(torch.uint8)[:, : ours.shape[1]], bits, n), codes)


def test_symmetric_int4():
    """e0m3b-2f has sign and magnitude; its numbers are theirs without -8."""
    x = torch.randn(16, 64)
    scale = x.abs().amax(1, keepdim=True) / 7
    numbers = decode(encode(x, "e0m3b-2f", scale), "e0m3b-2f")
    words = module("compressors.pack_quantized.helpers").pack_to_int32(numbers.to(torch.int8), 4)
    assert_same_bits(unpack(words.view(torch.uint8), 4, 64).float() - 8, numbers + 0.0)  # theirs has no -0


@pytest.mark.parametrize(
    ("name", "options"), [("NVFP4", NVFP4), ("MXFP4", MXFP4), ("MXFP6", MXFP6_E2M3)], ids=["NVFP4", "MXFP4", "MXFP6"]
)
def test_blocks(name, options):
    """Its decompressor of ours is decode_blocks, and its compressor by our scales gives our bytes.

    It multiplies in bfloat16, in which these products are exact, with a power of two for the scale of the tensor.
    """
    x = torch.randn(16, 128)
    x[3, 5] = 6 * 448 * 2.0**-9
    ours, scheme = encode_blocks(x, **options), module("quantization").preset_name_to_scheme(f"{name}A16", ["Linear"])
    compressor = module("compressors").BaseCompressor.get_value_from_registry(f"{name.lower()}-pack-quantized")
    above = {} if ours.tensor_scale is None else {"weight_global_scale": 1 / ours.tensor_scale}
    scales, block_scales = ours.scales, ours.float_scales()
    if name == "NVFP4":
        scales, block_scales = scales.view(torch.float8_e4m3fn), decode(ours.scales, "E4M3")
    theirs = compressor.decompress({"weight_packed": ours.codes, "weight_scale": scales} | above, scheme)
    assert_same_bits(theirs["weight"].float(), decode_blocks(ours), x)
    stored = compressor.compress({"weight": x, "weight_scale": block_scales} | above, scheme)
    assert_same_bits(stored["weight_packed"], ours.codes)
    assert_same_bits(stored["weight_scale"].view(torch.uint8), ours.scales)
    foreign = ours._replace(codes=stored["weight_packed"], scales=stored["weight_scale"].view(torch.uint8))
    assert_same_bits(decode_blocks(foreign), theirs["weight"].float(), x)
