"""The C kernels: the bits of the definition on every instruction set, in any layout, state, thread and process."""

import concurrent.futures
import ctypes
import functools
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import processes
import pytest
import reference
import torch
from conftest import (
    DTYPES,
    FORMATS,
    GIVEN_BITS,
    NAMED,
    all_inputs,
    assert_same_bits,
    near_ties,
    random_bit_patterns,
    reference_encode,
    reference_quantize,
    reference_quantize_and_encode,
)
from samples import POINTWISE, SAMPLES

from altgrad.quantization import E0M7, resolve
from ops_registry import aten, cpu
from ops_registry.modes import DETERMINISTIC_ROUNDINGS, SATURATIONS
from ops_registry.operators import OPERATORS

ROOT = Path(__file__).parent.parent
PACKAGES = Path(cpu.__file__).parents[1]  # the checkout, or where it was installed to
needs_library = pytest.mark.skipif(cpu.backend() == "aten", reason="needs the C kernels")
ag = torch.ops.altgrad


@pytest.fixture(params=["avx512", "avx2", "baseline", "aten"])
def kernels(request):
    """The module that holds the kernels: cpu with one instruction set selected, or aten."""
    if request.param == "aten":
        yield aten
        return
    if cpu.backend() == "aten" or cpu.select(cpu._native, request.param) is None:
        pytest.skip(f"needs the C kernels and a CPU with {request.param}")
    yield cpu
    cpu.select(cpu._native, cpu.backend())


