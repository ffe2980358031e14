"""A model switched by one call: what changes, what stays, what is refused, and how it goes on from a file."""

import contextlib
import copy
import io
import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from conftest import assert_same_bits
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call

from altgrad.simulation import (
    RECIPES,
    ProductState,
    Recipe,
    Rule,
    Simulation,
    SimulationState,
    conv,
    disabled,
    linear,
    register,
    restore,
    simulate,
)
from altgrad.simulation import layers as simulation_layers


class Block(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Net(nn.Module):
    """An embedding whose weight the last layer shares, blocks, a hook."""

    def __init__(self, width=32, blocks=2):
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


TOKENS = torch.arange(48).view(3, 16) % 16


def train(model, simulation, steps=3, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten().roll(1))
        loss.backward()
        optimizer.step()
        simulation.step()
        losses.append(loss.item())
    return losses


def test_everything_but_the_class_stays():
    model = net()
    parameters, keys, state = (
        dict(model.named_parameters()),
        list(model.state_dict()),
        copy.deepcopy(model.state_dict()),
    )
    calls = []
    model.blocks[0].up.register_forward_hook(lambda layer, args, y: calls.append(type(layer)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    simulation = simulate(model, "fp8_delayed")
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert list(model.state_dict()) == keys and model.head.weight is model.embedding.weight
    assert isinstance(model.blocks[0].up, nn.Linear) and type(model.blocks[0].norm) is nn.LayerNorm
    train(model, simulation, 1, optimizer)
    assert len(calls) == 1 and issubclass(calls[0], nn.Linear)
    assert not torch.equal(state["blocks.0.up.weight"], model.blocks[0].up.weight)
    untouched = net(1)
    untouched.load_state_dict(model.state_dict())
    restore(model)
    assert {type(m) for m in model.modules()} == {type(m) for m in untouched.modules()}
    assert [name for name, _ in model.named_modules()] == [name for name, _ in untouched.named_modules()]
    assert torch.equal(model(TOKENS), untouched(TOKENS))


@pytest.mark.parametrize("recipe", RECIPES)
def test_layers_compute_the_functions(recipe):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.Flatten(2), nn.Linear(36, 7))
    x = torch.randn(2, 3, 6, 6)
    simulation = simulate(model, recipe, seed=5)
    states = {name: state.of() for name, state in simulation.states.items()}
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
    h = conv(padded, model[0].weight, model[0].bias, recipe, state=states["0"])
    want = linear(h.flatten(2), model[2].weight, model[2].bias, recipe, state=states["2"])
    assert_same_bits(model(x), want)


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_goes_on(recipe):
    model = net()
    losses = train(model, simulate(model, recipe), 8)
    assert losses[-1] < losses[0] and all(torch.isfinite(p).all() for p in model.parameters())


def test_patterns_the_first_match_decides():
    model = net()
    simulation = simulate(model, {"blocks.*.up": "nvfp4", "blocks.1.*": None, "*": "mxfp8"}, skip=["head"])
    assert {row.module: row.recipe for row in simulation.rows} == {
        "blocks.0.up": "nvfp4",
        "blocks.0.down": "mxfp8",
        "blocks.1.up": "nvfp4",
        "blocks.1.down": "high precision: no pattern, or skipped",
        "head": "high precision: no pattern, or skipped",
    }
    assert str(simulation).splitlines()[:2] == [
        "module         kind    shape  recipe",
        "blocks.0.up    linear  64x32  nvfp4",
    ]
    again = net()
    assert str(simulate(again, json.loads(simulation.to_json()))) == str(simulation)
    assert torch.equal(again(TOKENS), model(TOKENS))


def test_what_has_no_simulated_form_is_in_the_table():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.ModuleDict({"a": nn.LSTM(2, 2), "b": nn.Bilinear(2, 2, 2), "c": Own(2, 2), "d": nn.Linear(2, 2)})
    rows = simulate(model, "mxfp8").rows
    assert [(row.module, row.recipe) for row in rows if "form" in row.recipe] == [
        (name, "high precision: no simulated form") for name in "abc"
    ]


def test_disabled_is_float():
    model, plain = net(), net()
    simulate(model, "mxfp4")
    simulated = model(TOKENS)
    with disabled(model), disabled(model.blocks):
        assert torch.equal(model(TOKENS), plain(TOKENS))
    assert torch.equal(model(TOKENS), simulated) and not torch.equal(simulated, plain(TOKENS))
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert torch.equal(model(TOKENS), simulated)


@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode])
def test_a_state_that_leaves_the_meta_device_is_usual_tensors(mode):
    layer = nn.Linear(32, 16, device="meta")
    simulation = simulate(layer, "nvfp4")
    weights = {"weight": torch.randn(16, 32), "bias": torch.zeros(16)}
    with mode(), contextlib.suppress(AssertionError):  # a fake tensor is mixed with no other
        functional_call(layer, weights, (torch.randn(8, 32),))
    simulation.step()
    assert type(layer.simulation.seeds) is torch.Tensor and not layer.simulation.seeds.is_inference()


