"""altgrad.report.measure: operands as computed by hand, nothing left behind, and predictions beside losses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from altgrad.quantization import PerAxis, compute_scale, quantization_stats, quantize, quantize_blocks
from altgrad.report import assign, candidate, measure
from altgrad.simulation import linear, register, simulate

CANDIDATES = ["E4M3", "E2M1@row", "MXFP4", "NVFP4", "e3m2b3f@2x8/rceil"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Linear(4 * 16, 24)
        self.dropout = nn.Dropout(0.2)
        self.again = nn.Linear(24, 24, bias=False)
        self.last = nn.Linear(24, 5)

    def forward(self, x):
        x = F.relu(self.first(self.norm(self.conv(x)).flatten(1)))
        return self.last(self.again(F.relu(self.again(self.dropout(x)))))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 2, 4, 4, generator=g), torch.randint(5, (n,), generator=g)) for n in (6, 8)]


def score(report, name, operand):
    return next(layer for layer in report.layers if (layer.name, layer.operand) == (name, operand)).scores


@pytest.mark.parametrize("candidates", [CANDIDATES, ["FP16", "BF16", "e4m4b7", "e5m6b15", "E8M0", "UE4M3"]])
def test_operands_are_those_of_the_layer(batches, candidates):
    """All six operands of a linear layer, with gradients from autograd, under candidates of every granularity."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 5))
    batch = batches[1]
    report = measure(model, [batch], loss, candidates)
    x = model[2](model[1](batch[0].flatten(1))).detach().requires_grad_()
    w = model[3].weight
    y = F.linear(x, w, model[3].bias)
    value = F.cross_entropy(y, batch[1])
    dy, dx, dw = torch.autograd.grad(value, [y, x, w])
    w = w.detach()
    operands = {
        "forward.x": (x.detach(), dx),
        "forward.w": (w, dw),
        "grad_input.dy": (dy, None),
        "grad_input.w": (w.T, None),
        "grad_weight.dy": (dy.T, None),
        "grad_weight.x": (x.detach().T, None),
    }
    assert report.loss == pytest.approx(value.item())
    assert report.samples == 8
    for operand, (t, gradient) in operands.items():
        for name in candidates:
            c, got = candidate(name), score(report, "3", operand)[candidate(name).name]
            scale = compute_scale(t, c.format, granularity=c.granularity, **c.keywords)
            want = quantization_stats(t, c.format, scale)
            assert (got.clipped, got.flushed, got.used_bits) == (want.clipped, want.flushed, want.used_bits)
            assert got.sqnr == pytest.approx(want.sqnr.item(), rel=1e-12)
            assert got.bits == pytest.approx(c.bits(*t.shape), rel=1e-12)
            if gradient is None:
                assert got.sensitivity is None
            else:
                error = quantize_blocks(t, c.format, granularity=c.granularity, **c.keywords).double() - t.double()
                assert got.sensitivity == pytest.approx((error * gradient).square().sum().item(), rel=1e-4)


def test_every_layer_is_measured_and_nothing_is_left_behind(net, batches):
    before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    report = measure(net, batches, loss, CANDIDATES)
    assert list(dict.fromkeys(layer.name for layer in report.layers)) == ["conv", "first", "again", "last"]
    assert len(report.layers) == 24 and report.left_out == []
    assert all(p.grad is None for p in net.parameters())
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    assert torch.get_rng_state().equal(rng)
    assert type(net.first) is nn.Linear and not net._forward_hooks
    counts = {layer.name: layer.count for layer in report.layers if layer.operand == "forward.w"}
    assert counts == {"conv": 36, "first": 64 * 24, "again": 24 * 24, "last": 120}  # again, run twice, counts once
    again = measure(net, batches, loss, CANDIDATES)
    assert again.to_json() == report.to_json()


@pytest.mark.parametrize("compiled", ["whole", "part"])
def test_compiled_modules_are_seen(net, batches, compiled):
    want = measure(net, batches, loss, ["E4M3", "MXFP4"])
    torch.compiler.reset()
    if compiled == "part":
        net.first.compile(backend="eager")
        model = net
    else:
        model = torch.compile(net, backend="eager")
    torch.manual_seed(0)
    before = loss(model.eval(), batches[0])
    got = measure(model.train(), batches, loss, ["E4M3", "MXFP4"])
    torch.manual_seed(0)
    assert loss(model.eval(), batches[0]).equal(before)
    assert [(layer.name, layer.operand) for layer in got.layers] == [(x.name, x.operand) for x in want.layers]
    assert len(got.layers) == 24


