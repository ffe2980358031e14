"""Launches of Triton kernels: compiled once for types and constants, and run again past Triton and Python.

What is launched follows from sizes, strides, dtypes, devices and alignments of an operator's tensors and from options.
The first call with them goes the whole way: checks, plan, Triton. Of it csrc/launches.c remembers all but addresses; it
makes the outputs of a later one, and has the driver run the same kernel.
"""

import ctypes
import threading
import warnings
from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from .native import load, of_torch, warn_without
from .operators import OPERATORS

MAX_KINDS = 4096
INPUTS = 3  # tensors of an operator; one that has fewer gives x for the others
_SCRATCH = (0, 0)  # a compiled kernel ends with pointers to scratch memory, null where it asks for none
_SLOTS, _DIMS = 24, 8  # arguments of a kernel, and dimensions; csrc/launches.c has room for as many

# What a kernel was compiled for -> the compiled kernel. Its launch skips the search in Triton's own cache.
_compiled: dict[tuple[Any, ...], Any] = {}

# The operators of csrc/launches.c. A kind is an operator with its options. Where nothing is remembered of it and such
# tensors, again gives undefined ones, which are None in Python.
_library = torch.library.Library("altgrad_launches", "DEF")
_library.define("again(int kind, Tensor x, Tensor second, Tensor third) -> (Tensor, Tensor)")
_library.define(
    "remember(int kind, Tensor x, Tensor second, Tensor third, Tensor out, Tensor other, Tensor numbers) -> ()"
)
_again = torch.ops.altgrad_launches.again.default._handle.redispatch_boxed
_remember = torch.ops.altgrad_launches.remember.default._handle.redispatch_boxed
KEYS = DispatchKeySet(DispatchKey.CUDA)
_kinds = count()
_lock = threading.Lock()
_owners: dict[int, Any] = {}  # of kernels that are remembered: they would be unloaded with them

# Of struct functions in csrc/launches.c: torch's, and the driver's behind them.
FUNCTIONS = (
    "aoti_torch_library_init_impl",
    "torch_library_impl",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dtype",
    "aoti_torch_get_device_type",
    "aoti_torch_get_device_index",
    "torch_get_const_data_ptr",
    "aoti_torch_item_float32",
    "aoti_torch_empty_strided",
    "aoti_torch_zero_",
    "aoti_torch_new_uninitialized_tensor",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_get_current_cuda_stream",
)
FUNCTIONS_OF_DRIVER = "cuCtxGetDevice", "cuLaunchKernelEx"


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


def launch_by(native: Any, functions: list[int]) -> None:
    """Has csrc/launches.c call the functions of these addresses, in the order of its struct."""
    native.altgrad_launch_by((ctypes.c_void_p * len(functions))(*functions))


def functions_of_cuda() -> list[int]:
    driver = ctypes.CDLL("libcuda.so.1")
    functions = [ctypes.cast(getattr(driver, name), ctypes.c_void_p).value or 0 for name in FUNCTIONS_OF_DRIVER]
    return [*[of_torch(name) for name in FUNCTIONS], *functions]


@cache
def _is_serving() -> bool:
    try:
        native = load()
        if native is None:
            warn_without("CUDA")
            return False
        launch_by(native, functions_of_cuda())
        if not native.altgrad_serve_launches(b"CUDA"):
            raise RuntimeError("torch did not take the kernels of csrc/launches.c")
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        warnings.warn(f"altgrad launches CUDA kernels through Triton alone, which takes longer: {error}", stacklevel=2)
        return False
    return True


def is_remembered(out: Tensor) -> bool:
    """Whether a launch for this output is remembered: on the current device, where csrc/launches.c serves."""
    if out.get_device() != torch._C._cuda_getDevice():
        return False
    with _lock:  # once, by one thread
        return _is_serving()


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


