"""Delayed scaling against TransformerEngine's recipe in plain Python, and as a module."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from conftest import assert_same_bits
from torch.utils.checkpoint import checkpoint

from altgrad.quantization import E4M3, E5M2, AmaxHistory, compute_scale, quantize, quantize_gradient

STREAM = [3.0, 448.0, 7.0, 0.0, 1e-3, 896.0, 2.0, 2.0, 2.0, 2.0]


def delayed_scales(stream, length, policy, margin):
    """A scale before each value, of the history so far."""
    scales = []
    for step in range(len(stream)):
        past = ([0.0] * length + stream[:step])[-length:]
        amax = max(past) if policy == "max" else past[-1]
        scales.append(1.0 if amax == 0 else float(torch.tensor(amax) * 2**margin / 448))
    return scales


def test_a_margin_that_leaves_the_range():
    """2^127 times an amax of 4 is no number, whose scale was NaN; now that of the largest number."""
    history = AmaxHistory(E4M3, margin=127)
    history(torch.full((2,), 4.0))
    assert_same_bits(history.scale(), compute_scale(torch.tensor(torch.finfo(torch.float32).max), E4M3))


@pytest.mark.parametrize("margin", [0, 1])
@pytest.mark.parametrize("policy", ["max", "most_recent"])
@pytest.mark.parametrize("length", [1, 3, 1024])
def test_recipe(length, policy, margin):
    history = AmaxHistory(E4M3, length=length, policy=policy, margin=margin)
    scales = [history(torch.tensor([[-amax, amax / 2]])) for amax in STREAM]
    assert_same_bits(torch.stack(scales), torch.tensor(delayed_scales(STREAM, length, policy, margin)))


def test_infinite_and_nan_are_not_recorded():
    history = AmaxHistory("E4M3", length=4)
    for amax in (448.0, math.inf, math.nan):
        history(torch.tensor([amax, 1.0]))
    assert history.history.tolist() == [448.0, 448.0, 448.0, 0.0]


def test_eval_keeps_the_scale():
    history = AmaxHistory(E4M3)
    history(torch.tensor(896.0))
    history.eval()
    assert [history(torch.tensor(1e6)).item() for _ in range(3)] == [2.0] * 3


def test_is_a_module():
    history = AmaxHistory(E4M3, length=3)
    history(torch.tensor(896.0))
    other = AmaxHistory(E4M3, length=3)
    other.load_state_dict(history.state_dict())
    assert list(history.state_dict()) == ["history"] and not list(history.parameters())
    for module in (other, copy.deepcopy(history), copy.deepcopy(history).to(torch.bfloat16)):
        assert_same_bits(module.scale(), torch.tensor(2.0))
    assert history.to("meta").history.device.type == "meta"


def test_nothing_is_recorded_off_the_meta_device(monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: torch.full_like(*args, 7.0, **kwargs))
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), AmaxHistory(E4M3, length=3))
    history = model.to_empty(device="cpu")[1]
    assert_same_bits(model[0].bias.detach(), torch.full((2,), 7.0))
    assert_same_bits(history.history, torch.zeros(3))
    assert_same_bits(history(torch.ones(2)), torch.tensor(1.0))


def test_buffer_is_updated_in_place():
    history = AmaxHistory(E4M3, length=3)
    address = history.history.data_ptr()
    history(torch.tensor(1.0))
    assert history.history.data_ptr() == address


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.compiles)])
def test_compiled(backend):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.amax = AmaxHistory(E4M3, length=3)

        def forward(self, x):
            return quantize(x, E4M3, self.amax(x))

    torch._dynamo.reset()
    eager, model = Model(), Model()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for amax in STREAM[:5]:
        x = torch.linspace(-amax, amax, 7)
        assert_same_bits(compiled(x), eager(x))
    assert_same_bits(model.amax.history, eager.amax.history)


@pytest.mark.gpu
def test_cuda_graph():
    history = AmaxHistory(E4M3, length=3).cuda()
    x = torch.ones(8, device="cuda")
    history(x)
    history.history.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scale = history(x)
    seen = []
    for amax in STREAM:
        x.fill_(amax)
        graph.replay()
        seen.append(scale.item())
    assert_same_bits(torch.tensor(seen), torch.tensor(delayed_scales(STREAM, 3, "max", 0)))


def test_errors():
    for options, message in [({"length": 0}, "length"), ({"policy": "min"}, "max, most_recent")]:
        with pytest.raises(ValueError, match=message):
            AmaxHistory(E4M3, **options)
    with pytest.raises(ValueError, match="unknown format"):
        AmaxHistory("E9M9")


def _rank(rank, address, results):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    together, alone = AmaxHistory(E4M3, length=5), AmaxHistory(E4M3, length=5, reduce=False)
    for amax in (448.0 * (1 + rank), *((bad if rank == of else 1e3) for bad in (math.nan, math.inf) for of in (0, 1))):
        for history in (together, alone):
            history(torch.tensor([amax]))
    torch.save((together.history, alone.history), f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_ranks_agree(tmp_path):
    torch.multiprocessing.spawn(_rank, (f"file://{tmp_path}/store", str(tmp_path)), nprocs=2)
    (first, first_alone), (second, second_alone) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.tolist() == second.tolist() == [896.0] * 5  # a NaN or an infinity of one rank is one of both
    assert first_alone.tolist() == [1e3, 1e3, 1e3, 448.0, 448.0]
    assert second_alone.tolist() == [1e3, 1e3, 1e3, 1e3, 896.0]


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "compiled"])
def test_activation_checkpointing(how):
    """A recomputation takes the scale of its forward pass and records nothing: the bits of a run without it."""
    torch._dynamo.reset()

    def steps(wrap):
        histories = [AmaxHistory(E4M3, length=3) for _ in range(2)]
        w = torch.linspace(-1, 1, 64).reshape(8, 8).requires_grad_()

        def region(x):
            return (quantize(x, E4M3, histories[0](x)) @ quantize(w, E4M3, histories[1](w))).tanh()

        results, region = [], wrap(region)
        for step in range(4):
            x = (torch.linspace(-3, 2, 64).reshape(8, 8) * 5**step).requires_grad_()
            region(x).square().sum().backward()
            results += [x.grad, w.grad.clone(), *(history.history.clone() for history in histories)]
        return results

    def checkpointed(region):
        f = lambda x: checkpoint(region, x, use_reentrant=how == "reentrant")  # noqa: E731
        return torch.compile(f, backend="aot_eager") if how == "compiled" else f

    for got, want in zip(steps(checkpointed), steps(lambda region: region)):
        assert_same_bits(got, want)


@pytest.mark.parametrize("how", ["alone", "hook", "reentrant", "not reentrant", "create_graph"])
def test_gradients(how):
    """Every backward pass records the amax of its gradient, which the first rounds to zero."""
    history, x = AmaxHistory(E5M2, length=4), torch.ones(4, requires_grad=True)

    def region(x):
        if how != "hook":
            return quantize_gradient(x, E5M2, scale=history) * 1
        y = x * 1
        y.register_hook(lambda grad: quantize(grad, E5M2, history(grad)))
        return y

    for step in range(3):
        x.grad, grad = None, torch.full((4,), 1e-30)
        y = checkpoint(region, x, use_reentrant=how == "reentrant") if "reentrant" in how else region(x)
        if how == "create_graph":
            (x.grad,) = torch.autograd.grad(y, x, grad, create_graph=True)
        else:
            y.backward(grad)
        assert_same_bits(x.grad.detach(), grad if step else torch.zeros(4))
    assert_same_bits(history.history, torch.tensor([1e-30, 1e-30, 1e-30, 0]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_takes_the_scale_of_the_last_call(reentrant):
    """After a call without a backward pass, in an evaluation, and again."""
    gradients = []
    for checkpoints in (False, True):
        history, w = AmaxHistory(E4M3, length=4), torch.full((8, 8), 0.3, requires_grad=True)
        region = lambda x, h=history, w=w: (quantize(x, E4M3, h(x)) @ w).relu()  # noqa: E731
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.no_grad():
            region(100 * x)
        y = checkpoint(region, x, use_reentrant=reentrant) if checkpoints else region(x)
        history.eval()
        for _ in range(2):
            y.square().sum().backward(retain_graph=True)
        gradients.append(w.grad)
        assert history.history.count_nonzero() == 2
    assert_same_bits(*gradients)


def test_an_eager_call_between_compiled_ones_recompiles_nothing():
    torch._dynamo.reset()
    history, x, graphs = AmaxHistory(E4M3, length=4), torch.randn(8), []
    compiled = torch.compile(lambda x: quantize(x, E4M3, history(x)), backend=lambda g, _: graphs.append(g) or g)
    for f in (compiled, history, compiled):
        f(x)
    assert len(graphs) == 1


@pytest.mark.compiles
def test_compiled_gradients():
    torch._dynamo.reset()
    history, x = AmaxHistory(E5M2, length=4), torch.ones(4, requires_grad=True)
    compiled = torch.compile(lambda x: quantize_gradient(x, E5M2, scale=history), backend="aot_eager")
    for f in (compiled, compiled, lambda x: quantize_gradient(x, E5M2, scale=history)):
        x.grad = None
        f(x).backward(torch.full((4,), 1e-30))
    assert_same_bits(history.history, torch.tensor([1e-30, 1e-30, 1e-30, 0]))
    assert_same_bits(x.grad, torch.full((4,), 1e-30))


def test_history_stays_in_float32():
    history = AmaxHistory(E4M3, length=2).half()
    history(torch.tensor(1e6))
    assert history.history.tolist() == [1e6, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_default_dtype_is_not_that_of_the_history(dtype, monkeypatch):
    """In bfloat16 449 was recorded as 448, in float16 1e6 as infinity, which is not recorded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        history = AmaxHistory(E4M3, length=1)
    finally:
        torch.set_default_dtype(before)
    for amax in (449.0, 1e6):
        history.record(torch.tensor([amax]))
        assert_same_bits(history.scale(), torch.tensor(amax) / 448)
