"""torch.export keeps one readable node; saved programs and AOTInductor packages run in fresh processes, same bits."""

import processes
import pytest
import torch
from conftest import assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

from altgrad.quantization import E4M3, E5M2, decode, dequantize, encode, quantize


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(8, 4)
        self.register_buffer("scale", torch.tensor([0.1, 0.37, 1.0, 2.0]))

    def forward(self, x):
        return torch.relu(quantize(self.linear(x), E4M3, self.scale))


class EveryOperator(torch.nn.Module):
    def forward(self, x, random):
        codes = encode(x, E4M3, 0.5)
        y = decode(codes, E4M3, 0.5, dtype=torch.bfloat16), dequantize(quantize(x, E5M2), 2.0)
        z = quantize(x, E5M2, rounding="stochastic", random_bits=random)
        return codes, *y, z, encode(x, E5M2, rounding="stochastic", random_bits=random)


BATCH = {"x": {0: torch.export.Dim("batch")}}


def altgrad_nodes(program):
    return [str(node.target) for node in program.graph.nodes if "altgrad" in str(node.target)]


@pytest.mark.compiles
@pytest.mark.parametrize("strict", [True, False])
def test_keeps_one_node(strict, device):
    model, x = Model().to(device), torch.randn(5, 8, device=device)
    program = torch.export.export(model, (x,), dynamic_shapes=BATCH, strict=strict)
    assert altgrad_nodes(program) == ["altgrad.quantize.default"]
    assert altgrad_nodes(program.run_decompositions()) == ["altgrad.quantize.default"]
    for n in (5, 9):
        x = torch.randn(n, 8, device=device)
        assert_same_bits(program.module()(x), model(x), x)
        assert_same_bits(torch.compile(program.module(), fullgraph=True)(x), model(x), x)


@pytest.mark.parametrize("strict", [True, False])
def test_every_operator_is_a_node(strict):
    args = torch.randn(5, 8), torch.randint(1 << 24, (5, 8), dtype=torch.int32)
    program = torch.export.export(EveryOperator(), args, strict=strict)
    names = ["encode", "decode", "quantize", "dequantize", "quantize_stochastic", "encode_stochastic"]
    assert altgrad_nodes(program) == [f"altgrad.{name}.default" for name in names]
    for got, want in zip(program.module()(*args), EveryOperator()(*args)):
        assert_same_bits(got, want)


def test_the_node_opens_on_request():
    program = torch.export.export(Model(), (torch.randn(5, 8),))
    assert altgrad_nodes(program.run_decompositions(decompose_custom_triton_ops=True)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_largest_of_a_tensor_on_a_gpu_opens_too(dtype):
    """Where compiled code calls its kernel for 16 bits."""

    class Largest(torch.nn.Module):
        def forward(self, x):
            return torch.ops.altgrad.amax(x, [0, 1])

    with FakeTensorMode():
        program = torch.export.export(Largest(), (torch.empty(5, 8, dtype=dtype, device="cuda"),))
        assert altgrad_nodes(program) == ["altgrad.amax.default"]
        assert altgrad_nodes(program.run_decompositions(decompose_custom_triton_ops=True)) == []


def test_exported_module_trains():
    x = torch.randn(5, 8)
    model = Model()
    trained = torch.export.export(model, (x,)).module()
    model(x).sum().backward()
    trained(x).sum().backward()
    assert_same_bits(trained.linear.weight.grad, model.linear.weight.grad)


LOAD = """
import sys, torch
{imports}
for name in ("altgrad", "triton"):
    assert name not in sys.modules, name
x, want = torch.load("{folder}/data.pt")
model = {load}
got = model(x)
assert got.dtype == want.dtype and torch.equal(got.view(torch.int32), want.view(torch.int32))
assert not [name for name in sys.modules if name.split(".")[0] in {absent}]
print("same bits")
"""


@pytest.fixture
def saved(tmp_path):
    model, x = Model(), torch.randn(7, 8)
    torch.save((x, model(x).detach()), tmp_path / "data.pt")
    program = torch.export.export(model, (torch.randn(5, 8),), dynamic_shapes=BATCH)
    torch.export.save(program, tmp_path / "model.pt2")
    return tmp_path, program


@pytest.mark.compiles
def test_saved_program_needs_only_ops_registry(saved):
    folder, _ = saved
    load = f'torch.export.load("{folder}/model.pt2").module()'
    done = processes.run(LOAD.format(imports="import ops_registry", folder=folder, load=load, absent=("altgrad",)))
    assert done.stdout == "same bits\n", done.stderr[-2000:]
    without = processes.run(LOAD.format(imports="", folder=folder, load=load, absent=()))
    assert without.returncode != 0
    # torch's own message; docs/operators.md says that `import ops_registry` is what it asks for.
    assert "failed to resolve torch.ops.altgrad.quantize.default" in without.stderr
    assert "import the custom op" in without.stderr


@pytest.mark.compiles
def test_aotinductor_package_needs_nothing(saved):
    folder, program = saved
    torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/package.pt2")
    load = f'torch._inductor.aoti_load_package("{folder}/package.pt2")'
    done = processes.run(LOAD.format(imports="", folder=folder, load=load, absent=("altgrad", "ops_registry")))
    assert done.stdout == "same bits\n", done.stderr[-2000:]
