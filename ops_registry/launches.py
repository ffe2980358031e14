"""Launches of Triton kernels: compiled once for types and constants, and run again past Triton's own Python.

What is launched follows from sizes, strides, dtypes, devices and alignments of an operator's tensors and from options.
The first call with them goes the whole way: checks, plan, Triton. It leaves a Call behind, by which the driver runs the
same kernel on the addresses of a later one.
"""

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .operators import OPERATORS

MAX_CALLS = 4096
_SCRATCH = (0, 0)  # a compiled kernel ends with pointers to scratch memory, null where it asks for none
_SLOTS = 24  # arguments of a kernel at most
_CONFIG = 56  # bytes of a CUlaunchConfig: grid, threads, shared memory; stream; no attributes

# What a kernel was compiled for -> the compiled kernel. Its launch skips the search in Triton's own cache.
_compiled: dict[tuple[Any, ...], Any] = {}


def _empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


# On the current device. Inductor's, where torch has it: half the time.
empty: Callable[..., Tensor] = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", _empty)


class Launch(NamedTuple):
    """A kernel, how many programs run it, and its arguments; the first of the tensors may be a number.

    from_zero: the outputs are 0 before it.
    """

    kernel: Any
    programs: int
    tensors: list[Any]
    integers: tuple[int, ...]
    constants: tuple[Any, ...]
    options: dict[str, Any]
    from_zero: bool = False


class Call(NamedTuple):
    """A launch whose addresses alone are to come: those of the operator's tensors and outputs.

    outputs: the shape, strides and dtype of each; from_zero: they are 0 before it. with_number: the value of the
    operator's second tensor goes before the pointers. pack_into writes the memory of a Driver.
    """

    outputs: tuple[tuple[Any, ...], ...]
    from_zero: bool
    device: int
    function: int
    grid: tuple[int, ...]
    sources: Callable[[list[int]], tuple[Any, ...]]  # of the addresses of the operator's tensors and outputs
    with_number: bool
    integers: tuple[int, ...]
    pack_into: Callable[..., None]
    owner: Any  # unloads the function when it goes


class Driver(threading.local):
    """A thread's way to the CUDA driver: a CUlaunchConfig, and behind it 8 bytes for each argument of a kernel."""

    def __init__(self) -> None:
        self.launch: Any = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
        self.launch.argtypes = [ctypes.c_void_p] * 4
        self.allocate()

    def allocate(self) -> None:
        self.memory = bytearray(_CONFIG + 8 * _SLOTS)
        self.config = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        first = self.config + _CONFIG
        self.slots = (ctypes.c_void_p * _SLOTS)(*range(first, first + 8 * _SLOTS, 8))
        self.parts = self.launch, self.memory, self.config, ctypes.addressof(self.slots)


driver = cache(Driver)


def key_of(options: Sequence[Any], tensors: tuple[Tensor | None, ...]) -> tuple[tuple[Any, ...], list[int]]:
    """What a launch depends on in its tensors, behind its options, and their addresses: kernels differ by alignment."""
    key, addresses = [*options], []
    for tensor in tensors:
        if tensor is None:
            address = 0
            key.append(None)
        else:
            address = tensor.data_ptr()
            key += (tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(), address & 15)
        addresses.append(address)
    return tuple(key), addresses


def start(launch: Launch) -> Any:
    """Runs a kernel on the device of the last tensor and its current stream; what Triton compiled for it."""
    kernel, programs, tensors, integers, constants, options, _ = launch
    if programs == 0:
        return None
    device = tensors[-1].get_device()
    # By address: Triton would ask the driver where a tensor lies.
    addresses = [tensor if isinstance(tensor, float) else tensor.data_ptr() for tensor in tensors]
    is_aligned = [isinstance(address, float) or address % 16 == 0 for address in addresses]
    dtypes = [float if isinstance(tensor, float) else tensor.dtype for tensor in tensors]
    key = (kernel, device, constants, *dtypes, *is_aligned)
    compiled = _compiled.get(key)
    others = (*integers, *constants)
    if compiled is not None and device == torch._C._cuda_getDevice():
        compiled[programs, 1, 1](*addresses, *others, stream=torch._C._cuda_getCurrentRawStream(device))
        return compiled
    with torch.cuda.device_of(tensors[-1]):
        compiled = _compiled[key] = kernel[programs, 1, 1](*tensors, *others, **options)
    return compiled


