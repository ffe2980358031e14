"""torch.func, forward mode, nesting, nested tensors, and the modes and devices that an operator meets in the wild."""

import copy
import functools
import pickle

import pytest
import torch
from conftest import assert_same_bits
from samples import LAID_OUT_LIKE_X, POINTWISE, SAMPLES
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from altgrad.quantization import (
    E4M3,
    E5M2,
    NVFP4,
    DequantizeFunc,
    PerAxis,
    PerBlock,
    PerTensor,
    QuantizeFunc,
    compute_scale,
    decode,
    dequantize,
    encode,
    quantize,
    quantize_blocks,
    quantize_gradient,
)
from altgrad.simulation import linear

ag = torch.ops.altgrad
HALF = torch.tensor(0.5)
QUANTIZERS = {
    "operator": lambda x: ag.quantize(x, HALF, "E5M2"),
    "function": lambda x: quantize(x, E5M2, 0.5),
    "Function": lambda x: QuantizeFunc.apply(x, E5M2, HALF),
}
quantizers = pytest.mark.parametrize("q", QUANTIZERS.values(), ids=QUANTIZERS)


def one_by_one(f, in_dims, *args):
    """What vmap promises, as a loop."""
    batch = next(a.shape[d] for a, d in zip(args, in_dims) if d is not None)
    return torch.stack([f(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims))) for i in range(batch)])


PLACEMENTS = [  # shapes of x and of scale, and where their batch dimensions are
    ((3, 4, 5), (), (0, None)),
    ((4, 5, 3), (5,), (2, None)),
    ((4, 5), (3,), (None, 0)),
    ((4, 5), (5, 3), (None, 1)),
    ((3, 4, 5), (3,), (0, 0)),
    ((4, 3, 5), (4, 1, 3), (1, 2)),
]


@pytest.mark.parametrize(
    ("x_shape", "scale_shape", "in_dims", "compiled"),
    [
        *((*p, False) for p in PLACEMENTS),
        *(pytest.param(*p, True, marks=pytest.mark.compiles) for p in (PLACEMENTS[1], PLACEMENTS[3], PLACEMENTS[5])),
    ],
)
def test_vmap_of_every_operator(x_shape, scale_shape, in_dims, compiled):
    if compiled:
        torch._dynamo.reset()
    x, scale = torch.randn(x_shape), torch.rand(scale_shape) + 0.1
    for name in ["quantize"] if compiled else POINTWISE:
        op, arguments = getattr(ag, name), SAMPLES[name](x, scale)
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        f = functools.partial(lambda op, options, *tensors: op(*tensors, *options), op, arguments[len(tensors) :])
        dims = (*in_dims, in_dims[0])[: len(tensors)]
        batched = vmap(f, dims)
        if compiled:
            batched = torch.compile(batched, fullgraph=True)
        assert_same_bits(batched(*tensors), one_by_one(f, dims, *tensors))


@pytest.mark.parametrize("name", SAMPLES)
def test_vmap_of_an_empty_batch(name):
    arguments = SAMPLES[name](torch.randn(4, 6), torch.tensor(0.5))
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]

    def f(*tensors):
        given = iter(tensors)
        return getattr(ag, name)(*(next(given) if isinstance(a, torch.Tensor) else a for a in arguments))

    for dim in (0, -1):
        batched = vmap(f, dim)(*(t.new_empty(0, *t.shape).movedim(0, dim) for t in tensors))
        for got, example in zip(tree_leaves(batched), tree_leaves(f(*tensors)), strict=True):
            assert (got.shape, got.dtype) == ((0, *example.shape), example.dtype)


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(0), PerBlock(16)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"method": "percentile"},
        {"method": "four_over_six", "scale_format": "E4M3"},
        {"scale_format": "E4M3"},
        {"scale_format": "UE4M3", "tensor_scale": False},
        {"scale_format": "UE4M3", "arithmetic": "transformer_engine"},
        {"scale_format": "UE4M3", "arithmetic": "transformer_engine", "method": "percentile"},
        pytest.param(
            {"power_of_two": "rceil"},
            marks=pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 batches no view as bits"),
        ),
    ],
    ids=str,
)
def test_scales_of_an_empty_batch(granularity, options):
    """torch takes the first example of batched 0-d tensors, where they meet others."""
    for f in (compute_scale, quantize_blocks):
        of_one = functools.partial(f, format="E2M1", granularity=granularity, **options)
        batched, example = vmap(of_one)(torch.empty(0, 4, 32)), of_one(torch.randn(4, 32))
        assert (batched.shape, batched.dtype) == ((0, *example.shape), example.dtype)


