"""Launches of Triton kernels: compiled once for types and constants, and run again past Triton's own Python.

What is launched follows from the sizes, strides, dtypes and alignments of an operator's tensors and from its options.
The first call with them goes the whole way: checks, plan, Triton. It leaves a Call behind, by which the driver runs the
same kernel on the addresses of a later one.
"""

import ctypes
import struct
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import aten
from .operators import OPERATORS

MAX_CALLS = 4096
_SCRATCH = (0, 0)  # a compiled kernel ends with pointers to scratch memory, null where it asks for none
_SLOTS = 24  # arguments of a kernel at most

# What a kernel was compiled for -> the compiled kernel. Its launch skips the search in Triton's own cache.
_compiled: dict[tuple[Any, ...], Any] = {}
# An operator, the traits of its tensors and its options -> what is launched.
_calls: dict[tuple[Any, ...], "Call"] = {}


class Launch(NamedTuple):
    """A kernel, how many programs run it, and its arguments; the first of the tensors may be a number."""

    kernel: Any
    programs: int
    tensors: list[Any]
    integers: tuple[int, ...]
    constants: tuple[Any, ...]
    options: dict[str, Any]


class Call(NamedTuple):
    """A launch whose addresses alone are to come: the kernel's pointers are those of the operator's tensors and output.

    with_number: the value of the operator's second tensor goes before them.
    """

    out_dtype: torch.dtype
    device: int
    function: int
    programs: int
    threads: int
    shared: int
    sources: tuple[int, ...]
    with_number: bool
    integers: tuple[int, ...]
    pack_into: Callable[..., None]
    owner: Any  # unloads the function when it goes


class Driver(threading.local):
    """A thread's way to the CUDA driver, which copies the arguments from their slots of 8 bytes when it launches."""

    def __init__(self) -> None:
        self.launch: Any = ctypes.CDLL("libcuda.so.1").cuLaunchKernel
        self.launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
        self.arguments = (ctypes.c_int64 * _SLOTS)()
        first = ctypes.addressof(self.arguments)
        self.pointers = (ctypes.c_void_p * _SLOTS)(*range(first, first + 8 * _SLOTS, 8))


driver = cache(Driver)


def traits(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """What a launch depends on in a tensor. Kernels differ by alignment."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(), tensor.data_ptr() % 16 == 0


def start(launch: Launch) -> Any:
    """Runs a kernel on the device of the last tensor and its current stream; what Triton compiled for it."""
    kernel, programs, tensors, integers, constants, options = launch
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


def call_of(launch: Launch, compiled: Any, tensors: tuple[Tensor | None, ...], out: Tensor) -> Call | None:
    """The launch without its addresses; None where more than they may change, or the driver needs to know more."""
    metadata = getattr(compiled, "metadata", None)
    theirs = (*tensors, out)
    if metadata is None or len({id(tensor) for tensor in theirs}) < len(theirs):  # one tensor in two roles
        return None
    needs = "launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size"
    if any(getattr(metadata, name, 0) for name in needs) or metadata.num_ctas != 1 or out.data_ptr() % 16:
        return None
    with_number = isinstance(launch.tensors[0], float)
    places = {id(tensor): place for place, tensor in enumerate(theirs)}
    sources = tuple(places.get(id(tensor), -1) for tensor in launch.tensors[with_number:])
    if -1 in sources:  # a copy, in another layout
        return None
    slots = struct.Struct(f"={'f4x' * with_number}{len(sources) + len(launch.integers) + len(_SCRATCH)}q")
    return Call(
        out.dtype,
        out.get_device(),
        compiled.function,
        launch.programs,
        32 * metadata.num_warps,
        metadata.shared,
        sources,
        with_number,
        launch.integers,
        slots.pack_into,
        compiled,
    )


def again(call: Call, tensors: tuple[Tensor | None, ...]) -> Tensor | None:
    """The output of the call on these tensors; None where the driver did not launch it, and Triton has to."""
    out = torch.empty_like(tensors[0], dtype=call.out_dtype)  # type: ignore[arg-type]
    theirs: Any = (*tensors, out)
    addresses = [theirs[source].data_ptr() for source in call.sources]
    if theirs[-1].data_ptr() % 16 or call.device != torch._C._cuda_getDevice():
        return None
    here = driver()
    number = [theirs[1].float().item()] if call.with_number else ()
    call.pack_into(here.arguments, 0, *number, *addresses, *call.integers, *_SCRATCH)
    stream = torch._C._cuda_getCurrentRawStream(call.device)
    grid = call.programs, 1, 1, call.threads, 1, 1
    return None if here.launch(call.function, *grid, call.shared, stream, here.pointers, None) else out


def served(name: str, describe: Callable[..., tuple[Tensor, Launch | None]]) -> Callable[..., Tensor]:
    """The CUDA kernel of an operator from what describes its launch; the aten formula serves where there is none."""
    count = OPERATORS[name].tensors

    def kernel(*args: Any) -> Tensor:
        tensors = args[:count]
        options = [tuple(option) if option.__class__ is list else option for option in args[count:]]
        key = (name, *map(traits, tensors), *options)
        call = _calls.get(key)
        if call is not None and (out := again(call, tensors)) is not None:
            return out
        out, launch = describe(*args)
        if launch is None:
            return aten.KERNELS[name](*args)
        call = call_of(launch, start(launch), tensors, out)
        if call is not None:
            if len(_calls) >= MAX_CALLS:
                _calls.clear()
            _calls[key] = call
        return out

    return kernel
