"""The operators, one row each: schema, what it accepts, and its output; everything that follows from a row is derived.

Schemas have tensors first, everything positional, and strings instead of objects. Gradients and kernels are written out
in the files of their dispatch keys.
"""

from collections.abc import Callable
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arithmetic import code_dtype, compute_dtype
from .checks import (
    check_amax,
    check_as_scale,
    check_decode,
    check_dequantize,
    check_encode,
    check_encode_blocks,
    check_matmul,
    check_pack,
    check_project,
    check_quantize,
    check_quantize_operand,
    check_quantize_operands,
    check_unpack,
)
from .formats import resolve
from .modes import ROUNDINGS, SATURATIONS

_PROJECTION = f'str format, str saturation="{SATURATIONS[0]}"'
_ROUNDING = f'str rounding="{ROUNDINGS[0]}"'
_DETERMINISTIC = f"(Tensor x, Tensor scale, {_PROJECTION}, {_ROUNDING}) -> Tensor"
_STOCHASTIC = f"(Tensor x, Tensor scale, Tensor random_bits, {_PROJECTION}) -> Tensor"
_TO_DTYPE = ", ScalarType? dtype=None) -> Tensor"
_OPERAND = ", ScalarType? dtype=None, bool hadamard=False) -> Tensor"
_BLOCKS = "int[] block, str? power_of_two=None, str? scale_format=None, float headroom=1.0"
_IN_BLOCKS = f"(Tensor x, Tensor? tensor_scale, str format, str saturation, str rounding, {_BLOCKS}) -> Tensor"
_IN_BLOCKS_STOCHASTIC = (
    f"(Tensor x, Tensor? tensor_scale, Tensor random_bits, str format, str saturation, {_BLOCKS}) -> Tensor"
)

_TWO = "-> (Tensor, Tensor)"
_OPERANDS = (
    "(Tensor x, Tensor? tensor_scale, Tensor? turned_scale, "
    f"str format, str saturation, str rounding, {_BLOCKS}{_OPERAND}"
).replace("-> Tensor", _TWO)


class Operator(NamedTuple):
    """A row: the schema behind the name, a check that raises, and the output, or outputs, without values.

    Pointwise operators take an element of each tensor, the second broadcasting to the first: they batch and shard by
    one rule each.
    """

    schema: str
    check: Callable[..., Any]
    output: Callable[..., Any]
    is_pointwise: bool = True
    is_laid_out_like_x: bool = True
    is_opaque: bool = False  # a node of its own in compiled code too

    @property
    def tensors(self) -> int:
        """How many of its first arguments are tensors, or None."""
        return len(list(takewhile(lambda argument: argument.startswith("Tensor"), self.schema[1:].split(", "))))


def stochastic(deterministic: Callable[..., Any]) -> Callable[..., Any]:
    """The same function for the operator's stochastic twin, whose random bits come third and stand for the rounding."""

    def twin(
        x: Tensor,
        scale: Tensor | None,
        random_bits: Tensor,
        format: str,
        saturation: str = SATURATIONS[0],
        *others: Any,
    ) -> Any:
        return deterministic(x, scale, format, saturation, "stochastic", *others, random_bits=random_bits)

    return twin


