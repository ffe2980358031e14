"""The processes behind test_distributed.py: every case in one set of them, ``distributed_worker.py SIZE DEVICE``.

A case is a function of the world size. Each rank writes ``{case: traceback or None}`` to the file RESULTS names. The
ranks of a CPU are forked from a process that has imported all they need.
"""

import copy
import functools
import itertools
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch._inductor.compile_fx
import torch.distributed as dist
from conftest import assert_same_bits
from samples import POINTWISE, SAMPLES
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from altgrad.quantization import (
    MXFP4,
    MXFP6_E2M3,
    MXFP8_E4M3,
    NVFP4,
    AmaxHistory,
    PerAxis,
    PerBlock,
    PerTensor,
    bit_stall,
    compute_scale,
    decode_blocks,
    dequantize,
    encode_blocks,
    quantization_stats,
    quantize,
    quantize_blocks,
    sqnr,
)
from altgrad.quantization.scaling import METHODS
from altgrad.simulation import Recipe, Rule, Simulation, coverage, linear, simulate
from ops_registry.modes import POWER_OF_TWO_RULES
from ops_registry.operators import OPERATORS

DEVICE = sys.argv[2] if len(sys.argv) > 2 else "cpu"
PLACEMENTS = [Replicate(), Shard(0), Shard(1)]
ag = torch.ops.altgrad
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