def test_states_on_the_meta_device():
    """Weights may come under another default device; a state that came before them would have been lost."""
    trained = nn.Linear(32, 16)
    state = simulate(trained, "fp8_delayed").state_dict()
    with torch.device("meta"):
        layer = nn.Linear(32, 16)
        simulation = simulate(layer, "fp8_delayed")
        with pytest.raises(ValueError, match="is on the meta device: load the weights of the model first"):
            simulation.load_state_dict(state)
        layer.load_state_dict(trained.state_dict(), assign=True)
    simulation.load_state_dict(state)
    assert layer.simulation.history.device.type == "cpu"
    del layer.weight, layer.bias
    layer.load_state_dict({})  # a layer without parameters


def test_disabled_compiles_once():
    layer, compiled = nn.Linear(32, 16), CompileCounter()
    simulate(layer, "mxfp4")
    layer.compile(backend=compiled)
    with disabled(layer):
        layer(torch.randn(4, 32))
        with disabled(layer):
            layer(torch.randn(4, 32))
    assert compiled.frame_count == 1


def test_disabled_is_of_a_context_alone():
    """A copy made within it is simulated, and of two that overlap, as in threads, neither ends the other."""
    model = net()
    simulate(model, "mxfp4")
    simulated = model(TOKENS)
    first, second = disabled(model), disabled(model)
    with first:
        for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(made(TOKENS), simulated)
        second.__enter__()
    assert not torch.equal(model(TOKENS), simulated)
    second.__exit__(None, None, None)
    assert torch.equal(model(TOKENS), simulated)


def test_forward_only():
    model = net()
    simulate(model, "nvfp4", forward_only=True)
    x = torch.randn(4, 32, requires_grad=True)
    dy = torch.randn(4, 64)
    model.blocks[0].up(x).backward(dy)
    assert torch.equal(x.grad, dy @ model.blocks[0].up.weight)


@pytest.mark.parametrize("recipe", ["nvfp4", "fp8_delayed"])
def test_a_resumed_run_is_the_uninterrupted_one(recipe):
    model = net()
    simulation = simulate(model, recipe, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, simulation, 2, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), simulation.state_dict()))
    want = train(model, simulation, 2, optimizer)

    other = net(9)
    resumed = simulate(other, recipe, seed=4)
    optimizer = torch.optim.AdamW(other.parameters(), 1e-2)
    for target, state in zip((other, optimizer, resumed), saved):
        target.load_state_dict(state)
    assert train(other, resumed, 2, optimizer) == want
    with pytest.raises(ValueError, match="does not fit"):
        simulation.load_state_dict({name: state | {"step": "x"} for name, state in simulation.state_dict().items()})
    with pytest.raises(ValueError, match="does not fit"):
        simulate(net(), "mxfp8", skip=["head"]).load_state_dict(saved[2])


def test_a_wrapper_changes_no_name_of_a_state():
    """What wraps a model or a part of it after simulate, as activation checkpointing."""
    simulation, model = simulate(net(), "fp8_delayed"), net()
    resumed = simulate(model, "fp8_delayed")
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    for handle in (resumed, Simulation(nn.DataParallel(model))):
        assert list(handle.states) == list(simulation.states)
        handle.load_state_dict(simulation.state_dict())
        simulate(net(), json.loads(handle.to_json()))
    inner = net()
    simulate(nn.DataParallel(inner), "fp8_delayed")
    assert list(Simulation(inner).states) == list(simulation.states)
    layer = nn.Linear(2, 2)
    simulate(layer, "mxfp8")
    assert list(Simulation(torch.compile(layer)).states) == [""]


