"""Simulated products against their definition in float64 (simulation_reference.py), forward and backward."""

import collections
import itertools

import numpy as np
import pytest
import simulation_reference
import torch
from conftest import DTYPES, all_inputs, assert_same_bits
from torch.utils._python_dispatch import TorchDispatchMode

from altgrad.quantization import E4M3, PerAxis, PerBlock, PerTensor, compute_scale, quantize, quantize_blocks
from altgrad.simulation import (
    RECIPES,
    Product,
    Recipe,
    Rule,
    SimulationState,
    attention,
    conv,
    linear,
    matmul,
    operands,
    products,
)
from altgrad.simulation.operands import State, quantize_operand, restored, stored
from altgrad.simulation.products import ProductState
from ops_registry.modes import SATURATIONS

OWN = [
    Recipe("rows of floats", *[(Rule("E4M3", per="row"), Rule("E3M4", per="row"))] * 3),
    Recipe("blocks of floats", *[(Rule("E2M1", per=8), Rule("E5M2", per=(4, 8)))] * 3),
    Recipe("wide", *[(Rule("E0M7"), Rule("E1M6", per=16, scale_format="E5M2"))] * 3),
    Recipe(
        "headroom", *[(Rule("E2M1", per=16, scale_format="E4M3", headroom=17 / 16, rounding="stochastic"),) * 2] * 3
    ),
    Recipe("mixed", (Rule("E4M3"), None), (None, Rule("E4M3", per=32, power_of_two="floor")), (Rule("E5M2"), None)),
    Recipe("fixed", *[(Rule("E4M3", scale=0.37), Rule("E4M3FNUZ", scale=2.0**-9))] * 3),
    Recipe(
        "rotated", Product(Rule("E4M3"), Rule("E4M3"), 16), Product(None, Rule("E4M3"), 16), Product(None, None, 16)
    ),
]
ALL = [*RECIPES.values(), *OWN]
SHAPES = [((37,), 70, 45), ((2, 3, 5), 33, 17), ((64,), 128, 128), ((1,), 1, 1)]


def tensors(shape, k, n, dtype, seed=0):
    """x, weight, bias and dy with outliers, so that scales differ.

    Multiples of 2^-12 below 2^8: sums of 16 of them, as in a Hadamard transform, are exact in float32 in any order.
    """
    torch.manual_seed(seed)
    spread = [torch.randn(*size) * torch.randn(*size[:-1], 1).exp() for size in ((*shape, k), (n, k), (*shape, n))]
    x, w, dy = (((t.clamp(-200, 200) * 2**12).round() / 2**12).to(dtype) for t in spread)
    return x, w, torch.randn(n).to(dtype), dy


def state_for(recipe):
    """Seeds of 6 rules; scales too, one for each of x, w and dy, which are rounded once for two products."""
    seeds = torch.arange(6) * 0x9E3779B97F4A7C1 if recipe.is_stochastic else None
    return ProductState(seeds, torch.tensor([0.01, 0.02, 0.03, 0.02, 0.03, 0.01]) if recipe.history else None)


def run(x, w, bias, dy, recipe, state, function=linear):
    leaves = {"dx": x.clone().requires_grad_(), "dw": w.clone().requires_grad_()}
    if bias is not None:
        leaves["db"] = bias.clone().requires_grad_()
    y = function(leaves["dx"], leaves["dw"], leaves.get("db"), recipe, state=state)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


