"""What a repeated launch hands to the driver, without one: a recorder stands in its place, CPU tensors for CUDA's."""

import ctypes
import struct
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch._C import DispatchKey, DispatchKeySet

from ops_registry import launches, native
from ops_registry.launches import FUNCTIONS, FUNCTIONS_OF_DRIVER, Launch, numbers_of

pytestmark = pytest.mark.skipif(native.load() is None, reason="needs the C library")

METADATA = {"num_warps": 4, "num_ctas": 1, "shared": 256, "global_scratch_size": 0}
MODES = "propagate", "nearest_ties_to_even"
HERE = -1  # the device of CPU tensors
INT, POINTER = ctypes.c_int32, ctypes.c_void_p


def store(address, ctype, value):
    ctype.from_address(address).value = value


class Recorder:
    """Stands for the driver, for what torch knows of CUDA, and for its allocations.

    launched: (function, grid and threads, shared memory, stream, the first arguments) of each launch.
    """

    def __init__(self):
        integer, int32s = ctypes.c_int64, [INT] * 3
        functions = {
            "torch_get_const_data_ptr": (self.data_ptr, [POINTER] * 2),
            "aoti_torch_get_device_index": (self.device_index, [POINTER] * 2),
            "aoti_torch_item_float32": (self.item, [POINTER] * 2),
            "aoti_torch_empty_strided": (self.empty_strided, [integer, POINTER, POINTER, *int32s, POINTER]),
            "aoti_torch_zero_": (self.zero, [POINTER]),
            "aoti_torch_delete_tensor_object": (self.delete, [POINTER]),
            "aoti_torch_get_current_cuda_stream": (self.current_stream, [INT, POINTER]),
            "cuCtxGetDevice": (self.current_device, [POINTER]),
            "cuLaunchKernelEx": (self.launch, [POINTER] * 4),
        }
        callbacks = {name: ctypes.CFUNCTYPE(INT, *types)(f) for name, (f, types) in functions.items()}
        real = {name: native.of_torch(name) for name in FUNCTIONS if "cuda" not in name}
        self.real = {name: type(callbacks[name])(real[name]) for name in callbacks if name in real}
        addresses = real | {name: ctypes.cast(callback, POINTER).value for name, callback in callbacks.items()}
        self.functions = [addresses[name] for name in (*FUNCTIONS, *FUNCTIONS_OF_DRIVER)]
        self.callbacks = callbacks
        self.start_anew()

    def start_anew(self, arguments=8):
        self.launched, self.made, self.zeroed = [], [], []
        self.arguments, self.device, self.current, self.offset, self.fails = arguments, HERE, HERE, 0, None

    def call(self, name, *args):
        return 1 if name == self.fails else self.real[name](*args)

    def data_ptr(self, tensor, out):
        status = self.call("torch_get_const_data_ptr", tensor, out)
        if tensor in self.made:
            store(out, ctypes.c_int64, ctypes.c_int64.from_address(out).value + self.offset)
        return status

    def device_index(self, tensor, out):
        store(out, INT, self.device)
        return 0

    def item(self, tensor, out):
        return self.call("aoti_torch_item_float32", tensor, out)

    def empty_strided(self, *args):
        assert args[5] == self.device
        status = self.call("aoti_torch_empty_strided", *args)
        if status == 0:
            self.made.append(POINTER.from_address(args[6]).value)
        return status

    def zero(self, tensor):
        self.zeroed.append(tensor)
        return self.call("aoti_torch_zero_", tensor)

    def delete(self, tensor):
        if tensor in self.made:
            self.made.remove(tensor)
        return self.call("aoti_torch_delete_tensor_object", tensor)

    def current_device(self, index):
        store(index, INT, self.current)
        return int(self.fails == "cuCtxGetDevice")

    def current_stream(self, device, stream):
        store(stream, POINTER, 78 + device)
        return int(self.fails == "aoti_torch_get_current_cuda_stream")

    def launch(self, config, function, pointers, extra):
        *sizes, shared, stream, attributes, number = struct.unpack("7I4xqqI4x", ctypes.string_at(config, 56))
        addresses = (POINTER * self.arguments).from_address(pointers)
        slots = [ctypes.c_int64.from_address(address).value for address in addresses]
        self.launched.append((function, tuple(sizes), shared, stream, slots))
        assert attributes == number == 0 and extra is None
        return int(self.fails == "cuLaunchKernelEx")


