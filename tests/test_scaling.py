"""Scales against their definitions, computed here in numpy, group by group."""

import dataclasses
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import DTYPES, FORMATS, NAMED, assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from altgrad.quantization import (
    E0M7,
    E2M1,
    E4M3,
    E5M2,
    MXFP4,
    NVFP4,
    PerAxis,
    PerBlock,
    PerTensor,
    compute_scale,
    decode,
    encode,
    quantize,
    quantize_blocks,
    resolve,
)
from altgrad.quantization.scaling import METHODS
from ops_registry import blocks
from ops_registry.modes import POWER_OF_TWO_RULES

METHODS = METHODS[:-1]  # four_over_six is E2M1's: test_two_levels.py
GRANULARITIES = [
    PerTensor(),
    PerAxis(0),
    PerAxis(-1),
    PerAxis((0, 1)),
    PerBlock(4),
    PerBlock((3, 5)),  # ragged in both dimensions of (8, 12)
    PerBlock((16, 32)),  # larger than they are
    PerBlock({0: 3}),
    PerBlock({-2: 4, 1: 5}),
]


def samples(*shape, dtype=torch.float32, seed=0):
    """Numbers over many binades."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(3).exp()).to(dtype)


MAGNITUDES = torch.cat([samples(4096).abs() + 1e-6, torch.ldexp(torch.ones(60), torch.arange(-30, 30))])[:, None]


def groups_of(shape, granularity):
    """For every element of a tensor the indices (tuples) of its group."""
    indices = list(itertools.product(*[range(size) for size in shape]))
    if isinstance(granularity, PerBlock):
        sizes = {dim % len(shape): size for dim, size in granularity.sizes}
        keys = [tuple(i // sizes.get(dim, 1) for dim, i in enumerate(index)) for index in indices]
    else:
        axes = () if isinstance(granularity, PerTensor) else granularity.axes
        axes = (axes,) if isinstance(axes, int) else axes
        keys = [tuple(index[axis] for axis in axes) for index in indices]
    members = {}
    for key, index in zip(keys, indices):
        members.setdefault(key, []).append(index)
    return [(index, members[key]) for key, index in zip(keys, indices)]


def by_groups(x, granularity, scale_of_magnitudes):
    """The definition of a scale, element by element, in the compute dtype."""
    a = np.abs(x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).numpy())
    result = np.empty_like(a)
    for index, members in groups_of(x.shape, granularity):
        result[index] = scale_of_magnitudes(np.array([a[i] for i in members]))
    return torch.from_numpy(result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_amax_is_the_largest_magnitude_over_the_largest_value(granularity, dtype):
    x = samples(8, 12, dtype=dtype)
    scale = compute_scale(x, E4M3, granularity=granularity)
    assert_same_bits(scale.expand(x.shape), by_groups(x, granularity, lambda a: a.max() / a.dtype.type(448)))


@pytest.mark.parametrize("fraction", [0, 0.1, 0.123456, 0.5, 0.9, 0.987654, 0.999, 1])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_percentile_is_numpys_quantile_in_float64(dtype, granularity, fraction):
    x = samples(8, 12, dtype=dtype)
    scale = compute_scale(x, E4M3, method="percentile", fraction=fraction, granularity=granularity)

    def definition(a):
        return a.dtype.type(np.quantile(a.astype(np.float64), fraction)) / a.dtype.type(448)

    assert_same_bits(scale.expand(x.shape), by_groups(x, granularity, definition))


@pytest.mark.parametrize("n", [1, 2, 3, 1000, 65_537, 1 << 20])
@pytest.mark.parametrize("repeats", [False, True])
def test_percentile_of_a_long_tensor(n, repeats):
    x = samples(n, seed=n)
    x = x.round() if repeats else x
    magnitudes = x.abs().numpy().astype(np.float64)
    for fraction in (0.25, 0.9, 0.99, 0.999, 0.99999, 1.0):
        want = torch.tensor(np.quantile(magnitudes, fraction)).float()
        got = compute_scale(x, "e3m0b3f", method="percentile", fraction=fraction)  # its largest value is 16
        assert_same_bits(got, torch.where(want == 0, 1.0, want / 16))


def test_percentile_beyond_the_limit_of_torch_quantile():
    n = (1 << 24) + 5
    x = torch.arange(n, dtype=torch.float64)
    x = x.roll(n // 3) * (1 - 2 * (torch.arange(n) % 2))
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x.abs(), 0.999)
    got = compute_scale(x, "e1m0b1f", method="percentile", fraction=0.999)  # its largest value is 1
    assert_same_bits(got, torch.tensor(np.quantile(np.arange(n, dtype=np.float64), 0.999)))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("options", [{}, {"power_of_two": "floor"}, {"scale_format": E4M3}], ids=str)
@pytest.mark.parametrize("f", [E2M1, E0M7, E4M3], ids=lambda f: f.name)
def test_mse_is_never_worse_than_amax(f, options, granularity):
    x = samples(8, 12)
    errors = {}
    for method in ("amax", "mse"):
        scale = compute_scale(x, f, method=method, granularity=granularity, **options).expand(x.shape)
        squares = (quantize(x, f, scale).double() - x.double()).square()
        errors[method] = torch.tensor(
            [float(sum(squares[i] for i in members)) for _, members in groups_of(x.shape, granularity)]
        )
    assert (errors["mse"] <= errors["amax"]).all()
    if f is E2M1 and granularity == PerAxis(0):
        assert (errors["mse"] < errors["amax"]).any()


@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_amax_clips_nothing(f):
    """x / scale is at most an ulp above the largest value, and that rounds to the largest value."""
    x = MAGNITUDES
    scale = compute_scale(x, f, granularity=PerAxis(0))
    largest = np.float32(f.max_representable_value)
    assert (x / scale).max() <= np.nextafter(largest, np.float32(np.inf))
    assert (encode(x, f, scale, saturation="none") == f.max_code).all()
    assert_same_bits(quantize(x, f, scale, saturation="none"), largest * scale)
    bound = x.double() * 2.0**-23
    assert ((quantize(x, f, scale).double() - x.double()).abs() <= bound).all()


def test_division_rounds_quotients_above_the_largest_value():
    """The case the test above is about exists."""
    x = samples(4096).abs()[:, None]
    assert (x / compute_scale(x, E4M3, granularity=PerAxis(0)) > 448).any()


@pytest.mark.parametrize("f", NAMED, ids=lambda f: f.name)
@pytest.mark.parametrize("rule", ["ceil", "rceil"])
def test_rounding_scales_up_clips_nothing(rule, f):
    scale = compute_scale(MAGNITUDES, f, granularity=PerAxis(0), power_of_two=rule)
    assert (MAGNITUDES / scale <= np.nextafter(np.float32(f.max_representable_value), np.float32(np.inf))).all()
    assert (encode(MAGNITUDES, f, scale, saturation="none") <= f.max_code).all()


def power_of_two_by_definition(amax, f, rule):
    """With exact logarithms, frexp, of a number of numpy."""

    def exponent(value):
        return math.frexp(value)[1] - 1

    largest = f.max_representable_value
    if math.isnan(amax):
        return math.nan
    below = exponent(largest)
    if rule == "rceil":
        with np.errstate(all="ignore"):
            amax, below = amax / type(amax)(largest), 0
    amax, infinity = float(amax), exponent(np.finfo(type(amax)).max) + 1
    if amax == 0:
        result = -127
    elif math.isinf(amax):
        result = 127 if rule == "rceil" else infinity - below
    else:
        if rule == "even":  # to M mantissa bits, ties away
            half_steps = math.floor(math.ldexp(amax, f.mantissa_bits + 1 - exponent(amax)))
            is_above = (half_steps + 1) // 2 == 2 << f.mantissa_bits
        else:
            is_above = rule != "floor" and math.frexp(amax)[0] != 0.5
        result = exponent(amax) - below + is_above
    return 2.0 ** min(max(result, -127), 127)


def magnitudes_around_thresholds(dtype):
    """Numbers in some binades of float32 and at the ends of a dtype, subnormals and specials among them."""
    bits = {np.float32: 23, np.float64: 52}[dtype]
    offsets = [0, 1, 2, 1 << bits - 1, (1 << bits) - 1, *[(1 << bits - k) + d for k in range(1, 12) for d in (-1, 0)]]
    offsets += [(1 << bits) - (1 << bits - k) + d for k in range(2, 12) for d in (-1, 0, 1)]
    limits = np.finfo(dtype)
    exponents = [*range(-150, 129, 30), -128, -127, -126, 126, 127]
    with np.errstate(over="ignore"):
        points = [np.ldexp(dtype(1) + np.array(offsets, dtype) * limits.eps, e).astype(dtype) for e in exponents]
    ends = [0, np.inf, np.nan, limits.tiny, limits.smallest_subnormal, limits.max, limits.max / 2]
    return np.concatenate([*points, np.array(ends, dtype)])


EXTREME = [resolve(spelling) for spelling in ("FP16", "e8m7b127", "e2m2b100f", "e0m1b148f", "e1m0b1f", "e0m15b1f")]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", POWER_OF_TWO_RULES)
@pytest.mark.parametrize("f", NAMED + EXTREME, ids=lambda f: f.name)
def test_power_of_two_is_the_definition(f, rule, dtype):
    points = magnitudes_around_thresholds(dtype)
    got = compute_scale(torch.from_numpy(points)[:, None], f, granularity=PerAxis(0), power_of_two=rule)
    want = torch.tensor([power_of_two_by_definition(p, f, rule) for p in points], dtype=got.dtype)
    assert_same_bits(got[:, 0], want, torch.from_numpy(points))


@pytest.mark.parametrize("rule", POWER_OF_TWO_RULES)
def test_subnormal_amax_gives_the_smallest_scale(rule):
    x = torch.tensor([[2.0**-149], [2.0**-130], [-(2.0**-128)]])
    scale = compute_scale(x, E4M3, granularity=PerAxis(0), power_of_two=rule)
    assert_same_bits(scale, torch.full((3, 1), 2.0**-127))
    assert_same_bits(quantize(x, E5M2, scale)[1:], x[1:])


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("options", [{"method": m} for m in METHODS] + [MXFP4, NVFP4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_blocks_is_quantize_by_compute_scale(options, granularity, dtype):
    options = {"format": E4M3} | dict(options) | {"granularity": granularity}
    for x in (samples(8, 12, dtype=dtype), samples(12, 8, dtype=dtype).t(), samples(8, 24, dtype=dtype)[:, ::2]):
        scale = compute_scale(x, **options)
        assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_same_bits(quantize_blocks(x, **options), quantize(x, options["format"], scale))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("options", [{"format": E4M3}, {"format": E2M1, "scale_format": E4M3}], ids=str)
def test_compact_scales(options, granularity):
    """One element a block, and quantize, encode and decode by it give what they give by a scale of x's shape."""
    bits = torch.randint(1 << 24, (8, 12), dtype=torch.int32)
    stochastic = {"rounding": "stochastic", "random_bits": bits}
    for x in (samples(8, 12), samples(12, 8).t(), samples(8, 24)[:, ::2]):
        scale = compute_scale(x, granularity=granularity, **options)
        compact = compute_scale(x, granularity=granularity, compact=True, **options)
        if isinstance(granularity, PerBlock):
            groups = {tuple(members) for _, members in groups_of(x.shape, granularity)}
            assert compact.numel() == len(groups)
        for f in (quantize, encode):
            want = f(x, options["format"], scale)
            assert_same_bits(f(x, options["format"], compact, granularity=granularity), want)
            want = f(x, options["format"], scale, **stochastic)
            assert_same_bits(f(x, options["format"], compact, granularity=granularity, **stochastic), want)
            assert_same_bits(decode(want, E4M3, compact, granularity=granularity), decode(want, E4M3, scale)) if (
                f is encode
            ) else None
        assert_same_bits(
            quantize_blocks(x, granularity=granularity, **options, **stochastic),
            quantize(x, options["format"], scale, **stochastic),
        )