@pytest.fixture(autouse=True)
def threads(request):
    """One thread, or as many as a test's parameter says: waiting for a second one takes longer than a small tensor."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 1))
    yield
    torch.set_num_threads(before)


with_two_threads = pytest.mark.parametrize("threads", [2], indirect=True)


def inputs_of(f, dtype):
    if dtype.itemsize == 2:
        return all_inputs(dtype)[f.max_code % 11 :: 11]
    if dtype == torch.float32:
        return torch.cat([near_ties(f), random_bit_patterns(2000)])
    return torch.cat([near_ties(f, dtype), random_bit_patterns(2000).double()])


def random_bits_like(x, dtype, generator):
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, x.shape, dtype=dtype, generator=generator)


# --- Bits -------------------------------------------------------------------------------------------------------------


# Of these tests the definition takes the most of the time: the kernels come last, and share what it gave.
each_kernel_in_turn = pytest.mark.parametrize("kernels", ["avx512", "avx2", "baseline", "aten"], indirect=True)


def assert_defined(kernels, cases):
    """Cases are the name of a function, its arguments and what it must give."""
    for function, args, want in cases:
        if function == "project" and kernels is aten:
            function = "project_to"
        assert_same_bits(getattr(kernels, function)(*args), want, args[0])


@functools.lru_cache(1)
def cases_of_roundings(f):
    cases, generator = [], torch.Generator().manual_seed(f.max_code)
    for dtype in DTYPES:
        x = inputs_of(f, dtype)
        # Each of the modes meets each kind of scale in some format and dtype.
        scales = [torch.tensor(1.0), torch.tensor(0.37, dtype=torch.float64), torch.rand(x.shape, generator=generator)]
        for i, saturation in enumerate(SATURATIONS):
            for j, rounding in enumerate(DETERMINISTIC_ROUNDINGS):
                s = scales[(i + j + f.max_code) % 3]
                values, codes = reference_quantize_and_encode(f, x, s, saturation, rounding)
                args = x, s, f.name, saturation, rounding
                cases += [("quantize", args, values), ("encode", args, codes)]
            for j, (bits_dtype, n) in enumerate(GIVEN_BITS.items()):
                s = scales[(i + j + f.max_code) % 3]
                bits = random_bits_like(x, bits_dtype, generator)
                given = saturation, "stochastic", (bits & ((1 << n) - 1)).numpy(), n
                values, codes = reference_quantize_and_encode(f, x, s, *given)
                args = x, s, f.name, saturation, "stochastic", bits
                cases += [("quantize", args, values), ("encode", args, codes)]
    return cases


@each_kernel_in_turn
@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_roundings(kernels, f):
    assert_defined(kernels, cases_of_roundings(f))


SIZES_OF_SCALES = [0.37, 1.0, 1 + 2.0**-23, 2 - 2.0**-23, 2.0, 6.0, 14.0, 3e37, 2.0**126, 3e38, -0.37]
SIZES_OF_SCALES += [3e-27, 3e-28, 2.6367786132938025e-36, 5.230680811854029e-36, 9.99971104170516e-36]
SIZES_OF_SCALES += [3.4735863896200207e-37, 1.3e-38, 2.0**-126, 2.0**-149]


@functools.lru_cache(1)
def cases_of_one_scale(name, rounding):
    cases, f, ties = [], resolve(name), near_ties(resolve(name))
    tiny = torch.arange(0, 200, dtype=torch.int32).view(torch.float32)
    for scale in map(torch.tensor, SIZES_OF_SCALES):
        scaled = ties * scale
        ends = [scaled.nextafter(torch.tensor(end)) for end in (torch.inf, -torch.inf)]
        for x in (ties, scaled, *ends, tiny, -tiny):  # a quotient that is infinite does not hide those beside it
            want = reference_quantize(f, x, scale, "propagate", rounding)
            cases.append(("quantize", (x, scale, name, "propagate", rounding), want))
    return cases


@each_kernel_in_turn
@pytest.mark.parametrize("rounding", DETERMINISTIC_ROUNDINGS)
@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E7M0", "E4M3FNUZ", "e2m2b122f", "e3m2b-60f"])
def test_one_scale_of_any_size(kernels, name, rounding):
    """Of one that serves many a reciprocal may be taken: at the ends of scales, quotients and x for which it is exact.

    2^-149 k / (2 k) is a tie between zero and the least number, and 2^-149 / (2 - 2^-23) is above one.
    """
    assert_defined(kernels, cases_of_one_scale(name, rounding))


@functools.lru_cache(1)
def cases_of_16_bits(name, dtype):
    cases, f, x, one = [], resolve(name), all_inputs(dtype), torch.tensor(1.0)
    in_order = x[x.isfinite()]
    finite = in_order[torch.randperm(in_order.numel(), generator=torch.Generator().manual_seed(1))]
    random_scales = 2.0 ** (torch.rand(6, generator=torch.Generator().manual_seed(2)) * 60 - 30)
    for i, scale in enumerate(map(torch.tensor, [*SIZES_OF_SCALES, *random_scales.tolist()])):
        for saturation, numbers in (("propagate", x), (SATURATIONS[i % 3], finite[:-5])):
            want = reference_quantize(f, numbers, scale, saturation)
            cases.append(("quantize", (numbers, scale, name, saturation), want))
        want = reference_quantize(f, finite.float() / scale, one).to(dtype)
        cases.append(("project", (finite, scale, name), want))
    beyond = 2.0 ** (16 if dtype == torch.float16 else 128)  # what the bits of infinity would stand for
    large = torch.full((9000,), beyond / 64, dtype=dtype).index_fill_(0, torch.tensor([3, 5000]), -torch.inf)
    for scale, saturation in itertools.product((torch.tensor(beyond / 328), torch.tensor(beyond / 70000)), SATURATIONS):
        want = reference_quantize(f, large, scale, saturation)
        cases.append(("quantize", (large, scale, name, saturation), want))
    rows = in_order[: 6 * 10000].view(6, 10000)
    scales = torch.tensor([0.37, 1.0, 1 + 2.0**-23, 6.0, 2.0**-9 / 3, 14.0]).view(6, 1)
    cases.append(("quantize", (rows, scales, name), reference_quantize(f, rows, scales, "propagate")))
    return cases


@each_kernel_in_turn
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["E4M3", "E5M2", "e5m1b40", "E4M3FNUZ", "FP16"])
def test_16_bits_by_one_scale(kernels, name, dtype):
    """All numbers by what may look them up by their fractions: one scale of all, and one of each row.

    The least scales make subnormal results, the largest ones infinite ones, others infinite quotients.
    """
    assert_defined(kernels, cases_of_16_bits(name, dtype))


@pytest.mark.parametrize("name", ["E0M7", "E4M3", "E5M2", "E6M1", "E7M0", "E2M1", "E4M3FNUZ"])
def test_bits_at_the_threshold(kernels, name):
    """The random number that is just enough to round up, and the one below it: x + R quanta / 2^N is a value or its
    neighbour, which a sum rounded to nearest takes for the value. Given bits hit these once in 2^N."""
    f, one = resolve(name), torch.tensor(1.0)
    for dtype in DTYPES:
        x = inputs_of(f, dtype)
        x = x[x.abs() <= f.max_representable_value]
        below = reference_quantize(f, x, one, "propagate", "toward_zero").double().abs()
        a = x.double().abs()
        exponent = (torch.frexp(below).exponent - 1).clamp(min=f.min_exponent)  # that of 0 is below any
        nu = (a - below) * 2.0 ** (f.mantissa_bits - torch.where(below == 0, f.min_exponent, exponent))
        for bits_dtype, n in GIVEN_BITS.items():
            enough = 2**n - (nu * 2.0**n).floor()
            for r in (enough - 1, enough.clamp(max=2**n - 1)):
                bits = r.to(torch.int32).to(bits_dtype)
                want = reference_quantize(f, x, one, "propagate", "stochastic", r.int().numpy(), n)
                assert_same_bits(kernels.quantize(x, one, name, "propagate", "stochastic", bits), want, x)
                want = reference_encode(f, x, one, "propagate", "stochastic", r.int().numpy(), n)
                assert_same_bits(kernels.encode(x, one, name, "propagate", "stochastic", bits), want, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E7M0", "E4M3FNUZ", "e4m0b8fn", "e2m2b1fnuz"])
def test_one_special_among_many(kernels, name, dtype):
    """The loops do without NaN and infinity, and a chunk of 1024 elements that has one is done again."""
    f = resolve(name)
    x = torch.linspace(-70000, 70000, 3000, dtype=dtype)
    for scale in (torch.tensor(0.37, dtype=dtype), torch.rand(3000, dtype=dtype) + 0.5):
        for i in (0, 1023, 1024, 2047, 2999):
            for special in (torch.nan, -torch.nan, torch.inf, -torch.inf):
                changed = x.index_fill(0, torch.tensor(i), special)
                for saturation in ("propagate", "finite"):
                    want = reference_quantize(f, changed, scale, saturation)
                    assert_same_bits(kernels.quantize(changed, scale, name, saturation), want, changed)
                    want = reference_encode(f, changed, scale, saturation)
                    assert_same_bits(kernels.encode(changed, scale, name, saturation), want, changed)
            for special in (f.max_code + 1, 0x7C, 0x7F, 0x80, 0xFC, 0xFF):
                codes = (torch.arange(3000) % f.max_code).byte().index_fill(0, torch.tensor(i), special)
                want = torch.from_numpy(reference.decode(f, codes.numpy(), scale.numpy()))
                assert_same_bits(kernels.decode(codes, scale, name, dtype), want, codes)


@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_decode(kernels, f):
    codes = torch.arange(256, dtype=torch.uint8)
    for dtype in DTYPES:
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        for scale in (torch.tensor(1.0), torch.tensor(0.37, dtype=torch.float16), torch.rand(256) * 1e-30):
            want = torch.from_numpy(reference.decode(f, codes.numpy(), scale.to(compute).numpy())).to(dtype)
            assert_same_bits(kernels.decode(codes, scale, f.name, dtype), want, codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(kernels, dtype):
    x = inputs_of(E0M7, dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for scale in (torch.tensor(0.37), torch.rand(x.shape, dtype=torch.float64), torch.tensor(1e5)):
        want = (x.to(compute) * scale.to(compute)).to(dtype)
        assert_same_bits(kernels.dequantize(x, scale), want, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_conversions(kernels, dtype):
    """All 16-bit numbers go in and come out; float32 numbers next to every tie of theirs are rounded to even."""
    x = all_inputs(dtype)
    one = torch.tensor(1.0)
    assert_same_bits(kernels.dequantize(x, one), x)
    assert_same_bits(kernels.dequantize(x, torch.tensor(1 / 3)), (x.float() * torch.tensor(1 / 3)).to(dtype), x)
    # value(64) of e7m0b64f is 1, so decode gives float32 scales in the narrow dtype.
    codes = torch.full((1 << 18,), 64, dtype=torch.uint8)
    scale = torch.cat([x.float(), random_bit_patterns(3 << 16)]).abs()
    ties = (scale.view(torch.int32) + (0x1000 if dtype == torch.float16 else 0x8000)).view(torch.float32)
    for s in (scale, ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(torch.inf))):
        assert_same_bits(kernels.decode(codes, s, "e7m0b64f", dtype), s.to(dtype), s)


@pytest.mark.parametrize(
    ("enumeration", "names"),
    [
        ("operation", cpu._OPERATIONS),
        ("dtype", [str(dtype).removeprefix("torch.") for dtype in cpu._DTYPES]),
        ("rounding", cpu._ROUNDINGS),
    ],
)
def test_numbers_are_those_of_plan_h(enumeration, names):
    """cpu.py numbers what plan.h enumerates."""
    header = (Path(cpu.__file__).parent / "csrc/plan.h").read_text()
    body = re.search(rf"enum {enumeration} {{(.*?)}};", header, re.S)[1]
    assert [name.strip().lower() for name in body.split(",")] == list(names)


@needs_library
def test_sizes_and_guards(kernels):
    """No tail is wrong, no alignment matters, and nothing outside the output is written."""
    if kernels is aten:
        pytest.skip("aten writes no buffer of ours")
    source = torch.linspace(-20, 20, 96)
    source[40:48] = torch.nan  # the C loops run twice over what has them
    one = torch.tensor(0.5)
    for dtype in DTYPES:
        for n in range(71):
            offset = n % 7
            x = source.to(dtype)[offset : offset + n]
            for operation, out_dtype, want in (
                ("quantize", dtype, lambda x: aten.quantize(x, one, "E3M4")),
                ("encode", torch.uint8, lambda x: aten.encode(x, one, "E3M4")),
            ):
                guarded = torch.full((n + 64,), 77, dtype=out_dtype)
                out = guarded[offset + 1 : offset + 1 + n]
                cpu._run(cpu._plan(operation, dtype, torch.float32, out_dtype, "E3M4"), out, x, one)
                assert_same_bits(out, want(x), x)
                outside = torch.cat([guarded[: offset + 1], guarded[offset + 1 + n :]])
                assert (outside == 77).all()
            codes = torch.arange(n + offset, dtype=torch.uint8)[offset:]
            assert_same_bits(cpu.decode(codes, one, "E3M4", dtype), aten.decode(codes, one, "E3M4", dtype))


@needs_library
@with_two_threads
@pytest.mark.parametrize("dtype", DTYPES)
def test_amax(kernels, threads, dtype):
    torch.manual_seed(0)
    for shape, dims in [
        ((3, 1), [1]),
        ((1000, 7), [1]),
        ((5000, 16), [1]),
        ((70, 33), [0]),
        ((2, 100_000), [1]),
        ((4, 100, 6, 8), [0, 3]),
        ((4, 100, 6, 8), [2, 3]),
        ((40, 30), [0, 1]),
        ((1, 0), [1]),
        ((0, 16), [1]),
        ((0, 16), [0]),
    ]:
        x = (torch.randn(shape) * 10).to(dtype)
        x[1::5] = -0.0
        x[::7, ::3] = -torch.inf
        x[::11, ::5] = torch.nan
        want = x.abs().amax(dims, keepdim=True) if x.numel() else x.sum(dims, keepdim=True)
        want = want.to(torch.float64 if dtype == torch.float64 else torch.float32)
        for view in (x, x.transpose(0, 1).contiguous().transpose(0, 1), torch._neg_view(-x)):
            assert_same_bits(kernels.amax(view.resolve_neg(), dims), want)
            got = ag.amax(view, dims)
            assert_same_bits(got, want)
            assert got.is_contiguous()


def random_view(rng, shape):
    """A view of the shape: permuted, sliced or expanded, dense or not."""
    order = rng.sample(range(len(shape)), len(shape))
    steps = [rng.choice([1, 1, 1, 2]) for _ in shape]
    base = torch.randn([1 if rng.random() < 0.1 else shape[d] * steps[d] for d in order])
    x = base.permute([order.index(d) for d in range(len(shape))])
    return x[tuple(slice(None, None, step) for step in steps)].expand(shape)


def check_call(x, scale, bits):
    """Every kernel against its aten formula, bits and strides; random bits of a layout of their own."""
    for name in set(POINTWISE) & set(cpu.KERNELS):
        kernel, (first, *others) = cpu.KERNELS[name], SAMPLES[name](x, scale)
        if OPERATORS[name].tensors == 3:
            others[1] = bits
        got = kernel(first, *others)
        assert got.stride() == torch.empty_like(first).stride()
        assert_same_bits(got, aten.FORMULAS[name](first, *others), first)


@needs_library
@pytest.mark.parametrize("seed", range(20))
def test_random_layouts(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(10):
        shape = [rng.choice([1, 2, 3, 5, 32, 67]) for _ in range(rng.randint(0, 4))]
        while torch.Size(shape).numel() > 50_000:
            shape.pop()
        x = random_view(rng, shape).to(rng.choice(DTYPES))
        scale = random_view(rng, [rng.choice([1, n]) for n in shape][rng.randint(0, len(shape)) :]).abs() + 0.1
        bits = (random_view(rng, shape) * 1e9).to(rng.choice([torch.int32, torch.uint8]))
        check_call(x, scale.to(rng.choice(DTYPES)), bits)


SCALES = {
    "scalar": lambda n, m: torch.tensor(0.37),
    "one element": lambda n, m: torch.full((1, 1), 0.37),
    "columns": lambda n, m: torch.rand(m) + 0.5,
    "rows": lambda n, m: torch.rand(n, 1) + 0.5,
    "blocks of 32": lambda n, m: (torch.rand(n, m // 32, 1) + 0.5).expand(n, m // 32, 32).reshape(n, m),
    "every element": lambda n, m: torch.rand(n, m) + 0.5,
}


@needs_library
@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("shape", [(2, 96), (5, 192), (70, 1024), (3, 7_000), (300, 64)])
def test_scale_layouts(name, shape):
    """Rows below, at and above the size of a chunk."""
    torch.manual_seed(0)
    n, m = shape
    m -= m % 32
    bits = torch.randint(0, 1 << 24, (n, m), dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(n, m, dtype=dtype)
        scale = SCALES[name](n, m)
        check_call(x, scale, bits)
        check_call(x.t().contiguous().t(), scale, bits)  # in memory, rows and columns change places


@needs_library
@with_two_threads
def test_blocks_and_channels(threads):
    """Enough elements for two threads."""
    torch.manual_seed(0)
    for width in (16, 32, 48, 50):
        x = torch.randn(63, 41, width)  # the second thread begins within a block
        check_call(x, torch.rand(63, 41, 1) + 0.5, torch.randint(0, 1 << 24, x.shape, dtype=torch.int32))
        check_call(x, torch.rand(41, 1) + 0.5, torch.randint(0, 1 << 24, x.shape, dtype=torch.int32))
    images = torch.randn(5, 3, 61, 67)  # the second thread begins within a channel
    bits = torch.randint(0, 1 << 24, images.shape, dtype=torch.int32)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        check_call(images.to(memory_format=memory_format), torch.rand(3, 1, 1) + 0.5, bits)


# --- State, threads and processes -------------------------------------------------------------------------------------

LARGE = 300_000  # elements: more than a thread's worth


def large_case():
    x = random_bit_patterns(LARGE) * 1e-30
    scale = torch.rand(LARGE) * 1e-36 + 1e-38
    f = E0M7
    return x, scale, f, reference_quantize(f, x, scale)


@needs_library
@with_two_threads
def test_flush_to_zero(threads):
    """A caller who flushes subnormals gets the same results, on every thread, and goes on flushing."""
    x, scale, f, want = large_case()
    assert torch.set_flush_denormal(True)
    try:
        got = ag.quantize(x, scale, f.name)
        codes = ag.encode(x[:100], scale[:100], f.name)
        still_flushes = (torch.tensor([1e-40]) * 1).item() == 0
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(got, want, x)
    assert_same_bits(codes, reference_encode(f, x[:100], scale[:100]), x[:100])
    assert still_flushes


@needs_library
@pytest.mark.skipif(cpu.backend() == "baseline", reason="the number of the mode is that of x86")
def test_rounding_mode_of_the_process():
    libm = ctypes.CDLL(None)
    upward = 0x800
    x, scale, f, want = large_case()
    x, scale, want = x[:1000], scale[:1000], want[:1000]
    assert libm.fesetround(upward) == 0
    try:
        got = ag.quantize(x, scale, f.name)
        mode = libm.fegetround()
    finally:
        libm.fesetround(0)
    assert mode == upward
    assert_same_bits(got, want, x)


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_number_of_threads(threads):
    x, scale, f, want = large_case()
    assert_same_bits(ag.quantize(x, scale, f.name), want, x)


@needs_library
@with_two_threads
def test_concurrent_calls(threads):
    cases = [(f, torch.randn(40_000 + i) * 3, torch.tensor(0.1 + i)) for i, f in enumerate(NAMED)]
    wants = [aten.quantize(x, scale, f.name) for f, x, scale in cases]

    def call(i):
        f, x, scale = cases[i % len(cases)]
        return ag.quantize(x, scale, f.name)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i, got in enumerate(pool.map(call, range(8 * len(cases)))):
            assert_same_bits(got, wants[i % len(cases)])


@needs_library
def test_lock_of_the_interpreter_is_released():
    """Another thread counts during a call that is far shorter than the interval at which threads must take turns."""
    x, one = torch.randn(1 << 23), torch.tensor(1.0)
    bits = torch.zeros(x.shape, dtype=torch.int32)
    out = torch.empty_like(x)
    plan = cpu._plan("quantize", x.dtype, x.dtype, x.dtype, "E4M3", "finite", "stochastic")
    counted, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            counted[0] += 1

    thread, interval = threading.Thread(target=count), sys.getswitchinterval()
    thread.start()
    sys.setswitchinterval(0.5)
    try:
        time.sleep(0.001)  # this thread's turn begins
        before = counted[0]
        cpu._run(plan, out, x, one, bits)
        after = counted[0]
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert after > before


def run_python(code, **environment):
    result = processes.run(code, cwd=ROOT / "tests", env={**os.environ, "PYTHONPATH": str(PACKAGES), **environment})
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


@pytest.mark.compiles
@needs_library
def test_worker_process_after_fork():
    """A DataLoader's worker is forked from a process whose threads have run, and has one thread."""
    code = """
import torch, altgrad
from ops_registry import aten
x = torch.randn(200_000)
want = aten.quantize(x, torch.tensor(0.5), "E4M3")
torch.set_num_threads(2)
assert torch.equal(torch.ops.altgrad.quantize(x, torch.tensor(0.5), "E4M3"), want)

class Quantized(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        assert torch.get_num_threads() == 1
        return torch.ops.altgrad.quantize(x, torch.tensor(0.5), "E4M3")

for batch in torch.utils.data.DataLoader(Quantized(), num_workers=2, multiprocessing_context="fork", timeout=60):
    assert torch.equal(batch[0], want)
print("done")
"""
    assert run_python(code) == "done"


