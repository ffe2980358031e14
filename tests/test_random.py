"""Random bits from a seed: the published generator, the same bits on every path, and what rounding makes of them."""

import numpy as np
import pytest
import reference
import torch
from conftest import assert_same_bits
from torch.utils.checkpoint import checkpoint

from altgrad.quantization import E2M1, E4M3, E5M2, encode, quantize, quantize_gradient
from ops_registry import aten, cpu
from ops_registry.philox import philox, random_bits

SEED = torch.tensor(-0x123456789ABCDEF)
ONE = torch.tensor(1.0)
STOCHASTIC = {"rounding": "stochastic"}
needs_c = pytest.mark.skipif(cpu.backend() == "aten", reason="of the C kernels")
# counter, key, block: "philox4x32 10" of kat_vectors in Random123 1.14
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.fixture
def x():
    return torch.randn(7, 339, generator=torch.Generator().manual_seed(0)) * 3


def bits_of(seed, shape):
    """The bits of the definition, as an operand of their own."""
    shape = torch.Size(shape)
    return torch.from_numpy(reference.random_words(int(seed), shape.numel()).astype(np.int32)).view(shape)


@pytest.mark.parametrize(("counter", "key", "block"), KNOWN)
def test_published_vectors(counter, key, block):
    assert list(reference.philox(counter, key)) == block
    assert [
        int(word) for word in philox(*([torch.tensor(word) for word in words] for words in (counter, key)))
    ] == block


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), int(SEED)])
def test_words_are_those_of_the_definition(seed):
    for size in (0, 1, 2, 3, 5, 63, 64, 65, 1027):
        assert torch.equal(random_bits(torch.tensor(seed), (size,)), bits_of(seed, (size,)))


@needs_c
def test_words_of_the_c_kernel():
    for size in (0, 1, 3, 64, 1023, 1024, 1025, 100_003):
        assert torch.equal(cpu.random_words(SEED, (size,)), random_bits(SEED, (size,)))
    assert torch.equal(cpu.random_words(SEED, (100,)), bits_of(SEED, (100,)))


def test_a_seed_is_its_bits(x):
    bits = bits_of(SEED, x.shape)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for scale in (ONE, torch.rand(7, 1) + 0.5, torch.rand(339) + 0.5):
            for name in ("quantize", "encode", "project"):
                op = getattr(torch.ops.altgrad, f"{name}_stochastic")
                want = op(x.to(dtype), scale, bits, "E4M3")
                assert_same_bits(op(x.to(dtype), scale, SEED, "E4M3"), want, x)
                assert_same_bits(aten.KERNELS[f"{name}_stochastic"](x.to(dtype), scale, SEED, "E4M3"), want, x)
    assert_same_bits(
        quantize(x, E4M3, **STOCHASTIC, random_bits=SEED), quantize(x, E4M3, **STOCHASTIC, random_bits=bits)
    )


def test_a_seed_of_rows_of_three():
    """Chunks of 1023 elements, which begin within a block of the counter and end in the 257th."""
    x, scale = torch.randn(1000, 3), torch.rand(3) + 0.5
    want = torch.ops.altgrad.quantize_stochastic(x, scale, bits_of(SEED, x.shape), "E4M3")
    assert_same_bits(torch.ops.altgrad.quantize_stochastic(x, scale, SEED, "E4M3"), want, x)


def test_layouts_draw_the_same(x):
    x = x[:, :336]
    want = quantize(x.contiguous(), E4M3, **STOCHASTIC, random_bits=SEED)
    images = x.reshape(2, 3, 56, 7).to(memory_format=torch.channels_last)
    for other in (x, x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2], images):
        got = quantize(other, E4M3, **STOCHASTIC, random_bits=SEED)
        assert_same_bits(got, quantize(other, E4M3, **STOCHASTIC, random_bits=bits_of(SEED, other.shape)), other)
        if other.shape == x.shape:
            assert_same_bits(got, want, other)


@needs_c
def test_threads_draw_the_same():
    x = torch.randn(300_001)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(quantize(x, E4M3, **STOCHASTIC, random_bits=SEED))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same_bits(result, results[0], x)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(7, 339), (40, 1536), (3, 5, 7)], ids=str)
def test_a_gpu_draws_the_same(shape):
    x, seed = torch.randn(shape) * 3, SEED.cuda()
    for dtype in (torch.float32, torch.bfloat16):
        for scale in (ONE, torch.rand(*shape[:-1], 1) + 0.5, torch.rand(shape[-1]) + 0.5):
            for name in ("quantize_stochastic", "encode_stochastic"):
                op = getattr(torch.ops.altgrad, name)
                want = op(x.to(dtype), scale, SEED, "E4M3")
                assert_same_bits(op(x.to(dtype).cuda(), scale.cuda(), seed, "E4M3"), want, x)
                turned = x.to(dtype).cuda().transpose(0, 1).contiguous().transpose(0, 1)
                assert_same_bits(op(turned, scale.cuda(), seed, "E4M3"), want, x)


@pytest.mark.compiles
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_draws_the_same(x, device):
    x, seed = x.to(device), SEED.to(device)
    f = lambda x, seed: quantize(x, E4M3, rounding="stochastic", random_bits=seed) * 2  # noqa: E731
    compiled = torch.compile(f, dynamic=True, fullgraph=True)
    for part in (x, x[:3]):
        assert_same_bits(compiled(part, seed), f(part, seed), part)