def test_scales_of_a_wrong_number_of_blocks():
    x, granularity = samples(8, 12), PerBlock(5)
    for scale in (torch.ones(8, 2), torch.ones(8, 12), torch.ones(()), 1.0):
        for f, first in ((quantize, x), (encode, x), (decode, x.to(torch.uint8))):
            with pytest.raises(ValueError, match=r"for each PerBlock\(5\) of .*the shape \(8, 3\), got"):
                f(first, E4M3, scale, granularity=granularity)


def test_blocks_print_compare_and_hash():
    assert [repr(PerBlock(s)) for s in (4, (4, 5), {0: 4}, {-1: 4})] == [
        "PerBlock(4)",
        "PerBlock((4, 5))",
        "PerBlock({0: 4})",
        "PerBlock(4)",
    ]
    assert len({PerBlock(4), PerBlock((4,)), PerBlock({-1: 4}), PerBlock({0: 4})}) == 2
    assert pickle.loads(pickle.dumps(PerBlock({0: 4}))) == PerBlock({0: 4}) == dataclasses.replace(PerBlock({0: 4}))


class Calls(TorchDispatchMode):
    """The names of the operators that run."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("sizes", [4, (4, 4), {0: 4}])
@pytest.mark.parametrize("transposed", [False, True])
def test_even_blocks_are_not_copied(sizes, transposed):
    x = samples(8, 12)
    x = x.t() if transposed else x
    granularity = PerBlock(sizes)
    with Calls() as calls:
        quantize_blocks(x, E4M3, granularity=granularity)
    assert calls.names == ["altgrad::quantize_blocks"]
    with Calls() as calls:
        y = blocks.quantize_blocks(x, None, "E4M3", "propagate", "nearest_ties_to_even", granularity.block(x))
    assert calls.names.count("altgrad::quantize") == 1
    assert not {"aten::clone", "aten::copy_", "aten::_to_copy", "aten::cat"} & set(calls.names)
    assert y.stride() == x.stride()


SPECIAL = [
    (torch.zeros(4), 1.0),
    (-torch.zeros(4), 1.0),
    (torch.tensor([2.0**-149, 0.0]), 2.0**-126),
    (torch.tensor([math.inf, 1.0]), math.nan),
    (torch.tensor([math.nan, 1.0]), math.nan),
    (torch.empty(0), 1.0),
    (torch.tensor(-448.0), 1.0),
]


@pytest.mark.parametrize("x, want", SPECIAL, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_special_tensors(x, want, method):
    scale = compute_scale(x, E4M3, method=method, fraction=1.0)
    assert_same_bits(scale, torch.tensor(want))
    if not x.isinf().any():
        assert_same_bits(quantize(x, E4M3, scale).isnan(), x.isnan() | math.isnan(want))


def test_a_scale_is_finite_even_if_the_quotient_is_not():
    f = resolve("e2m2b100f")
    x = torch.tensor([3e38])
    assert_same_bits(compute_scale(x, f), torch.tensor(torch.finfo(torch.float32).max))


def test_percentile_ignores_infinities_above_it_and_shows_nan():
    x = torch.cat([torch.arange(1.0, 1000.0), torch.tensor([-math.inf])])
    scale = compute_scale(x, "e1m0b1f", method="percentile", fraction=0.5)
    assert scale == 500.5
    assert compute_scale(torch.cat([x, torch.tensor([math.nan])]), E4M3, method="percentile", fraction=0.1).isnan()


@pytest.mark.parametrize("fraction", [0, 0.1, 0.5, 0.9, 1])
def test_percentile_between_a_number_and_infinity_is_infinity(fraction):
    x = torch.tensor([[math.inf, math.inf], [1.0, math.inf], [1.0, 2.0]])
    options = {"granularity": PerAxis(0), "power_of_two": "floor"}  # by which infinity is not NaN
    want = compute_scale(x if fraction else x[:, :1], E4M3, **options)
    assert_same_bits(compute_scale(x, E4M3, method="percentile", fraction=fraction, **options)[:2], want[:2])


@pytest.mark.parametrize("value, shown", [(0.0, False), (1e-44, False), (math.inf, True), (math.nan, True)])
def test_nvfp4_of_special_tensors(value, shown):
    x = torch.full((2, 32), value)
    scale = compute_scale(x, **NVFP4)
    assert scale.isnan().all() if shown else ((scale > 0) & scale.isfinite()).all()


def test_zero_block_beside_others():
    x = torch.cat([torch.zeros(1, 32), torch.ones(1, 32)])
    for recipe in (MXFP4, NVFP4, {"format": E4M3, "granularity": PerBlock(32)}):
        assert_same_bits(quantize_blocks(x, **recipe), x)


@pytest.mark.parametrize("options", [{"method": m} for m in METHODS] + [MXFP4, NVFP4], ids=str)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (3, 0, 2)])
def test_empty_tensors(shape, options):
    options = {"format": E4M3} | dict(options)
    for granularity in (PerTensor(), PerAxis(0), PerBlock(2)):
        options["granularity"] = granularity
        assert quantize_blocks(torch.empty(shape), **options).shape == shape
        compute_scale(torch.empty(shape), **options).expand(shape)


def test_scales_carry_no_gradient():
    x = samples(4, 8).requires_grad_()
    assert not compute_scale(x, E4M3, granularity=PerAxis(0)).requires_grad
    y = quantize_blocks(x, **MXFP4)
    y.backward(torch.arange(32.0).reshape(4, 8))
    assert_same_bits(x.grad, torch.arange(32.0).reshape(4, 8))


def test_errors():
    x = torch.ones(4, 4)
    for options, message in [
        ({"method": "max"}, "amax, percentile, mse"),
        ({"power_of_two": "round"}, "floor, ceil, even, rceil"),
        ({"fraction": 1.5}, "fraction"),
        ({"power_of_two": "floor", "scale_format": E4M3}, "one of them"),
        ({"granularity": PerAxis(2)}, "2 dimensions"),
        ({"granularity": PerBlock((2, 2, 2))}, "dimensions \\[-3, -2, -1\\] need"),
        ({"granularity": PerBlock({2: 4})}, "dimensions \\[2\\] need"),
        ({"granularity": PerBlock({0: 4, -2: 4})}, "dimensions \\[0, -2\\] need"),
    ]:
        with pytest.raises(ValueError, match=message):
            compute_scale(x, E4M3, **options)
    for sizes in (0, (), (4, -1), True, {}, {0: 0}, {"rows": 4}, {0: 4.0}):
        with pytest.raises(ValueError, match="positive integers"):
            PerBlock(sizes)
    with pytest.raises(TypeError, match="int64"):
        compute_scale(torch.ones(4, dtype=torch.int64), E4M3)
    with pytest.raises(ValueError, match="unknown format"):
        compute_scale(x, "E9M9")
    with pytest.raises(TypeError, match="format"):
        compute_scale(x, 8)


COMPILED = [
    {"format": "E4M3"} | options
    for options in ([{"method": m} for m in METHODS] + [{"power_of_two": r} for r in POWER_OF_TWO_RULES])
] + [{"format": "e3m2b3f", "scale_format": "e4m3b7fn"}]


@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_no_value_is_read(options):
    """Under fake tensors, which have no values, all that reads one fails."""
    with FakeTensorMode():
        x = torch.empty(8, 12)
        for granularity in GRANULARITIES:
            y = quantize(x, options["format"], compute_scale(x, granularity=granularity, **options))
            assert y.shape == quantize_blocks(x, granularity=granularity, **options).shape == x.shape


@pytest.mark.gpu
@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_on_a_gpu_nothing_synchronizes_and_bits_are_those_of_the_cpu(options):
    x = samples(8, 96)
    want = [quantize_blocks(x, granularity=granularity, **options) for granularity in GRANULARITIES]
    x = x.cuda()
    try:
        torch.cuda.set_sync_debug_mode("error")
        got = [quantize_blocks(x, granularity=granularity, **options) for granularity in GRANULARITIES]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for g, w in zip(got, want):
        assert_same_bits(g, w)


@pytest.mark.compiles
@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [MXFP4, NVFP4, {"format": E4M3, "granularity": PerAxis(0)}, {"format": "e3m2b3f", "granularity": PerTensor()}],
    ids=str,
)
def test_compiled_for_a_gpu_bits_are_those_of_the_cpu(options):
    torch._dynamo.reset()
    x = torch.cat([samples(8, 96), torch.zeros(1, 96), samples(1, 96) * 1e-36])
    got = torch.compile(quantize_blocks, fullgraph=True)(x.cuda(), **options)
    assert_same_bits(got, quantize_blocks(x, **options))


def assert_compiles(granularities, options, dynamic):
    def f(x):
        results = [quantize(x, options["format"], compute_scale(x, granularity=g, **options)) for g in granularities]
        return [*results, quantize_blocks(x, granularity=granularities[-1], **options)]

    torch._dynamo.reset()
    x = samples(8, 12)
    for got, want in zip(torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")(x), f(x)):
        assert_same_bits(got, want)


@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_compiled_is_eager_in_one_graph(options):
    is_mse = options.get("method") == "mse"  # whose candidates make long graphs
    assert_compiles([PerBlock(4)] if is_mse else [PerTensor(), PerAxis(0), PerBlock((3, 5))], options, None)


@pytest.mark.parametrize("method", ["amax", "percentile"])
def test_compiled_with_dynamic_shapes(method):
    assert_compiles([PerBlock(4)], {"format": "E4M3", "method": method}, True)


@pytest.mark.compiles
@pytest.mark.parametrize(
    "granularity, options",
    [
        (PerAxis(0), {}),
        (PerBlock(32), {"power_of_two": "even"}),
        (PerBlock((16, 32)), {"power_of_two": "rceil"}),
        (PerBlock(16), {"scale_format": E4M3}),
    ],
    ids=str,
)
def test_inductor_makes_a_reduction_and_one_fused_kernel(granularity, options):
    from torch._inductor.utils import run_and_get_code

    def f(x):
        return quantize_blocks(x * 2, E4M3, granularity=granularity, **options) + 1

    torch._dynamo.reset()
    x = samples(64, 96)
    got, code = run_and_get_code(torch.compile(f, fullgraph=True), x)
    assert_same_bits(got, f(x))
    kernels = sum(source.count("= async_compile.") for source in code)
    assert "torch.ops" not in "".join(code).split("def call", 1)[1]
    assert kernels <= (4 if "scale_format" in options else 2)  # the amax of the tensor comes before that of the blocks


@pytest.mark.parametrize("dynamic", [False, True])
def test_export_keeps_the_node(dynamic):
    class Model(torch.nn.Module):
        def forward(self, x):
            return quantize(x, E4M3, compute_scale(x, E4M3, granularity=PerAxis(0))), quantize_blocks(x, **MXFP4)

    x = samples(8, 64)
    shapes = {"x": {0: torch.export.Dim("rows", min=2, max=64)}} if dynamic else None
    program = torch.export.export(Model(), (x,), dynamic_shapes=shapes)
    nodes = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert nodes.count(torch.ops.altgrad.quantize.default) == 1
    assert nodes.count(torch.ops.altgrad.quantize_blocks.default) == 1
    for got, want in zip(program.module()(x[:3] if dynamic else x), Model()(x[:3] if dynamic else x)):
        assert_same_bits(got, want)


GRANULARITIES = [PerTensor(), PerAxis(0), PerAxis(1), PerBlock(32), PerBlock((1, 64))]


@pytest.mark.parametrize("method", ["amax", "percentile"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_sizes_that_depend_on_data(granularity, method):
    torch._dynamo.reset()
    x = torch.randn(64, 64)

    def f(x):
        return quantize_blocks(x[x.sum(1) > 0], E4M3, granularity=granularity, method=method)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_same_bits(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_percentile_exports_with_a_dynamic_size(granularity):
    class Model(torch.nn.Module):
        def forward(self, x):
            return compute_scale(x, E4M3, method="percentile", granularity=granularity)

    batch = torch.export.Dim("batch")
    program = torch.export.export(Model(), (torch.randn(64, 64),), dynamic_shapes=({0: batch},))
    for rows in (7, 64, 1000):
        x = torch.randn(rows, 64)
        assert_same_bits(program.module()(x), Model()(x))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_jit_trace(granularity):
    x, y = torch.randn(64, 64), torch.randn(64, 64)
    f = lambda x: compute_scale(x, E4M3, granularity=granularity)  # noqa: E731
    assert_same_bits(torch.jit.trace(f, (x,))(y), f(y))


@pytest.mark.parametrize(
    "recipe", [MXFP4, NVFP4, {"format": E4M3, "granularity": PerAxis(0)}], ids=["MXFP4", "NVFP4", "rows"]
)
def test_blocks_in_every_mode(recipe):
    x = torch.randn(6, 40)
    scale = compute_scale(x, **recipe)
    bits = torch.randint(1 << 24, x.shape, dtype=torch.int32)
    for modes in (
        {"saturation": "none"},
        {"rounding": "toward_zero"},
        {"rounding": "stochastic", "random_bits": bits, "saturation": "finite"},
    ):
        assert_same_bits(quantize_blocks(x, **recipe, **modes), quantize(x, recipe["format"], scale, **modes), x)
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    got = quantize_blocks(x, **recipe, rounding="stochastic", generator=draws[0])
    assert_same_bits(got, quantize(x, recipe["format"], scale, rounding="stochastic", generator=draws[1]), x)
    with pytest.raises(ValueError, match="need rounding='stochastic'"):
        quantize_blocks(x, **recipe, random_bits=bits)


@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerAxis(0), PerBlock(16), PerBlock(48), PerBlock((4, 32)), PerBlock({0: 4})], ids=str
)
@pytest.mark.parametrize("options", [{"power_of_two": "rceil"}, {"scale_format": "E4M3"}], ids=str)
def test_blocks_from_a_seed_have_the_bits_of_elements(granularity, options):
    x, seed = samples(8, 96), torch.tensor(2026)
    scale = compute_scale(x, E2M1, granularity=granularity, **options)
    for seeded in ({"random_bits": seed}, {"generator": torch.Generator().manual_seed(0)}):
        got = quantize_blocks(x, E2M1, granularity=granularity, rounding="stochastic", **seeded, **options)
        if "generator" in seeded:
            seeded["generator"].manual_seed(0)
        assert_same_bits(got, quantize(x, E2M1, scale, rounding="stochastic", **seeded), x)