@cache
def recorder():
    """The only one of the process: torch takes one kernel for each of its keys."""
    made = Recorder()
    launches.launch_by(native.load(), made.functions)
    assert native.load().altgrad_serve_launches(b"CPU")
    return made


@pytest.fixture
def driven(monkeypatch):
    made = recorder()
    made.start_anew()
    launches.launch_by(native.load(), made.functions)
    monkeypatch.setattr(launches, "is_remembered", lambda out: True)
    monkeypatch.setattr(launches, "KEYS", DispatchKeySet(DispatchKey.CPU))
    yield made
    monkeypatch.undo()
    if torch.cuda.is_available():
        launches.launch_by(native.load(), launches.functions_of_cuda())


def compiled(**changes):
    return SimpleNamespace(function=1234, metadata=SimpleNamespace(**METADATA | changes))


KINDS = iter(range(10**6, 2 * 10**6))  # none of a served operator


def padded(tensors):
    return (*tensors, *[tensors[0]] * (launches.INPUTS - len(tensors)))


def remember(launch, tensors, outputs, kind=None):
    """Remembers the launch under a new kind, or the one given, which is returned."""
    kind = next(KINDS) if kind is None else kind
    numbers = torch.tensor(numbers_of(launch, compiled(), tensors, outputs))
    launches._remember(launches.KEYS, kind, *padded(tensors), outputs[0], outputs[-1], numbers)
    return kind


def again(kind, *tensors):
    return launches._again(launches.KEYS, kind, *padded(tensors))


def simple_call(x, scale):
    """A launch on the two of what would write x's like."""
    out = torch.empty_like(x)
    return remember(Launch(None, 5, [scale, x, out], (32,), (), {}), (x, scale), (out,))


def test_arguments(driven):
    x, scale, out = torch.randn(8, 4), torch.ones(()), torch.empty(4, 8, dtype=torch.float16).t()
    kind = remember(Launch(None, 5, [scale, x, out, out], (32, -7), (), {}), (x, scale), (out,))
    y, other = torch.randn(8, 4), torch.ones(())
    result, nothing = again(kind, y, other)
    assert nothing is None
    assert (result.shape, result.stride(), result.dtype) == ((8, 4), (1, 8), torch.float16)
    ((function, sizes, shared, stream, slots),) = driven.launched
    assert (function, sizes, shared, stream) == (1234, (5, 1, 1, 128, 1, 1), 256, 77)
    pointers = [other.data_ptr(), y.data_ptr(), result.data_ptr(), result.data_ptr()]
    assert slots == [*pointers, 32, -7, 0, 0], "addresses, integers, scratch memory"


def test_two_outputs(driven, monkeypatch):
    """Each has a shape and strides of its own; two tensors that are not given are not one with two roles."""
    described = []

    def describe(x, *others):
        described.append(x)
        outputs = torch.empty_like(x), torch.empty_like(x.mT)
        return outputs, Launch(None, 3, [x, x, x, *outputs], (x.numel(),), (), {})

    monkeypatch.setattr(launches, "start", lambda launch: compiled())
    kernel, repeat = launches.served("quantize_operands", describe, None)
    args = None, None, "E4M3", *MODES, [1, 4]
    assert repeat(torch.randn(4, 8), *args) is None
    for x in (torch.randn(4, 8), torch.randn(4, 8)):
        outputs = kernel(x, *args)
        assert [(out.shape, out.stride()) for out in outputs] == [((4, 8), (8, 1)), ((8, 4), (1, 8))]
    assert len(described) == len(driven.launched) == 1
    assert driven.launched[0][-1] == [*[x.data_ptr()] * 3, *[out.data_ptr() for out in outputs], 32, 0, 0]
    assert len(repeat(x, *args)) == 2 and repeat(x.t(), *args) is None


def test_an_output_that_is_zero_before(driven):
    x, out = torch.randn(4), torch.zeros(1)
    driven.start_anew(arguments=5)
    for from_zero in (True, False):
        kind = remember(Launch(None, 3, [x, out], (4,), (), {}, from_zero), (x,), (out,))
        (result, _) = again(kind, x)
        assert len(driven.zeroed) == 1
        assert not from_zero or result.tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_number(driven, dtype):
    x, scale, out = torch.randn(4), torch.tensor(0.37, dtype=dtype), torch.empty(4)
    launch = Launch(None, 1, [0.37, x, out, out], (4,), (), {})
    kind = remember(launch, (x, scale), (out,))
    driven.start_anew(arguments=7)
    other = torch.tensor(0.1, dtype=dtype)
    result, _ = again(kind, x, other)
    slots = driven.launched[0][-1]
    assert struct.pack("q", slots[0])[:4] == struct.pack("f", other.item())
    assert slots[1:] == [x.data_ptr(), result.data_ptr(), result.data_ptr(), 4, 0, 0]
    assert numbers_of(launch, compiled(), (x, scale.double()), (out,)) is None


