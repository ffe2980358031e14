"""The operator quantize_blocks: the bits of the definition, by the formula and by every kernel.

Tests named ``interpreted`` run the Triton kernel on the CPU, in the process of test_interpreter.py.
"""

from functools import partial

import pytest
import torch
from conftest import DTYPES, assert_same_bits, random_bit_patterns, reference_quantize
from interpreter import INTERPRETS, interpreted

from altgrad.quantization import PerAxis, PerBlock, PerTensor, compute_scale, resolve
from altgrad.quantization.two_levels import Levels
from ops_registry import aten, blocks, cpu, cuda, tiles
from ops_registry.modes import DETERMINISTIC_ROUNDINGS, POWER_OF_TWO_RULES, SATURATIONS
from ops_registry.operators import IN_BLOCKS

kernels = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow in the interpreted kernel
NEAREST = "propagate", "nearest_ties_to_even"
FORMATS = [resolve(name) for name in ("E4M3", "E2M1", "E5M2", "E0M7", "E7M0", "E4M3FNUZ", "e3m2b-60f", "e2m2b100f")]
SCALINGS = [
    {},
    *({"power_of_two": rule} for rule in POWER_OF_TWO_RULES),
    *({"scale_format": name} for name in ("E4M3", "UE4M3", "E5M2", "E0M7")),
]
# shape -> block: of rows, of columns, of both; whole, uneven and larger dimensions, and those that join in memory.
BLOCKS = [
    ((7, 5, 9), (3, 1, 4)),
    ((4, 64), (1, 32)),
    ((3, 40), (1, 16)),
    ((5, 7, 64), (1, 1, 32)),
    ((37,), (5,)),
    ((4, 3000), (1, -1)),
    ((2, 3, 50), (1, -1, -1)),
    ((64, 48), (32, 1)),
    ((70, 33), (16, 1)),
    ((2, 50, 24), (1, 16, 1)),
    ((2, 64, 24), (1, 32, 1)),
    ((32, 48), (16, 16)),
    ((50, 70), (16, 16)),
    ((7, 5, 9), (1, 3, 4)),
    ((300, 200), (128, 128)),
    ((6, 8), (1, 1)),
    ((6, 1, 8), (4, 4, 100)),
    ((0, 8), (1, 4)),
    ((), ()),
    ((3, 4, 5, 6), (2, 3, 1, 4)),
]


def samples(shape, scaling=(), seed=0):
    """Numbers of many magnitudes: each row of its own, rows of zeros, of subnormals, with NaN, infinity, all bits.

    Where the tensor has a scale above those of blocks, NaN would make everything NaN: numbers that it reaches.
    """
    has_levels = "scale_format" in scaling
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if x.ndim < 2 or x.numel() == 0:
        return x
    rows = x.view(-1, x.shape[-1])
    rows *= 2.0 ** torch.randint(*((-6, 6) if has_levels else (-20, 20)), (len(rows), 1), generator=generator)
    for row, factor in zip(rows, (1.0, 0.0, 2.0**-130, -0.0, 1.0 if has_levels else 2.0**126)):
        row *= factor
    if len(rows) > 8 and not has_levels:
        rows[5, -1], rows[6, 0] = torch.nan, torch.inf
        rows[7] = random_bit_patterns(rows.shape[1], seed)
    return x


def granularity_of(block):
    if not block:
        return PerTensor()
    if -1 in block:
        return PerAxis(tuple(dim for dim, size in enumerate(block) if size == 1))
    return PerBlock(dict(enumerate(block)))


def want(x, f, block, saturation, rounding, random_bits=None, **scaling):
    """The definition: the projection of tests/reference.py by the scales of compute_scale."""
    scale = compute_scale(x, f, granularity=granularity_of(block), **scaling)
    others = () if random_bits is None else (random_bits.numpy(), 24)
    return reference_quantize(f, x, scale, saturation, rounding, *others)


