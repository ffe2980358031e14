"""How DTensor splits an operator: like its first argument, with whatever part of the scale the split needs.

DTensor would derive a rule from the global decomposition table (torch 2.13; 2.11 does not), but it breaks ties between
placements at will. With this rule the output is placed as x is, and only a Partial x is communicated: it is reduced
first. ``torch.distributed.tensor`` is not imported for it.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .formats import resolve
from .hadamard import SIZE, is_transformed
from .operators import IN_BLOCKS, OPERATORS
from .philox import random_words

Choices = list[tuple[list[Any], list[Any]]]  # placements of the outputs and of the arguments


@cache
def register() -> None:
    """Registers the rules; first_use.py calls it once DTensor is imported."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    rules: dict[str, Callable[..., Any]] = {
        name: _rule(operator.tensors) for name, operator in OPERATORS.items() if operator.is_pointwise
    }
    rules |= dict.fromkeys(IN_BLOCKS, _placements_of_blocks) | {
        name: _placements_of_stored_blocks for name in IN_BLOCKS if name.startswith("encode_blocks")
    }
    rules |= {
        "quantize_operands": _placements_of_operands,
        "amax": _placements_of_amax,
        "as_scale": _placements_of_elements,
        "pack": _placements_of_rows,
        "unpack": _placements_of_rows,
        "matmul": _placements_of_matmul,
    }
    known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    for name, rule in rules.items():
        op = getattr(torch.ops.altgrad, name).default
        register_sharding(op)(rule)
        # DTensor keeps a decision with the output's shape and dtype. register_sharding lets the integers alone decide
        # whether it serves again, but both follow from all options: codes of FP16 had the dtype of those of E4M3.
        known[op] = RuntimeSchemaInfo(static_argnum=OPERATORS[name].tensors, needs_pytree=True)


def _placements_of_amax(x: Any, dims: list[int], *hadamard: bool) -> Choices:
    """Replicated, or split as x is: along what is reduced each part has its own largest."""
    from torch.distributed.tensor import Partial, Replicate

    options = [None] * (1 + len(hadamard))
    splits = [p for p in x.placements if hasattr(p, "dim") and (not any(hadamard) or _has_whole_groups(x, p))]
    results = [Partial("max") if p.dim in dims else p for p in splits]
    choices = zip([Replicate(), *results], [Replicate(), *splits], strict=True)
    return [([result], [p, *options]) for result, p in choices]


def _has_whole_groups(x: Any, p: Any) -> bool:
    """Whether no part of x begins or ends within 16 elements of the Hadamard transform."""
    return p.dim != x.ndim - 1 or (p.is_shard() and x.shape[-1] % (SIZE * x.mesh.size()) == 0)


def _placements_of_blocks(x: Any, tensor_scale: Any, *args: Any) -> Choices:
    """Replicated, or split as x is where no block is."""
    from torch.distributed.tensor import Replicate

    block = next(argument for argument in args if isinstance(argument, list | tuple))
    has_bits = hasattr(args[0], "placements")
    bits_are_split = has_bits and args[0].ndim == x.ndim
    of_scale = None if tensor_scale is None else Replicate()
    options = [None] * (len(args) - has_bits)
    choices: Choices = []
    for p in (Replicate(), *x.placements):
        is_whole = p.is_replicate() or (
            p.is_shard()
            and (block[p.dim] == 1 or (block[p.dim] > 0 and x.shape[p.dim] % (block[p.dim] * x.mesh.size()) == 0))
            and (not is_transformed(args) or _has_whole_groups(x, p))
        )
        if is_whole and (p.is_replicate() or bits_are_split or not has_bits):
            of_bits = [p if bits_are_split else Replicate()] * has_bits
            choices.append(([p], [p, of_scale, *of_bits, *options]))
    return choices


def _placements_of_operands(x: Any, tensor_scale: Any, turned_scale: Any, *args: Any) -> Choices:
    """Replicated, or split as x is where no block of either direction is."""
    from torch.distributed.tensor import Replicate, Shard

    others = [None if t is None else Replicate() for t in (tensor_scale, turned_scale)]
    options = [None] * len(args)
    *outer, height, width = next(argument for argument in args if isinstance(argument, list | tuple))
    of_both = -1 if -1 in (height, width) else math.lcm(height, width)
    down = math.lcm(of_both, SIZE) if of_both > 0 and is_transformed(args) else of_both
    turned = {x.ndim - 2: x.ndim - 1, x.ndim - 1: x.ndim - 2}
    choices: Choices = []
    for (p,), _ in _placements_of_blocks(x, None, "", [*outer, down, of_both]):
        of_turned = Shard(turned.get(p.dim, p.dim)) if p.is_shard() else p
        choices.append(([p, of_turned], [p, *others, *options]))
    return choices


def _placements_of_elements(x: Any, *others: Any) -> Choices:
    """Replicated, or split as x is."""
    from torch.distributed.tensor import Replicate

    splits = [p for p in x.placements if hasattr(p, "dim")]
    return [([p], [p, *[None] * len(others)]) for p in (Replicate(), *splits)]


def _placements_of_stored_blocks(x: Any, *args: Any) -> Choices:
    """Codes and scales as x, which is not split where codes of two parts would share a byte."""
    bits = resolve(next(argument for argument in args if isinstance(argument, str))).bits

    def is_apart(p: Any) -> bool:
        part, rest = divmod(x.shape[p.dim], x.mesh.size()) if hasattr(p, "dim") else (0, 0)
        return p.is_replicate() or p.dim != x.ndim - 1 or (rest == 0 and part * bits % 8 == 0)

    return [(outputs * 2, inputs) for outputs, inputs in _placements_of_blocks(x, *args) if is_apart(outputs[0])]