def test_nested_vmap():
    x, scale = torch.randn(2, 3, 4), torch.rand(3, 2) + 0.1
    inner = lambda x, s: ag.quantize(x, s, "E4M3")  # noqa: E731
    got = vmap(vmap(inner), (0, 1))(x, scale)
    assert_same_bits(got, ag.quantize(x, scale.t()[:, :, None], "E4M3"))


@quantizers
def test_torch_func(q):
    x, t = torch.randn(4), torch.randn(4)
    eye = torch.eye(4)
    assert_same_bits(grad(lambda x: q(x).sum())(x), torch.ones(4))
    assert_same_bits(jacrev(q)(x), eye)
    assert_same_bits(jacfwd(q)(x), eye)
    assert_same_bits(vmap(grad(lambda x: (q(x) * 3).sum()))(torch.randn(5, 4)), torch.full((5, 4), 3.0))
    y, tangent = jvp(q, (x,), (t,))
    assert_same_bits(y, q(x))
    assert_same_bits(tangent, t)
    y, pullback = vjp(q, x)
    assert_same_bits(pullback(t)[0], t)
    # d2/dx2 q(x)^3 with the straight-through estimator is 6 q(x), by each of the four orders of the two modes
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            assert torch.equal(outer(inner(lambda x: (q(x) ** 3).sum()))(x), torch.diag(6 * q(x)))


@quantizers
def test_forward_mode(q):
    x, t = torch.randn(4), torch.randn(4)
    with forward_ad.dual_level():
        dual = q(forward_ad.make_dual(x, t))
        primal, tangent = forward_ad.unpack_dual(dual)
    assert_same_bits(primal, q(x))
    assert_same_bits(tangent, t)


@pytest.mark.parametrize(
    "d", [lambda x: ag.dequantize(x, HALF), lambda x: dequantize(x, 0.5), lambda x: DequantizeFunc.apply(x, HALF)]
)
def test_dequantize_under_transforms(d):
    x = torch.randn(4)
    assert_same_bits(jacrev(d)(x), torch.eye(4) * 0.5)
    assert_same_bits(jacfwd(d)(x), torch.eye(4) * 0.5)
    assert torch.equal(hessian(lambda x: (d(x) ** 3).sum())(x), torch.diag(6 * d(x) * 0.25))
    assert_same_bits(vmap(grad(lambda x: d(x).sum()))(torch.randn(5, 4)), torch.full((5, 4), 0.5))


@pytest.mark.compiles
def test_compiled_transforms():
    torch._dynamo.reset()
    q = QUANTIZERS["function"]
    x, t = torch.randn(4), torch.randn(4)
    for f, want in [
        (lambda: vmap(grad(lambda x: (q(x) * 3).sum()))(x[None]), torch.full((1, 4), 3.0)),
        (lambda: jacrev(q)(x), torch.eye(4)),
        (lambda: jacfwd(q)(x), torch.eye(4)),
        (lambda: jvp(q, (x,), (t,))[1], t),
        (lambda: jvp(lambda x: dequantize(x, 0.5), (x,), (t,))[1], t * 0.5),
    ]:
        assert_same_bits(torch.compile(f, fullgraph=True)(), want)