def arguments(x, f, block, saturation, rounding, power_of_two=None, scale_format=None):
    g = None if scale_format is None else resolve(scale_format)
    tensor_scale = None if g is None else Levels(f, g).tensor_scale(x)
    return x, tensor_scale, f.name, saturation, rounding, list(block), power_of_two, scale_format


def laid_out(x):
    """x contiguous, permuted, sliced and expanded, each with the same shape."""
    yield x
    if x.ndim > 1:
        yield x.transpose(-1, -2).contiguous().transpose(-1, -2)
        yield x.movedim(0, -1).contiguous().movedim(-1, 0)
        yield torch.stack([x, x], -1)[..., 0]
        yield x[:1].expand(x.shape)
    if x.ndim > 2:
        yield x.transpose(0, 1).contiguous().transpose(0, 1)


def check_blocks(op, shape, block, device):
    """Every layout, with scales of each kind in turn."""
    for i, xs in enumerate(zip(laid_out(samples(shape)), laid_out(samples(shape, "scale_format")), strict=True)):
        for x, scaling in zip(xs, (SCALINGS[i % 5], SCALINGS[5 + i % 4]), strict=True):
            f = FORMATS[i % 3]
            got = op(*on(device, arguments(x, f, block, *NEAREST, **scaling)))
            assert_same_bits(got, want(x, f, block, *NEAREST, **scaling), x)
            assert got.stride() == torch.empty_like(x).stride()


def check_modes(op, f, device):
    """Every rounding with saturations in turn, and every rule of the scale."""
    for i, scaling in enumerate(SCALINGS):
        x = samples((24, 64), scaling, seed=1)
        for j, rounding in enumerate(DETERMINISTIC_ROUNDINGS if i in (0, 1, 5) else NEAREST[1:]):
            saturation = SATURATIONS[(i + j) % 3]
            got = op(*on(device, arguments(x, f, (1, 16), saturation, rounding, **scaling)))
            assert_same_bits(got, want(x, f, (1, 16), saturation, rounding, **scaling), x)


def check_random_bits(op, shape, block, device):
    """Given bits, and those of a seed, which go by the row-major order of elements whatever the layout."""
    seed, f = torch.tensor(0x123456789ABCDEF), resolve("E2M1")
    for scaling in ({"scale_format": "E4M3"}, {"power_of_two": "floor"}):
        for x in laid_out(samples(shape, scaling)):
            bits = torch.randint(1 << 24, x.shape, dtype=torch.int32)
            of_seed = aten.bits_of(seed, x.shape) & 0xFFFFFF
            for given, expected in ((bits, bits), (seed, of_seed)):
                args = list(arguments(x, f, block, "finite", "stochastic", **scaling))
                args[2:5] = given, f.name, "finite"
                got = op(*on(device, args))
                assert_same_bits(got, want(x, f, block, "finite", "stochastic", expected, **scaling), x)


def operand(x, tensor_scale, format, saturation, rounding, block, power_of_two, scale_format, headroom, dtype):
    """quantize_operand by other operators: x with headroom has the scales, and the last factor is left out."""
    largest = torch.ops.altgrad.amax(*blocks.blocked(x, block)) * headroom
    f, compute = resolve(format), largest.dtype
    scale = factor = blocks.scales(largest, tensor_scale, f, power_of_two, scale_format, True)[0]
    if tensor_scale is not None:
        factor = aten.quantize(scale / tensor_scale, torch.ones((), dtype=compute), scale_format)
    view = blocks.blocked(x, block)[0].to(compute)
    values = reference_quantize(f, view / scale, torch.ones((), dtype=compute), saturation, rounding) * factor
    return blocks.unblocked(values.to(dtype), x, block)


