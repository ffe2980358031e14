"""Compiled, recomputed and exported: the bits of the eager run, one graph for all steps and for all blocks."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from altgrad.simulation import RECIPES, Product, Recipe, Rule, attention, disabled, linear, simulate
from ops_registry.cpu import backend

SEVERAL = ["fp8_current", "fp8_delayed", "mxfp8", "nvfp4"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


class Block(nn.Module):
    """Two layers and between them nothing that a compiler computes otherwise."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(40, 56), nn.Linear(56, 40)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Blocks(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def run(recipe, compiles=lambda model: None, reentrant=None, steps=3, device="cpu"):
    """Outputs, weights' and inputs' gradients of some steps, and the state in the end.

    Not the gradients of biases: a compiler may add them up in another order.
    """
    model = Blocks(reentrant).to(device)
    simulation = simulate(model, recipe, seed=1)
    compiles(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.ndim == 2], 1e-3)
    seen = []
    for step in range(steps):
        x = torch.randn(3, 20, 40, generator=torch.Generator().manual_seed(step)).to(device).requires_grad_()
        model.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        y = model(x)
        y.square().sum().backward()
        optimizer.step()
        simulation.step()
        seen += [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.ndim == 2)]
        seen = [t.clone() for t in seen]
    return [*seen, *(buffer for state in simulation.states.values() for buffer in state.buffers())]


def assert_same(got, want):
    assert [torch.equal(a, b) for a, b in zip(got, want, strict=True)] == [True] * len(want)


def test_the_steps_differ():
    """Otherwise the tests below could not fail."""
    for recipe in ("nvfp4", "fp8_delayed"):
        want, state = run(recipe), run(recipe, lambda model: None, steps=1)
        assert not torch.equal(want[-1], state[-1])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_checkpointed_is_eager(recipe, reentrant):
    assert_same(run(recipe, reentrant=reentrant), run(recipe))


@pytest.mark.parametrize("recipe", [*SEVERAL, "fp8_block", "unit_scaled_fp8"])
def test_compiled_is_eager(recipe):
    counter = CompileCounterWithBackend("aot_eager")
    assert_same(run(recipe, lambda model: model.compile(fullgraph=True, backend=counter)), run(recipe))
    assert counter.frame_count == 1


@pytest.mark.parametrize("recipe", SEVERAL)
def test_one_graph_for_all_blocks(recipe):
    counter = CompileCounterWithBackend("aot_eager")

    def compiles(model):
        for block in model.blocks:
            block.compile(fullgraph=True, backend=counter)

    assert_same(run(recipe, compiles), run(recipe))
    assert counter.frame_count == 1


@pytest.mark.parametrize("recipe", ["fp8_delayed", "nvfp4"])
def test_compiled_with_checkpoints_is_eager(recipe):
    compiles = lambda model: model.compile(fullgraph=True, backend="aot_eager")  # noqa: E731
    assert_same(run(recipe, compiles, reentrant=False), run(recipe))


def test_compiled_autograd_refuses_delayed_scaling():
    """A backward pass that writes to what the forward pass does not is more than it takes (torch 2.13); docs say so."""
    layer = nn.Linear(32, 16)
    simulate(layer, "fp8_delayed")

    def step(x):
        layer(x).square().sum().backward()

    with torch._dynamo.config.patch(compiled_autograd=True), pytest.raises(IndexError):
        torch.compile(step, backend="aot_eager")(torch.randn(8, 32))


@pytest.mark.parametrize(
    ("backend", "hadamard"),
    [("aot_eager", 0), ("aot_eager", 16), pytest.param("inductor", 0, marks=pytest.mark.compiles)],
)
def test_backward_passes_after_all_forward_passes(backend, hadamard):
    """Each records beside the others, with a transform the amax of x and of weights too; the largest is not last."""
    e4m3, e5m2 = Rule("E4M3", history=4), Rule("E5M2", history=4)
    products = (e4m3, e4m3), Product(e5m2, e4m3, hadamard=hadamard), Product(e5m2, e4m3, hadamard=hadamard)
    results = []
    for compiles in (False, True):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(32, 16, bias=False), nn.Linear(16, 24, bias=False))
        simulation = simulate(layers, Recipe("delayed", *products))
        if compiles:
            layers.compile(fullgraph=True, backend=backend)
        seen = []
        for _ in range(2):
            inputs = [(size * torch.randn(8, 32)).requires_grad_() for size in (1, 3, 0.5)]
            for y in [layers(x) for x in inputs]:
                y.square().sum().backward()
            seen += [x.grad for x in inputs]
            seen += [buffer.clone() for state in simulation.states.values() for buffer in state.buffers()]
            simulation.step()
        results.append([*seen, *(layer.weight.grad for layer in layers)])
    assert_same(*results)