MULTIPLIED = NVFP4 | {"arithmetic": "transformer_engine"}
OPERAND = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: quantize_blocks(x, **MULTIPLIED).sum(),
        lambda x: quantize_gradient(x, E5M2, lambda g: compute_scale(g, E5M2)).square().sum(),
        lambda w: linear(OPERAND, w, recipe="mxfp8").square().sum(),
        lambda x: linear(x, OPERAND, recipe="fp8_current").square().sum(),
    ],
    ids=["blocks", "gradient", "weight", "input"],
)
def test_compiled_gradients_of_an_argument_itself(function):
    """Dynamo left out the Function of what torch.func differentiates by: gradients were 0, or not rounded."""
    torch._dynamo.reset()
    x = torch.randn(32, 64)
    want = grad(function)(x)
    assert_same_bits(torch.compile(grad(function), backend="eager", fullgraph=True)(x), want)
    with pytest.raises(RuntimeError, match="vmap"):  # torch has no rule for it, as operators.md says
        torch.compile(vmap(grad(function)), backend="eager")(x[None])


@pytest.mark.filterwarnings("ignore:Dynamo")
def test_compiled_tangents_of_multiplied_blocks():
    """Compiled they were 0; eager has them."""
    torch._dynamo.reset()
    x, t = torch.randn(4, 64), torch.randn(4, 64)
    f = lambda: jvp(lambda x: quantize_blocks(x, **MULTIPLIED), (x,), (t,))[1]  # noqa: E731
    assert_same_bits(torch.compile(f, backend="eager")(), t)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="forward mode of arithmetic"):
        torch.compile(f, backend="eager", fullgraph=True)()


def test_codes_have_no_gradient_under_transforms():
    codes, tangent = jvp(lambda x: encode(x, E5M2), (torch.randn(4),), (torch.ones(4),))
    assert codes.dtype == torch.uint8 and not tangent.any()
    assert_same_bits(grad(lambda s: decode(encode(torch.ones(4), E5M2), E5M2, s).sum())(HALF), torch.tensor(0.0))


def test_per_sample_gradients_of_a_module():
    module, x = torch.nn.Linear(4, 2), torch.randn(6, 4)

    def loss(parameters, x):
        quantized = {name: quantize(p, E4M3, 0.25) for name, p in parameters.items()}
        return functional_call(module, quantized, (x,)).sum()

    got = vmap(grad(loss), (None, 0))(dict(module.named_parameters()), x)
    assert_same_bits(got["weight"], x[:, None, :].expand(6, 2, 4))


def test_stochastic_draws_under_vmap():
    x = torch.full((64, 8), 1.0625)
    f = lambda x: quantize(x, E5M2, rounding="stochastic")  # noqa: E731
    different = vmap(f, randomness="different")(x)
    same = vmap(f, randomness="same")(x)
    assert different.unique(dim=0).shape[0] > 1 and same.unique(dim=0).shape[0] == 1
    assert set(different.unique().tolist()) == {1.0, 1.25}


@pytest.mark.parametrize("shape", [(), (4,), (1, 1, 1)], ids=str)
def test_jagged_nested_tensors(shape):
    scale = torch.full(shape, 0.3)
    parts = [torch.randn(2, 4), torch.randn(5, 4)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    f = lambda x: ag.quantize(x, scale, "E5M2")  # noqa: E731
    y = f(nested)
    want = ag.quantize(torch.cat(parts), scale.reshape(scale.shape[-1:] if scale.ndim else ()), "E5M2")
    assert_same_bits(y.values(), want)
    (y * 2).values().sum().backward()
    assert_same_bits(nested.grad.values(), torch.full((7, 4), 2.0))
    codes = ag.encode(nested.detach(), HALF, "E5M2")
    assert_same_bits(ag.decode(codes, HALF, "E5M2").values(), ag.quantize(torch.cat(parts), HALF, "E5M2"))


@pytest.mark.compiles
def test_jagged_nested_tensors_compile():
    torch._dynamo.reset()
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(5, 4)], layout=torch.jagged)
    f = lambda x: quantize(x, E5M2, 0.5)  # noqa: E731
    assert_same_bits(torch.compile(f, fullgraph=True)(nested).values(), f(nested).values())


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_records_one_node(mode, pre_dispatch):
    graph = make_fx(QUANTIZERS["function"], tracing_mode=mode, pre_dispatch=pre_dispatch)(torch.randn(3))
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert targets.count("altgrad.quantize.default") == 1
    x = torch.randn(3)
    assert_same_bits(graph(x), quantize(x, E5M2, 0.5))