def by_scales(x, tensor_scale, format, saturation, rounding, block, power_of_two, scale_format):
    """quantize_blocks by the scales of the formula, for any scale of the tensor."""
    view, dims = blocks.blocked(x, block)
    largest, f = torch.ops.altgrad.amax(view, dims), resolve(format)
    scale = blocks.scales(largest, tensor_scale, f, power_of_two, scale_format, True)[0]
    return blocks.unblocked(reference_quantize(f, view, scale, saturation, rounding), x, block)


def check_16_bits(operator, dtype, block, device):
    """Blocks of many numbers, of like size by fifties; rows with NaN, infinity and the ends of exponents among them."""
    generator = torch.Generator().manual_seed(3)

    def numbers(rows):
        sizes = 2.0 ** torch.randint(-18, 1, (rows, 42), generator=generator)
        return torch.randn(rows, 2060, generator=generator) * sizes.repeat_interleave(50, 1)[:, :2060]

    x = torch.cat([numbers(260), samples((40, 2060), seed=4)]).to(dtype)
    x[100] *= 2.0 ** (14 if dtype == torch.float16 else 120)
    x[101] *= 2.0 ** (-14 if dtype == torch.float16 else -120)
    x[102:104].clamp_(min=0)
    narrow = x[:, :412].contiguous()  # a block of few columns lies beside others
    for name, given in (("E4M3", x), ("E4M3", narrow), ("E5M2", x), ("E2M1", x)):
        f = resolve(name)
        got = operator("quantize_blocks")(*on(device, arguments(given, f, block, *NEAREST)))
        assert_same_bits(got, want(given, f, block, *NEAREST), given)
    # Without the scale of the tensor, values by the scales of small rows are subnormal.
    x = (numbers(64) * 2.0 ** -torch.arange(0.0, 32.0, 0.5)[:, None]).to(dtype)
    f = resolve("e4m3b16" if dtype == torch.float16 else "e4m3b120")
    args = arguments(x, f, block, *NEAREST, scale_format="E5M2")
    got = operator("quantize_operand")(*on(device, (*args, 1.0, dtype)))
    assert_same_bits(got, operand(*args, 1.0, dtype), x)
    # The largest scale is not enough: infinite quotients.
    args = numbers(20).bfloat16() * 2.0**60, torch.tensor(2.0**-80), "E5M2", *NEAREST, list(block), None, "E4M3"
    assert_same_bits(operator("quantize_blocks")(*on(device, args)), by_scales(*args), args[0])