def numbers_of(
    launch: Launch, compiled: Any, tensors: tuple[Tensor | None, ...], outputs: tuple[Tensor, ...]
) -> list[int] | None:
    """The launch as csrc/launches.c reads it; None where more than addresses may change, or the driver needs more."""
    metadata = getattr(compiled, "metadata", None)
    theirs = (*tensors, *[None] * (INPUTS - len(tensors)), *outputs)
    given = [tensor for tensor in theirs if tensor is not None]
    has_two_roles = len({id(tensor) for tensor in given}) < len(given)  # a tensor, and which is read cannot be told
    if metadata is None or torch.version.hip or has_two_roles or any(tensor.ndim > _DIMS for tensor in given):
        return None
    needs = "launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size"
    is_plain = metadata.num_ctas == 1 and all(out.data_ptr() % 16 == 0 for out in outputs)
    if any(getattr(metadata, name, 0) for name in needs) or not is_plain:
        return None
    with_number = isinstance(launch.tensors[0], float)
    if with_number and tensors[1].dtype == torch.float64:  # type: ignore[union-attr]  # float32 may not hold it
        return None
    places = {id(tensor): place for place, tensor in enumerate(theirs) if tensor is not None}
    sources = [places.get(id(tensor), -1) for tensor in launch.tensors[with_number:]]
    integers = (*launch.integers, *_SCRATCH)
    if -1 in sources or with_number + len(sources) + len(integers) > _SLOTS:  # -1: a copy, in another layout
        return None
    sizes = launch.programs, 1, 1, 32 * metadata.num_warps, 1, 1, metadata.shared
    traits = outputs[0].get_device(), launch.from_zero, with_number, len(outputs), len(sources), len(integers)
    return [compiled.function, *sizes, *traits, *sources, *integers]


def served(
    name: str, describe: Callable[..., tuple[Any, Launch | None]], formula: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The CUDA kernel of an operator from what describes its output, or outputs, and their launch.

    The formula serves where no launch is described. The other function launches again what this kernel did before with
    such arguments, and returns None where there is no such launch.
    """
    tensors = OPERATORS[name].tensors
    types = [str(argument.type) for argument in getattr(torch.ops.altgrad, name).default._schema.arguments]
    block = types.index("List[int]") if "List[int]" in types else None  # no key for a dictionary
    second, third = (place if place < tensors else 0 for place in range(1, INPUTS))  # where, x standing for what is not
    kinds: dict[tuple[Any, ...], int] = {}

    def options_of(args: tuple[Any, ...]) -> tuple[Any, ...]:
        if block is None:
            return args[tensors:]
        missing = args[second] is None, args[third] is None
        return *missing, *args[tensors:block], tuple(args[block]), *args[block + 1 :]

    def repeat(*args: Any) -> Any:
        kind = kinds.get(options_of(args))
        if kind is None:
            return None
        x, y, z = args[0], args[second], args[third]
        output, other = _again(KEYS, kind, x, x if y is None else y, x if z is None else z)
        return output if other is None else (output, other)

    def kernel(*args: Any) -> Any:
        output = repeat(*args)
        if output is not None:
            return output
        output, launch = describe(*args)
        if launch is None:
            return formula(*args)
        outputs = (output,) if isinstance(output, Tensor) else output
        compiled = start(launch)
        numbers = numbers_of(launch, compiled, args[:tensors], outputs)
        if numbers is not None and is_remembered(outputs[0]):
            options = options_of(args)
            kind = kinds.get(options)
            if kind is None:
                if len(kinds) >= MAX_KINDS:
                    kinds.clear()
                kind = kinds[options] = next(_kinds)
            _owners[compiled.function] = compiled
            written = torch.tensor(numbers, dtype=torch.int64, device="cpu")
            inputs = [args[0] if args[place] is None else args[place] for place in (0, second, third)]
            _remember(KEYS, kind, *inputs, outputs[0], outputs[-1], written)
        return output

    return kernel, repeat