def with_twins(functions: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The functions, and those of the stochastic operators among OPERATORS that follow from them."""
    twins = {f"{name}_stochastic": stochastic(function) for name, function in functions.items()}
    return functions | {name: twin for name, twin in twins.items() if name in OPERATORS}


def _like_x(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x)


def _codes(x: Tensor, scale: Tensor, format: str, *args: Any, **random_bits: Any) -> Tensor:
    return torch.empty_like(x, dtype=code_dtype(resolve(format)))


def _values(codes: Tensor, scale: Tensor, format: str, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(codes, dtype=dtype or torch.float32)


def _in_dtype(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, dtype=next((a for a in args if isinstance(a, torch.dtype)), None))


def _both(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _in_dtype(x, *args), _in_dtype(x.transpose(-2, -1), *args)


def blocks_of(x: Tensor, block: list[int]) -> list[int]:
    """How many blocks there are along each dimension."""
    return [1 if b == -1 else -(-size // b) for size, b in zip(x.shape, block, strict=True)]


def _blocks(
    x: Tensor,
    tensor_scale: Tensor | None,
    format: str,
    saturation: str,
    rounding: str,
    block: list[int],
    power_of_two: str | None = None,
    scale_format: str | None = None,
    *args: Any,
    **random_bits: Any,
) -> tuple[Tensor, Tensor]:
    codes = x.new_empty([*x.shape[:-1], (x.shape[-1] * resolve(format).bits + 7) // 8], dtype=torch.uint8)
    of_scales = "E8M0" if power_of_two is not None else scale_format
    dtype = compute_dtype(x.dtype) if of_scales is None else code_dtype(resolve(of_scales))
    return codes, x.new_empty(blocks_of(x, block), dtype=dtype)


def _reduced(x: Tensor, dims: list[int], *hadamard: bool) -> Tensor:
    sizes = [1 if dim in dims else size for dim, size in enumerate(x.shape)]
    return x.new_empty(sizes, dtype=compute_dtype(x.dtype))


def _packed(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty([*codes.shape[:-1], (codes.shape[-1] * bits + 7) // 8])


def _unpacked(packed: Tensor, bits: int, n: int) -> Tensor:
    return packed.new_empty([*packed.shape[:-1], n])


def _product(a: Tensor, b: Tensor, *args: Any) -> Tensor:
    return a.new_empty([*a.shape[:-1], b.shape[-1]], dtype=torch.float32)


OPERATORS = {
    "quantize": Operator(_DETERMINISTIC, check_quantize, _like_x),
    "quantize_stochastic": Operator(_STOCHASTIC, stochastic(check_quantize), _like_x),
    "encode": Operator(_DETERMINISTIC, check_encode, _codes),
    "encode_stochastic": Operator(_STOCHASTIC, stochastic(check_encode), stochastic(_codes)),
    "quantize_gradient": Operator(_DETERMINISTIC, check_quantize, _like_x),
    "quantize_gradient_stochastic": Operator(_STOCHASTIC, stochastic(check_quantize), _like_x),
    "project": Operator(_DETERMINISTIC.replace(") -> Tensor", _TO_DTYPE), check_project, _in_dtype),
    "project_stochastic": Operator(_STOCHASTIC.replace(") -> Tensor", _TO_DTYPE), stochastic(check_project), _in_dtype),
    "decode": Operator(
        "(Tensor codes, Tensor scale, str format, ScalarType? dtype=None) -> Tensor", check_decode, _values
    ),
    "dequantize": Operator("(Tensor x, Tensor scale) -> Tensor", check_dequantize, _like_x),
    "quantize_blocks": Operator(_IN_BLOCKS, check_quantize_operand, _like_x, is_pointwise=False),
    "quantize_blocks_stochastic": Operator(
        _IN_BLOCKS_STOCHASTIC, stochastic(check_quantize_operand), _like_x, is_pointwise=False
    ),
    "quantize_operand": Operator(
        _IN_BLOCKS.replace(") -> Tensor", _OPERAND), check_quantize_operand, _in_dtype, is_pointwise=False
    ),
    "quantize_operand_stochastic": Operator(
        _IN_BLOCKS_STOCHASTIC.replace(") -> Tensor", _OPERAND),
        stochastic(check_quantize_operand),
        _in_dtype,
        is_pointwise=False,
    ),
    "quantize_operands": Operator(
        _OPERANDS, check_quantize_operands, _both, is_pointwise=False, is_laid_out_like_x=False
    ),
    "encode_blocks": Operator(
        _IN_BLOCKS.replace("-> Tensor", _TWO),
        check_encode_blocks,
        _blocks,
        is_pointwise=False,
        is_laid_out_like_x=False,
    ),
    "encode_blocks_stochastic": Operator(
        _IN_BLOCKS_STOCHASTIC.replace("-> Tensor", _TWO),
        stochastic(check_encode_blocks),
        stochastic(_blocks),
        is_pointwise=False,
        is_laid_out_like_x=False,
    ),
    "amax": Operator("(Tensor x, int[] dims, bool hadamard=False) -> Tensor", check_amax, _reduced, False, False),
    "as_scale": Operator("(Tensor amax, float max_value) -> Tensor", check_as_scale, _like_x, is_pointwise=False),
    "pack": Operator("(Tensor codes, int bits) -> Tensor", check_pack, _packed, False, False),
    "unpack": Operator("(Tensor packed, int bits, SymInt n) -> Tensor", check_unpack, _unpacked, False, False),
    "matmul": Operator(
        "(Tensor a, Tensor b, str accumulator, Tensor? a_scale=None, Tensor? b_scale=None) -> Tensor",
        check_matmul,
        _product,
        is_pointwise=False,
        is_laid_out_like_x=False,
        is_opaque=True,
    ),
}

IN_BLOCKS = [name for name in OPERATORS if name.startswith(("quantize_blocks", "quantize_operand", "encode_blocks"))]

# The registrations live as long as this object.
library = torch.library.Library("altgrad", "FRAGMENT")
for _name, _operator in OPERATORS.items():
    # pointwise lets jagged nested tensors and Inductor's fusion heuristics in; flexible_layout is true because the
    # output's layout follows x, and saves a copy where an operator stays opaque.
    _tags = (torch.Tag.pointwise, torch.Tag.flexible_layout) if _operator.is_pointwise else ()
    library.define(_name + _operator.schema, tags=(torch.Tag.pt2_compliant_tag, *_tags))
