"""Delayed scaling: the scale of a tensor from the amax of the tensors before it."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ops_registry.checks import check_number, check_tensor
from ops_registry.scales import as_scale
from ops_registry.sharding import whole_largest

from .formats import FP8Format, resolve
from .granularity import PerTensor, is_integer
from .magnitudes import amax

POLICIES = ("max", "most_recent")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def largest_of_ranks(amax: Tensor, process_group: "dist.ProcessGroup | None") -> Tensor:
    """The elementwise largest of all ranks, with infinity for NaN, which a reduction may lose by the order of ranks."""
    if is_distributed():
        amax = torch.where(amax < math.inf, amax, math.inf)
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=process_group)
    return amax


class AmaxHistory(torch.nn.Module):
    """The scale of a stream of tensors from the amax of the last ones: TransformerEngine's delayed scaling.

    ``forward(x)`` returns the scale for x, made of the tensors before x, and in training records the amax of x. So the
    scale is there before x is read; what grew since may clip, which a margin prevents. In ``eval`` the scale stays. The
    history is a buffer: in ``state_dict``, moved by ``.to``, updated in place. Nothing is read back from the device.

    Of gradients it is the scale of :func:`quantize_gradient`. A history is of a forward pass or of gradients: one that
    was called outside a backward pass takes every call inside one for a recomputation.

    Under activation checkpointing the recomputation in the backward pass gets the scale that the last call of the
    forward pass got, and records nothing. So a history there is for one place, and is called once between a forward
    pass and its backward pass, which nothing checks: micro-batches go forward and backward one by one. What is compiled
    inside a checkpoint does not know of the recomputation; compile around it.

    Until something is recorded, and for a history of zeros, the scale is 1. An infinite or NaN amax, of any rank, is
    not recorded: the last one counts again.

    Args:
        format: as in :func:`quantize`.
        length: how many amax values are kept.
        policy: ``"max"``: the scale of the largest amax kept. ``"most_recent"``: of the last.
        margin: the scale is 2^margin times that of the amax.
        reduce: record the largest amax of all ranks of the process group where ``torch.distributed`` is initialized, so
            that ranks agree; every rank must then call.
        process_group: the ranks that agree; None is the default group.

    Raises:
        TypeError, ValueError: an unknown format or policy, a length below 1, a margin that is none from -126 to 127.

    Example:
        >>> import torch
        >>> from altgrad.quantization import E4M3, AmaxHistory
        >>> history = AmaxHistory(E4M3, length=2)
        >>> [history(torch.full((4,), amax)).item() for amax in (448.0, 896.0, 0.0, 0.0, 0.0)]
        [1.0, 1.0, 2.0, 2.0, 1.0]
    """

    history: Tensor

    def __init__(
        self,
        format: FP8Format | str,
        *,
        length: int = 1024,
        policy: str = "max",
        margin: float = 0,
        reduce: bool = True,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        if not is_integer(length):
            raise TypeError(f"length must be an integer, got {length!r}")
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        check_number("margin", margin)
        if not -126 <= margin <= 127:
            raise ValueError(f"margin must be from -126 to 127, for a power of two in float32, got {margin!r}")
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        self.format = resolve(format)
        self.policy = policy
        self.factor = 2.0**margin
        self.reduce = reduce
        self.process_group = process_group
        self.register_buffer("history", torch.zeros(length, dtype=torch.float32))
        self._used = torch.ones((), dtype=torch.float32)  # the scale of the last call outside a backward pass
        self._is_of_forward = False  # whether there was one, so that what is called inside one is a recomputation

    def scale(self) -> Tensor:
        """The scale of the history, a 0-d float32 tensor."""
        kept = self.history.max() if self.policy == "max" else self.history[0]
        reach = (kept.float() * self.factor).clamp(max=torch.finfo(torch.float32).max)
        return as_scale(reach, self.format.max_representable_value)

    def record(self, x: Tensor) -> None:
        """Puts the amax of x first in the history and drops the oldest."""
        check_tensor("x", x)
        new = whole_largest(PerTensor().apply(amax, x.detach())).reshape(1).to(self.history.dtype)
        new = largest_of_ranks(new, self.process_group) if self.reduce else new
        new = torch.where(new < math.inf, new, self.history[:1])  # also for NaN
        self.history.copy_(torch.cat([new, self.history[:-1]]))

    def forward(self, x: Tensor) -> Tensor:
        is_eager = not torch.compiler.is_compiling()
        in_backward = is_eager and torch._C._current_graph_task_id() != -1
        if in_backward and self._is_of_forward:
            return self._used
        scale = self.scale()
        if self.training:
            self.record(x)
        if not in_backward:
            self._used = scale  # also compiled: it keeps a compiler from tracing torch.utils.checkpoint
            if is_eager:
                self._is_of_forward = True
        return scale

    def _apply(self, *args: Any, **kwargs: Any) -> "AmaxHistory":
        """Moves the history, and leaves it in float32: a narrower dtype has not the range of what it records.

        Off the meta device, where ``to_empty`` gives it any values, nothing is recorded.
        """
        before = self.history
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if before.is_meta and not self.history.is_meta:
            self.history.zero_()
        if self.history.dtype != before.dtype:
            self.history = before.to(self.history.device)
        return self