class Calls(TorchDispatchMode):
    """How often each operator of altgrad is called."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.counts[op.name()] += 1
        return op(*args, **kwargs or {})


def defined(x, w, bias, dy, recipe, state):
    flat = [t.float().reshape(-1, t.shape[-1]).numpy() for t in (x, w, dy)]
    seeds, scales = (None if t is None else t.numpy() for t in state[:2])
    return simulation_reference.layer(
        flat[0], flat[1], None if bias is None else bias.float().numpy(), flat[2], recipe, seeds, scales
    )


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("shape, k, n", SHAPES, ids=str)
def test_float32_is_the_definition_to_accumulation(recipe, shape, k, n):
    x, w, bias, dy = tensors(shape, k, n, torch.float32)
    for b in (bias, None):
        state = state_for(recipe)
        got, want = run(x, w, b, dy, recipe, state), defined(x, w, b, dy, recipe, state)
        assert got.keys() == want.keys()
        for name, (value, magnitude) in want.items():
            error = np.abs(got[name].reshape(value.shape).double().numpy() - value)
            assert (error <= 16 * 2.0**-24 * magnitude).all(), (name, (error / magnitude).max() * 2**24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_sixteen_bits_are_the_definition_rounded_once(recipe, dtype, device):
    x, w, bias, dy = tensors((4, 40), 130, 70, dtype)
    if dtype == torch.float16:
        dy = (dy * 0.01).half()  # so that nothing overflows
    state = state_for(recipe)
    moved = [t.to(device) for t in (x, w, bias, dy)]
    got = run(*moved, recipe, ProductState(*(None if t is None else t.to(device) for t in state[:2])))
    for name, (value, _) in defined(x, w, bias, dy, recipe, state).items():
        want = torch.from_numpy(value).to(dtype)
        same = (got[name].cpu().reshape(want.shape) == want).float().mean().item()
        assert got[name].dtype == dtype and same >= 0.98, (name, same)


def test_float64_is_computed_in_float64():
    x, w, bias, dy = tensors((8,), 33, 5, torch.float64)
    rule = Rule("E4M3", per="row")
    recipe = Recipe("rows", (rule, None))
    got = run(x, w, bias, dy, recipe, ProductState())
    scale = compute_scale(x, E4M3, granularity=PerAxis(0))
    assert torch.allclose(got["y"], quantize(x, E4M3, scale) @ w.T + bias, rtol=1e-14, atol=1e-14)


OPTIONS = [{}, {"method": "percentile", "fraction": 0.9}, {"method": "mse"}]
ROUNDED = [{}, {"power_of_two": "floor"}, {"power_of_two": "even"}, {"power_of_two": "rceil"}, {"scale_format": "E4M3"}]


@pytest.mark.parametrize("options, rounded", list(itertools.product(OPTIONS, ROUNDED)), ids=str)
@pytest.mark.parametrize("per", ["tensor", "row", 16, (8, 16)], ids=str)
def test_operands_are_quantize_blocks(per, options, rounded):
    """Every way to a scale that compute_scale has; what is left out of the values is the scale."""
    x = torch.randn(24, 64) * torch.randn(24, 1).exp()
    granularity = {"tensor": PerTensor(), "row": PerAxis(0)}.get(per) or PerBlock(per)
    values, scale, _ = quantize_operand(x, Rule("E2M3", per=per, **options, **rounded), 0, State())
    want = quantize_blocks(x, "E2M3", granularity=granularity, **options, **rounded)
    if scale is None:
        assert torch.equal(values, want)
        return
    assert scale.shape in ((), (24, 1))
    assert torch.allclose(values * scale, want, rtol=2.0**-23, atol=0)
    if not rounded:
        assert torch.equal(values * scale, want)


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_operands_of_sixteen_bits_are_exact(recipe):
    """bfloat16 where 8 significant bits suffice: the operand of a bfloat16 tensor is that of its float32 copy."""
    x = (torch.randn(48, 130) * torch.randn(48, 1).exp()).bfloat16()
    for rule in {rule for rule in recipe.rules if rule is not None and rule.format is not None}:
        state = State(torch.tensor(7), torch.tensor(0.0123))
        for dtype in (torch.bfloat16, torch.float16):
            narrow = quantize_operand(x.to(dtype), rule, 0, state)
            exact = quantize_operand(x.to(dtype).float(), rule, 0, state)
            assert torch.equal(narrow.values.float(), exact.values)
            assert (narrow.scale is None) == (exact.scale is None) == (not rule.has_outer_scale(None))
            if recipe in RECIPES.values():
                assert narrow.values.dtype == torch.bfloat16


AGAIN = Rule(None, source="forward")


@pytest.mark.parametrize("shape", [(8, 8), (16, 8)], ids=str)
def test_the_forward_operand_with_scales_of_rows_again(shape):
    """Its scales lie along the contraction of the product for the gradient, and are in the operand there."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 8, generator=generator) * torch.arange(1.0, n + 1)[:, None] for n in shape)
    x, w = x.requires_grad_(), w.requires_grad_()
    dy = torch.randn(*shape, generator=generator)
    rows, f = Rule("E4M3", per="row"), "E4M3"
    recipe = Recipe("again", (rows, rows), grad_input=(None, AGAIN), grad_weight=(None, AGAIN))
    of_x, of_w = torch.autograd.grad(linear(x, w, None, recipe), (x, w), dy)
    values = [quantize(t, f, compute_scale(t, f, granularity=PerAxis(0))).detach() for t in (x, w)]
    assert torch.allclose(of_x, dy @ values[1], rtol=1e-5, atol=1e-4)
    assert torch.allclose(of_w, dy.T @ values[0], rtol=1e-5, atol=1e-4)