def check_bfloat16_in_narrow_blocks(operator, block, device):
    """All numbers to 2^-8 of the largest of a block, beside all of these: so every threshold by every scale is met."""
    width = block[1]
    bits = torch.arange(128)[:, None, None] + 0x3F80
    below = bits - torch.arange(8 * 128 // (width - 1) * (width - 1)).view(-1, width - 1)
    rows = torch.cat([bits.expand(*below.shape[:-1], 1), below], -1).flatten(1).to(torch.int16).view(torch.bfloat16)
    rows = torch.where(torch.arange(rows.shape[1]) % 3 > 0, rows, -rows)
    sizes = [1.0, 2.0**-7, 2.0**60, 2.0**-60, 2.0**126, 2.0**-126]
    rows = rows * torch.tensor(sizes).bfloat16()[torch.arange(128) % 6, None]
    generator, shape = torch.Generator().manual_seed(5), (20, rows.shape[1])
    far = torch.randn(shape, generator=generator) * 2.0 ** -torch.randint(24, shape, generator=generator)
    special = torch.zeros_like(rows[:1]), rows[:1].index_fill(1, torch.tensor(5), torch.nan)
    rows = torch.cat([rows, far.bfloat16(), *special])
    ordinary = rows[:120:6] * torch.ones(20, 1).index_fill_(0, torch.arange(0, 20, 3), 2.0**-9).bfloat16()
    # Others are about what the C kernels look up, and what they must not.
    others = ["E5M2", "FP16", "e2m1b10f", "e2m1b-10f", "e4m3b17", "e4m3b120fn"]
    for name in ("E2M1", "E4M3", *(others if device == "cpu" else ())):
        f = resolve(name)
        for scaling in SCALINGS[1:]:
            x = ordinary if "scale_format" in scaling else rows
            args = arguments(x, f, block, *NEAREST, **scaling)
            factors = [1.0, 0.9, 2.0**-100 / 3, 2.0**-118 / 3, 2.0**110] if "scale_format" in scaling else [1.0]
            for factor in factors:
                tensor_scale = None if args[1] is None else args[1] * factor
                if factor == 0.9:  # 1.890625 by it is rounded to a tie, 1.25, and is above the tie's product with it
                    fraction = torch.tensor(1.890625 / 1.25).nextafter(torch.tensor(0.0))
                    tensor_scale = torch.ldexp(fraction, torch.frexp(tensor_scale).exponent)
                given = x, tensor_scale, *args[2:]
                assert_same_bits(operator("quantize_blocks")(*on(device, given)), by_scales(*given), x)
            for headroom in (0.7, 2.0**-115):
                got = operator("quantize_operand")(*on(device, (*args, headroom, torch.bfloat16)))
                assert_same_bits(got, operand(*args, headroom, torch.bfloat16), x)


def check_every_magnitude(operator, device):
    """Blocks with each number of bfloat16 as the largest: most of their scales follow from others by powers of two."""
    largest = torch.arange(1, 0x7F81)[:, None]  # to infinity
    largest[-2] = 0x7FC0  # NaN
    below = largest - torch.randint(3 << 7, (len(largest), 15), generator=torch.Generator().manual_seed(6))
    rows = torch.cat([below.clamp(min=0), largest], 1).to(torch.int16).view(torch.bfloat16).view(-1, 1024)
    rows = torch.where(torch.arange(1024) % 3 > 0, rows, -rows)
    cases = [
        *(("E2M1", "E4M3", factor) for factor in (1.0, 0.01, 2.0**-100 / 3, 2.0**-118 / 3, 2.0**100 / 3, 2.0**110)),
        *(("E2M1", "E5M2", 1.7), ("E2M1", "E2M3", 2.0**-20 / 3), ("E2M1", "e4m0b7fn", 1.0), ("E2M1", "e6m1b31", 0.3)),
        ("E2M1", "e3m3b40fn", 2.0**60),
        ("E2M1", "e3m2b-96", 2.0**-110),  # infinite quotients
        ("e2m1b-60f", "e5m2b-40", 2.0**-90),  # infinite products
        ("e2m1b-3f", "E4M3", (2 - 2.0**-23) * 2.0**-121),  # the least scale is rounded up to a normal number
        ("e2m1b-20f", "E4M3", float.fromhex("0x1.c71c7p-122")),  # another one is
        ("e2m1b100f", "e2m3b56fn", 2.0**40),  # the product of the least scale and the largest value is 0
    ]
    for i, (name, scale_format, factor) in enumerate(cases):
        x, tensor_scale = rows[i % 3 :: 3], torch.tensor(factor)
        args = x, tensor_scale, name, *NEAREST, [1, 16], None, scale_format
        assert_same_bits(operator("quantize_blocks")(*on(device, args)), by_scales(*args), x)
        got = operator("quantize_operand")(*on(device, (*args, 1.0, torch.bfloat16)))
        assert_same_bits(got, operand(*args, 1.0, torch.bfloat16), x)


def check_results(op, dtype, device):
    """Other dtypes in and out, headroom, and values without the scale of the tensor."""
    for scaling in ({}, {"power_of_two": "even"}, {"scale_format": "E4M3"}):
        x = samples((24, 64), scaling, seed=2).to(dtype)
        if INTERPRETS:  # its casts to bfloat16 truncate, those from it flush subnormals
            x = x.float().masked_fill(x.abs() < 1e-30, 0).to(dtype)
        for out in [torch.float64] if dtype == torch.float64 else [torch.float32] if INTERPRETS else DTYPES[:3]:
            for block in ((1, 16), (8, 1), (8, 8)):
                args = arguments(x, resolve("E2M1"), block, *NEAREST, **scaling)
                got = op(*on(device, (*args, 1.0625, out)))
                assert got.dtype == out
                assert_same_bits(got, operand(*args, 1.0625, out), x)


def on(device, args):
    return [a.to(device) if isinstance(a, torch.Tensor) and a.is_contiguous() else move(a, device) for a in args]


def move(a, device):
    """A tensor on a device with its strides."""
    if not isinstance(a, torch.Tensor) or device == "cpu":
        return a
    storage = a.as_strided((a.untyped_storage().nbytes() // a.element_size(),), (1,), 0).to(device)
    return storage.as_strided(a.shape, a.stride(), a.storage_offset())


@pytest.fixture(params=["formula", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request):
    """(name -> operator, device)"""
    if request.param == "formula":
        return aten.KERNELS.__getitem__, "cpu"
    return partial(getattr, torch.ops.altgrad), request.param


@pytest.mark.parametrize(("shape", "block"), BLOCKS, ids=str)
def test_blocks(shape, block, implementation):
    check_blocks(implementation[0]("quantize_blocks"), shape, block, implementation[1])


@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_modes(f, implementation):
    check_modes(implementation[0]("quantize_blocks"), f, implementation[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [(1, -1), (128, 128), (16, 200)], ids=str)
def test_16_bits(block, dtype, implementation):
    check_16_bits(implementation[0], dtype, block, implementation[1])


@pytest.mark.parametrize("block", [(1, 16), (1, 32), (4, 16)], ids=str)
def test_bfloat16_in_narrow_blocks(block, implementation):
    check_bfloat16_in_narrow_blocks(implementation[0], block, implementation[1])


def test_scales_of_every_magnitude(implementation):
    check_every_magnitude(*implementation)


@pytest.mark.parametrize(("shape", "block"), BLOCKS[::2], ids=str)
def test_random_bits(shape, block, implementation):
    check_random_bits(implementation[0]("quantize_blocks_stochastic"), shape, block, implementation[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results(dtype, implementation):
    check_results(implementation[0]("quantize_operand"), dtype, implementation[1])


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [(1, 32), (32, 1), (1, -1), (128, 128)], ids=str)
def test_strips(block, dtype, threads):
    """More strips lie beside each other than a thread takes at once; several threads share those of a tensor."""
    shape = min(2 * block[0] + 12, 140), 9300  # with uneven blocks in the end
    x, before = samples(shape, "scale_format").to(dtype), torch.get_num_threads()
    args = arguments(x, resolve("E2M1"), block, *NEAREST, scale_format="E4M3")
    modes = *args[:2], torch.tensor(7), "E2M1", "propagate", *args[5:]
    try:
        torch.set_num_threads(threads)
        got = torch.ops.altgrad.quantize_blocks(*args), torch.ops.altgrad.quantize_blocks_stochastic(*modes)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(got[0], aten.KERNELS["quantize_blocks"](*args), x)
    assert_same_bits(got[1], aten.KERNELS["quantize_blocks_stochastic"](*modes), x)


@pytest.mark.skipif(cpu.backend() == "aten", reason="needs the C kernels")
@pytest.mark.parametrize("shape", [(64, 2100), (2, 40, 1030), (30, 64), (36, 33)], ids=str)
@pytest.mark.parametrize("size", [16, 8, 6], ids=str)
def test_seeds_down_columns(shape, size):
    """Of an operand that lies transposed: found in the kernel, or where a block or a column splits fours, before."""
    x, threads = samples(shape).mT, torch.get_num_threads()
    block = [*[1] * (x.ndim - 1), size]
    args = x, None, torch.tensor(0x123456789ABCDEF), "E2M1", "finite", block, "rceil"
    want = aten.KERNELS["quantize_blocks_stochastic"](*args)
    for target in ("avx512", "avx2", "baseline"):
        if cpu.select(cpu._native, target) is not None:
            try:
                torch.set_num_threads(3)
                got = torch.ops.altgrad.quantize_blocks_stochastic(*args)
            finally:
                torch.set_num_threads(threads)
                cpu.select(cpu._native, cpu.backend())
            assert_same_bits(got, want, x)


@pytest.mark.parametrize("block", [(1, 32), (1, 16), (32, 1)], ids=str)
@pytest.mark.parametrize(
    ("name", "scaling"),
    [("E4M3", ("rceil", None)), ("E2M1", (None, "E4M3")), ("e3m2b20f", (None, "e4m3b120f"))],  # the last loses bits
    ids=str,
)
def test_products_of_few_bits(name, scaling, block):
    """Values by scales have few bits, which bfloat16 holds until they are below its smallest numbers."""
    x = torch.randn(32, 512, generator=torch.Generator().manual_seed(0)) * 2.0 ** -torch.arange(96, 128).view(-1, 1)
    x, scale = x.to(torch.bfloat16), None if scaling[0] else torch.tensor(1.0)
    args = x, scale, name, *NEAREST, list(block), *scaling, 1.0, torch.bfloat16
    assert_same_bits(torch.ops.altgrad.quantize_operand(*args), operand(*args), x)


@pytest.mark.compiles
def test_compiled_with_a_smaller_last_block():
    """Where zeros filled it up, Inductor's C++ made NaN of its elements."""
    torch._dynamo.reset()
    x = torch.randn(20, 40)
    args = arguments(x, resolve("E4M3"), (1, 32), *NEAREST, power_of_two="rceil")
    compiled = torch.compile(lambda x: torch.ops.altgrad.quantize_blocks(x, *args[1:]), fullgraph=True)
    assert_same_bits(compiled(x), torch.ops.altgrad.quantize_blocks(*args), x)


@pytest.fixture
def served(monkeypatch):
    """The kernel, which must serve: the formula is not called."""

    def refuse(*args, **options):
        pytest.fail("the formula served")

    for name in IN_BLOCKS:
        monkeypatch.setitem(aten.KERNELS, name, refuse)


@interpreted
@kernels
@pytest.mark.parametrize(("shape", "block"), [b for b in BLOCKS if sum(size > 1 for size in b[1]) < 2], ids=str)
def test_interpreted_lines(shape, block, served):
    check_blocks(cuda.KERNELS["quantize_blocks"], shape, block, "cpu")


@interpreted
@kernels
@pytest.mark.parametrize(("shape", "block"), [b for b in BLOCKS if sum(size > 1 for size in b[1]) >= 2], ids=str)
def test_interpreted_blocks(shape, block):
    check_blocks(cuda.KERNELS["quantize_blocks"], shape, block, "cpu")


@interpreted
@kernels
@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_interpreted_modes(f, served):
    check_modes(cuda.KERNELS["quantize_blocks"], f, "cpu")


@interpreted
@kernels
@pytest.mark.parametrize(("shape", "block"), BLOCKS[:11:2], ids=str)
def test_interpreted_random_bits(shape, block):
    check_random_bits(cuda.KERNELS["quantize_blocks_stochastic"], shape, block, "cpu")


@interpreted
@kernels
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_interpreted_results(dtype):
    check_results(cuda.KERNELS["quantize_operand"], dtype, "cpu")


def test_what_the_kernels_serve():
    strides = lambda *shape: torch.empty(shape, device="meta").stride()  # noqa: E731
    for shape, block, is_served in (
        ((4096, 768), (1, 32), True),
        ((4096, 768), (32, 1), True),
        ((4096, 768), (128, 128), True),
        ((4096, 768), (1, -1), True),
        ((4096, 16384), (1, -1), True),
        ((4096, 16385), (1, -1), False),
        ((4096, 768), (-1, 1), True),
        ((32768, 768), (-1, 1), False),
        ((3, 4, 5, 6), (2, 3, 1, 4), False),
    ):
        assert (tiles.tiling_of(shape, strides(*shape), block, False) is not None) == is_served, (shape, block)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({5: [2]}, ValueError, "block must have .* for each of the 2 dimensions of x, got"),
        ({5: [1, 0]}, ValueError, "block must have a positive size, or -1"),
        ({6: "up"}, ValueError, "power_of_two must be one of floor, ceil, even, rceil or None, got 'up'"),
        ({6: "floor", 7: "E4M3"}, ValueError, "both round the scale"),
        ({7: "E4M3"}, ValueError, "give both of them or neither"),
        ({1: torch.ones(())}, ValueError, "give both of them or neither"),
        ({1: torch.ones(()), 7: "E9M9"}, ValueError, "unknown format"),
        ({1: torch.ones(2, 1), 7: "E4M3"}, ValueError, "0-d tensor of torch.float32, got 2 dimensions"),
        ({1: torch.ones((), dtype=torch.float64), 7: "E4M3"}, ValueError, "got 0 dimensions of torch.float64"),
        ({8: 0.0}, ValueError, "headroom must be positive and finite, got 0.0"),
        ({9: torch.float64}, TypeError, "dtype must be float64 for float64 x"),
        ({2: "E9M9"}, ValueError, "unknown format"),
        ({3: "wrap"}, ValueError, "saturation must be one of"),
        ({4: "stochastic"}, ValueError, "needs random_bits"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_input(change, error, message, device):
    args = [torch.ones(2, 4), None, "E4M3", *NEAREST, [1, 2], None, None, 1.0, None]
    for place, value in change.items():
        args[place] = value
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    with pytest.raises(error, match=message):
        torch.ops.altgrad.quantize_operand(*args)


def test_gradients():
    """Straight through for quantize_blocks; quantize_operand has none."""
    x, grad = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    args = torch.tensor(0.37), "E2M1", *NEAREST, [1, 4], None, "E4M3"
    f = lambda x: torch.ops.altgrad.quantize_blocks(x, *args)  # noqa: E731
    assert_same_bits(torch.autograd.grad(f(x), x, grad)[0], grad)
    assert_same_bits(torch.func.jvp(f, (x,), (grad,))[1], grad)
    assert not torch.ops.altgrad.quantize_operand(x, *args).requires_grad


@pytest.mark.parametrize("scale_dim", [None, 0])
def test_vmap(scale_dim):
    x, scales = torch.randn(3, 4, 8), torch.tensor([0.1, 1.0, 10.0])
    scale = scales[0] if scale_dim is None else scales
    bits = torch.randint(1 << 24, x.shape, dtype=torch.int32)
    seeds = torch.arange(3)

    def f(x, scale):
        return torch.ops.altgrad.quantize_blocks(x, scale, "E2M1", *NEAREST, [2, 4], None, "E4M3")

    def drawn(x, scale, bits):
        return torch.ops.altgrad.quantize_blocks_stochastic(x, scale, bits, "E2M1", "finite", [2, 4], None, "E4M3")

    of = lambda i: scale if scale_dim is None else scale[i]  # noqa: E731
    assert_same_bits(torch.vmap(f, (0, scale_dim))(x, scale), torch.stack([f(x[i], of(i)) for i in range(3)]))
    for given, dim in ((bits, 0), (seeds, 0), (seeds[1], None)):
        got = torch.vmap(drawn, (0, scale_dim, dim))(x, scale, given)
        one_by_one = [drawn(x[i], of(i), given if dim is None else given[i]) for i in range(3)]
        assert_same_bits(got, torch.stack(one_by_one))