def test_compiled_layers_are_left_out_once_and_lazy_ones_say_why(batches):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(2)), *(nn.GRU(8, 8) for _ in range(1)))
    for i in (1, 2):
        model[i] = torch.compile(model[i], backend="eager")
    report = measure(model, [torch.ones(2, 8)], lambda model, x: model[0](x).square().mean(), ["E4M3"], samples=2)
    assert report.left_out == [("1", "it was not called"), ("2", "no simulated form")]
    report.left_out.clear()
    assert [name for name, _ in assign(report, 99, model=model).left_out] == ["1", "2"]
    with pytest.raises(ValueError, match="no layer that can be simulated: the model, it is not initialized"):
        measure(nn.LazyLinear(4), batches, loss, ["E4M3"])


def test_a_compiled_layer_alone_has_no_name():
    layer, x = nn.Linear(4, 4), [torch.ones(2, 4)]
    report = measure(torch.compile(layer, backend="eager"), x, lambda model, x: model(x).square().mean(), ["E4M3"])
    assert {layer.name for layer in report.layers} == {""} and set(assign(report, 99, model=layer).choices) == {""}


def test_bfloat16_autocast_attention_and_registered_layers(batches):
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(32, 8))

        def forward(self, x):
            return x @ self.kernel

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.attention = Dense(), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            h = self.dense(x.flatten(1)).unsqueeze(0)
            return self.attention(h, h, h)[0][0, :, :5]

    register(Dense, weight="kernel", layout="KN")
    torch.manual_seed(0)
    model = Model()
    with torch.autocast("cpu", torch.bfloat16):
        report = measure(model, batches, loss, ["E4M3", "MXFP4"])
    names = {layer.name for layer in report.layers}
    assert names == {"dense", "attention", "attention.out_proj"}
    assert {layer.dtype for layer in report.layers} == {"bfloat16"}
    weight = next(layer for layer in report.layers if (layer.name, layer.operand) == ("attention", "forward.w"))
    assert weight.count == 3 * 64


def test_bad_input(net, batches):
    with pytest.raises(ValueError, match="batches must not be empty"):
        measure(net, [], loss)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got 'x'"):
        measure("x", batches, loss)
    with pytest.raises(TypeError, match="samples must be an integer, got 'x'"):
        measure(net, batches, loss, samples="x")
    with pytest.raises(ValueError, match="samples must be 0 or more, got -1"):
        measure(net, batches, loss, samples=-1)
    with pytest.raises(ValueError, match="unknown format"):
        measure(net, batches, loss, ["E9M9"])
    with pytest.raises(TypeError, match="candidates must be a list of formats, got 'E4M3'"):
        measure(net, batches, loss, "E4M3")
    with pytest.raises(RuntimeError, match="the model failed on batch 0: ValueError: x ") as raised:
        measure(net, [(torch.randn(2, 3), torch.zeros(2))], loss)
    assert "\n" not in str(raised.value) and type(net.first) is nn.Linear
    with pytest.raises(ValueError, match="no layer that can be simulated"):
        measure(nn.LayerNorm(3), batches, loss)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        measure(copy.deepcopy(net).requires_grad_(False), batches, loss)
    simulated = copy.deepcopy(net)
    simulate(simulated, "mxfp8")
    with pytest.raises(ValueError, match="restore the model first"):
        measure(simulated, batches, loss)


def test_a_layer_behind_the_first_gradient_is_named(net, batches):
    net.conv.requires_grad_(False)
    report = measure(net, batches, loss, ["E4M3"])
    assert report.left_out == assign(report, 9).left_out == [("conv", "no gradient reached it")]


def test_an_assignment_names_all_layers_that_stay_in_high_precision():
    """With the model: an expert that got no call, and layers without a simulated form."""
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("called", "frozen", "uncalled")})
    model["up"], model["rnn"], model["norm"] = nn.ConvTranspose1d(1, 1, 2), nn.GRU(8, 8), nn.LayerNorm(8)
    model["frozen"].requires_grad_(False)

    def loss(model, x):
        return model["norm"](model["called"](model["frozen"](x))).square().mean()

    report = measure(model, [torch.ones(2, 8)], loss, ["E4M3"], samples=2)
    left_out = assign(report, 9, model=model).left_out
    assert ("frozen", "no gradient reached it") in left_out
    assert sorted(name for name, _ in left_out) == ["frozen", "rnn", "uncalled", "up"]
    report.left_out.clear()
    nothing, without = "the report has nothing of it", "no simulated form"
    want = [("frozen", nothing), ("uncalled", nothing), ("up", without), ("rnn", without)]
    assert assign(report, 9, model=model).left_out == want