def test_the_forward_operand_again_is_not_rounded_to_bfloat16():
    w, dy = torch.randn(16, 16).half(), torch.randn(4, 16).half()
    x = torch.zeros(4, 16).half().requires_grad_()
    recipe = Recipe("again", (None, Rule("E4M3")), grad_input=Product(None, AGAIN, 16))
    (got,) = torch.autograd.grad(linear(x, w, None, recipe), x, dy)
    value = quantize(w.float(), "E4M3", compute_scale(w.float(), "E4M3")).double()
    assert (got - dy.double() @ value).norm() < 2**-11 * got.double().norm()


@pytest.mark.parametrize("per", [32, (3, 32)], ids=str)
def test_a_percentile_is_one_of_numbers_that_are_there(per):
    """Not of the zeros that fill up the last block."""
    x = torch.full((8, 40), 3.0)
    x[:, 32:] = 1000 * torch.arange(1.0, 9)
    block = PerBlock(per if isinstance(per, tuple) else (1, per))
    want = quantize_blocks(x, "E4M3", granularity=block, method="percentile", fraction=0.5)
    recipe = Recipe("percentile", (Rule("E4M3", per=per, method="percentile", fraction=0.5), None))
    assert_same_bits(linear(x, torch.eye(40), None, recipe), want)


def test_a_format_with_values_below_bfloat16s():
    x, recipe = torch.randn(4, 8).bfloat16(), Recipe("far", (Rule("e2m1b140f"), None))
    want = linear(x.float(), torch.eye(8), None, recipe).bfloat16()
    assert want.count_nonzero() == want.numel()
    assert_same_bits(linear(x, torch.eye(8).bfloat16(), None, recipe), want)


def test_bias_has_no_rounding_of_its_own():
    """In bfloat16, 256 + 1 is 256; the product is not rounded before the bias is added."""
    x, w, bias = (torch.tensor(t).bfloat16() for t in ([[256.0, 1.0]], [[1.0, 1.0]], [1.0]))
    assert linear(x, w, bias, Recipe("forward", (Rule("E5M2"), Rule("E5M2")))).item() == 258


