"""Formats beyond one signed byte: up to 16 bits with codes, up to 19 without, ranges up to float32's own, no sign."""

import ml_dtypes
import numpy as np
import pytest
import reference
import torch
from conftest import (
    GIVEN_BITS,
    WIDE,
    WIDE_NAMED,
    all_inputs,
    assert_same_bits,
    points_of,
    random_bit_patterns,
    reference_decode,
    reference_encode,
    reference_quantize,
    reference_quantize_and_encode,
)

from altgrad.quantization import decode, encode, quantize, resolve
from ops_registry import aten, cpu
from ops_registry.arithmetic import code_dtype
from ops_registry.modes import DETERMINISTIC_ROUNDINGS, SATURATIONS

ag = torch.ops.altgrad
formats = pytest.mark.parametrize("f", WIDE, ids=lambda f: f.name)


def check(f, x, scale, saturation, rounding):
    want, want_codes = reference_quantize_and_encode(f, x, scale, saturation, rounding)
    for ops in (ag, aten):
        assert_same_bits(ops.quantize(x, scale, f.name, saturation, rounding), want, x)
        if f.code_bytes:
            assert_same_bits(ops.encode(x, scale, f.name, saturation, rounding), want_codes, x)


@formats
@pytest.mark.parametrize("rounding", DETERMINISTIC_ROUNDINGS)
def test_near_ties(f, rounding):
    x = torch.cat([points_of(f), random_bit_patterns(2000)])
    for i, saturation in enumerate(SATURATIONS):
        scale = torch.tensor((1.0, 0.37, 2.0**-9)[i])
        check(f, x, torch.tensor(1.0), saturation, rounding)
        check(f, x * scale, scale, saturation, rounding)
    saturation = "none" if rounding.startswith("toward") else "propagate"
    check(f, points_of(f, torch.float64), torch.tensor(1.0), saturation, rounding)


@formats
@pytest.mark.parametrize("bits_dtype", GIVEN_BITS, ids=str)
def test_stochastic_with_given_bits(f, bits_dtype):
    n = GIVEN_BITS[bits_dtype]
    x, scale = points_of(f) * 0.37, torch.tensor(0.37)
    random = torch.randint(0, 1 << n, x.shape, generator=torch.Generator().manual_seed(0)).to(bits_dtype)
    for saturation in SATURATIONS:
        modes = saturation, "stochastic", random.numpy().astype(np.int64), n
        want = reference_quantize(f, x, scale, *modes)
        assert_same_bits(ag.quantize_stochastic(x, scale, random, f.name, saturation), want, x)
        assert_same_bits(aten.FORMULAS["quantize_stochastic"](x, scale, random, f.name, saturation), want, x)


@formats
def test_decode_every_code(f):
    if f.code_bytes is None:
        with pytest.raises(ValueError, match="codes have at most 16 bits"):
            decode(torch.zeros(1, dtype=torch.uint8), f)
        return
    codes = torch.arange(256**f.code_bytes).to(code_dtype(f))  # bits above the width are ignored
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for scale in map(torch.tensor, (1.0, 0.37)):
            want = reference_decode(f, codes, scale, dtype)
            for ops in (ag, aten):
                assert_same_bits(ops.decode(codes, scale, f.name, dtype), want, codes.int())


@pytest.mark.skipif(cpu.backend() == "aten", reason="needs the C kernels")
@pytest.mark.parametrize("target", ["avx2", "baseline"])
@formats
def test_other_instruction_sets(f, target):
    if cpu.select(cpu._native, target) is None:
        pytest.skip(f"needs a CPU with {target}")
    try:
        x, scale = points_of(f) * 0.37, torch.tensor(0.37)
        for modes in (("none", "nearest_ties_to_even"), ("propagate", "toward_negative")):
            assert_same_bits(cpu.quantize(x, scale, f.name, *modes), reference_quantize(f, x, scale, *modes), x)
            if f.code_bytes:
                want = reference_encode(f, x, scale, *modes)
                assert_same_bits(cpu.encode(x, scale, f.name, *modes), want, x)
                assert_same_bits(cpu.decode(want, scale, f.name), reference_decode(f, want, scale))
    finally:
        cpu.select(cpu._native, cpu.backend())