def test_export_keeps_the_seed_as_an_operand(x):
    class Module(torch.nn.Module):
        def forward(self, x, seed):
            return quantize(x, E4M3, rounding="stochastic", random_bits=seed)

    program = torch.export.export(Module(), (x, SEED))
    assert [node.target for node in program.graph.nodes].count(torch.ops.altgrad.quantize_stochastic.default) == 1
    other = torch.tensor(5)
    assert_same_bits(program.module()(x, other), quantize(x, E4M3, **STOCHASTIC, random_bits=other), x)


@pytest.mark.compiles
def test_onnx_draws_the_same(x, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")

    class Module(torch.nn.Module):
        def forward(self, x, seed):
            return quantize(x, E4M3, rounding="stochastic", random_bits=seed)

    torch.onnx.export(Module().eval(), (x, SEED), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    (got,) = session.run(None, dict(zip(names, [x.numpy(), SEED.numpy()], strict=True)))
    assert_same_bits(torch.from_numpy(got), quantize(x, E4M3, **STOCHASTIC, random_bits=SEED), x)


def test_vmap_counts_within_an_example(x):
    f = lambda x, seed: quantize(x, E4M3, rounding="stochastic", random_bits=seed)  # noqa: E731
    seeds = torch.arange(7)
    got = torch.vmap(f)(x, seeds)
    assert_same_bits(got, torch.stack([f(*pair) for pair in zip(x, seeds, strict=True)]), x)
    assert_same_bits(torch.vmap(f, (0, None))(x, SEED), torch.stack([f(row, SEED) for row in x]), x)
    assert_same_bits(torch.vmap(f, (None, 0))(x, seeds), torch.stack([f(x, seed) for seed in seeds]), x)
    assert_same_bits(torch.vmap(f, (1, None))(x, SEED), torch.stack([f(column, SEED) for column in x.t()]), x)


def test_opcheck(x):
    for name in ("quantize_stochastic", "encode_stochastic", "quantize_gradient_stochastic", "project_stochastic"):
        torch.library.opcheck(getattr(torch.ops.altgrad, name).default, (x[:2, :5], ONE, SEED, "E4M3"))


def test_a_seed_is_drawn_once_from_torch(x):
    torch.manual_seed(0)
    got = quantize(x, E4M3, rounding="stochastic")
    torch.manual_seed(0)
    seed = torch.randint((1 << 63) - 1, ())
    assert_same_bits(got, quantize(x, E4M3, **STOCHASTIC, random_bits=seed), x)
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    first, second = (encode(x, E4M3, rounding="stochastic", generator=generator) for generator in generators)
    assert torch.equal(first, second)
    assert not torch.equal(first, encode(x, E4M3, rounding="stochastic", generator=generators[0]))


def test_nothing_but_the_seed_is_saved(x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = quantize_gradient(x.requires_grad_(), E5M2, rounding="stochastic")
    assert max(tensor.numel() for tensor in saved) == 1
    grad = torch.randn_like(x)
    y.backward(grad)
    (seed,) = (tensor for tensor in saved if tensor.dtype == torch.int64)
    assert_same_bits(x.grad, quantize(grad, E5M2, **STOCHASTIC, random_bits=seed), grad)


def test_checkpointed_and_resumed_runs_draw_the_same(x):
    def f(x):
        return quantize(quantize(x, E4M3, rounding="stochastic").square(), E2M1, rounding="stochastic").square()

    grads = []
    for run in (f, lambda x: checkpoint(f, x, use_reentrant=False)):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        run(leaf).sum().backward()
        grads.append(leaf.grad)
    assert_same_bits(grads[1], grads[0], x)
    state = torch.get_rng_state()
    first = f(x)
    torch.set_rng_state(state)
    assert_same_bits(f(x), first, x)


@pytest.mark.parametrize("seed", [0, 1, int(SEED)])
def test_bits_are_uniform(seed):
    """Chi-square of each byte of the 24 bits, of pairs of neighbours, and along the four words of a block."""
    n = 1 << 20
    words = quantize_words(seed, n)
    counts = [torch.bincount(words >> shift & 255, minlength=256) for shift in (0, 8, 16)]
    counts.append(torch.bincount((words[:-1] >> 16 & 255) * 16 + (words[1:] >> 20 & 15), minlength=4096))
    counts += [torch.bincount(words[word::4] >> 16 & 255, minlength=256) for word in range(4)]
    for count in counts:
        expected = count.sum().double() / len(count)
        chi_square, freedom = float(((count - expected) ** 2 / expected).sum()), len(count) - 1
        assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def quantize_words(seed, n):
    words = (
        random_bits(torch.tensor(seed), (n,)) if cpu.backend() == "aten" else cpu.random_words(torch.tensor(seed), (n,))
    )
    return words.long() & 0xFFFFFF


def test_the_mean_of_many_draws_is_unbiased():
    x = torch.tensor([0.3, -1.7, 2.2, 5.0, 0.01, -0.26])
    draws = 40_000
    y = quantize(x.expand(draws, 6), E2M1, **STOCHASTIC, random_bits=SEED).double()
    step = torch.tensor([0.5, 0.5, 1.0, 2.0, 0.5, 0.5], dtype=torch.float64)
    nu = (x.abs().double() / step) % 1
    deviation = step * (nu * (1 - nu) / draws).sqrt()
    assert ((y.mean(0) - x.double()).abs() < 5 * deviation).all()


def test_what_is_no_seed_is_refused(x):
    with pytest.raises(ValueError, match=r"random_bits of int64 are a seed, a 0-d tensor, got shape \(7, 339\)"):
        quantize(x, E4M3, **STOCHASTIC, random_bits=torch.zeros(x.shape, dtype=torch.int64))