def test_parts_that_are_simulated_by_themselves_have_the_names_of_modules():
    """One may be named as a wrapper names what it wraps."""
    model = nn.ModuleDict({"module": nn.Sequential(nn.Linear(2, 2)), "0": nn.Linear(2, 2), "1": nn.Linear(2, 2)})
    for part in model.values():
        simulate(part, "mxfp8")
    assert list(Simulation(model).states) == ["module.0", "0", "1"]


@pytest.mark.parametrize("recipe", ["nvfp4", "fp8_delayed"])
@pytest.mark.parametrize("clone", ["deepcopy", "pickle", "save"])
def test_copies_go_on_like_the_model(recipe, clone):
    def save(model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    model = net()
    simulation = simulate(model, recipe)
    train(model, simulation, 2)
    copies = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "save": save}
    other = copies[clone](model)
    assert other.head.weight is other.embedding.weight is not model.head.weight
    assert train(other, Simulation(other), 2) == train(model, simulation, 2)


def test_the_state_of_a_layer():
    draws = [SimulationState("nvfp4", *args).draw() for args in (("a",), ("b",))]
    draws.append(SimulationState("nvfp4", "a", seed=1).draw())
    state = SimulationState("nvfp4", "a", products=2)
    assert torch.equal(state.draw()[:1], draws[0]) and len(torch.cat([*draws, state.draw()[1:]]).unique()) == 24
    assert torch.equal(state.seeds, state.draw())
    assert SimulationState("mxfp8").of() == ProductState()
    delayed = SimulationState("fp8_delayed").to(torch.bfloat16)
    assert {buffer.dtype for buffer in delayed.buffers()} == {torch.float32} and not delayed.state_dict()
    assert delayed.of(records=False)[2:4] == (None, None)


def test_delayed_scaling_by_hand():
    """Scales are those of the largest amax of the steps before; an infinite one counts as the one before it."""
    layer = nn.Linear(2, 2, bias=False)
    simulation = simulate(layer, Recipe("delayed", (Rule("E4M3", history=2, headroom=2.0), None)))
    seen = []
    for amax in (448.0, 896.0, float("inf"), 0.0, 0.0, 0.0):
        layer(torch.tensor([[amax / 2, 1.0]]))
        layer(torch.tensor([[amax, -1.0]]))  # two micro-batches
        layer.eval()
        layer(torch.tensor([[1e9, 0.0]]))  # an evaluation leaves no trace
        layer.train()
        simulation.step()
        seen.append(layer.simulation.scales[0, 0].item())
    assert seen == torch.tensor([2.0, 4.0, 4.0, 4.0, 2 / 448, 2 / 448]).tolist()


def test_the_scale_of_a_layer_that_is_not_called_stays():
    layer = nn.Linear(2, 2, bias=False)
    simulation = simulate(layer, Recipe("delayed", (Rule("E4M3", history=1), None)))
    layer(torch.full((1, 2), 896.0))
    for _ in range(2):
        simulation.step()
        assert layer.simulation.scales[0, 0] == 2.0


def test_each_rule_has_a_history_of_its_own():
    recipe = Recipe("two", (Rule("E4M3", history=1), Rule("E4M3", history=4)))
    layer = nn.Linear(2, 2, bias=False)
    simulation = simulate(layer, recipe)
    for amax in (896.0, 4.48):
        nn.init.constant_(layer.weight, amax)
        layer(torch.full((1, 2), amax))
        simulation.step()
    assert layer.simulation.scales[0, :2].tolist() == torch.tensor([4.48 / 448, 2.0]).tolist()


def test_states_are_float32_whatever_the_default_is():
    torch.set_default_dtype(torch.bfloat16)
    try:
        state = SimulationState("fp8_delayed")
        y = linear(
            torch.ones(1, 1).float(), torch.ones(1, 1).float(), None, Recipe("fixed", (Rule("E4M3", scale=0.3), None))
        )
    finally:
        torch.set_default_dtype(torch.float32)
    assert {buffer.dtype for buffer in state.buffers()} == {torch.float32}
    assert y.item() == (3.25 * torch.tensor(0.3)).item()