def _placements_of_rows(x: Any, *others: Any) -> Choices:
    """Replicated, or split as x is, but not along the last dimension, where codes share bytes."""

    def is_apart(p: Any) -> bool:
        return p.is_replicate() or (p.is_shard() and p.dim != x.ndim - 1)

    return [choice for choice in _placements_of_elements(x, *others) if is_apart(choice[0][0])]


def _placements_of_matmul(a: Any, b: Any, accumulator: str, a_scale: Any = None, b_scale: Any = None) -> Choices:
    """Replicated, or split along rows, columns or what is in front of them: a part of a sum is another sum."""
    from torch.distributed.tensor import Replicate, Shard

    def choice(of_a: Any, of_b: Any, result: Any) -> tuple[list[Any], list[Any]]:
        scales = [None if scale is None else of for scale, of in ((a_scale, of_a), (b_scale, of_b))]
        return [result], [of_a, of_b, None, *scales]

    whole, rows, columns = Replicate(), Shard(a.ndim - 2), Shard(a.ndim - 1)
    along_batch = [choice(Shard(dim), Shard(dim), Shard(dim)) for dim in range(a.ndim - 2)]
    return [choice(whole, whole, whole), choice(rows, whole, rows), choice(whole, columns, columns), *along_batch]


def _rule(tensors: int) -> Callable[..., Any]:
    from torch.distributed.tensor import Replicate, Shard

    def placements(*args: Any) -> Choices:
        """The choices for one dimension of the mesh, each (output, arguments): replicated, or split as an input is."""
        x, scale = args[:2]
        others = [None] * (len(args) - tensors)
        choices = [([Replicate()], [Replicate()] * tensors + others)]
        if any(like_x.ndim != x.ndim for like_x in args[2:tensors]):
            return choices  # the elements of a part of x do not count as a seed counts them
        splits = {p: None for like_x in (x, *args[2:tensors]) for p in like_x.placements if hasattr(p, "dim")}
        lead = x.ndim - scale.ndim
        splits |= {Shard(p.dim + lead): None for p in scale.placements if p.is_shard()}
        for split in splits:
            if split.dim < lead or scale.shape[split.dim - lead] == 1:
                of_scale: Any = Replicate()
            elif split.is_shard():
                of_scale = Shard(split.dim - lead)
            elif lead == 0:
                of_scale = split  # strided, as in tensor parallelism under FSDP2
            else:
                continue
            choices.append(([split], [split, of_scale, *[split] * (tensors - 2), *others]))
        return choices

    return placements


def whole(t: Any) -> Tensor:
    """A DTensor as the plain tensor that all ranks agree on; any other tensor as it is.

    Of one that is made within a graph Dynamo knows the attributes, not the methods: hasattr finds no ``full_tensor``.
    """
    return t.full_tensor() if hasattr(t, "placements") else t


def whole_largest(t: Any) -> Tensor:
    """The largest magnitude of a tensor as a plain one, where NaN of a DTensor is infinity: a reduction may lose it."""
    if not hasattr(t, "placements"):
        return t
    from torch.distributed.tensor import DTensor

    part = t.to_local()
    part = torch.where(part < math.inf, part, math.inf)
    return DTensor.from_local(part, t.device_mesh, t.placements, run_check=False).full_tensor()


def with_whole_blocks(x: Any, block: list[int]) -> Any:
    """A DTensor gathered along the dimensions where its parts would split a block; any other tensor as it is."""
    if not hasattr(x, "placements"):
        return x
    from torch.distributed.tensor import Replicate

    def splits(p: Any) -> bool:
        return hasattr(p, "dim") and block[p.dim] > 1 and x.shape[p.dim] % (block[p.dim] * x.device_mesh.size()) != 0

    placements = tuple(Replicate() if splits(p) else p for p in x.placements)
    return x if placements == x.placements else x.redistribute(placements=placements)


def largest_over_parts(of_part: Callable[[Tensor], Tensor], t: Any) -> Tensor:
    """of_part(t); for a DTensor the elementwise maximum of the plain of_part of each rank's part."""
    if not hasattr(t, "placements"):
        return of_part(t)
    from torch.distributed.tensor import DTensor, Partial

    placements = [Partial("max")] * t.device_mesh.ndim
    return DTensor.from_local(of_part(t.to_local()), t.device_mesh, placements, run_check=False).full_tensor()


def shared_seed(x: Any, seed: Tensor) -> Tensor:
    """Seeds that this rank drew for x; for a DTensor those of all ranks of its mesh, each the largest that one drew."""
    return largest_over_parts(lambda part: seed, x)


def random_bits_like(x: Any, seed: Tensor) -> Any:
    """The int32 random bits of a seed for a DTensor x, placed as x is: of each element by its index in the whole."""
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placements = [Replicate() if placement.is_partial() else placement for placement in x.placements]
    sizes, offsets = compute_local_shape_and_global_offset(x.shape, x.device_mesh, placements)
    strides = [math.prod(x.shape[dim + 1 :]) for dim in range(x.ndim)]
    index = torch.zeros((), dtype=torch.int64, device=seed.device)
    for dim, (size, offset, stride) in enumerate(zip(sizes, offsets, strides, strict=True)):
        places = torch.arange(offset, offset + size, device=seed.device) * stride
        index = index + places.view(-1, *[1] * (x.ndim - 1 - dim))
    bits = random_words(seed, index).to(torch.int32)
    return DTensor.from_local(bits, x.device_mesh, placements, run_check=False, shape=x.shape, stride=tuple(strides))