class TestFunctions:
    """Functions with another contraction are the linear product on rearranged operands."""

    def test_matmul_broadcasts(self):
        torch.manual_seed(0)
        for left, right in [((3, 4, 5), (3, 5, 6)), ((2, 1, 4, 5), (3, 5, 6)), ((5,), (5, 6)), ((4, 5), (5,))]:
            a, b = torch.randn(left), torch.randn(right)
            assert torch.allclose(matmul(a, b, Recipe("high")), a @ b, atol=1e-6)
            assert matmul(a, b, "nvfp4").shape == (a @ b).shape

    def test_batched_product_is_a_product_of_each(self):
        torch.manual_seed(0)
        a, b = (torch.randn(size, requires_grad=True) for size in ((3, 20, 40), (3, 40, 24)))
        y = matmul(a, b, "mxfp8")
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, (a, b), dy)
        for i in range(3):
            part = linear(a[i], b[i].mT, None, "mxfp8")
            assert torch.allclose(part, y[i], rtol=1e-5, atol=1e-5)
            for whole, each in zip(got, torch.autograd.grad(part, (a, b), dy[i])):
                assert torch.allclose(whole[i], each[i], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("d", [1, 2, 3])
    @pytest.mark.parametrize("groups", [1, 4])
    def test_convolution_in_high_precision_is_torch(self, d, groups):
        torch.manual_seed(0)
        function = [torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d][d - 1]
        x, w, bias = torch.randn(2, 8, *(7, 9, 6)[:d]), torch.randn(12, 8 // groups, *(3, 2, 3)[:d]), torch.randn(12)
        for options in ({}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}, {"padding": "valid"}):
            leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
            got, want = (
                f(*leaves, *recipe, groups=groups, **options)
                for f, recipe in ((conv, [Recipe("high")]), (function, []))
            )
            dy = torch.randn_like(want)
            for a, b in zip(
                (got, *torch.autograd.grad(got, leaves, dy)), (want, *torch.autograd.grad(want, leaves, dy))
            ):
                assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)

    def test_convolution_contracts_channels_times_kernel(self):
        """The patches of a 3 x 3 kernel as rows of the linear product, in blocks of 32 of C * 9 elements."""
        torch.manual_seed(0)
        x, w = torch.randn(2, 5, 6, 6), torch.randn(7, 5, 3, 3)
        patches = torch.nn.functional.unfold(x, 3).mT.reshape(-1, 45)
        for recipe in ("mxfp4", "fp8_current", "fp8_block"):
            want = linear(patches, w.flatten(1), None, recipe).view(2, 4, 4, 7).permute(0, 3, 1, 2)
            assert torch.equal(conv(x, w, None, recipe), want)

    @pytest.mark.parametrize("d", [1, 2, 3])
    def test_convolutions_are_laid_out_like_torchs(self, d):
        function = [torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d][d - 1]
        x, w = torch.randn(2, 3, *(8,) * d), torch.randn(6, 3, *(3,) * d)
        last = [torch.contiguous_format, torch.channels_last, torch.channels_last_3d][d - 1]
        for given, weight in ((x, w), (x.to(memory_format=last), w), (x, w.to(memory_format=last))):
            assert conv(given, weight, None, "mxfp8").stride() == function(given, weight).stride()
        for options in ({"stride": (2,)}, {"padding": (1,)}, {"dilation": (2,)}, {"stride": np.int64(2)}):
            want = function(x, w, **options)
            assert torch.allclose(conv(x, w, None, Recipe("high"), **options), want, rtol=1e-4, atol=1e-4)
        assert conv(x[:0], w, None, "mxfp8").shape == function(x[:0], w).shape

    @pytest.mark.parametrize(
        "mask", [torch.ones(6, 6).tril(-2).bool(), torch.full((6, 6), -torch.inf).triu(-1)], ids=str
    )
    def test_a_query_without_keys_is_zero(self, mask):
        """As in torch's attention, and no gradient is NaN."""
        q, k, v = (torch.randn(2, 6, 8, requires_grad=True) for _ in range(3))
        got, want = (
            f(q, k, v, *recipe, attn_mask=mask)
            for f, recipe in (
                (attention, [Recipe("high")]),
                (torch.nn.functional.scaled_dot_product_attention, []),
            )
        )
        assert torch.allclose(got, want, atol=1e-6)
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (got, want))):
            assert torch.allclose(a, b, atol=1e-5)
        low = attention(*(t.bfloat16() for t in (q, k, v)), "mxfp8", attn_mask=mask)
        assert low.dtype == torch.bfloat16 and not low.isnan().any()

    @pytest.mark.parametrize(
        "options",
        [{}, {"is_causal": True}, {"attn_mask": torch.randn(6, 6)}],
        ids=lambda options: "-".join(options) or "plain",
    )
    def test_attention_in_high_precision_is_torch(self, options):
        torch.manual_seed(0)
        q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        assert torch.allclose(attention(q, k, v, Recipe("high"), enable_gqa=True, **options), want, atol=1e-6)
        scores = matmul(q, k.repeat_interleave(2, 1).mT, "mxfp8") * 8**-0.5
        if not options:
            want = matmul(scores.softmax(-1), v.repeat_interleave(2, 1), "mxfp8")
            assert torch.equal(attention(q, k, v, "mxfp8", enable_gqa=True), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_like_torch(dtype):
    x, w, bias, _ = tensors((8,), 40, 24, torch.float32)
    want = linear(x.to(dtype), w.to(dtype), bias.to(dtype), "nvfp4", state=state_for(RECIPES["nvfp4"]))
    with torch.autocast("cpu", dtype):
        got = linear(x, w, bias, "nvfp4", state=state_for(RECIPES["nvfp4"]))
    assert got.dtype == dtype and torch.equal(got, want)
    with torch.autocast("cpu", dtype):  # a float64 product stays one
        assert linear(x.double(), w.double(), None, "mxfp8").dtype == torch.float64


@pytest.mark.parametrize("recipe", ["fp8_current", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("shape, k, n", [((0,), 4, 3), ((2, 0), 4, 3), ((3,), 0, 2), ((3,), 2, 0)], ids=str)
def test_empty(recipe, shape, k, n):
    x, w, bias, dy = tensors(shape, k, n, torch.float32)
    got = run(x, w, bias, dy, RECIPES[recipe], None)
    assert {name: t.shape for name, t in got.items()} == {"y": dy.shape, "dx": x.shape, "dw": w.shape, "db": bias.shape}
    assert not got["dx"].any() or n


def test_a_matrix_of_results_is_no_view():
    """As of nn.Linear: where a pipeline's schedule splits the backward pass, it detaches a stage's output in place."""
    linear(torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)).detach_()


def test_what_is_kept_for_the_backward_pass(monkeypatch):
    """Per tensor: the rounded operands, once, in bytes for wide products; else x and w themselves, no copy."""
    x, w = torch.randn(64, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear(x, w, None, "mxfp8")
    assert sorted(t.data_ptr() for t in saved) == sorted((x.data_ptr(), w.data_ptr()))
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear(x.bfloat16(), w.bfloat16(), None, "fp8_current")
        linear(x.bfloat16(), w.bfloat16().repeat(64, 1), None, "fp8_current")
    assert [(tuple(t.shape), t.dtype) for t in saved if t.ndim and t.numel()] == [
        ((64, 32), torch.bfloat16),
        ((16, 32), torch.float8_e4m3fn),
        ((64, 32), torch.float8_e4m3fn),
        ((1024, 32), torch.float8_e4m3fn),
    ]
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear(x, w.detach(), None, "mxfp8")
    assert [t.data_ptr() for t in saved] == [w.data_ptr()]
    monkeypatch.setattr(products, "stored", lambda *args: pytest.fail("kept without a backward pass"))
    with torch.no_grad():
        linear(x, w, None, "fp8_current")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rule, in_bytes",
    [
        *(
            (Rule("E4M3", saturation=saturation, scale=scale), True)
            for saturation in SATURATIONS
            for scale in (None, 1.0)
        ),
        *((Rule("E4M3", **options), False) for options in ({"power_of_two": "ceil"}, {"scale_format": "E5M2"})),
        *((Rule("E4M3", per=per), False) for per in ("row", (32, 32))),
        *((Rule(name), False) for name in ("E3M4", "E5M2", "E2M1", "e4m3b7", "E4M3FNUZ", "FP16")),
    ],
    ids=repr,
)
def test_what_is_kept_loses_nothing(rule, in_bytes, dtype):
    everything = all_inputs(torch.bfloat16).view(1024, 64)
    for x in (everything, everything.nan_to_num(0, 0, 0) * 2.0**-120):
        operand = quantize_operand(x.to(dtype), rule, 0, State())
        kept = stored(operand, rule)
        assert (kept.values.dtype == torch.float8_e4m3fn) == in_bytes
        assert_same_bits(restored(kept, rule, dtype).values, operand.values)


def test_the_largest_is_rounded_where_a_compiler_does_not_round(monkeypatch):
    """Inductor on a GPU made 1.1625 of the largest of ``x * 0.3`` in bfloat16."""
    x, unrounded = torch.tensor([[1.1640625]], dtype=torch.bfloat16), torch.tensor([[1.162500023841858]])
    monkeypatch.setattr(operands, "amax", lambda x, dims: unrounded)
    assert operands.rounded_amax(x, (0, 1)) is unrounded
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert operands.rounded_amax(x, (0, 1)).item() == x.item()


def test_transforms_of_functions():
    x, w = torch.randn(5, 3, 8), torch.randn(4, 8)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: linear(x, w, None, "fp8_current").sum()))(x)
    for i in range(5):
        assert torch.equal(per_sample[i], torch.func.grad(lambda x: linear(x, w, None, "fp8_current").sum())(x[i]))
    layer = torch.nn.Linear(8, 4)
    gradient = torch.func.grad(lambda w: linear(x, w, None, "mxfp8").square().sum())(layer.weight)
    linear(x, layer.weight, None, "mxfp8").square().sum().backward()
    assert torch.equal(gradient, layer.weight.grad)