@formats
def test_identities(f):
    x = torch.cat([points_of(f), random_bit_patterns(5000)])
    x = x if f.has_nan else x[~x.isnan()]
    y = quantize(x, f)
    assert_same_bits(quantize(y, f), y, x)
    if f.code_bytes:
        codes = encode(x, f, 0.37)
        assert codes.dtype == code_dtype(f)
        assert_same_bits(decode(codes, f, 0.37), quantize(x, f, 0.37), x)
        every = torch.arange(1 << f.bits).to(code_dtype(f))
        values = decode(every, f)
        numbers = ~values.isnan()
        assert_same_bits(encode(values, f)[numbers], every[numbers])


@formats
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_input(f, dtype):
    check(f, all_inputs(dtype), torch.tensor(0.37), "none", "nearest_ties_to_even")


@pytest.mark.parametrize(("name", "dtype"), [("FP16", torch.float16), ("BF16", torch.bfloat16)])
def test_torch_casts_agree(name, dtype):
    f = resolve(dtype)
    assert f == resolve(name)
    x = torch.cat([points_of(f), random_bit_patterns(1 << 20)])
    assert_same_bits(quantize(x, f, saturation="none"), x.to(dtype).float(), x)
    codes = encode(x, f, saturation="none")
    numbers = ~x.isnan()
    assert_same_bits(codes.view(torch.int16)[numbers], x.to(dtype).view(torch.int16)[numbers], x[numbers])
    assert_same_bits(decode(all_inputs(dtype).view(torch.uint16), f, dtype=dtype), all_inputs(dtype))


def test_tf32_drops_13_bits():
    x = torch.cat([points_of(resolve("TF32")), random_bit_patterns(1 << 18)])
    bits = x.view(torch.int32)
    want = ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)
    assert_same_bits(quantize(x, "TF32", saturation="none"), torch.where(x.isnan(), x, want), x)


def test_e8m0_and_ml_dtypes():
    """ml_dtypes rounds up every tie, and all between 2^-127 and 2^-126; all else is ours with saturation none."""
    f = resolve(torch.float8_e8m0fnu)
    x = torch.cat([points_of(f), random_bit_patterns(1 << 18)])
    is_tie = x.view(torch.int32) & 0x7FFFFF == 0x400000
    is_tie |= (x > 2.0**-127) & (x < 2.0**-126)
    x = x[~is_tie]
    with np.errstate(all="ignore"):
        theirs = x.numpy().astype(ml_dtypes.float8_e8m0fnu)
    assert_same_bits(encode(x, f, saturation="none"), torch.from_numpy(theirs.view(np.uint8)), x)
    codes = torch.arange(256, dtype=torch.uint8)
    assert_same_bits(decode(codes, f), torch.from_numpy(codes.numpy().view(theirs.dtype).astype(np.float32)))


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["FP16", "BF16", "TF32", "E8M0", "UE4M3", "e5m6b15"])
def test_compiled(name, each_value_is_traced_once):
    torch._dynamo.reset()
    f, scale = resolve(name), torch.tensor(0.37)
    x = torch.cat([points_of(f), random_bit_patterns(5000)])

    def function(x, scale):
        results = [quantize(x, f, scale), quantize(x, f, scale, saturation="none", rounding="toward_positive")]
        if f.code_bytes:
            codes = encode(x, f, scale)
            results += [codes, decode(codes, f, scale)]
        return results

    for got, want in zip(torch.compile(function, fullgraph=True)(x, scale), function(x, scale)):
        assert_same_bits(got, want, x)


# --- All float32 numbers ----------------------------------------------------------------------------------------------

