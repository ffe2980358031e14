"""CUDA: the bits of the definition, every layout of scale, no synchronization; without a GPU, Triton's interpreter.

Tests named ``interpreted`` run the kernels on the CPU, in the process of test_interpreter.py.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import (
    DTYPES,
    FORMATS,
    WIDE,
    all_inputs,
    assert_same_bits,
    near_ties,
    points_of,
    random_bit_patterns,
    reference_decode,
    reference_encode,
    reference_quantize,
)
from interpreter import interpreted
from samples import SAMPLES

from altgrad.quantization import E4M3, E5M2, E7M0, quantize, resolve
from ops_registry import aten, cuda, launches
from ops_registry.accumulators import resolve_accumulator
from ops_registry.arithmetic import code_dtype
from ops_registry.modes import DETERMINISTIC_ROUNDINGS, SATURATIONS

try:
    import triton
    import triton.language as tl

    from ops_registry import cuda_kernels
except ImportError:
    triton = None

altgrad = torch.ops.altgrad


@pytest.fixture
def large_blocks(monkeypatch):
    """Blocks of 64 KiB for tests of bits: the interpreter takes its time for each block, whatever its size."""
    monkeypatch.setattr(cuda, "BLOCK_BYTES", 1 << 16)


EDGES = [
    resolve(name)
    for name in ("E0M7", "E4M3", "E5M2", "E7M0", "E4M3FNUZ", "e4m0b8fnuz", "e0m7b20f", "e3m2b-60f", "e2m2b122f")
]
SCALED = "E4M3", "E5M2", "E7M0", "E4M3FNUZ"
SPECIAL_SCALES = [
    0.95,
    0.98,
    0.0,
    -0.0,
    torch.inf,
    -torch.inf,
    torch.nan,
    -0.37,
    1e-42,
    -3e-45,
    2.0**-126,
    2.0**126,
    3e38,
    1e-30,
]


def test_offsets_in_tall_tiles_fit_32_bits():
    """Two rows of 2^29 elements: the last row of a tile would begin at 15 * 2^29."""
    for rows in (2, 16):
        columns = 2**30 // rows
        _, _, (walk, rows_of_tile, _) = cuda.plan((rows, columns), (columns, 1), (columns,), (1,), 1024)
        assert not walk.is_wide
        assert not walk.is_columns or rows_of_tile * columns <= 2**30


@interpreted
@pytest.mark.usefixtures("large_blocks")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow in the arithmetic of the kernel
@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_interpreted_rounding(f):
    ties = near_ties(f)
    for rounding in DETERMINISTIC_ROUNDINGS:
        for saturation in SATURATIONS if f.name in SCALED else SATURATIONS[:1]:
            for scale in map(torch.tensor, (1.0, 0.37) if f.name in SCALED else (1.0,)):
                x, modes = ties * scale, (saturation, rounding)  # quotients at a tie or next to it
                want = reference_quantize(f, x, scale, *modes)
                assert_same_bits(cuda.KERNELS["quantize"](x, scale, f.name, *modes), want, x)
                want = reference_encode(f, x, scale, *modes)
                assert_same_bits(cuda.KERNELS["encode"](x, scale, f.name, *modes), want, x)
    codes = torch.arange(256, dtype=torch.uint8)
    assert_same_bits(cuda.KERNELS["decode"](codes, scale, f.name), aten.decode(codes, scale, f.name))


def check_wide_format(f, rounding, device):
    """Formats that are computed in float64, or whose codes are of two bytes or have no sign."""
    x, scale = torch.cat([points_of(f), random_bit_patterns(2000)]), torch.tensor(0.37)
    inputs = (x, torch.tensor(1.0)), (x * scale, scale), (points_of(f, torch.float64), scale.double())
    for (x, s), saturation in (
        itertools.product(inputs, SATURATIONS)
        if device == "cuda" and rounding == "nearest_ties_to_even"
        else zip(inputs, SATURATIONS)
    ):
        on_device, modes = (x.to(device), s.to(device), f.name), (saturation, rounding)
        assert_same_bits(cuda.KERNELS["quantize"](*on_device, *modes), reference_quantize(f, x, s, *modes), x)
        if f.code_bytes:
            assert_same_bits(cuda.KERNELS["encode"](*on_device, *modes), reference_encode(f, x, s, *modes), x)
    if f.code_bytes:
        codes = torch.arange(256**f.code_bytes).to(code_dtype(f))
        for dtype in (torch.float32, torch.float64):
            got = cuda.KERNELS["decode"](codes.to(device), scale.to(device), f.name, dtype)
            assert_same_bits(got, reference_decode(f, codes, scale, dtype), codes.int())


def two_roundings(f):
    """To nearest, and another that goes by the format."""
    return "nearest_ties_to_even", DETERMINISTIC_ROUNDINGS[1 + (WIDE + EDGES).index(f) % 5]


@interpreted
@pytest.mark.usefixtures("large_blocks")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("f", WIDE, ids=lambda f: f.name)
def test_interpreted_wide_formats(f):
    for rounding in two_roundings(f):
        check_wide_format(f, rounding, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("f", WIDE, ids=lambda f: f.name)
def test_wide_formats(f):
    for rounding in two_roundings(f):
        check_wide_format(f, rounding, "cuda")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("f", WIDE, ids=lambda f: f.name)
def test_all_roundings_of_wide_formats(f):
    for rounding in DETERMINISTIC_ROUNDINGS:
        check_wide_format(f, rounding, "cuda")


def check_special_scales(f, device):
    """Scales that split into power and significand in a way of their own, at inputs whose quotients are near ties."""
    for value in SPECIAL_SCALES:
        scale = torch.tensor(value)
        scaled = near_ties(f) * scale
        x = torch.cat([near_ties(f), scaled, scaled.nextafter(torch.tensor(torch.inf)), random_bit_patterns(2_000)])
        for saturation in SATURATIONS if f.has_nan else SATURATIONS[:1]:  # without specials they are one
            got = cuda.KERNELS["quantize"](x.to(device), scale.to(device), f.name, saturation)
            assert_same_bits(got, reference_quantize(f, x, scale, saturation), x)
            got = cuda.KERNELS["encode"](x.to(device), scale.to(device), f.name, saturation)
            assert_same_bits(got, reference_encode(f, x, scale, saturation), x)


@interpreted
@pytest.mark.usefixtures("large_blocks")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("f", EDGES, ids=lambda f: f.name)
def test_interpreted_special_scales(f):
    check_special_scales(f, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("f", EDGES, ids=lambda f: f.name)
def test_special_scales(f):
    check_special_scales(f, "cuda")


if triton is not None:

    @triton.jit
    def quotient_kernel(x_ptr, scale_ptr, out_ptr, n, block: tl.constexpr):
        i = tl.program_id(0) * block + tl.arange(0, block)
        x, scale = tl.load(x_ptr + i, i < n), tl.load(scale_ptr + i, i < n, 1.0)
        q, _, _ = cuda_kernels.quotient(x, scale, 2.0**100, True, False)
        tl.store(out_ptr + i, q, i < n)


def hard_quotients(scales):
    """(x, scale), integers of 24 bits, for each x / scale next to a midpoint h / 2 of floats, h being odd of 25 bits:

    x * 2^j = h * scale + d, j being 24 or 25, for 0 < |d| <= 16. The product with a reciprocal, corrected, is off by
    1.5 * 2^-23 ulp, which is |d| = 6 (of scale = 2^t * odd, d is a multiple of 2^t).
    """
    found = []
    for j, d in itertools.product((24, 25), (*range(-16, 0), *range(1, 17))):
        twos = (d & -d).bit_length() - 1
        for t in range(twos + 1):
            odd = scales[scales & ((2 << t) - 1) == 1 << t] >> t
            inverse = odd
            for _ in range(5):  # Newton's iteration modulo 2^64 doubles the bits that are right, 3 at first
                inverse = inverse * (2 - odd * inverse)
            first = (-(d >> t) * inverse) & ((1 << (j - t)) - 1)
            for h in (first + (i << (j - t)) for i in range(1 << (25 - j + t))):
                x = (h * (odd << t) + d) >> j
                is_one = (h > 1 << 24) & (h & 1 == 1) & (x >= 1 << 23) & (x < 1 << 24)
                found.append(torch.stack([x, odd << t])[:, is_one])
    return torch.cat(found, dim=1).float()


def check_quotients(scales):
    x, scale = hard_quotients(scales)
    out = torch.empty_like(x)
    quotient_kernel[triton.cdiv(len(x), 4096),](x, scale, out, len(x), 4096)
    assert_same_bits(out, x.cpu() / scale.cpu(), x.cpu())
    return len(x)


@interpreted
def test_interpreted_quotients():
    assert check_quotients(torch.arange(1 << 23, 1 << 24, 9973)) > 8_000


@pytest.mark.gpu
def test_quotients():
    count = 0
    for first in range(1 << 23, 1 << 24, 1 << 20):
        count += check_quotients(torch.arange(first, first + (1 << 20), device="cuda"))
    assert count > 93_000_000


@interpreted
@pytest.mark.usefixtures("large_blocks")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("f", EDGES, ids=lambda f: f.name)
def test_interpreted_dtypes_and_random_bits(f):
    x = near_ties(f, torch.float64)
    one = torch.tensor(1.0)
    for rounding in DETERMINISTIC_ROUNDINGS:
        assert_same_bits(
            cuda.KERNELS["quantize"](x, one, f.name, "none", rounding), reference_quantize(f, x, one, "none", rounding)
        )
        # The interpreter's casts to bfloat16 truncate and those from it flush subnormals: with scale 1 all are exact.
        for dtype in (torch.float16, torch.bfloat16):
            narrow = near_ties(f).to(dtype)
            narrow = narrow[(narrow == 0) | ~(narrow.abs() < torch.finfo(dtype).tiny)]
            assert_same_bits(
                cuda.KERNELS["quantize"](narrow, one, f.name, "propagate", rounding),
                reference_quantize(f, narrow, one, "propagate", rounding),
            )
    x = near_ties(f)
    for dtype in (torch.uint8, torch.int32):
        bits = torch.randint(0, 256 if dtype == torch.uint8 else 1 << 24, x.shape, dtype=dtype)
        for name in ("quantize_stochastic", "encode_stochastic"):
            arguments = x, one, bits, f.name
            assert_same_bits(cuda.KERNELS[name](*arguments), aten.FORMULAS[name](*arguments), x)


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "accumulator", ["HOPPER_FP8_FAST", "HOPPER_FP8", "HOPPER_BF16", "e5m10n", "g4f3e5m4np8", "g8f9e8m12zx8(E2M1,E2M1)"]
)
def test_interpreted_products(accumulator, monkeypatch):
    """Tiles that are not full, subnormal operands, infinities and NaN, batches."""
    from ops_registry import cuda_products, products

    monkeypatch.setattr(cuda_products, "TILE", 16)
    rule, generator = resolve_accumulator(accumulator), torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) * 2.0**-4 for shape in ((2, 17, 40), (2, 40, 5)))
    a, b = (quantize(x, f or "BF16") for x, f in zip((a, b), rule.formats, strict=True))
    if rule.scaled is None:
        a[0, 0, 0], b[1, 3, 2] = torch.nan, torch.inf if rule.formats[1] is None else torch.nan
    scales = [torch.full((2, 17, 5), 0.5), torch.full((2, 5, 5), 3.0)] if rule.scaled else [None, None]
    got = torch.empty(2, 17, 5)
    cuda_products.launch(*products.factors(a, b, rule, *scales), got, rule)
    assert_same_bits(got, altgrad.matmul(a, b, accumulator, *scales))


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_interpreted_seeds():
    seed = torch.tensor(-0x123456789ABCDEF)
    for shape in ((7, 339), (3, 2048), (17, 1024), (5, 12, 6), (1,), ()):
        x = torch.randn(shape) * 3
        scales = [torch.tensor(1.0)]
        if x.ndim > 1:
            scales += [torch.rand(*shape[:-1], 1) + 0.5, torch.rand(shape[-1]) + 0.5, torch.rand(shape) + 0.5]
        for scale in scales:
            for name in ("quantize_stochastic", "encode_stochastic", "project_stochastic"):
                arguments = x, scale, seed, "E4M3"
                assert_same_bits(cuda.KERNELS[name](*arguments), aten.FORMULAS[name](*arguments), x)
    x = x.new_ones(6, 8).t()
    assert_same_bits(
        cuda.KERNELS["quantize_stochastic"](x / 3, scales[0], seed, "E2M1"),
        aten.FORMULAS["quantize_stochastic"](x / 3, scales[0], seed, "E2M1"),
    )


def _layouts():
    """(x, scale) that reach every way in which a kernel walks along scale."""
    generator = torch.Generator().manual_seed(0)

    def x(*shape):
        return torch.randn(shape, generator=generator) * 10

    def scale(*shape):
        return torch.rand(shape, generator=generator) + 0.5

    return {
        "one": (x(5, 7), scale()),
        "odd size": (x(2049), scale(1)),
        "row": (x(3, 4096), scale(3, 1)),
        "short rows": (x(7, 33), scale(7, 1)),
        "column": (x(7, 33), scale(33)),
        "columns in tiles": (x(17, 3072), scale(3072)),
        "too few rows for a tile": (x(7, 1024), scale(1024)),
        "full": (x(7, 333), scale(7, 333)),
        "full, transposed": (x(70, 100), scale(100, 70).t()),
        "channels": (x(2, 3, 40, 50), scale(3, 1, 1)),
        "channels last": (x(2, 3, 16, 16).to(memory_format=torch.channels_last), scale(3, 1, 1)),
        "inner dimension": (x(3, 5, 64), scale(5, 1)),
        "outer and column": (x(3, 4, 1024), scale(3, 1, 1024)),
        "blocks": (x(8, 16, 32), scale(8, 16, 1)),
        "blocks in two dimensions": (x(4, 6, 8, 2, 16), scale(4, 1, 8, 1, 1)),
        "beyond the kernels": (x(2, 3, 4, 5, 6, 7), scale(2, 1, 4, 1, 6, 1)),
        "transposed": (x(64, 128).t(), scale(128, 1)),
        "strided scale": (x(6000), scale(12000)[::2]),
        "expanded scale": (x(8, 2048), scale(8, 1).expand(8, 2048)),
        "sliced": (x(10, 20)[:, ::2], scale(10)),
        "expanded": (x(10, 1).expand(10, 20), scale(20)),
        "unaligned": (x(5001)[1:], scale()),
        "unaligned scale": (x(5, 2048), scale(2049)[1:]),
        "empty": (x(0, 7), scale(7)),
    }


def check_layout(x, scale, random_bits, device):
    """The kernels for x on device against the aten formulas on the CPU, bits and strides."""
    for name, kernel in cuda.KERNELS.items():
        arguments = list(SAMPLES[name](x, scale))
        if name.endswith("_stochastic"):
            arguments[2] = random_bits
        moved = [_move(t, device) if isinstance(t, torch.Tensor) else t for t in arguments]
        if device == "cuda":  # the first call goes by Triton, a second one with the same strides by the driver alone
            kernel(*(torch.zeros_like(t) if isinstance(t, torch.Tensor) else t for t in moved))
        outputs = kernel(*moved)
        wanted = aten.KERNELS[name](*arguments)
        for got, want in zip(*[t if isinstance(t, tuple) else (t,) for t in (outputs, wanted)], strict=True):
            strides = [[stride for stride, n in zip(t.stride(), t.shape) if n != 1] for t in (got, want)]
            assert strides[0] == strides[1]
            assert_same_bits(got, want)


@pytest.mark.gpu
def test_repeated_launches(monkeypatch):
    """Without Triton wherever a call comes from: other streams, threads and modes, a graph, a gradient."""
    x, scale = torch.randn(64, 96), torch.tensor(0.37)
    want = aten.KERNELS["quantize"](x, scale, "E4M3")
    on_cuda = x.cuda(), scale.cuda()
    torch.ops.altgrad.quantize(*on_cuda, "E4M3")
    monkeypatch.setattr(launches, "start", lambda launch: pytest.fail("Triton launches"))

    def check(x=on_cuda[0]):
        got = torch.ops.altgrad.quantize(x, on_cuda[1], "E4M3")
        torch.cuda.synchronize()
        assert_same_bits(got, want)
        return got

    assert check(on_cuda[0].clone().requires_grad_()).requires_grad
    with torch.inference_mode():
        assert check().is_inference()
    with torch.cuda.stream(torch.cuda.Stream()):
        check()
    # A thread without a context of CUDA, which torch's first kernel there makes, is left to Triton.
    with ThreadPoolExecutor(4, initializer=lambda: torch.zeros(1, device="cuda")) as pool:
        for result in [pool.submit(check) for _ in range(64)]:
            result.result()
    graph, static = torch.cuda.CUDAGraph(), on_cuda[0].clone().zero_()
    with torch.cuda.graph(graph):
        out = torch.ops.altgrad.quantize(static, on_cuda[1], "E4M3")
    static.copy_(on_cuda[0])
    graph.replay()
    assert_same_bits(out, want)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*overrid")
def test_a_kernel_in_the_place_of_ours():
    """It serves where ours did not before; what ours launched is launched again (how_it_works.md)."""
    x, scale = torch.randn(8, device="cuda"), torch.ones((), device="cuda")
    before = torch.ops.altgrad.quantize(x, scale, "e3m2b5")
    with torch.library._scoped_library("altgrad", "IMPL") as theirs:
        theirs.m.impl("quantize", "CUDA", lambda x, *others: x + 1, False)  # impl itself refuses that in torch 2.11
        assert_same_bits(torch.ops.altgrad.quantize(x, scale, "e3m2b6"), x + 1)
        assert_same_bits(torch.ops.altgrad.quantize(x, scale, "e3m2b5"), before)
        assert_same_bits(torch.ops.altgrad.quantize(x.requires_grad_(), scale, "e3m2b5"), x + 1)
    assert_same_bits(torch.ops.altgrad.quantize(x, scale, "e3m2b5"), before)


def _move(tensor, device):
    """tensor on device with its strides and storage offset."""
    storage = tensor.as_strided((tensor.untyped_storage().size() // tensor.element_size(),), (1,), 0).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("layout", _layouts())
def test_interpreted_layouts(layout):
    x, scale = _layouts()[layout]
    check_layout(x, scale, torch.randint(0, 1 << 24, x.shape, dtype=torch.int32), "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", _layouts())
def test_layouts(layout):
    x, scale = _layouts()[layout]
    check_layout(x, scale, torch.randint(0, 1 << 24, x.shape, dtype=torch.int32), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("f", EDGES, ids=lambda f: f.name)
def test_a_scale_on_the_cpu(f):
    """It becomes an argument of the kernel; those on the device are in test_numerics.py."""
    ties = near_ties(f)
    for rounding in two_roundings(f):
        for saturation in SATURATIONS:
            for scale in map(torch.tensor, (1.0, 0.37) if f.name in SCALED else (1.0,)):
                x, arguments = ties * scale, (saturation, rounding)
                got = altgrad.quantize(x.cuda(), scale, f.name, *arguments)
                assert_same_bits(got, reference_quantize(f, x, scale, *arguments), x)
                got = altgrad.encode(x.cuda(), scale, f.name, *arguments)
                assert_same_bits(got, reference_encode(f, x, scale, *arguments), x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("f", EDGES, ids=lambda f: f.name)
def test_dtypes(f, dtype):
    x = near_ties(f, dtype) if dtype == torch.float64 else all_inputs(dtype)
    for scale in (1.0, 0.37, 3e-39, 1e300):  # also on the CPU, where they become numbers in float32 or fills
        scale = torch.tensor(scale, dtype=torch.float64)
        assert_same_bits(altgrad.quantize(x.cuda(), scale.cuda(), f.name), reference_quantize(f, x, scale), x)
        assert_same_bits(altgrad.encode(x.cuda(), scale, f.name), reference_encode(f, x, scale), x)
        codes = torch.arange(256, dtype=torch.uint8)
        got = altgrad.decode(codes.cuda(), scale, f.name, dtype)
        assert_same_bits(got, aten.decode(codes, scale, f.name, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("f", EDGES, ids=lambda f: f.name)
def test_random_bits(f):
    x, scale = torch.cat([near_ties(f), random_bit_patterns(50_000)]), torch.tensor(0.37)
    for dtype in (torch.uint8, torch.int32):
        bits = torch.randint(0, 256 if dtype == torch.uint8 else 1 << 24, x.shape, dtype=dtype)
        for name in ("quantize_stochastic", "encode_stochastic"):
            got = getattr(altgrad, name)(x.cuda(), scale.cuda(), bits.cuda(), f.name, "none")
            assert_same_bits(got, aten.FORMULAS[name](x, scale, bits, f.name, "none"), x)


@pytest.mark.compiles
@pytest.mark.gpu
@pytest.mark.parametrize("rounding", DETERMINISTIC_ROUNDINGS)
@pytest.mark.parametrize("scale", [6.0, 0.37, 3.141592653589793 / 1000, 2.0**-9, 1e-42])
def test_compiled(rounding, scale):
    """Inductor's kernel against Triton's, on every exponent; 3 * 2^-149 / 6 is a tie of subnormals."""
    x = torch.cat([random_bit_patterns(1 << 20), torch.arange(-4096, 4096, dtype=torch.int32).view(torch.float32)])
    x, scale = x.cuda(), torch.tensor(scale).cuda()
    for f in (E4M3, E5M2, E7M0, resolve("e2m2b124f")):
        for name in ("quantize", "encode"):
            op = getattr(altgrad, name)
            compiled = torch.compile(lambda x, scale: op(x, scale, f.name, "propagate", rounding), fullgraph=True)  # noqa: B023
            assert_same_bits(compiled(x, scale), op(x, scale, f.name, "propagate", rounding), x)
        torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (5,), (70, 33), (3, 50, 20), (2, 3, 4, 4100), (0, 4), (1 << 20,)], ids=str)
def test_the_largest_of_a_tensor(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    _, launch = cuda.amax(x.cuda(), list(range(x.ndim)))
    assert (launch is not None) == (dtype != torch.float64 and x.numel() > 0)
    cases = [x, x.mT if x.ndim > 1 else x, x[..., ::2], x * 0, -x.abs()]
    for special in (torch.inf, -torch.inf, torch.nan, -torch.nan):
        cases.append(x.clone())
        cases[-1].view(-1)[-1:] = special
    for case in cases:
        dims = list(range(case.ndim))
        for _ in range(2):  # the second time as it was launched before
            assert_same_bits(altgrad.amax(case.cuda(), dims), aten.amax(case, dims), case)


@pytest.mark.gpu
@pytest.mark.compiles
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_largest_of_a_tensor_in_compiled_code(dtype):
    """The kernel finds that of 16 bits, as eager code has them; of float32 it is fused."""
    from torch._inductor.utils import run_and_get_code

    f = lambda x: altgrad.amax(x * 0.3, [0, 1])  # noqa: E731
    x = torch.randn(70, 33, device="cuda", dtype=dtype)
    got, (code,) = run_and_get_code(torch.compile(f, fullgraph=True), x)
    assert_same_bits(got, f(x))
    assert ("altgrad.amax" in code) == (dtype != torch.float32)


@pytest.mark.gpu
def test_nothing_synchronizes():
    x, codes = torch.randn(64, 64, device="cuda"), torch.zeros(64, 64, dtype=torch.uint8, device="cuda")
    scales = torch.tensor(0.5, device="cuda"), torch.rand(64, 1, device="cuda"), torch.tensor(0.5)
    bits = torch.zeros(64, 64, dtype=torch.uint8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for scale in (*scales, *scales):  # the second time without Triton
            altgrad.quantize(x, scale, "E4M3")
            altgrad.quantize_stochastic(x, scale, bits, "E4M3")
            altgrad.encode(x, scale, "E4M3")
            altgrad.encode_stochastic(x, scale, bits, "E4M3")
            altgrad.decode(codes, scale, "E4M3")
            altgrad.dequantize(x, scale)
        with pytest.raises(RuntimeError):
            scales[0].item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_graph():
    x, scale = torch.randn(1000, device="cuda"), torch.rand(1000, device="cuda") + 0.5
    altgrad.quantize(x, scale, "E4M3")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = altgrad.quantize(x, scale, "E4M3")
    x.copy_(torch.randn(1000))
    graph.replay()
    assert_same_bits(y, aten.quantize(x.cpu(), scale.cpu(), "E4M3"))


@pytest.mark.gpu
def test_current_stream():
    """A kernel on the current stream waits for what is in it; on another one it would read x too early."""
    x, scale = torch.zeros(1 << 20, device="cuda"), torch.ones((), device="cuda")
    altgrad.quantize(x, scale, "E4M3")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(3.3)
        y = altgrad.quantize(x, scale, "E4M3")
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(y, torch.full((1 << 20,), 3.25))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    x, scale = torch.randn(5000), torch.rand(5000) + 0.5
    assert torch.cuda.current_device() == 0
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        y = altgrad.quantize(x.to(device), scale.to(device), "E4M3")
        assert y.device == torch.device(device)
        assert_same_bits(y, aten.quantize(x, scale, "E4M3"))
        assert_same_bits(
            altgrad.encode(x.to(device), torch.tensor(0.5), "E4M3"), aten.encode(x, torch.tensor(0.5), "E4M3")
        )
    with pytest.raises(RuntimeError, match="device"):
        altgrad.quantize(x.to("cuda:1"), scale.to("cuda:0"), "E4M3")


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1, 1 << 20])
def test_more_than_2_31_elements(columns):
    n = (1 << 31) + 3 * (1 << 20)
    x = torch.full((n // columns, columns), 3.3, dtype=torch.bfloat16, device="cuda")
    x[-1, -1] = 5.3
    scale = torch.ones(n // columns, 1, device="cuda") if columns > 1 else torch.ones((), device="cuda")
    y = altgrad.encode(x, scale, "E4M3")
    want = aten.encode(torch.tensor([3.3, 5.3], dtype=torch.bfloat16), torch.tensor(1.0), "E4M3").tolist()
    assert (y.view(-1)[:-1] == want[0]).all()
    assert y.view(-1)[-1] == want[1] != want[0]


class Model(torch.nn.Module):
    def forward(self, x, scale):
        codes = altgrad.encode(x, scale, "E4M3")
        # Not their sum: it would contract with the product that ends quantize, as sums of products do in Inductor.
        return torch.maximum(altgrad.quantize(x, scale, "E5M2"), altgrad.decode(codes, scale, "E4M3"))


@pytest.fixture
def example():
    x = torch.randn(128, 256, device="cuda") * 10
    return x, torch.rand(128, 1, device="cuda") + 0.5


@pytest.mark.gpu
def test_export(example, tmp_path):
    program = torch.export.export(Model(), example)
    torch.export.save(program, tmp_path / "model.pt2")
    assert_same_bits(torch.export.load(tmp_path / "model.pt2").module()(*example), Model()(*example))


@pytest.mark.compiles
@pytest.mark.gpu
def test_reduce_overhead(example):
    compiled = torch.compile(Model(), mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        assert_same_bits(compiled(*example), Model()(*example))
        example[0].add_(1)


@pytest.mark.compiles
@pytest.mark.gpu
def test_fusion_leaves_no_opaque_call():
    from torch._inductor.utils import run_and_get_code

    x, w = (torch.randn(128, 128, device="cuda", requires_grad=True) for _ in range(2))
    scale = torch.tensor(0.37, device="cuda")
    compiled = torch.compile(lambda x, w: torch.relu(altgrad.quantize(x @ w, scale, "E4M3")), fullgraph=True)
    _, codes = run_and_get_code(lambda: compiled(x, w).sum().backward())
    assert len(codes) == 2
    assert not any(
        "altgrad" in line for code in codes for line in code.splitlines() if ".run(" in line or "ops." in line
    )
    assert not any("torch.ops.altgrad" in code for code in codes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", cuda.KERNELS)
def test_opcheck_of_a_scale_on_the_cpu(name, dtype):
    """Those on the device are in test_opcheck.py."""
    x = torch.randn(12, 16, device="cuda").to(dtype)
    torch.library.opcheck(getattr(altgrad, name).default, SAMPLES[name](x, torch.tensor(0.5)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_gradients_and_strides(dtype):
    x = torch.randn(12, 16, device="cuda").to(dtype)
    for scale in (torch.rand((), device="cuda") + 0.5, torch.rand(12, 1, device="cuda") + 0.5, torch.tensor(0.5)):
        torch.library.opcheck(altgrad.quantize.default, (x.clone().requires_grad_(), scale, "E4M3"))
        torch.library.opcheck(altgrad.encode.default, (x.t().contiguous().t(), scale, "E4M3"))


@pytest.mark.gpu
def test_aten_serves_where_triton_is_missing(monkeypatch):
    x, scale = torch.randn(100).cuda(), torch.tensor(0.37).cuda()
    monkeypatch.setattr(cuda, "kernels", lambda module: None)
    assert_same_bits(altgrad.quantize(x, scale, "E4M3"), aten.quantize(x.cpu(), scale.cpu(), "E4M3"))
