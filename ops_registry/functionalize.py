"""How compilers see through an operator: torch.compile inlines and fuses its aten formula, torch.export keeps the node.

The rule runs where that of ``torch.library.triton_op`` runs and obeys the same switch; it therefore serves every
AOTAutograd backend, is in place whatever was compiled before, and imports nothing of Inductor. The global decomposition
table beside it is what ``torch.onnx.export`` and DTensor read; it does not change what compile and export do.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch._functorch import config
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx import traceback

from .aten import FORMULAS, KERNELS, project_to, quantize, with_sign_of_portable
from .cpu import backend
from .hadamard import is_transformed
from .operators import IN_BLOCKS, OPERATORS, library, with_twins

_TRANSPARENT_TYPES = (FakeTensor, FunctionalTensor)


def stays_opaque(name: str, x: Tensor, *args: Any) -> bool:
    """Whether compiled code calls the operator, whose kernel is better than what Inductor makes of the formula.

    On a GPU that reads x twice and, for blocks along columns, in an order that memory is slow in; for the largest of a
    whole tensor of 16 bits it takes up to three times as long, but exported programs need no altgrad where they are
    opened. On a CPU it takes as long, and a step of training three times as long to compile; there quantize_blocks
    stays open, so that a compiled program needs no altgrad. amax is one of them behind a Hadamard transform.
    """
    transforms = is_transformed(args)
    if x.is_cuda:
        is_largest = name == "amax" and len(args[0]) == x.ndim and x.dtype.itemsize == 2
        return name in IN_BLOCKS or transforms or (is_largest and not torch.compiler.is_exporting())
    return (name.startswith("quantize_operand") or transforms) and x.device.type == "cpu" and backend() != "aten"


@contextmanager
def _in_its_pass() -> Iterator[None]:
    """Keeps what the backward pass of a Function calls in the backward pass.

    AOTAutograd would move to the forward pass what needs no incoming gradient, such as operands of saved x and weights,
    and save them. There kernels are fewer and shorter, and launches what takes the time.
    """
    meta = traceback.current_meta
    if type(torch._C._current_autograd_node()).__name__ != "ApplyTemplateBackward":  # as Dynamo's Functions are traced
        yield
        return
    tag = meta.get("partitioner_tag")
    meta["partitioner_tag"] = "must_be_in_backward"
    try:
        yield
    finally:
        meta["partitioner_tag"] = tag


def _inlined(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Any]:
    def rule(mode: Any, op: Any, types: tuple[type, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_export = not config.decompose_custom_triton_ops
        if is_export or stays_opaque(name, *args):
            with _in_its_pass():
                return mode.__torch_dispatch__(op, types, args, kwargs)
        if not all(t is Tensor or issubclass(t, _TRANSPARENT_TYPES) for t in types):
            return NotImplemented
        with mode:
            return kernel(*args, **kwargs)

    return rule


def _portable(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def decomposition(x: Tensor, scale: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The optimizer of torch.onnx drops a product with a 0-d constant within 1e-5 of 1, but not with a 1-d one.
        return formula(x, scale.unsqueeze(0) if x.ndim > scale.ndim == 0 else scale, *args, **kwargs)

    return decomposition


_PORTABLE = FORMULAS | with_twins(
    {name: partial(f, sign=with_sign_of_portable) for name, f in (("quantize", quantize), ("project", project_to))}
)

for _name, _kernel in KERNELS.items():
    if OPERATORS[_name].is_opaque:
        continue
    torch.library.register_torch_dispatch(
        f"altgrad::{_name}", FunctionalTensorMode, _inlined(_name, _kernel), lib=library
    )
    _op = getattr(torch.ops.altgrad, _name).default
    # The formula alone, without the layout, which ONNX cannot say.
    register_decomposition(_op)(_portable(_PORTABLE[_name]) if OPERATORS[_name].is_pointwise else FORMULAS[_name])