def test_layers_that_are_not_measured_are_named(net, batches):
    """Without a form, never called, with a forward of its own, of numbers that no format has."""
    net.unused, net.lstm = nn.Linear(4, 4), nn.LSTM(4, 4)
    net.complex = nn.Linear(2, 2, dtype=torch.complex64)
    net.hooked = nn.Linear(4, 4)
    net.hooked.forward = F.relu
    report = measure(net, batches, loss, ["E4M3"])
    assert report.left_out == [
        ("unused", "it was not called"),
        ("lstm", "no simulated form"),
        ("complex", "it has a weight of torch.complex64: is it quantized?"),
        ("hooked", "it has a forward of its own, which would be called instead"),
    ]


def squared_gradients_times_errors(weight, gradients, format):
    error = quantize(weight, format, compute_scale(weight, format, granularity=PerAxis(0))) - weight
    return sum(float((g.double() * error.double()).square().sum()) for g in gradients) / len(gradients)


@pytest.mark.parametrize("way", ["plain", "autocast", "parametrized"])
def test_a_weight_of_several_calls_is_one(net, batches, way):
    """Also where each call makes another tensor of it."""
    net.eval()
    if way == "parametrized":
        nn.utils.parametrizations.weight_norm(net.again)

    def loss(model, batch):
        with torch.autocast("cpu", enabled=way == "autocast"):
            return F.cross_entropy(model(batch[0]), batch[1])

    entry = score(measure(net, batches, loss, ["E2M1@row"]), "again", "forward.w")["E2M1@row"]
    plain = copy.deepcopy(net)
    if way == "parametrized":
        nn.utils.parametrize.remove_parametrizations(plain.again, "weight")
    gradients = [torch.autograd.grad(loss(plain, batch), plain.again.weight)[0] for batch in batches]
    stored = plain.again.weight.detach().to(torch.bfloat16 if way == "autocast" else torch.float32)
    wanted = squared_gradients_times_errors(stored, gradients, "E2M1")
    assert entry.sensitivity == pytest.approx(wanted, rel=0.02 if way == "autocast" else 1e-5)


def test_backward_passes_within_the_loss_do_not_count(net, batches):
    net.eval()

    def attacked(model, batch):
        x = batch[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), batch[1], reduction="sum"), x)
        return loss(model, ((x + 0.1 * gradient.sign()).detach(), batch[1]))

    shifted = []
    for x, y in batches:
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(net, (x, y)), x)
        shifted.append(((x + 0.1 * gradient.sign()).detach(), y))
    assert measure(net, batches, attacked, CANDIDATES).layers == measure(net, shifted, loss, CANDIDATES).layers


def test_the_input_of_a_frozen_layer_that_is_written_to():
    layer = nn.Linear(4, 4)
    layer.requires_grad_(False)
    model = nn.Sequential(nn.Linear(4, 4), layer)

    def forward(x):
        x = model[0](x)
        x += model[1](x)
        return x

    def apart(x):
        x = model[0](x)
        return x + model[1](x)

    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    got = measure(model, [x], lambda _, x: forward(x).square().mean(), CANDIDATES, samples=8)
    want = measure(model, [x], lambda _, x: apart(x).square().mean(), CANDIDATES, samples=8)
    assert got.layers == want.layers


def test_products_that_the_model_calls_with_a_recipe_are_not_measured():
    """Their weights, of one recipe, are not one weight of a layer of its name."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.a, self.b = nn.Linear(8, 8), *(nn.Parameter(torch.ones(n, 8)) for n in (8, 6))

        def forward(self, x):
            return linear(linear(self.layer(x), self.a, None, "mxfp8"), self.b, None, "mxfp8")

    report = measure(Own(), [torch.ones(4, 8)], lambda model, x: model(x).square().mean(), ["E4M3"])
    assert {layer.name for layer in report.layers} == {"layer"} and not report.left_out


def test_bits_of_blocks_are_those_of_each_group():
    """A scale of E4M3@128x128 is that of one group of a convolution, here of 9 weights."""
    torch.manual_seed(0)
    model = nn.Conv2d(64, 64, 3, groups=64)
    report = measure(model, [torch.randn(2, 64, 8, 8)], lambda model, x: model(x).square().mean(), ["E4M3@128x128"])
    assert score(report, "", "forward.w")["E4M3@128x128"].bits == 8 + 32 / 9


def test_samples():
    """The output's dimensions but the last, or its only one; where the model itself is not called, nobody knows."""
    model = nn.Linear(4, 1)
    batches = [torch.ones(6, 4)]
    assert measure(model, batches, lambda model, x: model(x).square().mean(), ["E4M3"]).samples == 6
    model = nn.Sequential(model, nn.Flatten(0))
    assert measure(model, batches, lambda model, x: model(x).square().mean(), ["E4M3"]).samples == 6
    with pytest.warns(UserWarning, match="no output of the model says how many samples a batch has: give samples"):
        assert measure(model, batches, lambda model, x: model[0](x).square().mean(), ["E4M3"]).samples == 1