@pytest.mark.compiles
@pytest.mark.parametrize("recipe", SEVERAL)
def test_inductor_is_eager(recipe):
    results = []
    for compiles in (False, True):
        torch.manual_seed(0)
        layer, x = nn.Linear(40, 56), torch.randn(20, 40, requires_grad=True)
        simulation = simulate(layer, recipe)
        if compiles:
            layer.compile(fullgraph=True)
        seen = []
        for _ in range(2):
            y = layer(x)
            seen += [y.detach(), *torch.autograd.grad(y.square().sum(), (x, layer.weight))]
            simulation.step()
        results.append([*seen, *layer.simulation.buffers()])
    assert_same(*results)


@pytest.mark.compiles
def test_dynamic_from_the_start_needs_a_switch():
    """As docs/simulation.md says; without it Dynamo fails on the second layer."""
    layers = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    simulate(layers, "mxfp8")
    x = torch.randn(6, 32)
    with pytest.raises(AssertionError, match="root SubgraphTracer"):
        torch.compile(layers, backend="eager", dynamic=True)(x)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(specialize_float=True):
        assert torch.equal(torch.compile(layers, backend="eager", dynamic=True)(x), layers(x))


@pytest.mark.compiles
def test_strict_export_with_a_dynamic_batch_is_without_gradients():
    layers, x = nn.Sequential(nn.Linear(32, 48)), torch.randn(20, 32)
    simulate(layers, "mxfp8")
    with torch.no_grad():
        program = torch.export.export(
            layers, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},), strict=True
        )
    assert torch.equal(program.module()(x[:7]), layers(x[:7]))


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("recipe", "dtype", "share"),
    [("mxfp8", torch.bfloat16, 1.0), ("mxfp8", torch.float32, 0.9), ("fp8_current", torch.float32, 0.9)],
)
def test_inductor_in_bfloat16_sees_the_operands_of_eager(recipe, dtype, share):
    """Inductor keeps what it fuses in float32; the operand is rounded to bfloat16 all the same, where autocast says.

    Results that stay in the compiled code are not rounded: of y, a few differ in the last bit for the bias.
    """
    results = []
    for compiles in (False, True):
        torch.manual_seed(0)
        layer, x = nn.Linear(64, 96).to(dtype), torch.randn(64, 64, dtype=dtype, requires_grad=True)
        simulate(layer, recipe)
        if compiles:
            layer.compile(fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            y = layer(x)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        results.append([t.bfloat16() for t in (y, *torch.autograd.grad(y, (x, layer.weight), dy))])
    assert all((a == b).float().mean() >= share for a, b in zip(*results))


@pytest.mark.skipif(backend() == "aten", reason="the operator is a node of compiled code where C kernels serve")
@pytest.mark.parametrize(
    ("recipe", "forward", "backward"), [("mxfp8", (2, 0, 0, 0), (2, 0, 1, 0)), ("nvfp4", (2, 0, 0, 0), (1, 2, 0, 2))]
)
def test_operands_are_made_in_their_pass(recipe, forward, backward):
    """Those of x and of weights in the backward pass too, though they could be made and kept in the forward pass.

    So is amax where it transforms; elsewhere compiled code fuses it.
    """
    counts = []

    def count(graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes]
        names = "quantize_operand.", "quantize_operand_stochastic.", "quantize_operands.", "amax."
        counts.append(tuple(sum(f"altgrad.{name}" in target for target in targets) for name in names))
        # What is saved so would live as long as the loss does.
        assert not any("saved_tensor_with_no_vc_check" in node.meta for node in graph.graph.nodes)
        return make_boxed_func(graph)

    compiler = aot_autograd(fw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    x, w = torch.randn(32, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    torch.compile(lambda x, w: linear(x, w, None, recipe), backend=compiler)(x, w).sum().backward()
    assert counts == [forward, backward]


def test_disabled_has_a_graph_of_its_own():
    model, x = Blocks(), torch.randn(2, 40)
    plain = copy.deepcopy(model)
    simulate(model, "mxfp4")
    counter = CompileCounterWithBackend("aot_eager")
    eager = model(x)
    model.compile(fullgraph=True, backend=counter)
    for _ in range(3):
        assert torch.equal(model(x), eager)
        with disabled(model):
            assert torch.equal(model(x), plain(x))
    assert counter.frame_count == 2


@pytest.mark.compiles
def test_sizes_do_not_recompile_without_end():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear, fullgraph=True, backend=counter)
    w = torch.randn(48, 64)
    for tokens in (32, 64, 96, 128):
        x = torch.randn(tokens, 64)
        assert torch.equal(compiled(x, w, None, "mxfp8"), linear(x, w, None, "mxfp8"))
    assert counter.frame_count == 2


@pytest.mark.parametrize("recipe", SEVERAL)
def test_export_keeps_nodes(recipe):
    model, x = Blocks(), torch.randn(5, 40)
    simulate(model, recipe)
    program = torch.export.export(model.eval(), (x,))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum(name.startswith(("altgrad.quantize", "altgrad.project")) for name in names) >= 8
    assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_in_training_says_that_it_has_no_backward_pass(strict):
    layers, x = nn.Sequential(nn.Linear(32, 32), nn.Sigmoid(), nn.Linear(32, 32, bias=False)), torch.randn(4, 32)
    simulate(layers, "mxfp8", skip=["2"])
    with pytest.warns(UserWarning, match="no backward pass"):
        program = torch.export.export(layers, (x,), strict=strict)
    program.module()(x).sum().backward()
    assert layers[0].weight.grad is None and layers[2].weight.grad is not None
    with torch.no_grad():
        torch.export.export(layers, (x,), strict=strict)
    torch.export.export(layers.eval(), (x,), strict=strict)


def test_export_keeps_a_dynamic_range():
    """Whether an operand of 16 bits is kept in bytes depends on a size, but not on a dynamic one."""

    class Attends(nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, "fp8_current")

    inputs, size = tuple(torch.randn(3, 2, 4, 8, 16).half()), torch.export.Dim("size", min=2, max=8192)
    program = torch.export.export(Attends(), inputs, dynamic_shapes=({2: size},) * 3, strict=True)
    assert torch.equal(program.module()(*inputs), Attends()(*inputs))


def test_autocast_compiled_is_eager():
    results = []
    for compiles in (False, True):
        model, x = Blocks(), torch.randn(20, 40)
        simulate(model, "mxfp8")
        if compiles:
            model.compile(fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters() if p.ndim == 2)])
    assert_same(*results)