class Quantized(torch.nn.Module):
    def __init__(self, format):
        super().__init__()
        self.format = format
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x):
        return self.linear(quantize(x, self.format, self.scale))


def test_modules_that_hold_formats(tmp_path):
    module, x = Quantized(E5M2), torch.randn(2, 4)
    torch.save(module, tmp_path / "module.pt")
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(tmp_path / "module.pt", weights_only=False),
        pickle.loads(pickle.dumps(torch.fx.symbolic_trace(module))),
        torch.jit.trace(module, (x,)),
    ):
        assert_same_bits(other(x), module(x))


def test_autocast_leaves_dtypes_alone(device):
    x = torch.randn(4, 4, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert quantize(x, E5M2).dtype == torch.float32
        assert quantize(x @ x, E5M2).dtype == torch.bfloat16
        assert dequantize(x, 2.0).dtype == torch.float32
        assert_same_bits(quantize(x, E5M2, 0.3), torch.ops.altgrad.quantize(x, torch.tensor(0.3), "E5M2"))


def test_inference_mode(device):
    x = torch.randn(4, device=device)
    want = quantize(x, E5M2)
    with torch.inference_mode():
        y = quantize(x, E5M2)
    assert y.is_inference() and not y.requires_grad
    assert_same_bits(y, want)


def test_meta_device():
    """The aten kernel is registered for every device; meta proves it."""
    x = torch.randn(2, 3, device="meta").t()
    y = quantize(x, E5M2, 0.5)
    assert (y.device.type, y.shape, y.stride(), y.dtype) == ("meta", (3, 2), (1, 3), torch.float32)
    for name, sample in SAMPLES.items():
        outputs = getattr(ag, name)(*sample(x, torch.empty((), device="meta")))
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            assert output.is_meta and (output.shape == x.shape or name not in LAID_OUT_LIKE_X)
        for key in ("Meta", "XPU", "MPS", "HPU", "PrivateUse1"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"altgrad::{name}", key)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    x = torch.randn(4, requires_grad=True)
    f = lambda x: (quantize(x, E5M2, 0.5) ** 2).sum()  # noqa: E731
    torch.utils.checkpoint.checkpoint(f, x, use_reentrant=reentrant).backward()
    assert_same_bits(x.grad, 2 * quantize(x, E5M2, 0.5))


@pytest.mark.compiles
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_compiled_activation_checkpointing(scale, each_value_is_traced_once):
    """Inductor drops a division by 1 and would have the input of the region computed again."""
    torch._dynamo.reset()

    def region(x, w):
        return (quantize(x, E5M2, scale) @ (decode(encode(w, E4M3, scale), E4M3, scale) * w)).relu()

    def step(f):
        x, w = (torch.linspace(-3, 3, 64).reshape(8, 8).requires_grad_() for _ in range(2))
        f(x, w).sum().backward()
        return x.grad, w.grad

    checkpointed = lambda x, w: torch.utils.checkpoint.checkpoint(region, x, w, use_reentrant=False)  # noqa: E731
    for got, want in zip(step(torch.compile(checkpointed, fullgraph=True)), step(region)):
        torch.testing.assert_close(got, want)  # the product is Inductor's


def test_compiled_autograd():
    """The format of a gradient is part of what a compiled backward pass is kept under."""
    torch._dynamo.reset()
    g = torch.linspace(0.1, 5, 8)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        for format, scale in [("E5M2", 0.5), ("E2M1", 0.5), ("E2M1", 0.25), ("E4M3", 0.5)]:
            x = torch.randn(8, requires_grad=True)
            (quantize(quantize_gradient(x, format, scale), E5M2) * g).sum().backward()
            assert_same_bits(x.grad, quantize(g, format, scale))