def test_an_expert_without_tokens():
    torch.manual_seed(0)
    experts = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])

    def loss(model, tokens):
        x, n = tokens
        return torch.cat([model[0](x), model[1](x[:n])]).square().mean()

    x = torch.randn(4, 32)
    none, both = (measure(experts, [(x, n) for n in counts], loss, CANDIDATES, samples=1) for counts in ([0], [0, 4]))
    full = measure(experts, [(x, 4)], loss, CANDIDATES, samples=1)
    assert [x.operand for x in none.layers if x.name == "1"] == ["forward.w", "grad_input.w"]
    assert {entry.sensitivity for entry in score(none, "1", "forward.w").values()} == {0.0}
    for operand in ("forward.x", "forward.w"):
        for name, got in score(both, "1", operand).items():
            assert got.sensitivity == pytest.approx(score(full, "1", operand)[name].sensitivity / 2)
    assert set(assign(none, 99, activations=True).choices["1"]) == {"forward.w"}


def test_verified(net, batches):
    net.eval()
    report = measure(net, batches, loss, ["E2M1", "E3M2", "E4M3"])
    for activations in (False, True):
        choice = assign(report, 6.2, activations=activations, model=net, verify=True, batches=batches, loss=loss)
        assert set(choice.bits) == {"weights", "activations"} if activations else {"weights"}
        assert all(bits <= 6.2 for bits in choice.bits.values())
        assert choice.loss != report.loss and choice.predicted > report.loss
        sides = {"forward.x", "forward.w"} if activations else {"forward.w"}
        assert all(set(operands) == sides for operands in choice.choices.values())
        assert type(net.first) is nn.Linear


def test_verifying_leaves_nothing_behind(net, batches):
    """With statistics and dropout; the masks are those of the report, so that wide formats give its loss."""
    before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    report = measure(net, batches, loss, ["FP16"])
    choice = assign(report, 99, model=net, verify=True, batches=batches, loss=loss)
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    assert torch.get_rng_state().equal(rng)
    assert choice.loss == pytest.approx(report.loss, rel=1e-3)


def test_sensitivities_are_the_mean_over_batches(net, batches):
    net.eval()
    both, first, second = (measure(net, data, loss, ["E2M1", "MXFP4"]) for data in (batches, batches[:1], batches[1:]))
    for layers in zip(both.layers, first.layers, second.layers):
        for name in both.candidates:
            got, *parts = (layer.scores[name].sensitivity for layer in layers)
            if layers[0].operand.startswith("forward."):
                assert got == pytest.approx(sum(parts) / 2, rel=1e-5), (layers[0].name, layers[0].operand)


def test_sensitivities_to_small_gradients(net, batches):
    """Squares of float32 gradients near 2^-80 are no float32 numbers."""
    usual = measure(net, batches, loss, CANDIDATES)
    small = measure(net, batches, lambda model, batch: loss(model, batch) * 2.0**-80, CANDIDATES)
    for one, other in zip(usual.layers, small.layers, strict=True):
        for score, its in zip(one.scores.values(), other.scores.values(), strict=True):
            if score.sensitivity is not None:
                assert its.sensitivity == pytest.approx(score.sensitivity * 2.0**-160, rel=1e-6, abs=0)


@pytest.mark.gpu
def test_a_model_on_a_gpu(net, batches):
    """What is counted there is what is counted here, but for what products round in another order."""
    net.eval()
    here = measure(net, batches, loss, CANDIDATES)
    there = measure(net.cuda(), [tuple(t.cuda() for t in batch) for batch in batches], loss, CANDIDATES)
    assert [(layer.name, layer.operand) for layer in there.layers] == [
        (layer.name, layer.operand) for layer in here.layers
    ]
    for got, want in zip(there.layers, here.layers):
        for name, of_want in want.scores.items():
            assert got.scores[name].sqnr == pytest.approx(of_want.sqnr, abs=0.5), (want.name, want.operand, name)
            assert got.scores[name].flushed == pytest.approx(of_want.flushed, abs=0.02)
        if want.operand == "forward.w":
            assert got.scores["E4M3"].used_bits == want.scores["E4M3"].used_bits
