"""The output is laid out as torch.empty_like(x): eager, fake and compiled, also where opcheck cannot look."""

import functools
import itertools
import random

import pytest
import torch
from conftest import assert_same_bits
from samples import LAID_OUT_LIKE_X, POINTWISE, SAMPLES
from torch._subclasses import FakeTensorMode

from ops_registry import aten
from ops_registry.layout import inverse

ag = torch.ops.altgrad


def random_layout(rng):
    """A random view: permuted, sliced, expanded, overlapping, with sizes of one and zero, and a scale that fits it."""
    shape = [rng.choice([1, 1, 2, 3, 4]) for _ in range(rng.randint(0, 5))]
    strides = [rng.choice([0, 1, 1, 2, 3, 4, 8]) for _ in shape]
    if rng.random() < 0.5:
        x = torch.randn([rng.choice([0, 1, 2, 3, 3]) for _ in shape])
        x = x.permute(rng.sample(range(x.ndim), x.ndim))
        x = x[tuple(slice(None, None, rng.choice([1, 1, 2])) for _ in range(x.ndim))]
    else:
        x = torch.randn(256).as_strided(shape, strides, rng.randint(0, 4))
    scale = torch.rand([rng.choice([1, n]) for n in x.shape][rng.randint(0, x.ndim) :]) + 0.5
    if scale.ndim > 1 and rng.random() < 0.5:
        scale = scale.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x, scale


def calls(x, scale):
    arguments = {name: SAMPLES[name](x, scale) for name in LAID_OUT_LIKE_X}
    return [(args[0], functools.partial(getattr(ag, name), *args)) for name, args in arguments.items()]


@pytest.mark.parametrize("seed", range(10))
def test_eager_and_fake(seed, device):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(30):
        x, scale = (t.to(device) if t.is_contiguous() else t for t in random_layout(rng))
        x, scale = (x, scale) if device == "cpu" else (to_device(x), to_device(scale))
        for first, call in calls(x, scale):
            want = torch.empty_like(first)
            got = call()
            assert (got.shape, got.stride()) == (want.shape, want.stride()), (x.shape, x.stride(), scale.shape)
        dense = ag.quantize(x.contiguous(), scale, "E5M2")
        assert_same_bits(ag.quantize(x, scale, "E5M2"), dense, x)
        assert_same_bits(ag.encode(x, scale, "E5M2"), ag.encode(x.contiguous(), scale, "E5M2"), x)
        with FakeTensorMode() as mode:
            fake_x, fake_scale = mode.from_tensor(x), mode.from_tensor(scale)
            for first, call in calls(fake_x, fake_scale):
                assert call().stride() == torch.empty_like(first).stride()


@pytest.mark.parametrize("seed", range(4))
def test_formulas_walk_in_the_order_of_memory(seed):
    """With scales and random bits permuted alike: the bits and the layout that the kernels in C give."""
    rng = random.Random(200 + seed)
    torch.manual_seed(seed)
    for _ in range(20):
        x, scale = random_layout(rng)
        for name in POINTWISE:
            args = SAMPLES[name](x, scale)
            want, got = getattr(ag, name)(*args), aten.KERNELS[name](*args)
            assert got.stride() == want.stride() == torch.empty_like(args[0]).stride()
            assert_same_bits(got, want, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SAMPLES)
def test_outputs_are_no_views(name, dtype):
    """A view that was made under no_grad refuses to be written in place where a gradient is wanted."""
    for x in (torch.randn(4, 8, dtype=dtype), torch.randn(8, 4, dtype=dtype).t(), torch.randn(1, 8, dtype=dtype).t()):
        for call in (getattr(ag, name), aten.KERNELS[name]):
            with torch.no_grad():
                outputs = call(*SAMPLES[name](x, torch.ones(1, dtype=dtype)))
            assert not any(t._is_view() for t in (outputs if isinstance(outputs, tuple) else (outputs,)))


@pytest.mark.parametrize("name", ["quantize_stochastic", "encode_stochastic", "project_stochastic"])
def test_formulas_count_in_row_major_order(name):
    """From a seed the bits of an element follow from its index, wherever it lies."""
    x, scale, seed = torch.randn(5, 3, 4) * 3, torch.rand(3, 1) + 0.5, torch.tensor(2026)
    want = aten.KERNELS[name](x, scale, seed, "E2M1")
    for order in itertools.permutations(range(3)):
        moved = x.permute(order).contiguous().permute(inverse(order))
        assert_same_bits(aten.KERNELS[name](moved, scale, seed, "E2M1"), want, x)
        assert_same_bits(getattr(ag, name)(moved, scale, seed, "E2M1"), want, x)


def test_formulas_name_shapes_as_they_were_given():
    x = torch.randn(4, 3).t()
    with pytest.raises(ValueError) as of_formula:
        aten.KERNELS["quantize"](x, torch.ones(4, 3), "E5M2")
    with pytest.raises(ValueError) as of_kernel:
        ag.quantize(x, torch.ones(4, 3), "E5M2")
    assert str(of_formula.value) == str(of_kernel.value)


def to_device(tensor):
    """A copy on the GPU with the same strides, overlaps included."""
    storage = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return storage.cuda().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def strides(tensor):
    """The strides that matter: Inductor leaves that of a size of one open."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1]


@pytest.mark.compiles
@pytest.mark.parametrize("seed", range(4))
def test_compiled(seed):
    torch._dynamo.reset()
    x, scale = random_layout(random.Random(100 + seed))
    f = lambda x, scale: (ag.quantize(x, scale, "E5M2"), ag.encode(x, scale, "E5M2"))  # noqa: E731
    for got, want in zip(torch.compile(f, fullgraph=True, dynamic=False)(x, scale), f(x, scale)):
        assert_same_bits(got, want, x)
        assert strides(got) == strides(want)


@pytest.mark.compiles
def test_where_arithmetic_alone_lays_out_otherwise(monkeypatch):
    """The case that opcheck passes and an opaque call under compile then fails on."""
    x = torch.randn(64).as_strided((2, 1, 3, 1), (2, 2, 0, 4))
    scale = torch.rand(1, 3, 1) + 0.5
    want = torch.empty_like(x)
    assert strides(x / scale) != strides(want)
    assert ag.quantize(x, scale, "E5M2").stride() == want.stride()
    torch._dynamo.reset()
    assert strides(torch.compile(lambda x, scale: ag.quantize(x, scale, "E5M2"))(x, scale)) == strides(want)
    monkeypatch.setenv(
        "CI", "true"
    )  # where Inductor refuses nodes that have a decomposition, but for those it is told of
    with torch._functorch.config.patch(decompose_custom_triton_ops=False):  # the node stays opaque
        compiled = torch.compile(lambda x, scale: ag.quantize(x, scale, "E5M2") + 1, fullgraph=True)
        assert_same_bits(compiled(x, scale), ag.quantize(x, scale, "E5M2") + 1)