def test_functional_call():
    model, x = Blocks(), torch.randn(5, 40)
    simulate(model, "mxfp8")
    parameters = dict(model.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    model(x).square().sum().backward()
    assert all(torch.equal(gradients[name], p.grad) for name, p in parameters.items())


@pytest.mark.compiles
@pytest.mark.gpu
@pytest.mark.parametrize("recipe", SEVERAL)
def test_cuda_graphs_have_the_bits_of_compiled_code(recipe):
    """In the fourth step everything is replayed."""

    def compile_blocks(model, **options):
        for block in model.blocks:
            block.compile(fullgraph=True, **options)

    replayed = run(recipe, lambda model: compile_blocks(model, mode="reduce-overhead"), steps=4, device="cuda")
    torch._dynamo.reset()
    assert_same(replayed, run(recipe, compile_blocks, steps=4, device="cuda"))


@pytest.mark.compiles
@pytest.mark.parametrize(
    "recipe",
    ["fp8_current", "fp8_delayed", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("mxfp8", "nvfp4"))],
)
def test_operands_are_rounded_to_bfloat16(device, recipe):
    """The gradient of the weight has eager's bits, where Inductor rounds neither x * 0.3 nor dy * 0.3 by itself.

    On a CPU C finds blocks in memory: test_inductor_in_bfloat16_sees_the_operands_of_eager.
    """
    results = []
    for compiles in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(64, 1024, bias=False).to(device, torch.bfloat16)
        simulation = simulate(layer, recipe, seed=1)
        function = lambda x: layer(x * 0.3) * 0.3  # noqa: E731, B023
        function = torch.compile(function, fullgraph=True) if compiles else function
        seen = []
        for _ in range(2):
            x = torch.randn(128, 64).to(device, torch.bfloat16)
            dy = torch.randn(128, 1024).to(device, torch.bfloat16)
            seen += torch.autograd.grad(function(x), layer.weight, dy)
            simulation.step()
        results.append(seen)
    assert_same(*results)