def test_what_is_not_repeated():
    x, scale, out = torch.randn(4), torch.ones(()), torch.empty(4)
    launch = Launch(None, 1, [scale, x, out, out], (4,), (), {})
    assert numbers_of(launch, compiled(), (x, scale), (out,))
    assert numbers_of(launch, None, (x, scale), (out,)) is None
    assert numbers_of(launch, compiled(), (x, x), (out,)) is None, "which of two is read cannot be told"
    assert numbers_of(launch._replace(tensors=[scale, x.clone(), out, out]), compiled(), (x, scale), (out,)) is None
    for change in (
        *({"num_ctas": 2}, {"global_scratch_size": 8}, {"profile_scratch_size": 8}),
        *({"launch_cooperative_grid": True}, {"launch_pdl": True}),
    ):
        assert numbers_of(launch, compiled(**change), (x, scale), (out,)) is None
    odd = torch.empty(5)[1:]
    assert numbers_of(launch._replace(tensors=[scale, x, odd, odd]), compiled(), (x, scale), (odd,)) is None
    assert numbers_of(launch._replace(integers=(1,) * 19), compiled(), (x, scale), (out,)) is None, "25 arguments"
    deep, like = torch.randn([1] * 9), torch.randn([1] * 9)
    assert numbers_of(Launch(None, 1, [scale, deep, like], (), (), {}), compiled(), (deep, scale), (like,)) is None


MAY_FAIL = (
    "torch_get_const_data_ptr",
    "aoti_torch_item_float32",
    "aoti_torch_empty_strided",
    "aoti_torch_zero_",
    "aoti_torch_get_current_cuda_stream",
    "cuCtxGetDevice",
    "cuLaunchKernelEx",
)


def counts(*tensors):
    return [tensor._use_count() for tensor in tensors]


@pytest.mark.parametrize("trouble", [{"current": 0}, {"offset": 8}, *({"fails": name} for name in MAY_FAIL)], ids=str)
def test_no_launch(trouble, driven):
    """Where something fails, nothing is given and nothing kept: another device, no memory, a boundary, the driver."""
    x, scale, out = torch.randn(8, 4), torch.ones(()), torch.empty(8, 4)
    before = counts(x, scale, out)
    kind = remember(Launch(None, 5, [0.37, x, out], (32,), (), {}, from_zero=True), (x, scale), (out,))
    assert counts(x, scale, out) == before
    driven.start_anew(arguments=6)
    vars(driven).update(trouble)
    assert again(kind, x, scale) == (None, None)
    assert len(driven.launched) == (driven.fails == "cuLaunchKernelEx")
    assert counts(x, scale, out) == before
    assert not driven.made
    driven.start_anew(arguments=6)
    result, _ = again(kind, x, scale)
    assert counts(result) == counts(torch.empty(1))
    assert counts(x, scale, out) == before


def test_keys(driven):
    """What differs in anything but addresses is another call."""
    x, scale, seed = torch.randn(8, 8), torch.ones(()), torch.tensor(1)
    kind = simple_call(x, scale)
    driven.start_anew(arguments=6)
    assert again(kind, torch.randn(8, 8), scale)[0] is not None
    others = x.t()[:4], x.double(), x[1:], x.flatten()[1:].view(-1), torch.randn(9, 8), x[:, None]
    moved = torch.randn(66)[1:65].view(8, 8)  # the same traits, 4 bytes behind a boundary
    deep = torch.randn([1] * 64)
    for tensors in (*[(other, scale) for other in (*others, moved)], (x, seed), (x, scale, seed), (x, scale[None])):
        assert again(kind, *tensors) == (None, None)
    assert again(kind, deep, deep.clone(), deep.clone()) == (None, None)
    assert again(next(KINDS), x, scale) == (None, None)
    driven.device = 0
    assert again(kind, x, scale) == (None, None), "tensors of another device"


