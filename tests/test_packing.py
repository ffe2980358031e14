"""pack and unpack: the bits of one integer for a row, by the formula and by every kernel, and what others read.

Tests named ``interpreted`` run the Triton kernel on the CPU, in the process of test_interpreter.py.
"""

import itertools
import math

import pytest
import torch
from conftest import assert_same_bits
from interpreter import interpreted

from altgrad.quantization import pack, unpack
from ops_registry import aten, cpu, cuda, packing


def packed_by_definition(codes, bits):
    """One integer for a row: code i counts 2^(i * bits)."""
    number = sum((code % (1 << bits)) << (i * bits) for i, code in enumerate(codes))
    return list(number.to_bytes(math.ceil(len(codes) * bits / 8), "little"))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 9, 33])
def test_pack_is_the_definition(bits, n, device):
    codes = torch.randint(256, (3, 2, n), dtype=torch.uint8)  # also with bits above the width
    want = torch.tensor([[packed_by_definition(row, bits) for row in m] for m in codes.tolist()], dtype=torch.uint8)
    want = want.reshape(3, 2, -1)
    for x in (codes, codes.transpose(0, 1).contiguous().transpose(0, 1), codes.repeat(1, 1, 2)[..., :n]):
        assert_same_bits(pack(x.to(device), bits).cpu(), want)
    assert_same_bits(unpack(want.to(device), bits, n).cpu(), codes & ((1 << bits) - 1))
    batched = torch.vmap(lambda c: pack(c, bits), in_dims=1)(codes.to(device)).cpu()
    assert_same_bits(batched, want.transpose(0, 1).contiguous())


SHAPES = [(3, 7), (5, 8), (700, 131), (1, 100003), (1000, 128), (4, 0), (0, 5), (2, 4096), (3, 2, 33), (4095,), (1, 1)]


def check_kernels(bits, device):
    """Rows that begin with a group of their own and rows that are one, programs that are full and not, layouts."""
    for shape in SHAPES:
        codes = torch.randint(256, shape, dtype=torch.uint8)
        packed = packing.pack(codes, bits)
        columns, apart = codes.transpose(0, -1).contiguous().transpose(0, -1), codes.repeat_interleave(2, 0)[::2]
        before_others = torch.cat([codes, codes | 255])[: len(codes)]
        for x in (codes, columns, apart, before_others):
            assert_same_bits(cuda.pack(x.to(device), bits), packed)
        got = cuda.unpack(packed.transpose(0, -1).contiguous().transpose(0, -1).to(device), bits, shape[-1])
        assert_same_bits(got, codes & ((1 << bits) - 1))


@pytest.mark.skipif(cpu.backend() == "aten", reason="needs the C kernels")
@pytest.mark.parametrize("target", ["avx512", "avx2", "baseline"])
def test_packing_of_every_instruction_set(target):
    """Rows that begin with a group of their own and rows that are one, in two threads."""
    if cpu.select(cpu._native, target) is None:
        pytest.skip(f"needs a CPU with {target}")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for bits, shape in itertools.product(range(1, 9), SHAPES):
            codes = torch.randint(256, shape, dtype=torch.uint8)
            packed = packing.pack(codes, bits)
            assert_same_bits(cpu.pack(codes, bits), packed)
            assert_same_bits(cpu.unpack(packed, bits, shape[-1]), codes & ((1 << bits) - 1))
            columns = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (codes, packed)]
            assert_same_bits(cpu.pack(columns[0], bits), packed)
            assert_same_bits(cpu.unpack(columns[1], bits, shape[-1]), codes & ((1 << bits) - 1))
    finally:
        torch.set_num_threads(threads)
        cpu.select(cpu._native, cpu.backend())


def test_bad_input():
    codes = torch.zeros(2, 4, dtype=torch.uint8)
    for bits in (0, 9, -1):
        with pytest.raises(ValueError, match=f"bits must be from 1 to 8, got {bits}"):
            pack(codes, bits)
        with pytest.raises(ValueError, match=f"bits must be from 1 to 8, got {bits}"):
            unpack(codes, bits, 4)
    for n in (-1, 4, 6, 9):
        with pytest.raises(ValueError, match=f"for n = {n} codes of 4 bits, got 4"):
            unpack(codes, 4, n)
    for wrong in (codes.int(), codes.float()):
        with pytest.raises(TypeError, match="uint8"):
            pack(wrong, 4)
        with pytest.raises(TypeError, match="uint8"):
            unpack(wrong, 4, 8)
    for zero in (torch.tensor(1, dtype=torch.uint8), torch.tensor(1, dtype=torch.uint8, device="meta")):
        with pytest.raises(ValueError, match="0-d"):
            pack(zero, 4)
    with pytest.raises(ValueError, match="0-d"):
        torch.vmap(lambda c: pack(c, 4))(codes[0])
    with pytest.raises(TypeError, match="list"):
        pack([1], 4)


class Packed(torch.nn.Module):
    def forward(self, codes):
        return unpack(pack(codes, 6), 6, codes.shape[-1])


def test_export_keeps_one_node_each():
    codes = torch.randint(64, (3, 10), dtype=torch.uint8)
    exported = torch.export.export(Packed(), (codes,), dynamic_shapes=({1: torch.export.Dim.DYNAMIC},))
    nodes = [str(node.target) for node in exported.graph.nodes if "altgrad" in str(node.target)]
    assert nodes == ["altgrad.pack.default", "altgrad.unpack.default"]
    longer = torch.randint(64, (3, 33), dtype=torch.uint8)
    assert_same_bits(exported.module()(longer), longer)


@pytest.fixture
def served(monkeypatch):
    """The kernel, which must serve: the formula is not called."""

    def refuse(*args):
        pytest.fail("the formula served")

    for name in ("pack", "unpack"):
        monkeypatch.setitem(aten.KERNELS, name, refuse)


@interpreted
@pytest.mark.parametrize("bits", range(1, 9))
def test_interpreted(bits, served):
    check_kernels(bits, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", range(1, 9))
def test_kernels(bits):
    check_kernels(bits, "cuda")