@pytest.mark.compiles
@needs_library
def test_memory():
    """Nothing the size of the input but the output: 32 MiB for 8 Mi numbers, also with a scale for each row."""
    code = """
import resource, torch, altgrad
x, scale = torch.ones(4096, 2048), torch.ones(4096, 1)
torch.ops.altgrad.quantize(x[:2], scale[:2], "E4M3")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
y = torch.ops.altgrad.quantize(x, scale, "E4M3")
print(peak() - before)
"""
    # Not a fork, which has the pages of its parent.
    environment = os.environ | {"PYTHONPATH": str(PACKAGES)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert int(done.stdout) <= 34, done.stderr


# --- Choice of the backend, and the build -----------------------------------------------------------------------------

BACKEND = "import altgrad, ops_registry.cpu; print(ops_registry.cpu.backend())"


@pytest.mark.compiles
def test_aten_serves_without_the_library():
    code = BACKEND + "; import torch; print(torch.ops.altgrad.encode(torch.ones(2), torch.ones(()), 'E5M2').tolist())"
    assert run_python(code, ALTGRAD_CPU_TARGET="aten").split("\n") == ["aten", "[60, 60]"]


@pytest.mark.compiles
@needs_library
@pytest.mark.parametrize("target", ["avx512", "avx2", "baseline"])
def test_target_of_the_environment(target):
    if cpu.select(cpu._native, target) is None:
        pytest.skip(f"needs a CPU with {target}")
    cpu.select(cpu._native, cpu.backend())
    assert run_python(BACKEND, ALTGRAD_CPU_TARGET=target) == target


@pytest.mark.compiles
def test_unknown_target_is_refused():
    with pytest.raises(AssertionError, match="ImportError: ALTGRAD_CPU_TARGET=sse9"):
        run_python(BACKEND, ALTGRAD_CPU_TARGET="sse9")
    assert run_python(BACKEND, ALTGRAD_CPU_TARGET="") == cpu.backend()


def build(directory, *args, **environment):
    """A copy of the package in directory, built in place."""
    for package in ("ops_registry", "altgrad"):
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "setup.py", directory)
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace", *args],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.compiles
def test_build_without_a_compiler(tmp_path):
    result = build(tmp_path, CC="/no/such/compiler")
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.glob("ops_registry/*.so"))
    assert run_python(BACKEND, PYTHONPATH=str(tmp_path)) == "aten"
    call = (
        "import torch, altgrad; x = torch.ones(2); torch.ops.altgrad.dequantize(torch.ops.altgrad.dequantize(x, x), x)"
    )
    for files, advice in (([], "no C compiler was found"), (["pyproject.toml"], "it is a source tree")):
        for name in files:
            (tmp_path / name).touch()
        for target, warnings in (("", 1), ("aten", 0)):
            environment = {"PYTHONPATH": str(tmp_path), "ALTGRAD_CPU_TARGET": target}
            done = processes.run(call, env=os.environ | environment)
            assert done.returncode == 0, done.stderr
            assert done.stderr.count("without its C kernels") == done.stderr.count(advice) == warnings