def test_a_state_of_other_sizes_is_refused_as_a_whole():
    def model(length=2, attention=True):
        layers = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 1))
        return simulate(layers, Recipe("d", (Rule("E4M3", history=length), None)), attention=attention)

    state = model().state_dict()
    state["0"]["step"] = 5
    for other in (model(length=1), model(length=4), model(attention=False)):
        with pytest.raises(ValueError, match="does not fit: is the model simulated by the same recipes"):
            other.load_state_dict(state)
        assert other.states["0"].step == 0


def test_names_that_are_patterns_or_a_key_of_recipes():
    model = nn.Module()
    for name in ("a[0]", "name", "source"):
        model.add_module(name, nn.Linear(4, 4))
    simulation = simulate(model, {"name": "mxfp8", "source": "mxfp4", "*": "nvfp4"})
    recipes = json.loads(simulation.to_json())
    restore(model)
    rows = {row.module: row.recipe for row in simulate(model, recipes).rows}
    assert rows == {"a[0]": "nvfp4", "name": "mxfp8", "source": "mxfp4"}


def test_the_input_by_its_name():
    for layer, x in ((nn.Linear(8, 4), torch.randn(2, 8)), (nn.Conv1d(2, 3, 2), torch.randn(2, 2, 5))):
        simulate(layer, "mxfp8")
        assert torch.equal(layer(input=x), layer(x))
        with pytest.raises(TypeError):
            layer(x, input=x)


def test_delayed_scaling_sees_gradients():
    layer = nn.Linear(4, 3)
    simulation = simulate(layer, "fp8_delayed")
    x, dy = torch.randn(5, 4, requires_grad=True), torch.randn(5, 3) * 1e-4
    for _ in range(2):
        layer(x).backward(dy)
        simulation.step()
    e4m3, e5m2 = 448, 57344
    want = [x.abs().max() / e4m3, layer.weight.abs().max() / e4m3, dy.abs().max() / e5m2]
    assert_same_bits(layer.simulation.scales[0, :3], torch.stack(want).detach())


def test_a_pass_on_the_meta_device():
    model = nn.Sequential(nn.Conv1d(4, 8, 3, device="meta"), nn.Linear(62, 8, device="meta"))
    simulate(model, "mxfp8")
    with torch.autocast("cpu"):
        assert model(torch.ones(2, 4, 64, device="meta")).shape == (2, 8, 8)


def test_meta_device():
    with torch.device("meta"):
        model = Net()
    simulate(model, "nvfp4", seed=2)
    model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict())
    want = net()
    simulate(want, "nvfp4", seed=2)
    model.zero_grad()
    for each in (model, want):
        each(TOKENS).sum().backward()
    assert_same_bits(model.blocks[0].up.weight.grad, want.blocks[0].up.weight.grad)


@pytest.mark.parametrize("recipe", ["nvfp4", "fp8_delayed"])
@pytest.mark.parametrize("compiles", [False, True])
def test_weights_assigned_to_the_meta_device(recipe, compiles):
    """The state stayed there."""
    want = nn.Linear(32, 16)
    layer = nn.Linear(32, 16, device="meta")
    simulations = [simulate(each, recipe) for each in (layer, want)]
    layer.load_state_dict(copy.deepcopy(want.state_dict()), assign=True)
    if compiles:
        layer.compile(fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 32)
    for each, simulation in zip((layer, want), simulations):
        for _ in range(2):
            each(x).square().sum().backward()
            simulation.step()
    assert_same_bits(layer.weight.grad, want.weight.grad)
    for buffer, other in zip(layer.simulation.buffers(), want.simulation.buffers(), strict=True):
        assert torch.equal(buffer, other)


def test_functional_call_of_a_model_on_the_meta_device():
    x, weights = torch.randn(8, 32), {"weight": torch.randn(16, 32), "bias": torch.zeros(16)}
    layers = nn.Linear(32, 16, device="meta"), nn.Linear(32, 16)
    for layer in layers:
        simulate(layer, "nvfp4")
    gradient = torch.func.grad(lambda w, layer: torch.func.functional_call(layer, w, (x,)).square().sum())
    got, want = (gradient(weights, layer)["weight"] for layer in layers)
    assert_same_bits(got, want)
    assert torch.equal(layers[0].simulation.seeds, layers[1].simulation.seeds)
    assert not torch._C._functorch.is_gradtrackingtensor(layers[0].simulation.seeds)