@pytest.mark.parametrize("recipe", ["mxfp8", "fp8_current", "unit_scaled_fp8"])  # these keep both operands
def test_a_penalty_on_a_gradient_raises(recipe):
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    for value in (linear(x, w, None, recipe).sum(), linear(x, w, None, recipe).square().sum()):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            (value + gradient.square().sum()).backward()


@pytest.mark.parametrize("recipe", ["mxfp8", "fp8_current", "fp8_block", "unit_scaled_fp8"])  # the last three keep one
def test_a_penalty_on_a_gradient_of_x_reaches_the_weight(recipe):
    """Its gradient to the weight was that of the loss alone, and under torch.func 0, where an operand is kept."""
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    y = linear(x, w, None, recipe)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(y.sum() + gradient.square().sum(), w)
    of_x = lambda x, w: torch.func.grad(lambda x: linear(x, w, None, recipe).sum())(x).square().sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.func.grad(of_x, 1)(x.detach(), w.detach())


@pytest.mark.parametrize("recipe", ["mxfp8", "fp8_current"])
def test_gradients_of_functions_require_none(recipe):
    x, w = torch.randn(3, 8), torch.randn(4, 8)
    _, vjp = torch.func.vjp(lambda x: linear(x, w, None, recipe), x)
    assert not vjp(torch.ones(3, 4))[0].requires_grad
    assert not torch.func.jacrev(lambda x: linear(x, w, None, recipe))(x).requires_grad