def test_room(driven):
    """With too many calls, all are forgotten but the last; the same one twice is kept once."""
    x, scale = torch.randn(8, 4), torch.ones(())
    driven.start_anew(arguments=6)
    first = simple_call(x, scale)
    room = 4096
    for _ in range(room // 2):
        other = simple_call(x, scale)
        simple_call(x, scale)
        remember(Launch(None, 7, [scale, x, out := torch.empty_like(x)], (32,), (), {}), (x, scale), (out,), other)
    assert again(first, x, scale) == (None, None)
    assert again(other, x, scale)[0] is not None
    assert driven.launched[-1][1][0] == 5, "the first"


@pytest.fixture
def described(monkeypatch):
    """How often an operator that is made of the name was described, and the operator's kernel."""

    def make(name):
        calls = []

        def describe(x, *others):
            calls.append(others)
            out = torch.empty_like(x)
            return out, None if "E5M2" in others else Launch(None, 1, [x, x, out, out], (x.numel(),), (), {})

        return calls, launches.served(name, describe, getattr(torch.ops.altgrad, name))[0]

    monkeypatch.setattr(launches, "start", lambda launch: compiled())
    return make


def test_an_operator_is_described_once(driven, described, monkeypatch):
    """A second call with the same traits and options goes to the driver; too many kinds of options start anew."""
    monkeypatch.setattr(launches, "MAX_KINDS", 2)
    driven.start_anew(arguments=7)
    calls, kernel = described("quantize_operand")
    for x, scale, block in (
        (torch.randn(4, 8), None, [1, 4]),
        (torch.randn(4, 8), None, [1, 4]),  # again
        (torch.randn(8, 4).t(), None, [1, 4]),
        (torch.randn(4, 8), None, [1, 8]),
        (torch.randn(4, 8), None, [1, 8]),  # again
        (torch.randn(4, 8), torch.ones(4, 8), [1, 8]),  # the third kind
        (torch.randn(4, 8), None, [1, 4]),  # forgotten
    ):
        out = kernel(x, scale, "E4M3", *MODES, block)
        assert (out.shape, out.stride()) == (x.shape, x.stride())
    assert [others[4] for others in calls] == [[1, 4], [1, 4], [1, 8], [1, 8], [1, 4]]
    assert len(driven.launched) == 2
    x = torch.randn(4, 8)
    want = torch.ops.altgrad.quantize_operand(x, None, "E5M2", *MODES, [1, 4])
    assert torch.equal(kernel(x, None, "E5M2", *MODES, [1, 4]), want), "the formula, where nothing is launched"


def test_each_option_counts(driven, described):
    """Numbers of a list are not taken for options behind it: True is 1."""
    driven.start_anew(arguments=7)
    x, others = torch.randn(4, 32), ("E4M3", *MODES, [1, 32])
    usual = {"power_of_two": None, "scale_format": None, "headroom": 1.0, "dtype": None, "hadamard": False}
    changes = {"power_of_two": "floor", "scale_format": "E4M3", "headroom": 1.5, "dtype": x.dtype, "hadamard": True}
    calls, kernel = described("quantize_operand")
    for change in ({}, *({name: value} for name, value in changes.items())):
        kernel(x, None, *others, *(usual | change).values())
    assert len(calls) == 6 and not driven.launched
    calls, kernel = described("amax")
    for options in (([0, 1],), ([0], True), ([0],), ([0, 1], True), ([1],)):
        kernel(x, *options)
    assert len(calls) == 5 and not driven.launched


def test_a_default_device_and_what_is_kept(driven, described):
    """The numbers of a launch lie on the CPU, and its kernel stays loaded."""
    driven.start_anew(arguments=7)
    launches._owners.clear()
    calls, kernel = described("quantize_operand")
    with torch.device("meta"):
        kernel(torch.ones(4, 8, device="cpu"), None, "E4M3", *MODES, [1, 4])
    kernel(torch.ones(4, 8), None, "E4M3", *MODES, [1, 4])
    assert len(calls) == len(driven.launched) == 1
    assert [owner.function for owner in launches._owners.values()] == [1234]


def test_triton_serves_where_c_cannot(monkeypatch):
    def load():
        raise ImportError("built from other sources")

    monkeypatch.setattr(launches, "load", load)
    with pytest.warns(UserWarning, match="through Triton alone, which takes longer: built from other sources"):
        assert not launches._is_serving.__wrapped__()  # behind its cache