def compare_attention(make, *args, **kwargs):
    """An attention layer in a recipe of high precision is torch's, forward and backward."""
    plain = make()
    layer = copy.deepcopy(plain)
    simulate(layer, Recipe("high"), attention=True)
    for train in (True, False):
        results = []
        for each in (plain, layer):
            y, weights = each.train(train)(*args, **kwargs)
            each.zero_grad()
            y.square().sum().backward()
            gradients = [p.grad for p in each.parameters() if p.grad is not None]
            results.append([y, *([] if weights is None else [weights]), *gradients])
        assert len(results[0]) == len(results[1])
        for a, b in zip(*results):
            assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_no_key_and_contiguous_output_as_in_torch():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    x, padding = torch.randn(4, 2, 8), torch.tensor([[False] * 4, [True] * 4])
    want = layer(x, src_key_padding_mask=padding)
    simulate(layer, Recipe("high"))
    got = layer(x, src_key_padding_mask=padding)
    assert torch.allclose(got, want, atol=1e-5) and got.is_contiguous()
    got.square().sum().backward()
    assert not any(p.grad.isnan().any() for p in layer.parameters())


def test_a_skipped_attention_has_no_simulated_layer():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)})
    simulation = simulate(model, "mxfp4", skip=["attention"], seed=np.int64(3))
    assert list(simulation.states) == ["linear"]
    assert {row.module: row.recipe for row in simulation.rows}[
        "attention.out_proj"
    ] == "high precision: its attention is"
    with pytest.raises(ValueError, match="or the out_proj alone of an attention"):
        simulate(nn.MultiheadAttention(8, 2), {"out_proj": "mxfp8"})


class TestMultiheadAttention:
    x, y = torch.randn(5, 3, 16), torch.randn(7, 3, 16)

    @pytest.mark.parametrize(
        "options",
        [{}, {"batch_first": True}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}, {"num_heads": 4}],
        ids=str,
    )
    def test_self_attention(self, options):
        make = lambda: nn.MultiheadAttention(16, **{"num_heads": 2, **options})  # noqa: E731
        compare_attention(make, self.x, self.x, self.x)
        compare_attention(make, self.x, self.x, self.x, need_weights=False)
        compare_attention(make, self.x[:, 0], self.x[:, 0], self.x[:, 0], average_attn_weights=False)

    def test_masks(self):
        make = lambda: nn.MultiheadAttention(16, 2, add_zero_attn=True)  # noqa: E731
        padding = torch.arange(5).expand(3, 5) >= torch.tensor([[3], [5], [4]])
        causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
        for mask in (None, causal, torch.randn(5, 5), causal.expand(6, 5, 5)):
            for pad in (None, padding):
                if pad is None or mask is None or mask.dtype == torch.bool:  # torch warns of mixed masks
                    compare_attention(make, *[self.x] * 3, attn_mask=mask, key_padding_mask=pad)
        layer = nn.MultiheadAttention(16, 2)
        compare_attention(lambda: layer, *[self.x] * 3, attn_mask=causal, is_causal=True, need_weights=False)
        simulate(layer, "mxfp8")
        with pytest.raises(RuntimeError, match="is_causal"):
            layer(*[self.x] * 3, is_causal=True)

    @pytest.mark.parametrize(
        "mask, error, message",
        [
            ({"attn_mask": torch.zeros(2, 5, 5)}, ValueError, r"must be \(5, 5\) or \(6, 5, 5\), got \(2, 5, 5\)"),
            ({"attn_mask": torch.zeros(1, 5)}, ValueError, r"attn_mask must be \(5, 5\) or"),
            ({"attn_mask": torch.ones(5, 5, dtype=torch.long)}, TypeError, "must be boolean or .*, got torch.int64"),
            ({"key_padding_mask": torch.zeros(1, 5)}, ValueError, r"key_padding_mask must be \(3, 5\), got \(1, 5\)"),
        ],
    )  # fmt: skip
    def test_masks_that_torch_refuses(self, mask, error, message):
        """Some of them broadcast; an integer one was added to the scores."""
        layer = nn.MultiheadAttention(16, 2)
        with pytest.raises((RuntimeError, AssertionError)):
            layer(*[self.x] * 3, **mask)
        simulate(layer, "mxfp8")
        with pytest.raises(error, match=message):
            layer(*[self.x] * 3, **mask)

    def test_other_keys_and_values(self):
        compare_attention(lambda: nn.MultiheadAttention(16, 2), self.x, self.y, self.y)
        compare_attention(
            lambda: nn.MultiheadAttention(16, 2, kdim=8, vdim=4), self.x, self.y[..., :8], self.y[..., :4]
        )

    def test_in_a_recipe(self):
        """Three projections, a product each; the output projection is a layer; attention's products if asked for."""
        layer = nn.MultiheadAttention(16, 2)
        rows = simulate(layer, "fp8_current").rows
        assert [(row.module, row.kind, row.shape) for row in rows] == [
            ("", "attention", (48, 16)),
            ("out_proj", "linear", (16, 16)),
        ]
        one = layer(self.x, self.x, self.x)[0]
        restore(layer)
        simulate(layer, "fp8_current", attention=True)
        assert not torch.equal(one, layer(self.x, self.x, self.x)[0])

    def test_the_fast_paths_of_encoders_are_off(self):
        """In evaluation torch's encoder layers look past their submodules, the encoder by nested tensors too."""
        torch.manual_seed(0)
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
        padding = torch.arange(5).expand(3, 5) >= torch.tensor([[3], [5], [4]])
        x = torch.randn(3, 5, 16)
        with torch.no_grad():
            fast = encoder(x, src_key_padding_mask=padding)
            for skip in ((), ("*attn*",)):
                simulate(encoder, "mxfp4", skip=skip)
                simulated = encoder(x, src_key_padding_mask=padding)
                valid = ~padding
                assert not torch.allclose(simulated[valid], fast[valid], atol=1e-2)
                with disabled(encoder):
                    assert torch.allclose(encoder(x, src_key_padding_mask=padding)[valid], fast[valid], atol=1e-5)
                restore(encoder)
            assert encoder.use_nested_tensor and torch.equal(encoder(x, src_key_padding_mask=padding), fast)