def test_a_second_differentiation_raises():
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)

    def once(x):
        return torch.func.grad(lambda x: linear(x, w.detach(), None, "mxfp8").square().sum())(x).sum()

    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.func.grad(once)(x.detach())
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: linear(x, w.detach(), None, "mxfp8"), (x.detach(),), (x.detach(),))


IMAGE = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x, w: linear(x, w, None, "mxfp9"), ValueError, "recipe must be one of fp8_current.*'mxfp9'"),
        (lambda x, w: linear(x, w, None, 3), TypeError, "recipe must be a Recipe"),
        (lambda x, w: linear(x, w, w[0]), ValueError, r"bias must be \[4\], as weight has features out, got \(8,\)"),
        (lambda x, w: linear([1.0], w), TypeError, r"x must be a tensor, got list \[1.0\]"),
        (lambda x, w: linear(x, None), TypeError, "weight must be a tensor, got NoneType None"),
        (lambda x, w: matmul(x, 3), TypeError, "b must be a tensor, got int 3"),
        (lambda x, w: matmul(x, x.double()), TypeError, "a, b must have one .* got torch.float32, torch.float64"),
        (lambda x, w: attention(x, 3, x), TypeError, "key must be a tensor, got int 3"),
        (lambda x, w: attention(x, x, x.half()), TypeError, "query, key, value must have one floating-point dtype"),
        (lambda x, w: attention(x, x, x, attn_mask=3), TypeError, "attn_mask must be a tensor, got int 3"),
        (lambda x, w: linear(x, w[:, 1:]), ValueError, "must share K"),
        (lambda x, w: linear(x, w.double()), TypeError, "one floating-point dtype.*float32, torch.float64"),
        (lambda x, w: linear(x.int(), w.int()), TypeError, "one floating-point dtype"),
        (lambda x, w: linear(x, w, None, "fp8_delayed"), ValueError, "delayed scaling needs a state"),
        (lambda x, w: matmul(x, w), ValueError, "must share K"),
        (lambda x, w: conv(x, w), ValueError, "must agree"),
        (lambda x, w: attention(x, x, x, attn_mask=x, is_causal=True), ValueError, "not both"),
        (lambda x, w: attention(x, x, x, attn_mask=x.int()), TypeError, "attn_mask must be boolean or floating"),
        (
            lambda x, w: attention(*[torch.ones(n, 2, 4) for n in (4, 3, 3)], enable_gqa=True),
            ValueError,
            r"multiples of those of key and value, got \[4, 3, 3\]",
        ),
        (lambda x, w: linear(x, w, state=SimulationState("nvfp4")), TypeError, r"what SimulationState.of\(\) gives"),
        (lambda x, w: conv(*IMAGE, padding=-1), ValueError, "padding must be one or 2 integers of at least 0, got -1"),
        (lambda x, w: conv(*IMAGE, padding="sme"), ValueError, "padding must be 'same', 'valid' or .* got 'sme'"),
        (lambda x, w: conv(*IMAGE, padding="same", stride=2), ValueError, "'same' needs a stride of 1, got 2"),
        (lambda x, w: conv(*IMAGE, stride=(1, 1, 1)), ValueError, "stride must be one or 2 integers of at least 1"),
        (lambda x, w: conv(*IMAGE, dilation=0), ValueError, "dilation must be one or 2 integers of at least 1, got 0"),
        (lambda x, w: conv(IMAGE[0][..., :2], IMAGE[1]), ValueError, r"spans \[3, 3\], .* with its padding, \[8, 2\]"),
        (lambda x, w: conv(*IMAGE, torch.ones(1)), ValueError, r"bias must be \[4\].*got \(1,\)"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 8), torch.randn(4, 8))


