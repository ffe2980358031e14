"""How DTensor splits an operator: like its first argument, with whatever part of the scale the split needs.

DTensor would derive a rule from the global decomposition table (torch 2.13; 2.11 does not), but it breaks ties between
placements at will. With this rule the output is placed as x is, and only a Partial x is communicated: it is reduced
first. ``torch.distributed.tensor`` is not imported for it.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from .operators import OPERATORS


@cache
def register() -> None:
    """Registers the rules; first_use.py calls it once DTensor is imported."""
    from torch.distributed.tensor.experimental import register_sharding

    for name, operator in OPERATORS.items():
        if operator.is_pointwise:
            register_sharding(getattr(torch.ops.altgrad, name).default)(_rule(operator.tensors))
    register_sharding(torch.ops.altgrad.amax.default)(_placements_of_amax)


def _placements_of_amax(x: Any, dims: list[int]) -> list[tuple[list[Any], list[Any]]]:
    """Replicated, or split as x is: along what is reduced each part has its own largest."""
    from torch.distributed.tensor import Partial, Replicate

    splits = {p: Partial("max") if p.dim in dims else p for p in x.placements if hasattr(p, "dim")}
    return [([Replicate()], [Replicate(), None]), *(([result], [p, None]) for p, result in splits.items())]


def _rule(tensors: int) -> Callable[..., Any]:
    from torch.distributed.tensor import Replicate, Shard

    def placements(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        """The choices for one dimension of the mesh, each (output, arguments): replicated, or split as an input is."""
        x, scale = args[:2]
        others = [None] * (len(args) - tensors)
        choices = [([Replicate()], [Replicate()] * tensors + others)]
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