def test_the_gradient_of_a_weight_by_delayed_scales_is_the_same_for_any_x():
    """Where x needed no gradient another history served, so that what followed had the scale 1: gradients of 0."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    simulation = simulate(layer, "fp8_delayed")
    x, grad = torch.randn(16, 8), torch.full((16, 4), 1e-6)
    got = []
    for leaf in (x, x, x, x.clone().requires_grad_()):
        layer(leaf).backward(grad)
        got.append(layer.weight.grad)
        layer.zero_grad()
        simulation.step()
    assert got[2].count_nonzero() > 30
    assert_same_bits(got[3], got[2])


class WithReduce(nn.Linear):
    """Pickled by a function and its arguments alone."""

    def __reduce__(self):
        return WithReduce.made, (self.in_features, self.out_features, self.state_dict())

    @staticmethod
    def made(n, m, state):
        layer = WithReduce(n, m)
        layer.load_state_dict(state)
        return layer


def test_copies_of_a_layer_with_a_reduce_of_its_own():
    layer, x = WithReduce(8, 4), torch.randn(3, 8)
    simulate(layer, "mxfp8")
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_bits(made(x), layer(x))


def test_transformers_conv1d(monkeypatch):
    """GPT-2's layer, known by its name alone: weights [in, out]."""

    class Conv1D(nn.Module):
        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

        def forward(self, x):
            return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], self.nf)

    Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"
    module = types.ModuleType(Conv1D.__module__)
    module.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    layer, x = Conv1D(6, 5), torch.randn(2, 3, 5)
    simulate(layer, "mxfp8")
    assert_same_bits(layer(x), linear(x, layer.weight.mT, layer.bias, "mxfp8"))
    assert_same_bits(pickle.loads(pickle.dumps(layer))(x), layer(x))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return x @ self.kernel


class DeepDense(Dense):
    pass


class OtherDense(Dense):
    def forward(self, x):
        return -super().forward(x)


def test_registered_layers(monkeypatch):
    monkeypatch.setattr(simulation_layers, "KINDS", dict(simulation_layers.KINDS))
    register(Dense, weight="kernel", layout="KN")
    model, x = nn.Sequential(Dense(), DeepDense(), OtherDense()), torch.randn(2, 4)
    rows = simulate(model, "mxfp8").rows
    assert [row.recipe for row in rows] == ["mxfp8", "mxfp8", "high precision: no simulated form"]
    for layer in model[:2]:
        assert_same_bits(layer(x), linear(x, layer.kernel.mT, None, "mxfp8"))
    with pytest.raises(ValueError, match="layout must be one of NK, KN, got 'NHWC'"):
        register(Dense, layout="NHWC")
    with pytest.raises(TypeError, match="cls must be a class of modules"):
        register(3)


