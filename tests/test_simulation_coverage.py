"""Nothing is missed in silence: coverage names every product that aten is called with and that was not simulated."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from altgrad.quantization import quantize
from altgrad.simulation import RECIPES, Recipe, Rule, attention, coverage, linear, matmul, simulate

aten = torch.ops.aten
# Written out, for a test must not share the search by name.
PRODUCTS = {
    *(aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.dot, aten.convolution, aten.convolution_backward),
    *(aten._trilinear, aten._scaled_dot_product_flash_attention_for_cpu),
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}


class Count(TorchDispatchMode):
    """Products, but for those with the 16 x 16 matrix of a Hadamard transform."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_transform = func.overloadpacket is aten.mm and args[1].shape == (16, 16) and (args[1].abs() == 0.25).all()
        self.total += func.overloadpacket in PRODUCTS and not is_transform
        return func(*args, **(kwargs or {}))


class Everything(nn.Module):
    """Layers with a form, layers without, and products between them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.rest = nn.ModuleDict(
            {"recurrent": nn.GRU(16, 16), "bilinear": nn.Bilinear(16, 16, 16), "linear": nn.Linear(16, 16)}
        )
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        h = self.conv(x).flatten(2)
        h = self.attend(h, h, h)[0]
        h = self.rest["recurrent"](h)[0]
        h = self.rest["linear"](self.rest["bilinear"](h, h))
        h = nn.functional.linear(h, self.weight) + nn.functional.scaled_dot_product_attention(h, h, h)
        return linear(h, self.weight, None, "mxfp8"), matmul(h, h.mT, "mxfp8"), attention(h, h, h, "mxfp8"), h @ h.mT


def everything():
    torch.manual_seed(0)
    return Everything(), torch.randn(3, 2, 4, 4, requires_grad=True)


def run(model, x):
    with Count() as count:
        sum(t.sum() for t in model(x)).backward()
    return count.total


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_the_total_is_what_aten_sees(recipe):
    model, x = everything()
    found = coverage(model, x)
    assert found.total == run(model, x)
    if recipe is not None:
        simulate(model, recipe)
        simulated = coverage(model, x)
        assert simulated.total == run(model, x)
        assert simulated.simulated - found.simulated == 3 * (1 + 3 + 1 + 1)  # conv, attention's four, linear


def test_rows_say_where():
    model, x = everything()
    simulate(model, "mxfp8", attention=True)
    rows = {(row.module, row.direction, row.operation) for row in coverage(model, x).uncovered}
    assert {module for module, _, _ in rows} == {"", "rest.recurrent", "rest.bilinear"}
    assert {("", "forward", "mm"), ("", "backward", "mm"), ("", "forward", "bmm"), ("", "backward", "bmm")} < rows
    assert {operation for module, _, operation in rows if module == "rest.bilinear"} == {"_trilinear"}
    assert coverage(model, x, backward=False).uncovered == [
        row for row in coverage(model, x).uncovered if row.direction == "forward"
    ]


def test_products_of_a_simulated_layer_may_stay():
    """A rule for the weight alone, gradients in high precision."""
    layer, x = nn.Linear(4, 3), torch.randn(2, 4, requires_grad=True)
    simulate(layer, Recipe("weights", (None, Rule("E4M3"))))
    found = coverage(layer, x)
    assert (found.simulated, found.total) == (1, 3)
    assert {(row.module, row.direction) for row in found.uncovered} == {("", "backward")}


def test_nothing_is_left_behind():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()), torch.randn(8, 4)
    simulate(model, "fp8_delayed")
    buffers = [*model.buffers(), *model[0].simulation.buffers()]
    before = [t.clone() for t in buffers]
    state = torch.random.get_rng_state()
    coverage(model, (x,))
    coverage(model, {"input": x})
    assert all(torch.equal(a, b) for a, b in zip(before, buffers))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_the_backward_pass_ends_at_the_example_and_goes_round_what_gets_no_gradient():
    """A graph in front of the example is not the model's, and lives on; a scale is a leaf of the graph without one."""

    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return super().forward(quantize(x, "E4M3", self.scale))

    model, front = Scaled(), nn.Linear(8, 8)
    x = torch.nn.functional.gelu(front(torch.randn(4, 8)))
    found = coverage(model, x)
    assert found == coverage(model, x.detach().requires_grad_()) and found.total == 3
    x.sum().backward()
    assert front.weight.grad is not None and model.scale.grad is None


def test_a_model_that_freezes_its_layer_has_no_backward_pass():
    class Frozen(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            self.requires_grad_(False)
            return y

    assert coverage(Frozen(4, 4), torch.randn(2, 4)).total == 1


def test_checkpointed_and_compiled_parts():
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    model = nn.Sequential(Checkpointed(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    x = torch.randn(2, 4, requires_grad=True)
    plain = coverage(model, x)
    assert plain.total == run(lambda x: [model(x)], x) > 9  # some are computed again
    assert {row.module for row in plain.uncovered} == {"0.0", "0.1", "1"}
    simulate(model, "mxfp8")
    found = coverage(model, x)
    assert found.uncovered == [] and found.simulated == found.total == run(lambda x: [model(x)], x)
    model.compile(backend="eager")
    assert coverage(model, x) == found
