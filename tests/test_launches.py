"""What a repeated launch hands to the driver, without one: a recorder stands in its place."""

import ctypes
import struct
from types import SimpleNamespace

import pytest
import torch

from ops_registry import launches
from ops_registry.launches import Launch, call_of, key_of

METADATA = {"num_warps": 4, "num_ctas": 1, "shared": 256, "global_scratch_size": 0}


@pytest.fixture
def driven(monkeypatch):
    """The launches of a recorder: (function, grid and threads, shared memory, stream, arguments)."""
    recorded = []

    def launch(config, function, pointers, extra):
        assert extra is None
        *sizes, shared, stream, attributes, number = struct.unpack("7I4xqqI4x", ctypes.string_at(config, 56))
        assert attributes == number == 0
        addresses = (ctypes.c_int64 * launches._SLOTS).from_address(pointers)
        slots = [ctypes.c_int64.from_address(address).value for address in addresses]
        recorded.append((function, tuple(sizes), shared, stream, slots))
        return 0

    class Recorder(launches.Driver):
        def __init__(self):
            self.launch = launch
            self.allocate()
            self.memory[:] = b"\xff" * len(self.memory)

    recorder = Recorder()
    monkeypatch.setattr(launches, "driver", lambda: recorder)
    monkeypatch.setattr(
        launches, "empty", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype)
    )
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)  # where CPU tensors are
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    return recorded


def compiled(**changes):
    return SimpleNamespace(function=1234, metadata=SimpleNamespace(**METADATA | changes))


def again(call, tensors):
    _, addresses = key_of([], tensors)
    return launches.again(call, tensors, addresses)


def test_arguments(driven):
    x, scale, out = torch.randn(8, 4), torch.ones(()), torch.empty(8, 4, dtype=torch.float16)
    call = call_of(Launch(None, 5, [scale, x, out, out], (32, -7), (), {}), compiled(), (x, scale), (out,))
    y, other = torch.randn(8, 4), torch.ones(())
    (result,) = again(call, (y, other))
    assert (result.shape, result.dtype) == ((8, 4), torch.float16)
    ((function, sizes, shared, stream, slots),) = driven
    assert (function, sizes, shared, stream) == (1234, (5, 1, 1, 128, 1, 1), 256, 77)
    pointers = [other.data_ptr(), y.data_ptr(), result.data_ptr(), result.data_ptr()]
    assert slots[:8] == [*pointers, 32, -7, 0, 0], "addresses, integers, scratch memory"


def test_two_outputs(driven, monkeypatch):
    """Each has a shape and strides of its own; two tensors that are not given are not one with two roles."""
    described = []

    def describe(x, *others):
        described.append(x)
        outputs = torch.empty_like(x), torch.empty_like(x.mT)
        return outputs, Launch(None, 3, [x, x, x, *outputs], (x.numel(),), (), {})

    monkeypatch.setattr(launches, "start", lambda launch: compiled())
    kernel = launches.served("quantize_operands", describe, None)
    args = None, None, "E4M3", "propagate", "nearest_ties_to_even", [1, 4]
    for x in (torch.randn(4, 8), torch.randn(4, 8)):
        outputs = kernel(x, *args)
        assert [(out.shape, out.stride()) for out in outputs] == [((4, 8), (8, 1)), ((8, 4), (1, 8))]
    assert len(described) == len(driven) == 1
    assert driven[0][-1][:6] == [x.data_ptr()] * 3 + [out.data_ptr() for out in outputs] + [32]


def test_an_output_that_is_zero_before(driven, monkeypatch):
    launch = Launch(None, 3, [x := torch.randn(4), out := torch.zeros(1)], (4,), (), {}, from_zero=True)
    call = call_of(launch, compiled(), (x,), (out,))
    monkeypatch.setattr(launches, "empty", lambda *place: torch.full((1,), torch.nan))
    assert again(call, (x,))[0].tolist() == [0.0]


def test_a_number(driven):
    x, scale, out = torch.randn(4), torch.tensor(0.37), torch.empty(4)
    call = call_of(Launch(None, 1, [0.37, x, out, out], (4,), (), {}), compiled(), (x, scale), (out,))
    (result,) = again(call, (x, torch.tensor(0.1)))
    slots = driven[0][-1]
    assert struct.pack("q", slots[0])[:4] == struct.pack("f", 0.1)
    assert slots[1:7] == [x.data_ptr(), result.data_ptr(), result.data_ptr(), 4, 0, 0]
    assert call_of(Launch(None, 1, [0.37, x, out, out], (4,), (), {}), compiled(), (x, scale.double()), (out,)) is None


