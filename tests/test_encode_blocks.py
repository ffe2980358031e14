"""The operator encode_blocks: the codes and scales of the definition, by the formula and by every kernel.

Tests named ``interpreted`` run the Triton kernel on the CPU, in the process of test_interpreter.py.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import DTYPES, assert_same_bits, reference_encode
from interpreter import INTERPRETS, interpreted
from test_quantize_blocks import BLOCKS, FORMATS, NEAREST, SCALINGS, arguments, granularity_of, laid_out, on, samples

from altgrad.quantization import (
    MXFP4,
    MXFP6_E3M2,
    MXFP8_E4M3,
    NVFP4,
    PerBlock,
    compute_scale,
    decode,
    decode_blocks,
    encode_blocks,
    quantize_blocks,
    resolve,
)
from ops_registry import aten, cpu, cuda, packing, sharding
from ops_registry.modes import DETERMINISTIC_ROUNDINGS, SATURATIONS

ag = torch.ops.altgrad
kernels = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow in the interpreted kernel
SHAPES = [(shape, block) for shape, block in BLOCKS if shape]
# Rows that are whole bytes and not, blocks of 8 elements and not, strips that begin within a byte.
SHAPES += [((6, 2000), (1, 3)), ((3, 7, 24), (1, 1, 24)), ((2, 4, 12), (1, 4, 4)), ((16, 1040), (8, 8))]


def check(op, x, f, block, modes, device, random_bits=None, **scaling):
    """Codes against tests/reference.py by the scales of compute_scale, and scales against these."""
    args = list(arguments(x, f, block, *modes, **scaling))
    given = () if random_bits is None else (random_bits.numpy(), 24)
    if random_bits is not None:
        args[2:5] = random_bits, f.name, modes[0]
    codes, scales = op(*on(device, args))
    scale = compute_scale(x, f, granularity=granularity_of(block), **scaling)
    want = reference_encode(f, x, scale, *modes, *given)
    assert_same_bits(codes, packing.pack(want.contiguous(), f.bits), None)
    of_scales = "E8M0" if "power_of_two" in scaling else scaling.get("scale_format")
    if of_scales is not None:
        scales = decode(scales.cpu(), of_scales, 1.0 if args[1] is None else args[1], dtype=scale.dtype)
    assert_same_bits(scales, compute_scale(x, f, granularity=granularity_of(block), compact=True, **scaling))


def check_blocks(op, shape, block, device):
    """Every layout, with scales of each kind and widths of codes in turn."""
    for i, xs in enumerate(zip(laid_out(samples(shape)), laid_out(samples(shape, "scale_format")), strict=True)):
        for j, (x, scaling) in enumerate(zip(xs, (SCALINGS[i % 5], SCALINGS[5 + i % 4]), strict=True)):
            check(op, x, (*FORMATS[:4], resolve("E3M2"))[(2 * i + j) % 5], block, NEAREST, device, **scaling)


def check_modes(op, f, device):
    for i, scaling in enumerate(SCALINGS):
        x = samples((24, 64), scaling, seed=1)
        for j, rounding in enumerate(DETERMINISTIC_ROUNDINGS if i in (0, 1, 5) else NEAREST[1:]):
            check(op, x, f, (1, 16), (SATURATIONS[(i + j) % 3], rounding), device, **scaling)


def check_random_bits(op, shape, block, device):
    """Given bits, and a seed's, which count elements in row-major order."""
    seed, f = torch.tensor(0x123456789ABCDEF), resolve("E2M1")
    for scaling in ({"scale_format": "E4M3"}, {"power_of_two": "floor"}):
        for x in laid_out(samples(shape, scaling)):
            bits = torch.randint(1 << 24, x.shape, dtype=torch.int32)
            check(op, x, f, block, ("finite", "stochastic"), device, bits, **scaling)
            args = list(arguments(x, f, block, "finite", "stochastic", **scaling))
            args[2:5] = aten.bits_of(seed, x.shape).int() & 0xFFFFFF, f.name, "finite"
            want = aten.KERNELS["encode_blocks_stochastic"](*args)
            args[2] = seed
            for got, wanted in zip(op(*on(device, args)), want, strict=True):
                assert_same_bits(got, wanted)


def check_dtypes(op, dtype, device):
    for block, scaling in (((1, 16), {}), ((8, 1), {"power_of_two": "even"}), ((8, 8), {"scale_format": "E4M3"})):
        x = samples((24, 64), scaling, seed=2).to(dtype)
        if INTERPRETS:  # its casts from bfloat16 flush subnormals
            x = x.float().masked_fill(x.abs() < 1e-30, 0).to(dtype)
        check(op, x, resolve("E2M1"), block, NEAREST, device, **scaling)