KERNELS = ["avx512", "avx2", "baseline", "aten", pytest.param("cuda", marks=pytest.mark.gpu)]
EXHAUSTED = [*WIDE_NAMED, resolve("e5m6b15"), resolve("e6m9b31")]
MAGNITUDES = 1 << 31


def runs_of(f, is_negative, reference_op, saturation):
    """The definition over all numbers of a sign, ordered by magnitude: where its runs of one result begin, and results.

    The definition is monotone: what it gives for the first and for the last of a run it gives for all of them.
    """
    _, midpoints = reference.grid(f)
    with np.errstate(over="ignore"):
        near = np.abs(midpoints).astype(np.float32).view(np.int32).astype(np.int64)
    begins = np.concatenate([near, near + 1, [0, 1, 0x7F800000, 0x7F800001]])  # a tie, or what is beyond it
    begins = np.unique(begins[begins < MAGNITUDES])
    ends = np.append(begins[1:], MAGNITUDES) - 1

    def results(magnitudes):
        x = torch.from_numpy((magnitudes | is_negative << 31).astype(np.uint32).view(np.float32))
        return reference_op(f, x, torch.tensor(1.0), saturation, "nearest_ties_to_even")

    assert_same_bits(results(begins), results(ends))
    return torch.from_numpy(begins), results(begins)


def chunk_of(runs, start, n):
    """The definition for the magnitudes from start to start + n."""
    begins, results = runs
    results = results.view(torch.int16) if results.dtype == torch.uint16 else results  # has no repeat_interleave
    first, last = torch.searchsorted(begins, torch.tensor([start, start + n - 1], device=begins.device), right=True)
    edges = torch.cat([begins[first - 1 : last].clamp(min=start), begins.new_tensor([start + n])])
    return results[first - 1 : last].repeat_interleave(edges.diff()).view(runs[1].dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("f", EXHAUSTED, ids=lambda f: f.name)
def test_all_float32_inputs(f, kernel):
    """2^32 inputs: quantize with the saturation that overflows, encode with the one that does not."""
    device, n = ("cuda", 1 << 27) if kernel == "cuda" else ("cpu", 1 << 17)  # what stays in cache
    if kernel in ("avx512", "avx2", "baseline") and (cpu._native is None or not cpu.select(cpu._native, kernel)):
        pytest.skip(f"needs the C kernels for {kernel}")
    ops, one = aten if kernel == "aten" else ag, torch.ones((), device=device)
    checks = [(ops.quantize, reference_quantize, "none"), (ops.encode, reference_encode, "propagate")]
    try:
        for op, reference_op, saturation in checks if f.code_bytes else checks[:1]:
            for is_negative in (0, 1):
                runs = [t.to(device) for t in runs_of(f, is_negative, reference_op, saturation)]
                for start in range(0, MAGNITUDES, n):
                    bits = torch.arange(start, start + n, dtype=torch.int64, device=device) - (is_negative << 31)
                    x = bits.to(torch.int32).view(torch.float32)
                    got, want = op(x, one, f.name, saturation), chunk_of(runs, start, n)
                    if got.is_floating_point():
                        got, want = (t.masked_fill(t.isnan(), torch.nan) for t in (got, want))
                    if not torch.equal(got.view(torch.uint8), want.view(torch.uint8)):
                        assert_same_bits(got, want, x)
    finally:
        if cpu._native is not None:
            cpu.select(cpu._native, cpu.backend())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("FP16", torch.float16), ("BF16", torch.bfloat16)])
def test_torch_casts_agree_on_all_float32_inputs(name, dtype):
    for start in range(-(1 << 31), 1 << 31, 1 << 22):
        x = torch.arange(start, start + (1 << 22), dtype=torch.int32).view(torch.float32)
        got, want = quantize(x, name, saturation="none"), x.to(dtype).float()
        if not torch.equal(got.view(torch.int32), want.view(torch.int32)):
            assert_same_bits(got, want, x)