def test_what_is_not_repeated(driven):
    x, scale, out = torch.randn(4), torch.ones(()), torch.empty(4)
    launch = Launch(None, 1, [scale, x, out, out], (4,), (), {})
    assert call_of(launch, compiled(), (x, scale), (out,))
    assert call_of(launch, None, (x, scale), (out,)) is None
    assert call_of(launch, compiled(), (x, x), (out,)) is None, "which of two is read cannot be told"
    assert call_of(launch._replace(tensors=[scale, x.clone(), out, out]), compiled(), (x, scale), (out,)) is None
    for change in ({"num_ctas": 2}, {"global_scratch_size": 8}, {"launch_cooperative_grid": True}):
        assert call_of(launch, compiled(**change), (x, scale), (out,)) is None
    odd = torch.empty(5)[1:]
    assert call_of(launch._replace(tensors=[scale, x, odd, odd]), compiled(), (x, scale), (odd,)) is None


def test_the_driver_refuses(driven, monkeypatch):
    x, scale, out = torch.randn(4), torch.ones(()), torch.empty(4)
    call = call_of(Launch(None, 1, [scale, x, out, out], (4,), (), {}), compiled(), (x, scale), (out,))
    assert again(call, (x, scale)) is not None
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0)
    assert again(call, (x, scale)) is None, "another device"
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1)
    driver = launches.driver()
    driver.parts = (lambda *args: 201, *driver.parts[1:])  # CUDA_ERROR_INVALID_CONTEXT
    assert again(call, (x, scale)) is None


def test_keys():
    x, seed = torch.randn(8, 8), torch.tensor(1)
    others = x.t()[:4], x.double(), x[1:], x.flatten()[1:65].view(1, -1), x.flatten()[:63], x[:, None]
    calls = [("E4M3",), (x,)], [("E5M2",), (x,)], [("E4M3", None), (x,)], [("E4M3",), (x, None)], [("E4M3",), (x, seed)]
    keys = [key_of(*call)[0] for call in (*calls, *[(("E4M3",), (other,)) for other in others])]
    assert len(set(keys)) == len(keys)
    assert keys[0] == key_of(["E4M3"], (torch.randn(8, 8),))[0]
    assert key_of((), (x, None, seed))[1] == [x.data_ptr(), 0, seed.data_ptr()]


def test_an_operator_is_described_once(driven, monkeypatch):
    """A second call with the same traits and options goes to the driver; too many kinds of calls start anew."""
    described = []

    def describe(x, tensor_scale, *options):
        described.append(options)
        out = torch.empty_like(x)
        return out, None if options[0] == "E5M2" else Launch(None, 1, [x, x, out, out], (x.numel(),), (), {})

    monkeypatch.setattr(launches, "start", lambda launch: compiled())
    monkeypatch.setattr(launches, "MAX_CALLS", 2)
    kernel = launches.served("quantize_operand", describe, torch.ops.altgrad.quantize_operand)
    modes = "propagate", "nearest_ties_to_even"
    for x, options in (
        (torch.randn(4, 8), ("E4M3", *modes, [1, 4])),
        (torch.randn(4, 8), ("E4M3", *modes, [1, 4])),  # again
        (torch.randn(4, 8), ("E4M3", *modes, [1, 8])),
        (torch.randn(4, 8), ("E4M3", *modes, [1, 8])),  # again
        (torch.randn(8, 4).t(), ("E4M3", *modes, [1, 4])),  # the third kind
        (torch.randn(4, 8), ("E4M3", *modes, [1, 4])),  # forgotten
    ):
        out = kernel(x, None, *options)
        assert (out.shape, out.stride()) == (x.shape, x.stride())
    assert [options[3] for options in described] == [[1, 4], [1, 8], [1, 4], [1, 4]]
    assert len(driven) == 2
    x = torch.randn(4, 8)
    want = torch.ops.altgrad.quantize_operand(x, None, "E5M2", *modes, [1, 4])
    assert torch.equal(kernel(x, None, "E5M2", *modes, [1, 4]), want), "the formula, where nothing is launched"