@pytest.mark.compiles
@needs_library
def test_library_of_other_sources_is_refused(tmp_path):
    shutil.copytree(PACKAGES / "ops_registry", tmp_path / "ops_registry")
    shutil.copytree(PACKAGES / "altgrad", tmp_path / "altgrad")
    with (tmp_path / "ops_registry/csrc/round.h").open("a") as source:
        source.write("\n")
    with pytest.raises(AssertionError, match="built from other sources"):
        run_python(BACKEND, PYTHONPATH=str(tmp_path))


# --- All float32 numbers ----------------------------------------------------------------------------------------------


def steps_of(f):
    """The definition as a step function: the bits of magnitudes where steps begin, and a magnitude of each step."""
    values, midpoints = (np.float32(numbers) for numbers in reference.grid(f))
    largest = len(values) - 2  # its step goes on to infinity
    begins = midpoints[:largest].view(np.int32) + (np.arange(largest) % 2 == 0)  # the tie above an even code is its own
    begins = np.append(begins, [0x7F800000, 0x7F800001])
    return torch.from_numpy(begins.astype(np.int32)), np.append(values[: largest + 1], np.float32([np.inf, np.nan]))


@needs_library
@pytest.mark.slow
@with_two_threads
@pytest.mark.parametrize("f", NAMED, ids=lambda f: f.name)
def test_all_float32(f, threads):
    """All 2^32 inputs on every instruction set: the definition."""
    one, n = torch.tensor(1.0), 1 << 24
    begins, magnitudes = steps_of(f)
    signed = {False: torch.from_numpy(magnitudes), True: torch.from_numpy(-magnitudes)}
    values = {sign: reference_quantize(f, x, one) for sign, x in signed.items()}
    codes = {sign: reference_encode(f, x, one) for sign, x in signed.items()}
    targets = [t for t in ("avx512", "avx2", "baseline") if cpu.select(cpu._native, t)]
    try:
        for start in range(-(1 << 31), 1 << 31, n):
            x = torch.arange(start, start + n, dtype=torch.int32).view(torch.float32)
            step = torch.bucketize(x.view(torch.int32) & 0x7FFFFFFF, begins, right=True, out_int32=True)
            want, want_codes = values[start < 0][step], codes[start < 0][step]
            for target in targets:
                cpu.select(cpu._native, target)
                got = cpu.quantize(x, one, f.name)
                same = (got.view(torch.int32) == want.view(torch.int32)) | (got.isnan() & x.isnan())
                assert same.all(), (target, x[~same][:5])
                same = cpu.encode(x, one, f.name) == want_codes
                assert same.all(), (target, x[~same][:5])
    finally:
        cpu.select(cpu._native, cpu.backend())