@pytest.fixture(params=["formula", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request):
    """(name -> operator, device)"""
    if request.param == "formula":
        return aten.KERNELS.__getitem__, "cpu"
    return partial(getattr, ag), request.param


@pytest.mark.parametrize(("shape", "block"), SHAPES, ids=str)
def test_blocks(shape, block, implementation):
    check_blocks(implementation[0]("encode_blocks"), shape, block, implementation[1])


@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_modes(f, implementation):
    check_modes(implementation[0]("encode_blocks"), f, implementation[1])


@pytest.mark.parametrize(("shape", "block"), SHAPES[::3], ids=str)
def test_random_bits(shape, block, implementation):
    check_random_bits(implementation[0]("encode_blocks_stochastic"), shape, block, implementation[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, implementation):
    check_dtypes(implementation[0]("encode_blocks"), dtype, implementation[1])


@pytest.mark.parametrize("block", [(1, 32), (32, 1), (1, -1), (128, 128)], ids=str)
def test_threads(block):
    """Several threads share the strips of a tensor, and the bytes of a row."""
    x, threads = samples((140, 9304), "scale_format"), torch.get_num_threads()
    args = arguments(x, resolve("E2M1"), block, *NEAREST, scale_format="E4M3")
    try:
        torch.set_num_threads(4)
        outputs = ag.encode_blocks(*args)
    finally:
        torch.set_num_threads(threads)
    for got, want in zip(outputs, aten.KERNELS["encode_blocks"](*args), strict=True):
        assert_same_bits(got, want)


def test_a_long_row():
    """Of more elements than there is room for a scale of each."""
    args = arguments(samples((2, 100_000)), resolve("E4M3"), (1, -1), *NEAREST)
    for got, want in zip(ag.encode_blocks(*args), aten.KERNELS["encode_blocks"](*args), strict=True):
        assert_same_bits(got, want)


@pytest.mark.skipif(cpu.backend() == "aten", reason="needs the C kernels")
@pytest.mark.parametrize("options", [MXFP4, MXFP6_E3M2, MXFP8_E4M3, NVFP4], ids=["MXFP4", "MXFP6", "MXFP8", "NVFP4"])
def test_one_pass(options, monkeypatch):
    """Neither the formula nor an operator on what another wrote."""
    x = torch.randn(6, 4096)
    want = quantize_blocks(x, **options)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "pack", lambda *args: pytest.fail("packed in a second pass"))
        patch.setattr(cpu.blocks, "encode_blocks", lambda *args: pytest.fail("the formula served"))
        blocks = encode_blocks(x, **options)
    assert_same_bits(decode_blocks(blocks), want, x)


def test_scales_below_the_smallest_normal():
    """Scales whose products with that of the tensor are subnormal are stored as they are, not as what they became."""
    for exponent in (-120, -130, -140):
        x = torch.randn(8, 64) * 2.0 ** torch.arange(exponent, exponent + 8)[:, None]
        blocks = encode_blocks(x, **NVFP4)
        assert_same_bits(decode_blocks(blocks), quantize_blocks(x, **NVFP4), x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_input(device):
    x = torch.ones(2, 4, device=device)
    args = None, "E4M3", *NEAREST
    for change, match in (
        ((torch.ones((), device=device), *args, []), "x must have a dimension, along which codes are packed"),
        ((x, None, "FP16", *NEAREST, [1, 2]), "at most 8 bits to be packed, got FP16 of 16"),
        ((x, *args, [2]), "block must have .* for each of the 2 dimensions of x, got"),
        ((x, *args, [1, 2], "up"), "power_of_two must be one of floor"),
        ((x, *args, [1, 2], None, "E4M3"), "give both of them or neither"),
    ):
        with pytest.raises(ValueError, match=match):
            ag.encode_blocks(*change)
    with pytest.raises(ValueError, match="x must have a dimension"):
        torch.vmap(lambda x: ag.encode_blocks(x, *args, []))(x[0])


def test_a_scale_of_the_tensor_is_one():
    blocks = encode_blocks(torch.randn(3, 40), **NVFP4)
    with pytest.raises(ValueError, match=r"tensor_scale must be 0-d, got the shape \(3,\)"):
        decode_blocks(blocks._replace(tensor_scale=torch.tensor([1.0, 2.0, 4.0])))
    with pytest.raises(TypeError, match="tensor_scale must be a tensor"):
        decode_blocks(blocks._replace(tensor_scale=3.0))


def test_no_gradients():
    x = torch.randn(3, 8, requires_grad=True)
    args = None, "E2M1", *NEAREST, [1, 4]
    assert not any(t.requires_grad for t in ag.encode_blocks(x, *args))
    loss = lambda x: (x * decode_blocks(encode_blocks(x, **MXFP4))).sum()  # noqa: E731
    want = decode_blocks(encode_blocks(x, **MXFP4))
    assert_same_bits(torch.func.grad(loss)(x), want)
    assert_same_bits(torch.autograd.grad(loss(x), x)[0], want)
    _, tangent = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    assert torch.allclose(tangent, want.sum())


@pytest.mark.parametrize("scale_dim", [None, 0])
def test_vmap(scale_dim):
    x, scales = torch.randn(3, 4, 8), torch.tensor([0.1, 1.0, 10.0])
    scale = scales[0] if scale_dim is None else scales
    seeds = torch.arange(3)

    def f(x, scale):
        return ag.encode_blocks(x, scale, "E2M1", *NEAREST, [2, 4], None, "E4M3")

    def drawn(x, scale, bits):
        return ag.encode_blocks_stochastic(x, scale, bits, "E2M1", "finite", [2, 4], None, "E4M3")

    of = lambda i: scale if scale_dim is None else scale[i]  # noqa: E731
    for got, want in (
        (torch.vmap(f, (0, scale_dim))(x, scale), [f(x[i], of(i)) for i in range(3)]),
        (torch.vmap(f, (2, scale_dim))(x.movedim(0, 2), scale), [f(x[i], of(i)) for i in range(3)]),
        (torch.vmap(drawn, (0, scale_dim, 0))(x, scale, seeds), [drawn(x[i], of(i), seeds[i]) for i in range(3)]),
    ):
        for stacked, parts in zip(got, zip(*want), strict=True):
            assert_same_bits(stacked, torch.stack(parts))


class Stored(torch.nn.Module):
    def forward(self, x):
        return encode_blocks(x, **NVFP4)[:3]


def test_export_keeps_the_operators():
    x = torch.randn(3, 40)
    exported = torch.export.export(Stored(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    nodes = [str(node.target) for node in exported.graph.nodes if "altgrad" in str(node.target)]
    assert nodes == [f"altgrad.{name}.default" for name in ("amax", "as_scale", "encode_blocks")]
    more = torch.randn(5, 40)
    for got, want in zip(exported.module()(more), Stored()(more), strict=True):
        assert_same_bits(got, want)


@pytest.mark.compiles
@pytest.mark.parametrize("options", [MXFP8_E4M3, MXFP6_E3M2 | {"granularity": PerBlock(12)}], ids=["MXFP8", "of 12"])
def test_compiled_with_a_smaller_last_block(options, each_value_is_traced_once):
    torch._dynamo.reset()
    x = torch.randn(20, 40)
    encoded = torch.compile(lambda x: encode_blocks(x, **options)[:2], fullgraph=True)(x)
    for got, want in zip(encoded, encode_blocks(x, **options)[:2], strict=True):
        assert_same_bits(got, want)


@pytest.fixture
def served(monkeypatch):
    """The kernel, which must serve: the formula is not called."""
    monkeypatch.setattr(cuda.blocks, "encode_blocks", lambda *args: pytest.fail("the formula served"))


@interpreted
@kernels
@pytest.mark.parametrize(("shape", "block"), SHAPES, ids=str)
def test_interpreted_blocks(shape, block):
    check_blocks(cuda.KERNELS["encode_blocks"], shape, block, "cpu")


@interpreted
@kernels
@pytest.mark.parametrize("f", FORMATS[:5], ids=lambda f: f.name)
def test_interpreted_modes(f, served):
    check_modes(cuda.KERNELS["encode_blocks"], f, "cpu")


@interpreted
@kernels
@pytest.mark.parametrize(("shape", "block"), SHAPES[1:10:3], ids=str)
def test_interpreted_random_bits(shape, block, served):
    check_random_bits(cuda.KERNELS["encode_blocks_stochastic"], shape, block, "cpu")


@interpreted
@kernels
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_interpreted_dtypes(dtype, served):
    check_dtypes(cuda.KERNELS["encode_blocks"], dtype, "cpu")


def test_parts_end_on_bytes():
    """A split whose parts do not end on a byte, or are not equal, is refused: three codes of 6 bits on 3 devices."""
    from torch.distributed.tensor import Replicate, Shard

    def splits(columns, devices, format):
        mesh = SimpleNamespace(size=lambda: devices)
        x = SimpleNamespace(ndim=2, shape=(32, columns), placements=[Shard(1)], mesh=mesh)
        args = None, format, *NEAREST, [32, 1], "floor"
        choices = sharding._placements_of_stored_blocks(x, *args)
        assert choices[0][0] == [Replicate()] * 2
        return len(choices) > 1

    assert [splits(4, 3, "E3M2"), splits(12, 3, "E3M2"), splits(8, 2, "E3M2"), splits(6, 2, "E3M2")] == [0, 1, 1, 0]
    assert [splits(6, 2, "E2M1"), splits(8, 2, "E2M1"), splits(6, 2, "E4M3"), splits(5, 2, "E4M3")] == [0, 1, 1, 0]