def call_of(
    launch: Launch, compiled: Any, tensors: tuple[Tensor | None, ...], outputs: tuple[Tensor, ...]
) -> Call | None:
    """The launch without its addresses; None where more than they may change, or the driver needs to know more."""
    metadata = getattr(compiled, "metadata", None)
    theirs = (*tensors, *outputs)
    given = [id(tensor) for tensor in theirs if tensor is not None]
    has_two_roles = len(set(given)) < len(given)  # a tensor, and which is read cannot be told
    if metadata is None or torch.version.hip or has_two_roles:
        return None
    needs = "launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size"
    is_plain = metadata.num_ctas == 1 and all(out.data_ptr() % 16 == 0 for out in outputs)
    if any(getattr(metadata, name, 0) for name in needs) or not is_plain:
        return None
    with_number = isinstance(launch.tensors[0], float)
    if with_number and tensors[1].dtype == torch.float64:  # type: ignore[union-attr]  # float32 may not hold it
        return None
    places = {id(tensor): place for place, tensor in enumerate(theirs)}
    sources = [places.get(id(tensor), -1) for tensor in launch.tensors[with_number:]]
    if -1 in sources:  # a copy, in another layout
        return None
    number = "f4x" if with_number else ""
    slots = struct.Struct(f"=7I4xq16x{number}{len(sources) + len(launch.integers) + len(_SCRATCH)}q")
    grid = launch.programs, 1, 1, 32 * metadata.num_warps, 1, 1, metadata.shared
    to_make = tuple((tuple(out.shape), out.stride(), out.dtype) for out in outputs)
    integers, of_outputs = (*launch.integers, *_SCRATCH), (to_make, launch.from_zero, outputs[0].get_device())
    pick = itemgetter(*sources)
    return Call(*of_outputs, compiled.function, grid, pick, with_number, integers, slots.pack_into, compiled)


def again(call: Call, tensors: tuple[Tensor | None, ...], addresses: list[int]) -> list[Tensor] | None:
    """The outputs of the call on these tensors; None where the driver did not launch it, and Triton has to."""
    outputs, from_zero, device, function, grid, sources, with_number, integers, pack_into, _ = call
    if device != torch._C._cuda_getDevice():
        return None
    made = [empty(*place) for place in outputs]
    if from_zero:
        for output in made:
            output.zero_()
    addresses += [output.data_ptr() for output in made]
    if addresses[-1] & 15:
        return None
    pointers = sources(addresses)
    if with_number:
        pointers = tensors[1].item(), *pointers  # type: ignore[union-attr]
    launch, memory, config, slots = driver().parts
    pack_into(memory, 0, *grid, torch._C._cuda_getCurrentRawStream(device), *pointers, *integers)
    return None if launch(config, function, slots, None) else made


def served(
    name: str, describe: Callable[..., tuple[Any, Launch | None]], formula: Callable[..., Any]
) -> Callable[..., Any]:
    """The CUDA kernel of an operator from what describes its output, or outputs, and their launch.

    The formula serves where no launch is described.
    """
    count = OPERATORS[name].tensors
    types = [str(argument.type) for argument in getattr(torch.ops.altgrad, name).default._schema.arguments[count:]]
    block = types.index("List[int]") if "List[int]" in types else None  # no key for a dictionary
    calls: dict[tuple[Any, ...], Call] = {}

    def kernel(*args: Any) -> Any:
        tensors, options = args[:count], [*args[count:]]
        if block is not None:
            options[block] = tuple(options[block])
        key, addresses = key_of(options, tensors)
        call = calls.get(key)
        if call is not None and (made := again(call, tensors, addresses)) is not None:
            return made[0] if len(made) == 1 else tuple(made)
        output, launch = describe(*args)
        if launch is None:
            return formula(*args)
        outputs = (output,) if isinstance(output, Tensor) else output
        call = call_of(launch, start(launch), tensors, outputs)
        if call is not None:
            if len(calls) >= MAX_CALLS:
                calls.clear()
            calls[key] = call
        return output

    return kernel