def quantized():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return nn.Sequential(nn.Linear(4, 4), layer)


def compiled():
    model = net()
    model.blocks[1].compile()
    return model


def twice():
    model = net()
    simulate(model.blocks[0], "mxfp8")
    return model


def wrapped():
    """As what hooks itself into a model does."""
    model = net()
    model.blocks[1].up.forward = model.blocks[1].up.forward
    return model


@pytest.mark.parametrize(
    "make, arguments, error, message",
    [
        (net, ["mxfp9"], ValueError, "recipe must be one of fp8_current"),
        (net, [{"*": "mxfp9"}], ValueError, "recipe must be one of fp8_current"),
        (net, [{"block.*": "mxfp8"}], ValueError, r"'block.\*' matches no layer .*: blocks.0.up"),
        (net, [8], TypeError, "recipe must be a Recipe, the name"),
        (nn.ReLU, ["mxfp8"], ValueError, "no layer of the model is simulated"),
        (lambda: 3, ["mxfp8"], TypeError, "model must be a torch.nn.Module"),
        (twice, ["mxfp8"], ValueError, "blocks.0.up is simulated already"),
        (compiled, ["mxfp8"], ValueError, "blocks.1 is compiled: simulate first"),
        (lambda: torch.compile(net()), ["mxfp8"], ValueError, "the model is compiled: simulate first"),
        (quantized, ["mxfp8"], ValueError, "1 has a weight of torch.int8: is it quantized"),
        (lambda: nn.LazyLinear(3), ["mxfp8"], ValueError, "the model is not initialized"),
        (wrapped, ["mxfp8"], ValueError, "blocks.1.up has a forward of its own, which would be called instead"),
        (net, [{3: "mxfp8"}], TypeError, "patterns must be strings, got 3"),
        (net, [{"name": "mine", "forwad": {}}], ValueError, "Recipe has name, .*, got forwad"),
    ],
)
def test_bad_input_leaves_the_model(make, arguments, error, message):
    model = make()
    types_before = [type(m) for m in model.modules()] if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        simulate(model, *arguments)
    if types_before is not None:
        assert [type(m) for m in model.modules()] == types_before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": "head"}, "skip must be patterns, a list for one too, got 'head'"),
        ({"skip": [3]}, "patterns must be strings, got 3"),
        ({"seed": None}, "seed must be an integer, got None"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(TypeError, match=message):
        simulate(net(), "mxfp8", **options)


def test_bad_input_to_the_others():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got 3"):
        restore(3)
    model = net()
    simulate(model, "mxfp8")
    model.head.forward = model.head.forward
    with pytest.raises(ValueError, match="head got a forward of its own after simulate"):
        restore(model)
    with pytest.raises(ValueError, match="no simulated layer"):
        restore(net())
    with pytest.raises(ValueError, match="pattern 'heads' matches no layer"):
        simulate(net(), "mxfp8", skip=["heads"])
    model = nn.Sequential(nn.Linear(2, 2))
    simulate(model, "mxfp8")
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    with pytest.raises(ValueError, match="0 became a ParametrizedSimulatedLinear after simulate"):
        restore(model)


def test_the_table_of_a_parametrized_layer_changes_nothing():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)))
    model[0].parametrizations.weight.eval()
    model[0].parametrizations.weight[0].train()
    before = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    assert simulate(model, "mxfp8").rows[0].shape == (4, 8)
    assert all(x.equal(before[0][name]) for name, x in model.state_dict().items())
    assert [module.training for module in model.modules()] == before[1]


def test_the_name_of_a_layer_is_no_pattern_for_others():
    """b[0] is a pattern of shells for b0, which so got the recipe of the other."""
    model = nn.ModuleDict({"b[0]": nn.Linear(8, 8), "b0": nn.Linear(8, 8)})
    written = simulate(model, {"b0": "mxfp4", "b[0]": "mxfp8"}).to_json()
    restore(model)
    simulate(model, json.loads(written))
    assert {name: layer.simulation.recipe.name for name, layer in model.items()} == {"b[0]": "mxfp8", "b0": "mxfp4"}