@functools.cache
def meshes(size):
    """The same objects each time: see an_equal_mesh_beside_it."""
    shapes = [(size,)] if size < 4 else [(size,), (2, size // 2)]
    return [init_device_mesh(DEVICE, shape) for shape in shapes]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def random_bits(shape):
    return torch.randint(1 << 24, shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.int32)


def operator(name):
    """The operator as a function of x, scale and random bits, which are the codes of decode."""
    _, _, *others = SAMPLES[name](torch.empty(0), torch.tensor(1.0))
    if name == "decode":
        return lambda x, scale, bits: ag.decode(bits.to(torch.uint8), scale, *others)
    if OPERATORS[name].tensors == 3:
        return lambda x, scale, bits: getattr(ag, name)(x, scale, bits, *others[1:])
    return lambda x, scale, bits: getattr(ag, name)(x, scale, *others)


CALLS = {name: operator(name) for name in POINTWISE}
CALLS["decode_float16"] = lambda x, scale, bits: ag.decode(bits.to(torch.uint8), scale, "E4M3", torch.float16)


def like(placements, x, scale):
    """Where the parts of a scale lie that parts of x need."""
    lead = x.ndim - scale.ndim
    splits = [isinstance(p, Shard) and p.dim >= lead and scale.shape[p.dim - lead] > 1 for p in placements]
    return [Shard(p.dim - lead) if split else Replicate() for p, split in zip(placements, splits, strict=True)]


def check_operator(operator, mesh, placements, x, scale, scale_is_sharded):
    """Values, gradients and placements; no collective."""
    grad, bits = randn(*x.shape, seed=2), random_bits(x.shape)
    plain = x.clone().requires_grad_()
    want = operator(plain, scale, bits)
    of_scale = like(placements, x, scale) if scale_is_sharded else [Replicate()] * mesh.ndim
    split, split_bits, split_grad = (distribute_tensor(t, mesh, placements) for t in (x, bits, grad))
    split.requires_grad_()
    split_scale = distribute_tensor(scale, mesh, of_scale)
    with CommDebugMode() as communication:
        got = operator(split, split_scale, split_bits)
        # Not backward(): to keep a gradient in .grad, torch 2.11 gathers unevenly split ones, whatever made them.
        gradients = torch.autograd.grad(got, split, split_grad) if want.requires_grad else ()
    assert communication.get_total_counts() == 0, communication.get_comm_counts()
    assert got.placements == tuple(placements)
    if got.dtype == torch.uint16:  # gloo sends none
        parts, want = got.to_local().int(), want.int()
        got = DTensor.from_local(parts, mesh, placements, shape=got.shape, stride=got.stride())
    assert_same_bits(got.full_tensor(), want)
    for of_split in gradients:
        (of_plain,) = torch.autograd.grad(want, plain, grad)
        assert of_split.placements == tuple(placements)
        assert_same_bits(of_split.full_tensor(), of_plain)


@case
def values_and_gradients(size):
    x = randn(7, 10)  # uneven over 2 and over 4
    scales = [(), (10,), (7, 1), (7, 10)]
    for mesh in meshes(size):
        for placements in itertools.product(PLACEMENTS, repeat=mesh.ndim):
            for i, operator in enumerate(CALLS.values()):
                for j, shape in enumerate(scales):
                    if mesh.ndim > 1 and i % len(scales) != j and shape:
                        continue  # every operator with a scalar and one more scale
                    check_operator(operator, mesh, placements, x, randn(*shape).abs() + 0.5, (i + j) % 2 == 1)


@case
def wide_and_unsigned_formats(size):
    """Codes of two bytes, arithmetic in float64, no sign."""
    x, mesh = randn(7, 10) * 3, meshes(size)[0]
    scales = [torch.tensor(0.37, device=DEVICE), randn(7, 1).abs() + 0.5]
    for name, placement, scale in itertools.product(("FP16", "BF16", "E8M0", "UE4M3"), PLACEMENTS, scales):
        for operator in (
            lambda x, scale, bits: ag.quantize(x, scale, name, "none", "toward_positive"),  # noqa: B023
            lambda x, scale, bits: ag.quantize_stochastic(x, scale, bits, name),  # noqa: B023
            lambda x, scale, bits: ag.encode(x, scale, name),  # noqa: B023
            lambda x, scale, bits: ag.decode(ag.encode(x, scale, name), scale, name),  # noqa: B023
        ):
            check_operator(operator, mesh, [placement], x, scale, scale_is_sharded=True)


@case
def plain_scalar_scale(size):
    for mesh in meshes(size):
        x = randn(8, 8)
        got = ag.quantize(distribute_tensor(x, mesh, [Shard(0)] * mesh.ndim), torch.tensor(0.37, device=DEVICE), "E3M4")
        assert_same_bits(got.full_tensor(), quantize(x, "E3M4", 0.37))


@case
def partial_is_reduced_first(size):
    parts, scale = randn(size, 7, 10).round(), torch.tensor(0.37, device=DEVICE)
    total = functools.reduce(torch.add, parts)  # not parts.sum(0), which is never -0
    bits = random_bits((7, 10))
    for mesh in meshes(size):
        x = DTensor.from_local(parts[dist.get_rank()], mesh, [Partial()] * mesh.ndim)
        for name in ("quantize", "encode", "dequantize", "quantize_stochastic"):
            got = CALLS[name](x, scale, distribute_tensor(bits, mesh, [Replicate()] * mesh.ndim))
            assert got.placements == (Replicate(),) * mesh.ndim
            assert_same_bits(got.full_tensor(), CALLS[name](total, scale, bits))


@case
def a_seed_counts_the_elements_of_the_whole(size):
    x, seed = randn(7, 10) * 3, torch.tensor(-0x123456789ABCDEF, device=DEVICE)
    want = quantize(x, "E2M1", rounding="stochastic", random_bits=seed)
    for mesh in meshes(size):
        for placements in itertools.product(PLACEMENTS, repeat=mesh.ndim):
            split = distribute_tensor(x, mesh, placements)
            with CommDebugMode() as communication:
                got = quantize(split, "E2M1", rounding="stochastic", random_bits=seed)
            assert (communication.get_total_counts(), got.placements) == (0, placements)
            assert_same_bits(got.full_tensor(), want)
            # The operator alone does not know which part it has: x is gathered first.
            got = ag.quantize_stochastic(split, torch.tensor(1.0, device=DEVICE), seed, "E2M1")
            assert_same_bits(got.full_tensor(), want)
    torch.manual_seed(0)
    got = quantize(distribute_tensor(x, meshes(size)[0], [Shard(0)]), "E2M1", rounding="stochastic")
    torch.manual_seed(0)
    assert_same_bits(got.full_tensor(), quantize(x, "E2M1", rounding="stochastic"))


@case
def a_seed_that_is_drawn_is_that_of_all_ranks(size):
    """Though their generators differ, as those of data-parallel ranks do."""
    torch.manual_seed(dist.get_rank())
    for mesh in meshes(size):
        x = distribute_tensor(randn(16, 16), mesh, [Replicate()] * mesh.ndim)
        drawn = [
            quantize(x, "E2M1", rounding="stochastic"),
            quantize_blocks(x, **NVFP4, rounding="stochastic"),
            linear(x, x, None, "unit_scaled_fp8"),
        ]
        for y in (t.to_local() for t in drawn):
            of_ranks = [torch.empty_like(y) for _ in range(size)]
            dist.all_gather(of_ranks, y)
            assert_same_bits(torch.stack(of_ranks), y.expand(size, *y.shape))


GRANULARITIES = [
    *(PerTensor(), PerAxis(0), PerAxis(-1), PerAxis((0, 1)), PerBlock(4), PerBlock(3), PerBlock((3, 5))),
    *(PerBlock((2, 4)), PerBlock({0: 3}), PerBlock({0: 2}), PerBlock((16, 32))),
]
SCALES = [{"method": method} for method in METHODS] + [{"power_of_two": rule} for rule in POWER_OF_TWO_RULES]
SCALES += [{"scale_format": "E4M3"}, {"scale_format": "E5M2", "tensor_scale": False}]


@case
def scales_of_every_granularity_and_rule(size):
    """The scale of a group is that of all its elements, wherever they lie."""
    x, mesh = randn(8, 12) * 7, meshes(size)[0]
    parts = [distribute_tensor(x, mesh, [placement]) for placement in PLACEMENTS]
    for options, granularity in itertools.product(SCALES if size == 2 else SCALES[1::4], GRANULARITIES):
        options = options | {"format": "E2M1", "granularity": granularity}
        for f in (compute_scale, functools.partial(compute_scale, compact=True), quantize_blocks):
            want = f(x, **options)
            for part in parts:
                got = full(f(part, **options))
                if not torch.equal(got, want):
                    raise AssertionError(f"{f} by {options} of {part.placements}: got {got}, want {want}")


@case
def stored_blocks(size):
    """Codes and scales lie where x does, which is gathered where parts would share a block or a byte."""
    wide, mesh = randn(8, 48) * 7, meshes(size)[0]
    of_threes = MXFP4 | {"granularity": PerBlock(3)}
    of_columns = MXFP6_E2M3 | {"granularity": PerBlock({0: 4})}
    for options in (MXFP8_E4M3, MXFP4, MXFP6_E2M3, NVFP4, of_columns, of_threes):  # three with one block
        x = wide[:, : 3 * size] if options is of_threes else wide
        bits = random_bits(x.shape)
        for placement in PLACEMENTS:
            part = distribute_tensor(x, mesh, [placement])
            for modes in ({}, {"rounding": "stochastic", "random_bits": bits}):
                of_part = modes | ({"random_bits": distribute_tensor(bits, mesh, [placement])} if modes else {})
                got, want = encode_blocks(part, **options, **of_part), encode_blocks(x, **options, **modes)
                if placement == Shard(0) and options is MXFP4:
                    assert got.codes.placements == got.scales.placements == (placement,)
                for field, wanted in zip(got[:3], want[:3]):
                    assert wanted is None or torch.equal(full(field), wanted), (options, placement)
                assert_same_bits(full(decode_blocks(got)), decode_blocks(want))


@case
def compiled(size):
    mesh, x, scale, bits = meshes(size)[-1], randn(8, 12), torch.tensor(0.37, device=DEVICE), random_bits((8, 12))

    def function(x, scale, bits):
        y = ag.dequantize(ag.quantize(x, scale, "E3M4"), scale)
        return y, ag.quantize_stochastic(y, scale, bits, "E5M2"), ag.decode(ag.encode(y, scale, "E4M3"), scale, "E4M3")

    plain = x.clone().requires_grad_()
    want = function(plain, scale, bits)
    (want[0] + want[1]).sum().backward()
    placements = [Shard(0)] * mesh.ndim
    split = distribute_tensor(x, mesh, placements).requires_grad_()
    replicated = distribute_tensor(scale, mesh, [Replicate()] * mesh.ndim)
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if size == 2 else "aot_eager")
    outputs = compiled(split, replicated, distribute_tensor(bits, mesh, placements))
    (outputs[0] + outputs[1]).sum().backward()
    for got, expected in zip(outputs, want, strict=True):
        assert got.placements == tuple(placements)
        assert_same_bits(got.full_tensor(), expected)
    assert_same_bits(split.grad.full_tensor(), plain.grad)


@case
def an_equal_mesh_beside_it(size):
    """What torch.compile fails on without altgrad: an equal mesh before. Where that ends, so should the docs."""
    if torch.__version__ < "2.13":
        return  # torch 2.11 compiles it
    equal = [init_device_mesh(DEVICE, (size,)) for _ in range(2)]
    first, second = (distribute_tensor(randn(2 * size, 3), mesh, [Shard(0)]).requires_grad_() for mesh in equal)
    double = lambda x: x * 2  # noqa: E731
    double(first)
    assert double(second).device_mesh is equal[0]
    try:
        torch.compile(double, backend="aot_eager")(second)
    except torch._dynamo.exc.BackendCompilerFailed as failure:
        assert "tangents_2 was invalid" in str(failure)
    else:
        raise AssertionError("compiled")


@case
def codes_of_two_bytes_after_one(size):
    """DTensor keeps the dtype of an operator's output, which is another one for another format."""
    x, scale = randn(3, 5), torch.tensor(0.37, device=DEVICE)
    part = distribute_tensor(x, meshes(size)[0], [Shard(0)])
    ag.encode(part, scale, "E4M3")
    got = ag.decode(ag.encode(part, scale, "FP16"), scale, "FP16")
    assert_same_bits(got.full_tensor(), ag.decode(ag.encode(x, scale, "FP16"), scale, "FP16"))


@case
def no_part_splits_a_group_of_the_transform(size):
    """Nor where blocks of 8 would allow it: parts of 24 elements are gathered, of 64 are not."""
    for columns, placement in itertools.product((16 * size // 2 * 3, 64 * size), PLACEMENTS):
        x = randn(4 * size, columns)
        part = distribute_tensor(x, meshes(size)[0], [placement])
        modes = "E2M1", "propagate", "nearest_ties_to_even", [1, 8], "rceil", None, 1.0, torch.float32, True
        got = ag.quantize_operand(part, None, *modes)
        assert_same_bits(got.full_tensor(), ag.quantize_operand(x, None, *modes))
        assert got.placements[0] == placement or (placement == Shard(1) and columns < 64 * size)
        assert_same_bits(ag.amax(part, [0, 1], True).full_tensor(), ag.amax(x, [0, 1], True))


@case
def operands_of_both_directions(size):
    """Split as x is, and as x transposed, where neither direction has a split block."""
    modes = "E2M1", "propagate", "nearest_ties_to_even", [1, 1, 8], "rceil", None, 1.0, torch.float32
    shapes = (16 * size, 8 * size), (8 * size, 12 * size), (16, 4)
    for (rows, columns), transforms in itertools.product(shapes, (False, True)):
        if transforms and rows % 16:
            continue
        x, options = randn(2 * size, rows, columns), (None, None, *modes, transforms)
        is_whole = True, rows % (size * (16 if transforms else 8)) == 0, columns % (8 * size) == 0
        for dim, turned in ((0, 0), (1, 2), (2, 1)):
            part = distribute_tensor(x, meshes(size)[0], [Shard(dim)])
            outputs = ag.quantize_operands(part, *options)
            for got, want in zip(outputs, ag.quantize_operands(x, *options), strict=True):
                assert_same_bits(got.full_tensor(), want)
            kept = [[Shard(dim)], [Shard(turned)]] if is_whole[dim] else [[Replicate()]] * 2
            assert [[*got.placements] for got in outputs] == kept


@case
def products_are_sums_of_whole_contractions(size):
    """Split along rows or columns; a split contraction is gathered, since parts of a sum are other sums."""
    a, b = quantize(randn(7, 40), "E4M3"), quantize(randn(40, 9, seed=1), "E4M3")
    want = ag.matmul(a, b, "HOPPER_FP8_FAST")
    for of_a, of_b in itertools.product(PLACEMENTS, repeat=2):
        mesh = meshes(size)[0]
        got = ag.matmul(distribute_tensor(a, mesh, [of_a]), distribute_tensor(b, mesh, [of_b]), "HOPPER_FP8_FAST")
        assert_same_bits(got.full_tensor(), want)


@case
def statistics_of_the_whole(size):
    x, g = randn(7, 10) * 3, randn(7, 10, seed=1)
    want, stalled = quantization_stats(x, "E4M3", 0.37), bit_stall(x, g, 0.1, "E4M3", 0.37)
    for mesh in meshes(size):
        for placements in itertools.product(PLACEMENTS, repeat=mesh.ndim):
            part, part_of_g = (distribute_tensor(t, mesh, placements) for t in (x, g))
            got = quantization_stats(part, "E4M3", 0.37)
            assert not any(isinstance(value, DTensor) for value in got)
            assert_same_bits(torch.stack([*got[:4], got.used_bits]), torch.stack([*want[:4], want.used_bits]))
            assert abs(got.sqnr - want.sqnr) < 1e-12 * want.sqnr  # a sum of float64 in another order
            assert_same_bits(bit_stall(part, part_of_g, 0.1, "E4M3", 0.37), stalled)


@case
def compiled_it_is_plain_too(size):
    """Of a DTensor that is made within a graph Dynamo knows the attributes and not the methods."""
    if size > 2:
        return
    x, (history, of_plain) = randn(8, 10), (AmaxHistory("E4M3", length=3).to(DEVICE) for _ in range(2))
    part = distribute_tensor(x, meshes(size)[0], [Shard(0)])
    compiled = torch.compile(lambda x: (sqnr(x, x + 1), history(x)), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(part), (sqnr(x, x + 1), of_plain(x)), strict=True):
        assert not isinstance(got, DTensor) and torch.allclose(got, want)
    assert_same_bits(history.history, of_plain.history)


@case
def history_of_the_whole(size):
    for placement in PLACEMENTS:
        plain, split = AmaxHistory("E4M3", length=3).to(DEVICE), AmaxHistory("E4M3", length=3).to(DEVICE)
        for step in range(4):
            x = randn(7, 10, seed=step) * 5**step
            part = distribute_tensor(x, meshes(size)[0], [placement])
            got, want = quantize(part, "E4M3", split(part)), quantize(x, "E4M3", plain(x))
            assert_same_bits(got.full_tensor(), want)
        assert_same_bits(split.history, plain.history)


@case
def a_history_leaves_out_infinities_of_any_part(size):
    for bad, row in itertools.product((float("inf"), float("nan")), range(size)):
        history, x = AmaxHistory("E4M3", length=3).to(DEVICE), torch.ones(size, 4, device=DEVICE)
        history(distribute_tensor(x, meshes(size)[0], [Shard(0)]))
        x[row] = bad
        history(distribute_tensor(2 * x, meshes(size)[0], [Shard(0)]))
        assert history.history.tolist() == [1, 1, 0], (bad, row)


@case
def replicated_x_takes_the_split_of_its_scale(size):
    mesh, x, scale = meshes(size)[0], randn(8, 8), randn(8, 1).abs() + 0.5
    replicated, split = distribute_tensor(x, mesh, [Replicate()]), distribute_tensor(scale, mesh, [Shard(0)])
    with CommDebugMode() as communication:
        got = ag.quantize(replicated, split, "E3M4")
    assert (communication.get_total_counts(), got.placements) == (0, (Shard(0),))
    assert_same_bits(got.full_tensor(), quantize(x, "E3M4", scale))


@case
def dimension_shorter_than_the_mesh(size):
    mesh, x = meshes(size)[0], randn(size - 1, 3)
    got = quantize(distribute_tensor(x, mesh, [Shard(0)]), "E3M4", torch.tensor(0.37, device=DEVICE))
    assert_same_bits(got.full_tensor(), quantize(x, "E3M4", 0.37))


class QuantizedGradient(torch.autograd.Function):
    """The identity, with a gradient on the grid of E2M3."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return quantize(grad, "E2M3", 2.0**-6)


class QuantizedLinear(nn.Linear):
    """All three products have operands on 6-bit grids with scales that are powers of two.

    A product of two is an integer below 2^12 times a constant, so sums of up to 2^12 of them are exact in float32 in
    any order: sharding a product, or reducing its parts, cannot change a bit.
    """

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        y = F.linear(quantize(x, "E2M3", 0.5), quantize(self.weight, "E2M3", 2.0**-5))
        return QuantizedGradient.apply(y)


class Block(nn.Module):
    """A transformer block; normalization has no weights, because their gradients are sums of arbitrary floats."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.head_width = width // heads
        self.query, self.key, self.value, self.out = (QuantizedLinear(width, width) for _ in range(4))
        self.up, self.down = QuantizedLinear(width, 2 * width), QuantizedLinear(2 * width, width)

    def attend(self, q, k, v):
        def heads(t):
            return quantize(t, "E2M3", 0.5).unflatten(-1, (-1, self.head_width)).transpose(-2, -3)

        weights = (heads(q) @ heads(k).transpose(-1, -2) * 0.25).softmax(-1)
        return (quantize(weights, "E2M3", 2.0**-3) @ heads(v)).transpose(-2, -3).flatten(-2)

    def forward(self, x):
        h = F.layer_norm(x, x.shape[-1:])
        x = x + self.out(self.attend(self.query(h), self.key(h), self.value(h)))
        return x + self.down(F.relu(self.up(F.layer_norm(x, x.shape[-1:]))))


def model(blocks=2):
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(blocks))).to(DEVICE)


# Inductor takes a minute of every CPU process for a block; what FSDP2 and DTensor do to a graph precedes it. Without
# it the bits are those of one process in eager mode.
BLOCK_BACKEND = "inductor" if DEVICE == "cuda" else "aot_eager"


def train(model, x, target, lr, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - target).square().sum().mul(2.0**-4).backward()
        optimizer.step()


def full(parameter):
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def assert_same_parameters(got, want, start):
    for (name, g), w, s in zip(got.named_parameters(), want.parameters(), start.parameters(), strict=True):
        assert not torch.equal(w, s), f"{name} was not trained"
        assert_same_bits(full(g), w)


def fsdp_steps(size, compiles):
    x, target = randn(8, 6, 32), randn(8, 6, 32, seed=3)
    start, single, sharded = (model(1 if compiles else 2) for _ in range(3))
    mesh = meshes(size)[0]
    for block in sharded:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    if compiles:
        for block in (*single, *sharded) if BLOCK_BACKEND == "inductor" else sharded:
            block.compile(backend=BLOCK_BACKEND, fullgraph=True)
    part = slice(dist.get_rank() * 8 // size, (dist.get_rank() + 1) * 8 // size)
    train(single, x, target, lr=2.0**-6)
    train(sharded, x[part], target[part], lr=2.0**-6 * size)  # FSDP divides gradients by the world size
    assert_same_parameters(sharded, single, start)


@case
def fsdp2(size):
    fsdp_steps(size, compiles=False)


@case
def fsdp2_compiled(size):
    fsdp_steps(size, compiles=True)


def tensor_parallel(model, mesh):
    plan = {name: ColwiseParallel() for name in ("query", "key", "value", "up")}
    for block in model:
        parallelize_module(block, mesh, plan | {name: RowwiseParallel() for name in ("out", "down")})


def tensor_parallel_steps(size, compiles):
    x, target = randn(4, 6, 32), randn(4, 6, 32, seed=3)
    start, single, split = (model(1 if compiles else 2) for _ in range(3))
    tensor_parallel(split, meshes(size)[0])
    if compiles:
        for block in (*single, *split) if BLOCK_BACKEND == "inductor" else split:
            block.compile(backend=BLOCK_BACKEND, fullgraph=True)
    for each in (single, split):
        train(each, x, target, lr=2.0**-6)
    assert_same_parameters(split, single, start)


@case
def tensor_parallel_block(size):
    tensor_parallel_steps(size, compiles=False)


@case
def tensor_parallel_compiled(size):
    tensor_parallel_steps(size, compiles=True)


@case
def fsdp2_of_tensor_parallel(size):
    if size < 4:
        return
    mesh = init_device_mesh(DEVICE, (2, size // 2), mesh_dim_names=("data", "tensor"))
    x, target = randn(8, 6, 32), randn(8, 6, 32, seed=3)
    start, single, split = (model() for _ in range(3))
    tensor_parallel(split, mesh["tensor"])
    for block in split:
        fully_shard(block, mesh=mesh["data"])
    part = slice(mesh.get_local_rank("data") * 4, (mesh.get_local_rank("data") + 1) * 4)
    train(single, x, target, lr=2.0**-6)
    train(split, x[part], target[part], lr=2.0**-5)
    assert_same_parameters(split, single, start)
    weight = split[0].up.weight  # strided shards on the first dimension of the mesh
    with CommDebugMode() as communication:
        codes = ag.encode(weight, torch.tensor(0.5, device=DEVICE), "E2M3")
    assert (communication.get_total_counts(), codes.placements) == (0, weight.placements)
    assert_same_bits(dequantize(full(codes).float(), 1.0), ag.encode(full(weight), torch.tensor(0.5), "E2M3").float())


def simulated_mlp(recipe, width=128):
    """Without biases, on numbers of few bits: with mxfp4 all sums are exact, in any order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width, bias=False), nn.ReLU(), nn.Linear(width, 64, bias=False)).to(DEVICE)
    return model, simulate(model, recipe)


def simulated_steps(model, simulation, x, steps=2):
    for _ in range(steps):
        model.zero_grad()
        model(x).sum().backward()
        simulation.step()


@case
def simulated_data_parallel(size):
    """DDP and FSDP2: the gradients of one process; scales of delayed scaling agree over ranks, and with one process."""
    x = randn(32 * size, 64).bfloat16().float()
    part = x.chunk(size)[dist.get_rank()]
    for recipe in ("mxfp4", "fp8_delayed"):
        single, simulation = simulated_mlp(recipe)
        simulated_steps(single, simulation, x)
        scales = [state.scales for state in simulation.states.values()]
        for wrap in (DistributedDataParallel, functools.partial(fully_shard, mesh=meshes(size)[0])):
            model, simulation = simulated_mlp(recipe)
            simulated_steps(wrap(model), simulation, part)
            for got, want in zip(model.parameters(), single.parameters()):
                if recipe == "mxfp4":
                    assert_same_bits(full(got.grad) * size, want.grad)
                else:
                    assert torch.allclose(full(got.grad) * size, want.grad, rtol=1e-5, atol=1e-5)
            for state, want in zip(simulation.states.values(), scales):
                assert want is None or torch.equal(state.scales, want)


@case
def simulated_infinities_of_one_rank(size):
    """As of one process with the whole batch: the amax of a step with one of them, or NaN, is not recorded."""
    for bad, of in itertools.product((float("inf"), float("nan")), range(size)):
        layer = nn.Linear(4, 4, device=DEVICE)
        simulation = simulate(layer, "fp8_delayed")
        for x in (float(size), bad if dist.get_rank() == of else 1e3):
            layer(torch.full((2, 4), x, device=DEVICE))
            simulation.step()
        assert simulation.states[""].history[0, 0, :3].tolist() == [size, size, 0]


@case
def simulated_layers_of_fsdp_are_covered(size):
    """Backward too, where the graph has other tensors than the model's parameters; and nothing is left behind."""
    x, found = randn(32, 64), []
    for wrap in (lambda module: module, functools.partial(fully_shard, mesh=meshes(size)[0])):
        model, simulation = simulated_mlp({"0": "mxfp8"})
        found.append(coverage(wrap(nn.Sequential(*map(wrap, model))), x))
        assert all(p.grad is None for p in model.parameters())
        simulated_steps(model, simulation, x)
    assert found[0] == found[1] and {row.direction for row in found[0].uncovered} == {"forward", "backward"}


@case
def simulated_stages_of_a_pipeline(size):
    """Layers that other ranks do not have are refused, and nothing is changed; in a group for each stage they serve."""
    alone = [dist.new_group([rank]) for rank in range(size)][dist.get_rank()]
    for split in (2, 3):
        model = nn.ModuleDict({str(i): nn.Linear(4, 4, device=DEVICE) for i in range(4)})
        simulation = simulate(model, "fp8_delayed")
        for name in (list("0123")[:split], list("0123")[split:])[dist.get_rank() != 0]:
            model[name](torch.full((2, 4), 10.0 ** int(name), device=DEVICE))
        for name in (list("0123")[split:], list("0123")[:split])[dist.get_rank() != 0]:
            del model[name]
        try:
            simulation.step()
        except RuntimeError as refusal:
            assert all(word in str(refusal) for word in ("process_group", *map(repr, model)))
        else:
            raise AssertionError("mixed layers")
        assert all(state.step == 0 for state in simulation.states.values())
        for _ in range(2):
            simulation.step(alone)
        for name, state in simulation.states.items():
            assert state.history[0, 0, :3].tolist() == [0, 10.0 ** int(name), 0]


@case
def simulated_pipeline(size):
    """With sizes that are given, a stage runs on data alone: delayed scaling sees what it sees in one process."""
    x, target = randn(4 * size, 16), randn(4 * size, 16, seed=1)
    loss = lambda y, t: (y - t).square().sum()  # noqa: E731
    rank, alone = dist.get_rank(), [dist.new_group([rank]) for rank in range(size)][dist.get_rank()]
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(size))).to(DEVICE)
    simulation = simulate(model, "fp8_delayed")
    stage_of_it = copy.deepcopy(model)[rank]
    for part, of_part in zip(x.chunk(size), target.chunk(size)):
        loss(model(part), of_part).backward()
    sizes = [torch.empty(4, 16, device="meta", requires_grad=requires_grad) for requires_grad in (rank > 0, True)]
    stage = PipelineStage(stage_of_it, rank, size, torch.device(DEVICE), input_args=sizes[0], output_args=sizes[1])
    schedule = ScheduleGPipe(stage, size, loss_fn=loss, scale_grads=False)
    schedule.step(*[x] * (rank == 0), target=target if rank == size - 1 else None)
    of_stage = Simulation(stage_of_it)
    of_stage.step(alone)
    simulation.step(alone)
    assert_same_bits(of_stage.states[""].history, simulation.states[str(rank)].history)
    assert_same_bits(stage_of_it.weight.grad, model[rank].weight.grad)


@case
def simulated_tensor_parallel(size):
    """A split by columns and one by rows: the operands of one process, so where sums are exact its bits."""
    x = randn(64, 64).bfloat16().float()
    of_parts = [  # that split the blocks
        Rule("E2M1", per=40, method="mse", rounding="stochastic"),
        Rule("E2M1", per=32, method="four_over_six", scale_format="E4M3"),
        Rule("E4M3", per=32, method="percentile", fraction=0.9),
    ]
    mine = [Recipe("mine", (rule, rule), (rule, rule), (rule, rule)) for rule in of_parts]
    for recipe in ("mxfp4", "fp8_current", "fp8_delayed", "fp8_block", "nvfp4", *mine):
        width = 96 if recipe in mine else 128
        (single, simulation), (split, of_split) = (simulated_mlp(recipe, width) for _ in range(2))
        parallelize_module(split, meshes(size)[0], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        results = []
        for model, steps in ((single, simulation), (split, of_split)):
            simulated_steps(model, steps, x)
            results.append([full(model(x)), *(full(p.grad) for p in model.parameters())])
        for got, want in zip(results[1], results[0]):
            if recipe == "mxfp4":
                assert_same_bits(got, want)
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


@case
def simulated_tensor_parallel_compiled(size):
    """Delayed scaling takes the amax of all parts."""
    if size > 2:
        return
    x, histories = randn(64, 64).bfloat16().float(), []
    for compiles in (False, True):
        split, simulation = simulated_mlp("fp8_delayed")
        parallelize_module(split, meshes(size)[0], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if compiles:
            split.compile(backend="aot_eager")
        simulated_steps(split, simulation, x)
        histories.append([state.history for state in simulation.states.values()])
    for got, want in zip(*histories, strict=True):
        assert_same_bits(got, want)


def run_cases(rank, size):
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    results = {}
    for name, function in CASES.items():
        try:
            function(size)
            results[name] = None
        except BaseException:
            results[name] = traceback.format_exc()[-4000:]
        torch._dynamo.reset()
    Path(f"{os.environ['RESULTS']}.{rank}").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    size = int(sys.argv[1])
    method = "fork" if DEVICE == "cpu" else "spawn"  # CUDA does not live on in what is forked
    torch.multiprocessing.start_processes(run_cases, (size,), nprocs=size, start_method=method)