ONE_RULE = Rule("E4M3", per=32, power_of_two="rceil")
ONE_TRANSFORMED = Recipe("one transformed", (None, None), (ONE_RULE, None), Product(ONE_RULE, None, 16))


@pytest.mark.parametrize(
    ("recipe", "tokens", "leaves", "expected"),
    [
        *((name, 32, "xw", 1) for name in ("mxfp8", "mxfp4", "mx_ocp", "fp8_block", "fp8_rowwise")),
        *((name, 32, "xw", 0) for name in ("fp8_current", "fp8_delayed", "unit_scaled_fp8")),
        ("mxfp8", 7, "xw", 1),
        ("mxfp8", 32, "x", 0),
        ("mxfp8", 32, "w", 0),
        ("nvfp4", 32, "xw", 0),  # stochastic
        (ONE_TRANSFORMED, 32, "xw", 1),
        (ONE_TRANSFORMED, 24, "xw", 0),  # the transform needs whole groups
        (Recipe("one", (None, None), (ONE_RULE, None), (ONE_RULE, None)), 32, "xw", 1),
        (Recipe("other rules", (None, None), (ONE_RULE, None), (Rule("E4M3", per=16), None)), 32, "xw", 0),
        (Recipe("both transformed", *[Product(ONE_RULE, None, 16)] * 3), 32, "xw", 0),
        (Recipe("squares", *[(Rule("E4M3", per=(32, 32), power_of_two="rceil"), None)] * 3), 32, "xw", 0),
        (Recipe("summed", *[(ONE_RULE, ONE_RULE)] * 3, accumulator="BLACKWELL_MXFP8"), 32, "xw", 0),
    ],
    ids=str,
)
def test_both_operands_of_the_incoming_gradient_are_one_call(recipe, tokens, leaves, expected):
    x, w, dy = torch.randn(tokens, 64), torch.randn(96, 64), torch.randn(tokens, 96)
    recipe = RECIPES.get(recipe, recipe)
    x, w = x.requires_grad_("x" in leaves), w.requires_grad_("w" in leaves)
    y = linear(x, w, None, recipe, state=state_for(recipe))
    with Calls() as calls:
        y.backward(dy)
    assert calls.counts["altgrad::quantize_operands"] == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("recipe", ["mxfp8", "mxfp4", "nvfp4", "fp8_block"])
def test_one_call_gives_the_bits_of_two(recipe, dtype, monkeypatch):
    recipe = RECIPES[recipe]
    args = *tensors((64,), 128, 160, dtype), recipe, state_for(recipe)
    got = run(*args)
    monkeypatch.setattr(products, "are_made_at_once", lambda *args: False)
    for name, want in run(*args).items():
        assert_same_bits(got[name], want)
